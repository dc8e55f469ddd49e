"""The devices that a run is divided over; the only file that counts them.

Each device has a number, its shard, and takes that share of every batch. State and data lie whole on each of them, so
nothing outside of this file has an axis for devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "device"


class Devices:
    """Some or all devices.

    Args:
        limit: how many are taken; 0: all of them.

    Attributes:
        count: how many there are.
        axis_name: for `make_train_step`; None if there is one device.

    Raises ValueError if there are not so many.
    """

    def __init__(self, limit: int = 0):
        available = jax.local_device_count()
        if not 0 <= limit <= available:
            raise ValueError(
                f"--devices is {limit}, but there are {available}: give 1 to {available}, or 0 for all"
            )
        local = jax.local_devices()[: limit or available]
        self.count = len(local)
        self.axis_name = AXIS if self.count > 1 else None
        self._all = local
        self._shards = np.arange(len(local), dtype=np.int32)
        self._whole = NamedSharding(Mesh(np.array(local), (AXIS,)), PartitionSpec())

    def check_divide(self, batch_size: int) -> None:
        """Raise ValueError if a batch cannot be divided into equal shares."""
        if batch_size % self.count:
            below = batch_size // self.count * self.count
            above = below + self.count
            nearest = (
                below if below and batch_size - below <= above - batch_size else above
            )
            raise ValueError(
                f"batch_size {batch_size} is not divisible by {self.count} devices: the nearest that is, is {nearest}"
            )

    def place(self, tree: Any) -> Any:
        """A copy of the arrays on every device. Only such arguments are not sent again at each call of what `compile` made."""
        if self.count == 1:
            return jax.device_put(tree, self._all[0])
        return jax.device_put(tree, self._whole)

    def compile(self, function: Callable, donate: bool = False) -> Callable:
        """`call(first, *others)`, which runs `function(first, *others, shard)` on every device at once.

        All arguments but `shard` are the same on each, and so must the results be. With `donate` the first argument is
        given away: use only what is returned.
        """
        donated = (0,) if donate else ()
        if self.count == 1:
            return jax.jit(
                lambda first, *others: function(first, *others, 0),
                donate_argnums=donated,
            )
        mapped = jax.pmap(
            lambda first, others, shard: function(first, *others, shard),
            axis_name=AXIS,
            in_axes=(None, None, 0),
            out_axes=None,
            devices=self._all,
            donate_argnums=donated,
        )
        return lambda first, *others: mapped(first, others, self._shards)

    def single(self, tree: Any) -> Any:
        """Of placed arrays the copy on the first device."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
