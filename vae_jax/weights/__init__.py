"""Trained models as safetensors folders, verified by SHA-256 and read without executing anything; two are bundled.

A folder holds `model.safetensors`, `config.json` (all but the weights), `README.md` (the model card) and `sha256.json`.
The latter lists the SHA-256 of the other files except the card, which people may edit. `vae_jax.export` writes such
folders.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vae_jax.families import Model, Variables, classifier
from vae_jax.run.directory import FIELDS as CONFIG_FIELDS
from vae_jax.run.files import read_regular
from vae_jax.run.stored import DIGESTS

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FIELDS = {"step": int, "image_shape": list, "num_classes": int, "data": dict, "config": dict, "metrics": dict}
FOLDER = Path(__file__).parent
CLASSIFIER = "mnist-classifier"
# The bundled weights: the post's models, trained on MNIST by configs/vae.py and configs/classifier.py, seed 0.
SHA256 = {
    "mnist-vae": "5bd029ac5720f010b2579192fab35b741ef9e9014341123146a93e5436711464",
    CLASSIFIER: "6f314da78619211cfa05dde5b69ff2ff35bcc4d7bd2c8e3adca210e59f1826e8",
}


def resolve(workdir: str) -> str:
    """The folder of a work directory: the name of a bundled model means its folder, unless such a path exists here."""
    if workdir not in SHA256:
        return workdir
    if os.path.lexists(workdir):
        print(f"vae_jax: {workdir} is the folder here, not the bundled model", file=sys.stderr)
        return os.path.join(".", workdir)
    return str(FOLDER / workdir)


def in_box(folder: str | Path) -> bool:
    """Whether a folder is that of a bundled model."""
    return Path(folder).parent == FOLDER


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported model, or the remains of one; no run directory has these files."""
    return (folder / WEIGHTS).exists() or (folder / DIGESTS).exists()


def read(folder: Path) -> tuple[dict, Variables]:
    """Read the metadata and the variables of an exported model.

    Raises ValueError, naming the file, if the folder is not as it was written or has another format.
    """
    from safetensors.numpy import load

    way_out = "install vae_jax again" if in_box(folder) else "export or copy it again"
    contents = read_listed(folder, way_out)
    try:
        metadata = json.loads(contents[CONFIG])
        number = metadata.get("format")
    except (ValueError, RecursionError, AttributeError):
        number = None
    if number != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} is of format {number!r}, but this version of vae_jax reads {FORMAT}: {way_out}"
        )
    if not has(metadata, FIELDS) or not has(
        metadata["config"], CONFIG_FIELDS | {"seed": int, "seeds": int, "epochs": int}
    ):
        raise ValueError(f"{folder / CONFIG} does not describe a model: {way_out}")
    try:
        leaves = load(contents[WEIGHTS])
    except Exception as error:  # safetensors raises its own kinds
        raise ValueError(f"{folder / WEIGHTS} cannot be read ({error}): {way_out}") from error
    return metadata, unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")


def has(values: dict, kinds: dict[str, type]) -> bool:
    """Whether a dictionary has these entries with these types."""
    return all(isinstance(values.get(name), kind) for name, kind in kinds.items())


def read_listed(folder: Path, way_out: str) -> dict[str, bytes]:
    """Read the files that sha256.json lists; only weights and config must exist.

    Raises ValueError unless the files are as they were written.
    """
    name = DIGESTS
    contents = {}
    try:
        listed = json.loads(read_regular(folder / DIGESTS))
        if in_box(folder):
            listed[WEIGHTS] = SHA256[folder.name]
        for name in {CONFIG: None, WEIGHTS: None} | listed:
            if Path(name).name != name:
                raise ValueError("not in the folder")
            if (folder / name).exists() or name in (CONFIG, WEIGHTS):
                contents[name] = read_regular(folder / name)
                if hashlib.sha256(contents[name]).hexdigest() != listed[name]:
                    raise ValueError("not as it was written")
    except FileNotFoundError:
        raise ValueError(f"{folder / name} is missing: {way_out}") from None
    except PermissionError as error:
        raise ValueError(f"{folder / name} cannot be read ({error.strerror}): let this user read it") from error
    except Exception as error:  # damage can raise almost anything
        raise ValueError(f"{folder / name} is damaged or changed: {way_out}") from error
    return contents


def save(variables: Any) -> bytes:
    """Serialize variables as safetensors, each named by its path, such as "params/conv1/kernel"."""
    from safetensors.numpy import save

    flat = flatten_dict(variables, sep="/")
    return save({name: np.asarray(leaf, order="C") for name, leaf in sorted(flat.items())})


def pinned_classifier() -> tuple[Model, Variables]:
    """The classifier used to compare images by their features: the post's, trained on MNIST."""
    return classifier.make((28, 28, 1), 10), read(FOLDER / CLASSIFIER)[1]
