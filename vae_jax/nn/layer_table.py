"""A table of a model's layers: parameters from its variables, output shapes from a traced call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

BATCH = 10_007  # a prime that is no layer's width, so an axis with a multiple of this size belongs to the batch
Path = tuple[str, ...]
Shape = tuple[int, ...]
Layer = tuple[Path, frozenset[tuple[str, Shape]]]  # its path, and the shapes of its parameters


def output_shapes(function: Callable[..., Any], *arguments: Any) -> dict[Layer, Shape]:
    """The shape of each Linen module's first output in `function(*arguments)`, without batch axes; nothing is computed.

    The batch must have `BATCH` examples. The path of a module starts at the network whose `apply` was called.
    """
    found: dict[Layer, Shape] = {}

    def note(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and hasattr(output, "shape"):
            own = shapes(context.module.variables.get("params", {}))
            found.setdefault((context.module.path, own), without_batch(output.shape))
        return output

    with nn.intercept_methods(note):
        jax.eval_shape(function, *arguments)
    return found


def shapes(parameters: Mapping[str, Any]) -> frozenset[tuple[str, Shape]]:
    """Names and shapes of a layer's parameters, without those of its sublayers."""
    return frozenset((name, leaf.shape) for name, leaf in parameters.items() if hasattr(leaf, "shape"))


def without_batch(shape: Shape) -> Shape:
    """The axes after the last batch axis. Sample and class axes come before it or are merged into it."""
    batch = [axis for axis, size in enumerate(shape) if size and size % BATCH == 0]
    return shape[batch[-1] + 1 :] if batch else shape


def layer_table(params: Mapping[str, Any], outputs: Mapping[Layer, Shape] | None = None) -> list[list[str]]:
    """A header, one row for each layer with parameters, and the total; columns: kernel, output if known, parameters.

    The rows are in the order of `outputs`. Without `outputs` a decoder comes last.
    """
    layers: dict[Path, dict[str, Any]] = {}
    for path, leaf in flatten_dict(params).items():
        layers.setdefault(path[:-1] or path, {})[path[-1]] = leaf
    known = list(outputs or {})
    calls = {path: called(path, shapes(parameters), known) for path, parameters in layers.items()}
    body = []
    for path in sorted(layers, key=lambda path: (calls[path], path[0] == "decoder")):
        kernel, call = layers[path].get("kernel"), calls[path]
        output = (outputs or {})[known[call]] if call < len(known) else ()
        body.append([" ".join(path), by("" if kernel is None else kernel.shape), by(output), sized(layers[path])])
    cells = [["layer", "kernel", "output", "parameters"], *body, ["all", "", "", sized(params)]]
    return cells if outputs else [[name, kernel, count] for name, kernel, _, count in cells]


def called(path: Path, own: frozenset, known: Sequence[Layer]) -> int:
    """The index in `known` of the call of a layer, or len(known) if there is none.

    The applied network may lie anywhere in the parameters, so the longest matching end of the path counts.
    """
    ends = ((path[start:], own) for start in range(len(path)))
    return next((known.index(end) for end in ends if end in known), len(known))


def by(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape))


def sized(params: Any) -> str:
    """The number of parameters."""
    return f"{sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)):,}"
