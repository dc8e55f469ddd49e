"""Export a trained model as a folder in a model hub's layout: weights, config and model card.

Programs for other runtimes are optional. Nothing is uploaded, and no path of this machine is written.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_jax import weights
from vae_jax.export.card import model_card
from vae_jax.export.for_jax import jax_programs
from vae_jax.export.for_onnx import onnx_programs
from vae_jax.pretrained import Pretrained, load
from vae_jax.run.environment import versions
from vae_jax.run.files import explained, local_path
from vae_jax.run.log import read_rows
from vae_jax.run.stored import DIGESTS

FORMATS = {"jax": jax_programs, "onnx": onnx_programs}


def export(
    workdir: str, output: str, checkpoint: str | int = "", seed: int | None = None, formats: Sequence[str] = ()
) -> list[Path]:
    """Write the model of a run into the folder `output`; returns its files.

    Args:
        formats: "jax": programs by `jax.export` for CPU, CUDA and TPU, for any batch; "onnx": the same for ONNX
            runtimes.

    Raises ValueError or OSError if there is no such model, if a format is unknown or this model or machine does not
    support it, and if the folder holds anything but this export.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"there is no format {name!r}: give one of {', '.join(FORMATS)}")
    if "://" in output:
        raise ValueError(f"{output} is not on this machine: export to a folder here, and copy that")
    pretrained = load(workdir, checkpoint, seed)
    metadata = describe(pretrained, workdir)
    contents = {
        weights.WEIGHTS: weights.save(pretrained.variables),
        weights.CONFIG: (json.dumps(metadata, indent=2) + "\n").encode(),
    }
    for name in formats:
        contents |= FORMATS[name](pretrained)
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
    card = model_card(pretrained, metadata, [*listed])
    contents |= {DIGESTS: (json.dumps(listed, indent=1) + "\n").encode(), weights.CARD: card.encode()}
    return write(local_path(output), contents)


def describe(pretrained: Pretrained, workdir: str) -> dict[str, Any]:
    """The content of config.json: the checkpoint's metadata for one seed, without paths, and its test numbers."""
    metadata = pretrained.metadata
    config = metadata["config"]
    name = config["data"]["name"]
    data = config["data"] | {
        "manual_dir": "",
        "name": f"./{Path(name).name}" if os.path.isabs(os.path.expanduser(name)) else name,
    }
    recorded = metadata.get("environment", {})
    numbers = metadata.get("metrics")
    if numbers is None:
        numbers = logged_numbers(local_path(workdir), pretrained.step)
    return {
        "format": weights.FORMAT,
        "library_name": "vae_jax",
        "vae_jax": importlib.metadata.version("vae_jax"),
        "model_type": config["model"]["name"],
        **{name: metadata[name] for name in ("step", "image_shape", "num_classes", "data")},
        "metrics": numbers,
        "config": config | {"data": data},
        "versions": metadata.get("versions") or {name: recorded[name] for name in versions() if name in recorded},
    }


def logged_numbers(folder: Path, step: int) -> dict[str, Any]:
    """The test metrics that a run logged at a step; {} if its log is gone."""
    rows = [row for row in read_rows(folder) if row["step"] == step and "test/loss" in row]
    return {name: value for row in rows[-1:] for name, value in row.items() if name.startswith("test/")}


def write(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write a folder atomically; keep it if it already holds these files. Raises OSError if it holds anything else."""
    paths = [folder / name for name in contents]
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not holds(folder, contents):
            raise FileExistsError(f"{folder} holds something other than this export: name another with --output")
        return paths
    with explained("cannot write the export", "name another folder with --output"):
        part = folder.parent / f".{folder.name}-{os.getpid()}"
        part.mkdir(parents=True)
        try:
            for name, content in contents.items():
                (part / name).write_bytes(content)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return paths


def holds(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Whether a folder holds exactly these files, ignoring edits of the card and a folder generated/."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    listed = contents.keys() - {weights.CARD}
    same = all((folder / name).is_file() and (folder / name).read_bytes() == contents[name] for name in listed)
    return same and names <= contents.keys() | {"generated"}
