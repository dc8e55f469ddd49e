"""Memory checks, made before memory is taken."""

import math
from typing import Any

import jax
import psutil


def check_memory(what: str, nbytes: int, way_out: str, device: Any = None) -> None:
    """Raise ValueError if `nbytes` exceed a device's memory, or the host's free memory if the device names no limit.

    Args:
        what: subject of the message, such as "three copies of mnist".
        way_out: what the user can do.
        device: None means the host.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit") if device else None
    place = device.device_kind if limit else "this machine"
    limit = limit or psutil.virtual_memory().available
    if nbytes > limit:
        raise ValueError(f"{what} need {gib(nbytes)} of memory, but {place} has {gib(limit)} free: {way_out}")


def gib(nbytes: int) -> str:
    return f"{math.ceil(nbytes / 2**30 * 10) / 10:.1f} GiB"


def check_fits(job: Any, device) -> None:
    """Raise ValueError if a training surely exceeds the device's memory.

    It holds the images, for each seed four copies of the weights (gradients and Adam's two averages among them), and four
    bytes for each pixel that the decoder makes of its share of a batch.
    """
    shapes = jax.eval_shape(job.init, jax.random.key(0))
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    decoded = job.batch_size * job.decodes_per_example * math.prod(job.dataset.image_shape) // jax.device_count()
    images = sum(split.image.nbytes for split in job.dataset.splits.values())
    check_memory(
        f"{len(job.seeds)} models of {weights:,} weights and the data set's images",
        images + 4 * (4 * len(job.seeds) * weights + decoded),
        device=device,
        way_out="take fewer or smaller images, a smaller model or batch, or fewer seeds",
    )
