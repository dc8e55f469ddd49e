"""The devices that a run is divided over.

Each device has a number, its shard, and takes that share of every batch. State and data lie whole on each of them, so
nothing outside of this file has an axis for devices. Every host runs the same program; the first one writes for all.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vae_jax.run.hosts import gather, together

AXIS = "device"


class Devices:
    """All devices of all hosts, or some of each host's.

    Args:
        limit: how many each host gives; 0: all that it has.

    Attributes:
        count: how many there are, on all hosts together.
        first: whether this is the host that writes.
        axis_name: for `make_train_step`; None if there is one device.

    Raises ValueError if there are not so many, or if several hosts have not been connected.
    """

    def __init__(self, limit: int = 0):
        hosts, host = jax.process_count(), jax.process_index()
        if hosts > 1 and not jax.distributed.is_initialized():
            raise ValueError(
                f"there are {hosts} hosts: start the same command on each with --distributed"
            )
        available = jax.local_device_count()
        if not 0 <= limit <= available:
            raise ValueError(
                f"--devices is {limit}, but there are {available}: give 1 to {available}, or 0 for all"
            )
        each = limit or available
        self._all = [
            device
            for process in range(hosts)
            for device in jax.local_devices(process_index=process)[:each]
        ]
        self._local = jax.local_devices()[:each]
        self._shards = np.arange(host * each, (host + 1) * each, dtype=np.int32)
        self._whole = NamedSharding(
            Mesh(np.array(self._local), (AXIS,)), PartitionSpec()
        )
        self.count = len(self._all)
        self.first = host == 0
        self.axis_name = AXIS if self.count > 1 else None

    def check_divide(self, batch_size: int) -> None:
        """Raise ValueError if a batch cannot be divided into equal shares."""
        if batch_size % self.count:
            fewer = batch_size // self.count * self.count
            more = fewer + self.count
            nearest = (
                fewer if fewer and batch_size - fewer <= more - batch_size else more
            )
            raise ValueError(
                f"batch_size {batch_size} is not divisible by {self.count} devices: give {nearest}, or fewer --devices"
            )

    def place(self, tree: Any) -> Any:
        """A copy of the arrays on every device. Only such arguments are not sent again at each call of what `compile` made."""
        return jax.device_put(tree, self._local[0] if self.count == 1 else self._whole)

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
        compiled = jax.process_count() == 1

        def call(first, *others):
            nonlocal compiled
            if not compiled:
                # Hosts that begin a program wait for each other, those with CPUs only 30 s: less than compiling may take.
                mapped.lower(first, others, self._shards).compile()
                compiled = bool(gather(True))
            return mapped(first, others, self._shards)

        return call

    def single(self, tree: Any) -> Any:
        """Of placed arrays the copy on the first of this host's devices."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def from_first(self, make: Callable[[], Any], like: Any) -> Any:
        """What `make()` gives on the first host, on all of them: arrays of the shapes in `like`, or None.

        Raises on all hosts what `make` raises there, if it is a ValueError or OSError.
        """
        if jax.process_count() == 1:
            return make()
        with together():
            made = make() if self.first else None
        if not gather(made is not None)[0]:
            return None

        if not self.first:
            shapes = jax.eval_shape(plain, like)
            made = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        made = multihost_utils.broadcast_one_to_all(plain(made))
        return jax.tree.map(
            lambda leaf, shape: (
                jax.random.wrap_key_data(np.asarray(leaf)) if _is_key(shape) else leaf
            ),
            made,
            like,
        )


def plain(tree: Any) -> Any:
    """`tree` with its typed keys as the integers that they are: between processes neither JAX nor Orbax takes keys."""
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree
    )


def _is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
