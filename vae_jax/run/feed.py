"""Feed images to the compiled program: all images stay on the devices, or each call's images are sent for it.

Both ways give the same batches, and so the same bits.
"""

import contextlib
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from vae_jax.run.devices import Devices
from vae_jax.run.hosts import gather
from vae_jax.run.job import Job
from vae_jax.run.memory import available, gib, stays_on

Feed = Callable[[int, int, int], tuple[Any, ...]]


def make_feed(job: Job, devices: Devices, note: Callable[[str], None]) -> Feed:
    """`feed(epoch, first, count)` returns what `run_steps` takes after the state, for `count` steps from `first` on.

    All hosts do the same: they send the images for each call if the images do not fit any one host's device.
    """
    nbytes, device = job.dataset.splits["train"].image.nbytes, jax.local_devices()[0]
    if all(gather(stays_on(device, nbytes))):
        return resident(job, devices)
    _, said = available(device)
    note(f"the training images take {gib(nbytes)}, and {said}: they stay on the host, which sends those of each call")
    return streamed(job, devices)


def resident(job: Job, devices: Devices) -> Feed:
    """Keep images and labels on the devices; send the order once per epoch."""
    arrays = devices.replicate(job.dataset.splits["train"])
    order = lru_cache(1)(lambda epoch: devices.replicate(job.order(epoch)))
    return lambda epoch, first, count: (order(epoch), first, count, *arrays)


def streamed(job: Job, devices: Devices) -> Feed:
    """Read and send a call's images and labels once the previous call has started.

    JAX starts a call and returns, so the host reads while the devices compute. The images are concatenated over the
    seeds. A call of fewer steps is padded with its last example.
    """
    image, label = job.dataset.splits["train"]
    order = lru_cache(1)(lambda epoch: np.atleast_2d(job.order(epoch)))
    most, seeds = job.batch_size * job.steps_per_call, len(job.seeds)
    place = np.arange(seeds * most, dtype=np.int32).reshape(seeds, most)

    def feed(epoch, first, count):
        rows = order(epoch)[:, first * job.batch_size : (first + count) * job.batch_size]
        rows = np.pad(rows, ((0, 0), (0, most - rows.shape[1])), mode="edge")
        index = (rows, place) if seeds > 1 else (rows[0], place[0])
        flat = rows.reshape(-1)
        ask_for(image, flat)
        index, *arrays = devices.replicate((index, image[flat], label[flat]))
        return index, 0, count, *arrays

    return feed


def ask_for(image: np.ndarray, rows: np.ndarray) -> None:
    """Ask the system for the rows of a mapped file all at once, so that a disk reads several at a time.

    Without asking, each row would wait for the disk alone and bring in neighbours that are not needed now.
    """
    if isinstance(image, np.memmap) and image.filename and hasattr(os, "posix_fadvise"):
        size = image[0].nbytes
        # A deleted file stays mapped.
        with contextlib.suppress(FileNotFoundError), open(image.filename, "rb") as file:
            for row in rows:
                os.posix_fadvise(file.fileno(), image.offset + int(row) * size, size, os.POSIX_FADV_WILLNEED)
