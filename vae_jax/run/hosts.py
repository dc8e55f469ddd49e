"""Several hosts: how they join, agree, and stop together."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from vae_jax.run.config import flatten
from vae_jax.run.environment import versions

LOST = 75  # exit code if another host was lost: "temporary failure" in sysexits.h
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a process saves and ends


class NotPrimary:
    """Stands in for run directory, checkpoints and progress on every host but the primary; its methods do nothing."""

    summary = best = restored = None
    history = kept = ()
    stopped_early = False

    def restore_evaluated(self, step, like):
        return None

    def is_best(self, metrics):
        return False

    def rewind(self, step, log):
        return True

    def log_digest(self):
        return None

    def save(self, *_): ...
    def mark_saved(self, step): ...
    def insert(self, row): ...
    def log(self, row): ...
    def upload(self): ...
    def flush(self): ...
    def doing(self, what): ...
    def note(self, text): ...
    def skip(self, images): ...
    def update(self, images, epoch, loss): ...
    def close(self): ...


def connect(
    coordinator: str | None, hosts: int | None, host: int | None, start_timeout: int, heartbeat_timeout: int
) -> None:
    """Join the hosts of a run. Call this before anything touches a device.

    Args:
        coordinator: ADDRESS:PORT of the primary host. If this or one of the next two is None, the cluster (Cloud TPU,
            Slurm, Open MPI or Kubernetes) supplies the value.
        hosts: number of hosts.
        host: number of this host, from 0.
        start_timeout: seconds to wait for the other hosts; then the program ends with one line and code 1.
        heartbeat_timeout: seconds of silence after which a host counts as lost and the others end.

    Raises ValueError if the hosts cannot be joined, or the cluster does not supply a value.
    """
    where = f"at {coordinator}" if coordinator else "that the cluster names"
    missed = f"not all hosts met the coordinator {where} within {start_timeout} s"
    question = "is host 0 running, and can each host reach that address?"
    # initialize waits outside Python, and its own timeout ends in a stack trace.
    timer = threading.Timer(start_timeout, exit_now, (f"{missed}: {question}", 1))
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
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        flags = "--coordinator=ADDRESS:PORT, --num_processes and --process_id"
        raise ValueError(f"cannot join the other hosts ({reason}): give {flags}") from error
    finally:
        timer.cancel()


def exit_now(message: str, code: int) -> NoReturn:
    """Print one line and end the process at once. A normal exit would wait for a lost host or a compiled program.

    This is safe: files are replaced atomically, and a torn last line of a log is dropped at the next start.
    """
    print(f"vae_jax: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def gather(value: Any) -> list:
    """Every host's JSON value, by host number. All hosts must call this at the same time."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text), np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


@contextlib.contextmanager
def raise_on_all_hosts() -> Iterator[None]:
    """If the block raises ValueError or OSError on any host, every host raises, naming that host."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            raise
        problem = str(error)
    for host, message in enumerate(gather(problem)):
        if message is not None:
            raise OSError(f"host {host}: {message}")


def check_hosts_agree(facts: dict[str, Any]) -> None:
    """Raise ValueError, naming each difference, if another host's facts differ from the primary host's."""
    first, *others = gather(facts)
    for host, other in enumerate(others, start=1):
        differences = [
            f"{name} is {first.get(name)} on host 0, {other.get(name)} on host {host}"
            for name in first | other
            if first.get(name) != other.get(name)
        ]
        if differences:
            raise ValueError(f"the hosts differ: {'; '.join(differences)}")


def host_facts(config: Mapping, device_limit: int) -> dict:
    """What all hosts must agree on: the config, the versions, the package's source, the devices."""
    source = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(file.read_bytes())
    device = jax.local_devices()[0].device_kind
    return (
        {f"config field {name}": value for name, value in flatten(config).items()}
        | versions()
        | {
            "config field data.manual_dir": "",  # it may differ
            "the source of vae_jax": source.hexdigest()[:12],
            "--devices": device_limit,
            "a host's devices": f"{jax.local_device_count()} of {device}",
        }
    )


def handle(numbers: Sequence[int], handler: Callable) -> None:
    """Let `handler` handle these signals, except those that are ignored, as nohup ignores SIGHUP."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class Stop:
    """Whether SIGTERM, SIGHUP or Ctrl-C asked this process to stop; a second Ctrl-C ends it at once.

    A thread receives the signals, because Python's own handlers wait until a compiled program returns.
    """

    signal = 0

    def __init__(self):
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno())
        handle(STOPS, lambda number, frame: None)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while True:
            (number,) = self._reader.recv(1)  # any signal with a Python handler, also one that a library installed
            if number not in STOPS:
                continue
            if self.signal and number == signal.SIGINT:
                exit_now("interrupted", 128 + number)
            self.signal = number
            if number == signal.SIGINT and sys.stderr.isatty():
                print("\nvae_jax: stopping after these steps; Ctrl-C again ends at once", file=sys.stderr)

    def __call__(self) -> bool:
        return bool(self.signal)


class StopOnAllHosts:
    """Whether SIGTERM, SIGHUP or Ctrl-C asked any host to stop; all hosts return True from the same call on.

    JAX treats SIGTERM as a preemption notice, and the hosts agree on the next call that all of them can reach.
    """

    signal = signal.SIGTERM

    def __init__(self):
        self._calls = 0
        handle((signal.SIGINT, signal.SIGHUP), self._forward)

    def _forward(self, number, frame):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)
