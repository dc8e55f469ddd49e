"""Files and paths: atomic writes, JSON lines."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath


def local_path(path: str) -> Path:
    """A path on this machine, with ~ and ~user for homes; `Path.expanduser` fails where there is no such user."""
    return Path(os.path.expanduser(path))


def reason(error: Exception) -> str:
    """The kind of an error and what it says, in one short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def is_remote(path: str) -> bool:
    """Whether a path is on Google Cloud Storage."""
    return path.startswith("gs://")


def check_reachable(path: str) -> None:
    """Raise ValueError if `path` is remote and this machine cannot reach it."""
    if not is_remote(path):
        return
    try:
        epath.Path(path).exists()
    except Exception as error:  # of gcsfs, of its credentials, of the network
        install = ": pip install -e '.[gcs]'" if isinstance(error, ImportError) else ""
        raise ValueError(f"cannot reach {path} ({error}){install}") from error


def read_objects(
    file: Path, check: Callable[[dict, dict], None] = lambda row, before: None
) -> list[dict]:
    """The objects of a file with one a line, less a last one that is torn; of no file, none.

    Raises OSError, naming the line, for one that is damaged, or that `check(object, the one before or {})` refuses by
    a ValueError.
    """
    *lines, _torn = (file.read_bytes() if file.exists() else b"").split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("no object")
            check(row, rows[-1] if rows else {})
        except (ValueError, TypeError, RecursionError) as error:
            raise OSError(
                f"line {number} of {file} is damaged: remove that line to continue"
            ) from error
        rows.append(row)
    return rows


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end: at no moment is there half a file."""
    part = path.with_suffix(".tmp")
    yield part
    os.replace(part, path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, as `whole_file` does."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def save_figure(figure, path: Path) -> None:
    """Write a PNG."""
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
