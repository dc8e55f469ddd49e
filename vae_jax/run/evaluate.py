"""Per-example arrays over a split, brought to the host once."""

from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Key

from vae_jax.batch import Split, make_batch
from vae_jax.run.devices import Devices
from vae_jax.steps import make_eval_step

BATCH_SIZE = 256  # bounds the memory of evaluation; the result does not depend on it


def make_evaluate(
    objective: Callable,
    split: Split,
    map_seeds: Callable = lambda function, seeded: function,
    batch_size: int = BATCH_SIZE,
    decodes_per_example: int = 1,
    devices: Devices | None = None,
) -> Callable[[dict, Key[Array, "..."]], dict]:
    """`evaluate(variables, key) -> {name: [n] array}` on the host, for every example of the split.

    The split is placed on the devices once, by default on one, and divided over them; what the last batches lack is
    filled up with weight 0 and cut off again. `map_seeds` as in `train.Job`: with several seeds, variables and key have
    them in front, and the arrays are [seeds, n].
    """
    devices = devices or Devices(1)
    size = len(split.label)
    batch_size = max(1, batch_size // decodes_per_example)
    batch_size = min(batch_size, -(-size // devices.count))
    batches = -(-size // (batch_size * devices.count))
    index = np.arange(devices.count * batches * batch_size)
    index = index.reshape(devices.count, batches, batch_size)
    weight = (index < size).astype(np.float32)
    index, weight, image, label = devices.place(
        (np.minimum(index, size - 1), weight, *split)
    )
    eval_step = make_eval_step(objective)

    def run(variables, key, index, weight, image, label, shard):
        def one_batch(rows):
            rows, weight = rows
            return eval_step(
                variables, make_batch(image[rows], label[rows], weight, rows), key
            )

        arrays = jax.tree.map(
            lambda values: values.reshape(-1, *values.shape[2:]),
            lax.map(one_batch, (index[shard], weight[shard])),
        )
        if devices.axis_name is not None:
            arrays = lax.all_gather(arrays, devices.axis_name, tiled=True)
        return jax.tree.map(lambda values: values[:size], arrays)

    run = devices.compile(map_seeds(run, 2))

    def evaluate(variables, key):
        return jax.device_get(run(variables, key, index, weight, image, label))

    return evaluate
