"""Map a per-example function over a split on all devices; the results are copied to the host once."""

import math
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Key

from vae_jax.batch import Batch, Split, binarize_as_evaluated, example_keys, make_batch
from vae_jax.families import Probes
from vae_jax.objectives import Objective
from vae_jax.run.devices import Devices
from vae_jax.run.seeds import first_seed, map_seeds, mean_metrics, reduce_seeds
from vae_jax.steps import eval_metrics, unchanged

BATCH_SIZE = 256  # bounds the memory of evaluation; the result does not depend on it
BLOCK = 2**28  # bytes of images sent at once; the result does not depend on it either


def map_examples(
    function: Callable[[Any, Batch, Key[Array, " batch"]], Any],
    split: Split,
    seeds: int = 1,
    batch_size: int = BATCH_SIZE,
    devices: Devices | None = None,
) -> Callable[[Any, Key[Array, "..."]], Any]:
    """`call(variables, key)` returns per-example arrays of `function(variables, batch, keys)`, [n, ...], on the host.

    `keys` are the examples' own, as evaluation uses them.
    The split is sent in blocks of `BLOCK` bytes of images and divided over the devices, by default one. With several
    seeds, variables and key have a leading seed axis, and the arrays are [seeds, n, ...].
    """
    devices = devices or Devices(1)
    batches = max(1, BLOCK // (split.image[0].nbytes * batch_size * devices.count))
    blocks = map_blocks(function, split, seeds, batch_size, devices, batches)

    def call(variables, key):
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=int(seeds > 1)), *blocks(variables, key))

    return call


def map_blocks(
    function: Callable[[Any, Batch, Key[Array, " batch"]], Any],
    split: Split,
    seeds: int = 1,
    batch_size: int = BATCH_SIZE,
    devices: Devices | None = None,
    batches: int = 1,
) -> Callable[..., Iterator[Any]]:
    """`blocks(variables, key, start=0)` iterates over the arrays of `map_examples` from example number `start` on.

    One call of the compiled program computes one block: at most `batches` batches on each device, sent for this call.
    The last batches are padded with examples of weight 0, which are cut off again.
    """
    devices = devices or Devices(1)
    size = len(split.label)
    batch_size = min(batch_size, -(-size // devices.count))
    batches = min(batches, -(-size // (batch_size * devices.count)))
    block = devices.count * batches * batch_size

    def run(variables, key, batches, shard):
        def one_batch(batch):
            batch = make_batch(*batch)
            return function(variables, batch, example_keys(key, None, batch.index))

        arrays = jax.tree.map(
            lambda values: values.reshape(math.prod(values.shape[:2]), *values.shape[2:]),
            lax.map(one_batch, jax.tree.map(itemgetter(shard), batches)),
        )
        if devices.axis_name is not None:
            arrays = lax.all_gather(arrays, devices.axis_name, tiled=True)
        return arrays

    compiled = devices.compile(map_seeds(run, 2, seeds))

    def blocks(variables, key, start=0):
        for first in range(start, size, block):
            index = np.arange(first, first + block).reshape(devices.count, batches, batch_size)
            weight, index = (index < size).astype(np.float32), np.minimum(index, size - 1)
            sent = devices.replicate((split.image[index], split.label[index], weight, index))
            arrays = jax.device_get(compiled(variables, key, sent))
            kept = np.s_[: size - first] if seeds == 1 else np.s_[:, : size - first]
            yield jax.tree.map(itemgetter(kept), arrays)

    return blocks


def as_seen(split: Split, how: str, seed: int) -> Split:
    """A split with the pixels that the model of a seed sees in evaluation: binarized as `how` says, as bytes."""
    if how == "none":
        return split

    @jax.jit
    def pixels(image, index):
        seen = binarize_as_evaluated(make_batch(image, index, index, index).image, index, how, seed)
        return (255 * seen).astype(jnp.uint8)

    starts = range(0, len(split.label), BATCH_SIZE)  # on this host alone: hosts may read their data at different times
    parts = [
        pixels(split.image[i : i + BATCH_SIZE], i + np.arange(len(split.label[i : i + BATCH_SIZE]))) for i in starts
    ]
    return split._replace(image=np.concatenate(parts))


def make_evaluate(
    objective: Objective,
    probes: Probes,
    split: Split,
    seeds: range = range(1),
    decodes_per_example: int = 1,
    devices: Devices | None = None,
    prepare: Callable = unchanged,
) -> Callable[[Any, Key[Array, "..."]], tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """`evaluate(variables, key) -> (numbers, arrays)` for every example of a split.

    `numbers` are the means of the objective's metrics and the probes' reduced values, combined over the seeds;
    `arrays` are the probes' measurements for the first seed. `prepare` is as in `make_train_step`.
    """

    def measure(variables, batch, keys):
        batch = prepare(batch, keys)
        return eval_metrics(objective, variables, batch, keys), probes.measure(variables, batch, keys)

    def reduce(arrays):
        metrics, measured = arrays
        return mean_metrics(metrics) | probes.reduce(measured, split)

    measured = map_examples(measure, split, len(seeds), max(1, BATCH_SIZE // max(1, decodes_per_example)), devices)

    def evaluate(variables, key):
        arrays = measured(variables, key)
        return reduce_seeds(reduce, arrays, seeds), first_seed(arrays[1], seeds)

    return evaluate
