"""A study as a directory: settings that decide its numbers, and one JSON line per finished result."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from vae_jax.batch import Dataset
from vae_jax.run.config import changes
from vae_jax.run.directory import FORMAT
from vae_jax.run.files import read_json_lines, write_atomically
from vae_jax.run.job import fingerprint
from vae_jax.run.log import OwnedDirectory

LEFTOVERS = {"lock", "settings.tmp"}  # left by a study that was killed right after its start


def settings_of(name: str, dataset: Dataset) -> dict:
    """The settings that every study of a data set has: the format of its runs, and the images."""
    return {"format": FORMAT, "data": name, "images": fingerprint(dataset)}


def open_study(path: Path, settings: dict) -> OwnedDirectory:
    """Open the directory of a study; its rows are those of results.jsonl.

    Raises OSError if another process works there, or if it holds other files or a study with other settings.
    """
    study = OwnedDirectory(path, "results.jsonl")
    with contextlib.ExitStack() as undone:
        undone.callback(study.close)
        write_settings(path, settings)
        study.keep(read_json_lines(path / "results.jsonl"))
        undone.pop_all()
    return study


def write_settings(path: Path, settings: dict) -> None:
    """Write settings.json. Raises OSError if the directory holds other files or a study with other settings."""
    file, another = path / "settings.json", "name another with --workdir"
    if file.exists():
        try:
            stored = json.loads(file.read_text("utf-8"))
        except ValueError:
            stored = None
        if not isinstance(stored, dict):
            raise OSError(f"{file} is damaged: restore it, or {another}")
        if different := changes(stored, settings):
            raise OSError(f"{path} holds another study ({'; '.join(different)}): {another}")
    elif {entry.name for entry in path.iterdir()} - LEFTOVERS:
        raise OSError(f"{path} is not empty and holds no study: {another}")
    write_atomically(file, json.dumps(settings, indent=2) + "\n")


def compute_once(study: OwnedDirectory, stage: str, compute: Callable[..., dict], **fields) -> dict:
    """Return the stored result with these fields; if there is none, store and print that of `compute(**fields)`."""
    name = {"stage": stage, **fields}
    for row in study.rows:
        if name.items() <= row.items():
            return row
    start = time.monotonic()
    row = name | compute(**fields)
    row.setdefault("seconds", round(time.monotonic() - start, 1))
    study.append(row)
    print("  ".join(f"{key} {shorten(value)}" for key, value in row.items()), flush=True)
    return row


def shorten(value) -> str:
    if isinstance(value, list):
        return " ".join(map(shorten, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)
