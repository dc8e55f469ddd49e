"""Files and paths: atomic writes, JSON lines, local and remote paths."""

import contextlib
import csv
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath


def local_path(path: str) -> Path:
    """A path on this machine with ~ and ~user expanded; `Path.expanduser` raises for an unknown user."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """The folder for what can be downloaded or computed again: $XDG_CACHE_HOME/vae_jax, or ~/.cache/vae_jax.

    Raises OSError if the user has no home, or XDG_CACHE_HOME is a relative path.
    """
    folder = local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vae_jax"
    if not folder.is_absolute():
        raise OSError(f"{folder} cannot hold downloads and caches: set XDG_CACHE_HOME to an absolute path")
    return folder


def is_remote(path: str) -> bool:
    """Whether a path is on Google Cloud Storage."""
    return path.startswith("gs://")


def check_local(path: str, what: str) -> None:
    """Raise ValueError if `path` is remote, which `what` cannot read."""
    if is_remote(path):
        raise ValueError(
            f"{what} takes a run on this machine: copy {path} here (gcloud storage cp -r) and name the copy"
        )


def check_reachable(path: str) -> None:
    """Raise ValueError if `path` is remote and this machine cannot reach it, or local and Orbax cannot write there."""
    if not is_remote(path):
        if "://" in path:
            raise ValueError(f"the work directory {path} is neither on this machine nor on gs://: name another")
        try:
            os.path.abspath(path).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the work directory {path!a} is not UTF-8, which checkpoints need: name another"
            ) from None
        return
    try:
        epath.Path(path).exists()
    except Exception as error:  # gcsfs, credentials and network raise many kinds
        install = ": pip install -e '.[gcs]'" if isinstance(error, ImportError) else ""
        raise ValueError(f"cannot reach {path} ({error}){install}") from error


def describe_error(error: Exception) -> str:
    """The kind of an error and the first line of its message, at most 120 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


@contextlib.contextmanager
def explained(what: str, way_out: str) -> Iterator[None]:
    """Add what failed and the way out to the system's OSErrors in the block; our own already name both."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:
            raise
        problem = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if isinstance(error, FileExistsError):
            problem = f"{error.filename} is a file, but must be a folder"
        raise OSError(f"{what} ({problem}): {way_out}") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` when the block ends, so no reader sees half a file."""
    part = path.with_suffix(".tmp")
    yield part
    os.replace(part, path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through `atomic_file`; names that are not UTF-8 are written as escapes."""
    with atomic_file(path) as part, open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # some file systems would leave an empty file after a power failure


def save_figure(figure, path: Path) -> None:
    """Write a PNG through `atomic_file`."""
    with atomic_file(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        figure.savefig(part, format="png", dpi=110)


def as_pillow(pixels: np.ndarray) -> Any:
    """uint8 pixels, [height, width, 1 or 3], as a Pillow image of mode L or RGB."""
    from PIL import Image

    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def save_film(frames: Sequence[np.ndarray], path: Path, milliseconds: int = 100) -> None:
    """Write frames, [height, width, channel] of bytes, as an endlessly looping WebP through `atomic_file`."""
    first, *rest = map(as_pillow, frames)
    how = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0, "quality": 90}
    with atomic_file(path) as part:
        first.save(part, format="WEBP", **how)


def save_image(pixels, path: Path) -> None:
    """Write uint8 pixels, [height, width, 1 or 3], as a PNG of that size through `atomic_file`."""
    with atomic_file(path) as part:
        as_pillow(pixels).save(part, format="PNG")


def read_regular(file: Path | epath.Path) -> bytes:
    """The content of a file. Raises ValueError for a pipe or a device, which might never end."""
    if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
        raise ValueError("it is not a regular file")
    return file.read_bytes()


def read_json_lines(
    file: Path | epath.Path, check: Callable[[dict, dict], None] = lambda row, before: None
) -> list[dict]:
    """Read a file of one JSON object per line; an incomplete last line is dropped, a missing file counts as empty.

    Raises OSError if it is not a regular file. Raises OSError, naming the line, if a line is damaged or
    `check(row, previous row or {})` raises ValueError or KeyError.
    """
    try:
        *lines, _ = (read_regular(file) if file.exists() else b"").split(b"\n")
    except ValueError as error:
        raise OSError(f"{file} is not a regular file: delete it to continue") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("not an object")
            check(row, rows[-1] if rows else {})
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise OSError(f"line {number} of {file} is damaged: remove that line to continue") from error
        rows.append(row)
    return rows


def json_line(row: dict) -> str:
    return json.dumps(row) + "\n"


def as_csv(header: list[str], rows: Iterable) -> str:
    """A table as CSV text."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    return text.getvalue()
