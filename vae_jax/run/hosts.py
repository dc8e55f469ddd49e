"""Several hosts: joining them, agreeing, stopping together."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Silent:
    """In the place of run directory, checkpoints and progress on all hosts but the first: whatever it is asked, it does nothing."""

    def __getattr__(self, name):
        return lambda *arguments, **keywords: None


def connect(
    coordinator: str | None,
    hosts: int | None,
    host: int | None,
    start_timeout: int,
    heartbeat_timeout: int,
) -> None:
    """Take part in a run on several hosts; before anything else touches a device.

    Args:
        coordinator: ADDRESS:PORT of the first host. None: it, and what else is None, is what Cloud TPU, Slurm, Open MPI
            or Kubernetes say.
        hosts: how many there are.
        host: which one this is, from 0.
        start_timeout: seconds after which the program ends, with one line and code 1, if not all hosts are there.
        heartbeat_timeout: seconds after which a host counts as lost, and the others end.

    Raises ValueError where the cluster does not say what is None.
    """
    where = f"at {coordinator}" if coordinator else "that the cluster names"

    def give_up():  # what waits is not Python, and would end in a stack trace
        print(
            f"vae_jax: not all hosts met the coordinator {where} within {start_timeout} s: is host 0 running, and can "
            "each host reach that address?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(start_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            hosts,
            host,
            initialization_timeout=2 * start_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"cannot join the other hosts ({error}): give --coordinator=ADDRESS:PORT, --num_processes and --process_id"
        ) from error
    finally:
        timer.cancel()


def gather(value: Any) -> list:
    """What JSON can hold, of every host in their order. All hosts must ask at the same time."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text), np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all hosts leave alike: the ValueError or OSError of one ends it on all, which say whose it is."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            raise
        problem = str(error)
    for host, told in enumerate(gather(problem)):
        if told is not None:
            raise OSError(f"host {host}: {told}")


def check_alike(facts: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, if another host has other facts than the first."""
    first, *others = gather(facts)
    for host, other in enumerate(others, start=1):
        differing = [
            f"{name} is {first.get(name)} on host 0, {other.get(name)} on host {host}"
            for name in first | other
            if first.get(name) != other.get(name)
        ]
        if differing:
            raise ValueError(f"the hosts are not alike: {'; '.join(differing)}")


class StopTogether:
    """Whether any host was told to stop, by SIGTERM or Ctrl-C: all hosts say yes after the same chunk.

    JAX takes SIGTERM for the notice of a preemption, and agrees with the other hosts on the next chunk that all can end
    at, counting the chunks by one.
    """

    signal = signal.SIGTERM

    def __init__(self):
        self._asked = 0
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number, frame):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)
