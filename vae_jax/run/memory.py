"""Memory checks, made before memory is taken."""

import math
from typing import Any

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
