"""A cache of images that do not fit in the host's memory: decoded once into files, then memory-mapped."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vae_jax.batch import Split
from vae_jax.run.files import cache_folder, explained
from vae_jax.run.memory import gib

FORMAT = 1
LEVELS = ("*", "*/*", "*/*/*")  # `rglob` does not follow links to folders
WAY_OUT = "set XDG_CACHE_HOME to another folder, or use fewer or smaller images (--config.data.size=64 scales them)"
Read = Callable[[Path | None], tuple[dict[str, Split], list[str]]]


def store(rows: Iterable[np.ndarray], shape: tuple[int, ...], scratch: Path | None) -> UInt8[np.ndarray, "..."]:
    """Store arrays of bytes as the rows of one array: in memory, or in an anonymous file in the folder `scratch`.

    The file is written, not mapped, because a full disk kills a process that writes to a map. Raises OSError for a full
    disk.
    """
    if scratch is None:
        array = np.empty(shape, np.uint8)
        for place, row in zip(array, rows):
            place[...] = row
        return array
    with tempfile.TemporaryFile(dir=scratch) as file:
        for row in rows:
            file.write(np.ascontiguousarray(row, np.uint8))
        file.flush()
        return np.memmap(file, np.uint8, "r", shape=shape)


def unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, scratch: Path) -> np.ndarray:
    """Copy an array of an .npz into an anonymous file and map it. Raises ValueError if it is no array of numbers."""
    with archive.open(member) as packed, tempfile.TemporaryFile(dir=scratch) as file:
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(packed)]
        shape, is_fortran, dtype = read_header(packed)
        if dtype.hasobject:
            raise ValueError("it holds objects, not numbers")
        shutil.copyfileobj(packed, file)
        file.flush()
        return np.memmap(file, dtype, "r", shape=shape, order="F" if is_fortran else "C")


def cached(source: Path, fields: Mapping[str, Any], read: Read, nbytes: int) -> tuple[dict[str, Split], list[str]]:
    """The result of `read(scratch)` with its images in files: those of an earlier call, or new ones.

    The files are made again if a source file has another size or time, or if their SHA-256 shows a change. A second
    process waits until the first one has made them. Raises OSError, in one line, if they cannot be written, and
    ValueError if the disk has less than the `nbytes` free that writing takes.
    """
    known = json.dumps([FORMAT, os.path.abspath(source), fields], sort_keys=True)
    root = cache_folder() / "images"
    name = f"{source.stem[:40]}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    folder = root / name
    failed = f"memory cannot hold the images of {source}, and they cannot be kept in {root}"
    with explained(failed, WAY_OUT):
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = listing(source)
            if why := problem(folder, found):
                part = root / f"{name}.tmp"
                shutil.rmtree(part, ignore_errors=True)  # left by a killed process: this one has the lock
                check_disk(source, root, nbytes)
                print(f"vae_jax: {source} {why}: its images are decoded into {folder}", file=sys.stderr, flush=True)
                write(folder, part, found, read)
            return open_splits(folder)


def check_disk(source: Path, root: Path, nbytes: int) -> None:
    """Raise ValueError unless the disk of the folder `root` has `nbytes` free."""
    room = shutil.disk_usage(root).free
    if nbytes > room:
        raise ValueError(
            f"memory cannot hold the images of {source}, and decoding them takes {gib(nbytes)} on the disk of {root}, "
            f"which has {gib(room)} free: {WAY_OUT}"
        )


def listing(source: Path) -> str:
    """A digest of the name, size and time of a file, or of every file in a folder, down to split/class/file."""
    found = [source] if source.is_file() else sorted(path for level in LEVELS for path in source.glob(level))
    total = hashlib.sha256()
    for file in filter(Path.is_file, found):
        stat = file.stat()
        total.update(os.fsencode(f"{file.relative_to(source)}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    return total.hexdigest()


def problem(folder: Path, source: str) -> str:
    """Why a cache cannot be used; "" if it can."""
    if not folder.exists():
        return "does not fit into memory"
    try:
        about = json.loads((folder / "cache.json").read_text())
        if about["source"] != source:
            return "has changed"
        return "" if about["sha256"] == digests(folder) else "is damaged in the cache"
    except (OSError, ValueError, LookupError, TypeError):
        return "is damaged in the cache"


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each array."""
    found = {}
    for path in sorted(folder.glob("*.npy")):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write(folder: Path, part: Path, source: str, read: Read) -> None:
    """Read the images and write them into the folder `part`, which replaces `folder` when it is complete."""
    part.mkdir()
    try:
        splits, notes = read(part)
        for name, split in splits.items():
            for kind, array in split._asdict().items():
                np.save(part / f"{name}-{kind}.npy", array)
        about = {"source": source, "splits": [*splits], "notes": notes, "sha256": digests(part)}
        (part / "cache.json").write_text(json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        if error.errno is None:  # np.save raises it so for a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part)) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def open_splits(folder: Path) -> tuple[dict[str, Split], list[str]]:
    """Open the splits of a cache, with mapped images, and its notes."""
    about = json.loads((folder / "cache.json").read_text())
    splits = {}
    for name in about["splits"]:
        image = np.load(folder / f"{name}-image.npy", mmap_mode="r", allow_pickle=False)
        splits[name] = Split(image, np.load(folder / f"{name}-label.npy", allow_pickle=False))
    return splits, about["notes"]
