"""Export a trained model's functions with their weights by `jax.export`, for any batch, on CPU, CUDA and TPU."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax import generate
from vae_jax.pretrained import Pretrained

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # largest difference from the model, relative to the largest value if that is above 1
BATCHES = (1, 3)  # batch sizes for which programs are checked


class Program(NamedTuple):
    """A function of a trained model with its weights, and the shapes of its arguments without the batch axis."""

    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]

    def examples(self, count: int) -> list[np.ndarray]:
        """Arguments for a batch, drawn uniformly from [0, 1]."""
        rng = np.random.default_rng(count)
        return [rng.random((count, *shape), np.float32) for shape in self.shapes]

    def output_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its outputs, without the batch axis."""
        return [leaf.shape[1:] for leaf in jax.tree.leaves(jax.eval_shape(self.call, *self.examples(1)))]


def programs_of(pretrained: Pretrained) -> dict[str, Program]:
    """encoder: image -> mean, logvar; decoder: z -> mean image; classifier: image -> probabilities.

    A conditional model's programs take the conditions as a second argument: one-hot labels, or images with only the
    visible part.
    """
    model, variables, image = pretrained.model, pretrained.variables, pretrained.image_shape
    condition = () if model.given is None else ({"label": (model.num_classes,), "image": image}[model.condition_on],)

    def given(*c):
        return model.given(*c) if c else model

    programs = {}
    if model.encode is not None and model.latent_dim:
        programs["encoder"] = Program(lambda x, *c: given(*c).encode(variables, x), (image, *condition))
    if model.decode_raw is not None:
        latent = (model.latent_dim,)
        programs["decoder"] = Program(lambda z, *c: generate.decode(given(*c), variables, z), (latent, *condition))
    if model.encode is None and model.probabilities is not None:
        programs["classifier"] = Program(lambda x: model.probabilities(variables, x), (image,))
    return programs


def jax_programs(pretrained: Pretrained) -> dict[str, bytes]:
    """{file: program}, each checked against the model on this machine.

    Raises ValueError if flatbuffers is missing, or if a program differs from the model.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise ValueError("the format jax needs flatbuffers: pip install flatbuffers") from None
    contents = {}
    for name, program in programs_of(pretrained).items():
        (batch,) = jax.export.symbolic_shape("batch")
        arguments = [jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in program.shapes]
        with without_paths():
            exported = jax.export.export(jax.jit(program.call), platforms=PLATFORMS)(*arguments)
        contents[f"{name}.jaxexport"] = bytes(exported.serialize())
        check_agreement(
            f"{name}.jaxexport", program, jax.export.deserialize(bytearray(contents[f"{name}.jaxexport"])).call
        )
    return contents


@contextlib.contextmanager
def without_paths() -> Iterator[None]:
    """In the block, lowered programs name no source file of this machine, and do not depend on who calls."""
    options = {"jax_hlo_source_file_canonicalization_regex": ".*", "jax_include_full_tracebacks_in_locations": False}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def check_agreement(name: str, program: Program, exported: Callable[..., Any]) -> None:
    """Raise ValueError if an exported program's outputs differ from the model's, for batches of several sizes."""
    for count in BATCHES:
        arguments = program.examples(count)
        expected, found = (jax.tree.leaves(call(*arguments)) for call in (jax.jit(program.call), exported))
        for one, other in zip(expected, found, strict=True):
            one, other = np.asarray(one), np.asarray(other)
            if one.shape != other.shape or not np.abs(one - other).max() <= TOLERANCE * max(1, np.abs(one).max()):
                raise ValueError(
                    f"the outputs of {name} differ from the model's, so nothing was exported: leave this format out"
                )
