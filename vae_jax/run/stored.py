"""Checkpoints as files: find them, verify them, and read their metadata.

A checkpoint is a folder named by its step. It lists the SHA-256 of its files, because Orbax does not detect a flipped
bit. It gets its name once the list is complete and loses it before it is deleted, so a folder with such a name is
either complete or damaged.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator

from etils import epath

from vae_jax.run.directory import OLD_FORMAT, read_settings
from vae_jax.run.files import describe_error, read_regular

DIGESTS = "sha256.json"
DATA = ("image_shape", "num_classes", "data")  # metadata that must not change when a training resumes


def steps(folder) -> list[int]:
    """The steps of the checkpoints in `folder`, latest first."""
    folder = epath.Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)


def latest_saved(folder) -> int:
    """The step of the latest checkpoint that a run has saved, from its config.json; 0 if that does not say."""
    with contextlib.suppress(OSError):
        return (read_settings(str(epath.Path(folder).parent)) or {}).get("saved", 0)
    return 0


def select(folder, which: str | int = "") -> dict:
    """The metadata of a checkpoint: "best", "latest", a step, or "" for the best if there is one, else the latest.

    Raises ValueError if there is no such checkpoint, or if it is damaged or lost.
    """
    found = steps(folder)

    def read(step):
        try:
            return read_metadata(folder, step)
        except ValueError as error:
            others = ", ".join(str(other) for other in found if other != step)
            raise ValueError(
                f"{error}; continue training{others and f', or choose another checkpoint: {others}'}"
            ) from error

    if not found:
        way_out = "bring them back" if latest_saved(folder) else "train first"
        raise ValueError(f"there is no checkpoint in {folder}: {way_out}")
    if str(which) in map(str, found):
        return read(int(which))
    if which not in ("", "best", "latest"):
        raise ValueError(
            f"there is no checkpoint {which!r} in {folder}: give latest, best, or one of {', '.join(map(str, found))}"
        )
    others = f"choose another checkpoint: {', '.join(map(str, found))}"
    saved = latest_saved(folder)
    if found[0] < saved:
        raise ValueError(
            f"the latest checkpoint, of step {saved}, is lost from {folder}: continue training, or {others}"
        )
    latest = read(found[0])
    best = latest["best"]
    if which == "best" and best is None:
        raise ValueError(
            f"no checkpoint in {folder} is the best yet: that takes an epoch with validation images (data.validation)"
        )
    if which == "latest" or best is None or best["step"] == found[0]:
        return latest
    if best["step"] not in found:
        raise ValueError(
            f"the best checkpoint, of step {best['step']}, is lost from {folder}: bring it back, or {others}"
        )
    return read(best["step"])


def survey(folder) -> tuple[dict[int, dict], dict[int, str]]:
    """{step: metadata} of the undamaged checkpoints and {step: problem} of the others, both latest first."""
    kept, damaged = {}, {}
    for step in steps(folder):
        try:
            kept[step] = read_metadata(folder, step)
        except ValueError as error:
            damaged[step] = str(error)
    return kept, damaged


def read_metadata(folder, step: int) -> dict:
    """Verify all files of a checkpoint and return its metadata.

    Raises ValueError, naming the file, for damage, and OSError if this user may not read it.
    """
    path = absolute(folder) / str(step)
    if (path / "about").exists():
        raise ValueError(f"checkpoint {step} in {folder} {OLD_FORMAT}")
    file = path / DIGESTS
    try:
        listed = json.loads(read_regular(file))
        for name in sorted({*listed, *_names(path)}):
            file = path / name
            if listed.get(name) != _sha256(file):
                raise ValueError("not as it was saved")
        file = path / "metadata" / "metadata"
        metadata = json.loads(read_regular(file))
        if not {"step", "best", "log"} <= metadata.keys():
            raise ValueError("of another version of vae_jax")
        if metadata["step"] != step:
            raise ValueError(f"this is checkpoint {metadata['step']}: rename its folder")
    except PermissionError as error:
        raise OSError(f"checkpoint {step} cannot be read: {file} ({error.strerror}): let this user read it") from error
    except Exception as error:  # damage can raise almost anything
        raise ValueError(f"checkpoint {step} is damaged: {file} ({describe_error(error)})") from error
    return metadata


def check_same_data(stored: dict, metadata: dict) -> None:
    """Raise OSError if a checkpoint was trained on other data than `metadata` describes."""
    for name in DATA:
        if stored.get(name) != json.loads(json.dumps(metadata.get(name))):
            raise OSError(
                f"{name} is not what it was when checkpoint {stored['step']} was saved: give the same data, or name "
                "another --workdir"
            )


@contextlib.contextmanager
def locked(path, kind: int) -> Iterator[None]:
    """Lock a local folder, for reading or for deleting. Raises FileNotFoundError if it is gone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind)
        os.stat(path)  # a process that deletes it renames it first
        yield
    finally:
        os.close(descriptor)


def absolute(folder):
    """The absolute path, which Orbax needs. `resolve` would turn a gs:// path into a local one."""
    path = epath.Path(folder)
    return path if path.is_absolute() else path.resolve()


def digests(path):
    """The SHA-256 of each file of a checkpoint."""
    return {name: _sha256(path / name) for name in _names(path)}


def _names(path):
    """The relative paths of a checkpoint's files, without the list of SHA-256."""
    return {str(file.relative_to(path)) for file in _files(path)} - {DIGESTS}


def _files(path):
    for child in path.iterdir():  # epath's `walk` returns paths without gs://
        yield from _files(child) if child.is_dir() else [child]


def _sha256(file):
    return hashlib.sha256(read_regular(file)).hexdigest()
