"""Trained models in the box: safetensors, from which nothing is executed, checked against their SHA-256."""

import hashlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vae_jax.families import Model, Variables, classifier

FOLDER = Path(__file__).parent
# configs/classifier.py, seed 0, on two cores of an Intel Xeon: 99.26 % of the MNIST test images
CLASSIFIER = "classifier-mnist"
SHA256 = {CLASSIFIER: "6f314da78619211cfa05dde5b69ff2ff35bcc4d7bd2c8e3adca210e59f1826e8"}


def read(name: str) -> Variables:
    """The variables of a model in the box. Raises ValueError for a file that is not the one that was shipped."""
    from safetensors.numpy import load

    content = (FOLDER / f"{name}.safetensors").read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise ValueError(
            f"{name}.safetensors has the SHA-256 {found[:16]}..., not {SHA256[name][:16]}...: install vae_jax again"
        )
    return unflatten_dict({path: jnp.asarray(leaf) for path, leaf in load(content).items()}, sep="/")


def write(path: Path, variables: Any) -> str:
    """Write variables as safetensors, each named by its path, "params/conv1/kernel". Returns the SHA-256 of the file."""
    from safetensors.numpy import save

    flat = flatten_dict(variables, sep="/")
    content = save({name: np.ascontiguousarray(leaf) for name, leaf in sorted(flat.items())})
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def pinned_classifier() -> tuple[Model, Variables]:
    """The classifier in whose features images are compared: the post's, trained on MNIST."""
    return classifier.make((28, 28, 1), 10), read(CLASSIFIER)
