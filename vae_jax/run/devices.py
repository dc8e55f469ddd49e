"""The devices of a run: data parallelism by `jax.pmap`.

Each device has a number, its shard, and takes that share of every batch. State and data are replicated on all devices,
so no other file has a device axis. Every host runs the same program, and the primary host writes for all.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import compilation_cache
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vae_jax.nn import bfloat16
from vae_jax.run.files import cache_folder
from vae_jax.run.hosts import gather, raise_on_all_hosts

AXIS = "device"
# By default XLA's loops use only half of an AVX-512 register.
WIDE_VECTORS = {"xla_cpu_prefer_vector_width": "512"}
# YNNPACK is faster for gradients of kernels, and for products in bfloat16 where the processor has them. XLA's own
# products are faster for the narrow ones of a forward pass in float32, and its own loops for everything else there.
WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}
YNNPACK_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


class Devices:
    """All devices of all hosts, or the first few of each host.

    Args:
        limit: number of devices on each host; 0 means all.
        precision: `model.precision`. It selects the compiler options of programs without gradients, for speed.

    Attributes:
        count: number of devices on all hosts together.
        is_primary: whether this host writes.
        axis_name: for `make_train_step`; None if there is one device.

    Raises ValueError if a host has fewer devices, or if several hosts are not connected.
    """

    def __init__(self, limit: int = 0, precision: str | None = None):
        hosts, host = jax.process_count(), jax.process_index()
        if hosts > 1 and not jax.distributed.is_initialized():
            raise ValueError(f"there are {hosts} hosts: start the same command on each with --distributed")
        available = jax.local_device_count()
        if not 0 <= limit <= available:
            raise ValueError(f"--devices is {limit}, but there are {available}: give 1 to {available}, or 0 for all")
        each = limit or available
        self._all = [device for process in range(hosts) for device in jax.local_devices(process_index=process)[:each]]
        self._local = self._all[host * each : (host + 1) * each]
        self._shards = np.arange(host * each, (host + 1) * each, dtype=np.int32)
        self._precision = precision
        self.count = len(self._all)
        self.is_primary = host == 0
        self.axis_name = AXIS if self.count > 1 else None

    def check_divide(self, batch_size: int) -> None:
        """Raise ValueError if a batch cannot be divided into equal shares."""
        if batch_size % self.count:
            nearest = max(1, (batch_size + (self.count - 1) // 2) // self.count) * self.count
            raise ValueError(
                f"batch_size {batch_size} is not divisible by {self.count} devices: give {nearest}, or fewer --devices"
            )

    def replicate(self, tree: Any) -> Any:
        """Copy the arrays to every local device once, rather than with every call."""
        if self.count == 1:
            return jax.device_put(tree, self._local[0])
        return jax.device_put(tree, NamedSharding(Mesh(np.array(self._local), (AXIS,)), PartitionSpec()))

    def compile(self, function: Callable, training: bool = False) -> Callable:
        """`call(first, *others)` runs `function(first, *others, shard)` on every device at once.

        All arguments but `shard` are replicated, and the results must be too. `training` says that the program computes
        gradients, and reuses the first argument's buffers: use only what is returned.
        """
        donated = (0,) if training else ()
        if self.count == 1:
            return jax.jit(
                lambda first, *others: function(first, *others, 0),
                donate_argnums=donated,
                compiler_options=compiler_options(training, self._precision),
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
                # A host that starts a program waits for the others, on CPUs only 30 s; compiling may take longer.
                mapped.lower(first, others, self._shards).compile()
                compiled = bool(gather(True))
            return mapped(first, others, self._shards)

        return call

    def local_copy(self, tree: Any) -> Any:
        """Replicated arrays as arrays on this host's first device."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def broadcast(self, make: Callable[[], Any], like: Any) -> Any:
        """Send the primary host's `make()` to all hosts: arrays in the shapes of `like`, or None.

        If `make` raises ValueError or OSError there, every host raises.
        """
        if jax.process_count() == 1:
            return make()
        with raise_on_all_hosts():
            made = make() if self.is_primary else None
        if not gather(made is not None)[0]:
            return None
        if not self.is_primary:
            shapes = jax.eval_shape(unwrap_keys, like)
            made = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        sent = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(unwrap_keys(made)))
        return jax.tree.map(lambda leaf, shape: jax.random.wrap_key_data(leaf) if _is_key(shape) else leaf, sent, like)


def compiler_options(training: bool, precision: str | None = None) -> dict[str, str]:
    """Compiler options of `jax.jit` for the CPU, and {} elsewhere; `precision` matters only without gradients."""
    if jax.default_backend() != "cpu":
        return {}
    if training:
        return WIDE_VECTORS
    return WIDE_VECTORS | (YNNPACK_PRODUCTS if precision == "bfloat16" and bfloat16.is_fast() else WITHOUT_YNNPACK)


def unwrap_keys(tree: Any) -> Any:
    """Replace typed keys by their integers: JAX cannot send typed keys between processes, nor can Orbax save them."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def enable_compilation_cache() -> None:
    """Cache compiled programs in `cache_folder()`, unless JAX already has a cache or the user has no home."""
    # With zstandard installed, JAX would write without a checksum, and one flipped bit would kill the process.
    compilation_cache.zstd = compilation_cache.zstandard = None  # JAX then uses zlib, which verifies a checksum
    if jax.config.jax_compilation_cache_dir is None:
        with contextlib.suppress(OSError):
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
