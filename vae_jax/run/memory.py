"""Memory checks, made before memory is allocated."""

import math
from pathlib import Path
from typing import Any

import jax
import psutil

CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of Linux
STAY = 0.5  # largest share of a device's memory for images, since activations need the rest; larger sets are streamed


class TooLarge(ValueError):
    """Raised for something that memory cannot hold, because it needs `nbytes`."""

    def __init__(self, message: str, nbytes: int):
        super().__init__(message)
        self.nbytes = nbytes


def available(device: Any = None) -> tuple[int, str]:
    """A device's memory in bytes, or the host's free memory if the device names no limit, and the same in words.

    Args:
        device: None means the host.
    """
    if limit := (device.memory_stats() or {}).get("bytes_limit") if device else None:
        return limit, f"{device.device_kind} has {gib(limit)}"
    room = min(psutil.virtual_memory().available, cgroup_room())
    return room, f"this machine has {gib(room)} free"


def cgroup_room() -> int | float:
    """Bytes that the memory limits of a container or a batch job leave; infinite without a limit."""
    if not CGROUP.is_file():
        return math.inf
    folder = CGROUPS / CGROUP.read_text().strip().rpartition("::")[2].lstrip("/")
    return min(room_in(each) for each in (folder, *folder.parents) if each.is_relative_to(CGROUPS))


def room_in(cgroup: Path) -> int | float:
    """Bytes that one cgroup's limit leaves, its page cache included; infinite without a limit."""
    try:
        limit, used, detail = ((cgroup / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = dict(line.split() for line in detail.splitlines())["inactive_file"]
        return max(0, int(limit) - int(used) + int(cached))
    except (OSError, ValueError, KeyError):  # not version 2, or "max"
        return math.inf


def check_memory(what: str, nbytes: int, way_out: str, device: Any = None) -> None:
    """Raise TooLarge, a ValueError, if `nbytes` exceeds the memory that `available` returns.

    Args:
        what: subject of the message, such as "three copies of mnist".
        way_out: what the user can do.
        device: None means the host.
    """
    limit, said = available(device)
    if nbytes > limit:
        raise TooLarge(f"{what} need {gib(nbytes)} of memory, but {said}: {way_out}", nbytes)


def gib(nbytes: int) -> str:
    return f"{math.ceil(nbytes / 2**30 * 10) / 10:.1f} GiB"


def stays_on(device: Any, nbytes: int) -> bool:
    """Whether training images of `nbytes` bytes stay on the device throughout training."""
    return nbytes <= STAY * available(device)[0]


def check_fits(job: Any, device: Any, count: int) -> None:
    """Raise ValueError if a training on `count` such devices surely exceeds the device's memory.

    A training holds the training images, or those of two calls; four copies of the weights per seed (including
    gradients and Adam's two averages); and four bytes per pixel decoded from the device's share of a batch.
    """
    shapes = jax.eval_shape(job.init, jax.random.key(0))
    seeds, pixels = len(job.seeds), math.prod(job.dataset.image_shape)
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    decoded = job.batch_size * job.decodes_per_example * pixels // count
    images, held = job.dataset.splits["train"].image.nbytes, "the training images"
    way_out = "take a smaller model or batch, or fewer seeds"
    if not stays_on(device, images):
        images, held = 2 * seeds * job.steps_per_call * job.batch_size * pixels, "the images of two calls"
        way_out += ", smaller images, or a smaller run.steps_per_call"
    check_memory(
        f"{seeds} models of {weights:,} weights and {held}",
        images + 4 * (4 * seeds * weights + decoded),
        way_out,
        device,
    )
