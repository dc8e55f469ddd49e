"""A directory that one process owns, with a log of JSON lines; reading the log of a run, metrics.jsonl."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from etils import epath

from vae_jax.run.files import json_line, read_json_lines, write_atomically

LARGEST = 1e300  # largest number in metrics.jsonl; the limit also refuses NaN and infinity


class OwnedDirectory:
    """A directory with a lock and a log of JSON lines; one process at a time owns it.

    Raises OSError if another process owns the directory, or it cannot be written to.
    """

    def __init__(self, path: Path, log_file: str):
        self.path = path
        self._log = path / log_file
        self.rows: list[dict] = []
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as on_error:
            lock = path / "lock"
            if lock.exists() and not lock.is_file():  # opening a pipe would block
                raise OSError(f"{lock} is not a regular file: delete it")
            self._lock = on_error.enter_context(open(lock, "w"))
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                another = "wait for it, or name another with --workdir"
                raise OSError(f"another process is working in {path}: {another}") from error
            on_error.pop_all()

    def keep(self, rows: list[dict]) -> None:
        """Rewrite the log with these rows."""
        self.check_owned()
        self.rows = rows
        write_atomically(self._log, "".join(map(json_line, rows)))

    def append(self, row: dict) -> None:
        """Append a row to the log."""
        self.check_owned()
        self.rows.append(row)
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(json_line(row))

    def check_owned(self) -> None:
        """Raise OSError if the lock file was deleted or replaced: it no longer keeps other processes out."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path / "lock"), os.fstat(self._lock.fileno())):
                return
        raise OSError(
            f"the file lock in {self.path} was deleted or replaced, so another process may be working there: "
            "this one stops, and the same command continues"
        )

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


class LogDigest:
    """Number and SHA-256 of the rows of metrics.jsonl, without their seconds."""

    def __init__(self, rows: Iterable[dict]):
        self._count, self._sha256 = 0, hashlib.sha256()
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        self._count += 1
        self._sha256.update(json_line({name: value for name, value in row.items() if name != "seconds"}).encode())

    def value(self) -> dict:
        return {"rows": self._count, "sha256": self._sha256.hexdigest()}


def read_rows(path: Path | epath.Path) -> list[dict]:
    """The rows of metrics.jsonl in a run directory, as `read_json_lines` returns them."""
    return read_json_lines(path / "metrics.jsonl", _check_row)


def _check_row(row, before):
    """Raise ValueError unless the values are finite numbers and the step is not before the previous row's."""
    scalars = [row[name] for name in ("step", "epoch", "seconds")]
    if list in map(type, scalars) or not all(map(_is_numeric, row.values())):
        raise ValueError("not a row of a run")
    if type(row["step"]) is not int or row["step"] < before.get("step", 0):
        raise ValueError("not in order")


def _is_numeric(value):
    """Whether a value is a finite number, or nested lists of them."""
    if isinstance(value, list):
        return all(map(_is_numeric, value))
    return type(value) in (int, float) and abs(value) < LARGEST
