"""Trained models for use in other code: no command line, no config, no training set."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from vae_jax import generate
from vae_jax.nn.networks import MODELS, VAE, Classifier
from vae_jax.run.checkpoint import read_about, restore_variables, select, steps
from vae_jax.run.config import derive
from vae_jax.run.files import local_path

BATCH_SIZE = 256  # bounds the memory; the results do not depend on it


def load(
    workdir: str, checkpoint: str | int = "", seed: int | None = None
) -> "TrainedVAE | TrainedClassifier":
    """The model that a run directory holds; the directory may have been moved from another machine.

    Args:
        checkpoint: "latest", "best" or a step; by default the best where there is one, else the latest.
        seed: which one of several that were trained together; by default the first.

    Raises ValueError if there is no such checkpoint or seed, or if it is damaged.
    """
    about, variables = load_variables(workdir, checkpoint)
    first, count = about["config"]["seed"], about["config"]["seeds"]
    seed = first if seed is None else seed
    if seed not in range(first, first + count):
        raise ValueError(
            f"seed {seed} was not trained in {workdir}: give {first}"
            + (f" to {first + count - 1}" if count > 1 else "")
        )
    if count > 1:
        variables = jax.tree.map(lambda leaf: leaf[seed - first], variables)
    return TRAINED[about["config"]["model"]["name"]](
        model=make_model(about),
        variables=jax.device_put(variables),
        image_shape=tuple(about["image_shape"]),
        step=about["step"],
        config=about["config"],
        data=about["data"],
    )


def load_variables(workdir: str, which: str | int = "") -> tuple[dict, dict]:
    """What is stored about a checkpoint, and its variables; those of several seeds have the seeds in front."""
    folder = local_path(workdir) / "checkpoints"
    step = select(folder, which)
    try:
        about = read_about(folder, step)
    except ValueError as error:
        others = [str(other) for other in steps(folder) if other != step]
        hint = f", or choose another checkpoint: {', '.join(others)}" if others else ""
        raise ValueError(f"{error}; train again{hint}") from error
    model = make_model(about)
    image = jax.ShapeDtypeStruct((1, *about["image_shape"]), np.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), image)
    seeds = about["config"]["seeds"]
    if seeds > 1:
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype), like
        )
    return about, restore_variables(folder, about["step"], like)


def make_model(about: dict) -> Any:
    """The Flax module that a checkpoint says it is of."""
    fields = dict(about["config"]["model"])
    make = MODELS[fields.pop("name")]
    fields = {
        name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        for name, value in fields.items()
    }
    return derive(
        functools.partial(make, **fields),
        image_shape=tuple(about["image_shape"]),
        num_classes=about["num_classes"],
    )


@dataclasses.dataclass(frozen=True)
class TrainedVAE:
    """A VAE with its variables. `model.apply(variables, ..., method="encode")` is the pure function below each method.

    Images are [n, height, width, channel], or without the channel where there is one: uint8, or float in [0, 1].
    Results are NumPy arrays. Raises ValueError for images of another size, type or range.
    """

    model: VAE
    variables: dict
    image_shape: tuple[int, int, int]
    step: int
    config: dict
    data: dict  # how many images it was trained on, and their SHA-256

    @property
    def title(self) -> str:
        """What was trained on what, for people."""
        return make_title(self.model, self.config["data"]["name"])

    def encode(
        self, image
    ) -> tuple[Float[np.ndarray, "n latent"], Float[np.ndarray, "n latent"]]:
        """Mean and log-variance of q(z | image)."""
        return self._apply("encode", check_images(image, self.image_shape))

    def decode(self, z) -> Float[np.ndarray, "n height width channel"]:
        """Mean images of p(x | z), in [0, 1]."""
        z = np.asarray(z, np.float32)
        if z.ndim != 2 or z.shape[1] != self.model.latent_dim or len(z) == 0:
            raise ValueError(
                f"z has shape {z.shape}, but must be [n, {self.model.latent_dim}]"
            )
        return self._apply("decode", z)

    def sample(
        self, count: int, seed: int = 0
    ) -> Float[np.ndarray, "count height width channel"]:
        """Mean images of `count` draws z ~ N(0, 1), in [0, 1]; count is at least 1."""
        if count < 1:
            raise ValueError(f"count is {count}, but must be at least 1")
        return self.decode(
            generate.prior(jax.random.key(seed), count, self.model.latent_dim)
        )

    def reconstruct(self, image) -> Float[np.ndarray, "n height width channel"]:
        """decode(mean of q(z | image))."""
        return self.decode(self.encode(image)[0])

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.model.apply, static_argnames="method")

    def _apply(self, method, array):
        return in_batches(
            lambda part: self._jitted(self.variables, part, method=method), array
        )


@dataclasses.dataclass(frozen=True)
class TrainedClassifier:
    """A classifier with its variables. `model.apply(variables, image)`, which gives logits, is the pure function below.

    Images are as in `TrainedVAE`.
    """

    model: Classifier
    variables: dict
    image_shape: tuple[int, int, int]
    step: int
    config: dict
    data: dict  # how many images it was trained on, and their SHA-256

    def probabilities(self, image) -> Float[np.ndarray, "n classes"]:
        """p(label | image) of every class."""
        image = check_images(image, self.image_shape)
        return in_batches(lambda part: self._jitted(self.variables, part), image)

    def predict(self, image) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The most probable label of each image, and its probability."""
        probabilities = self.probabilities(image)
        return probabilities.argmax(axis=1), probabilities.max(axis=1)

    @functools.cached_property
    def _jitted(self):
        return jax.jit(lambda *given: jax.nn.softmax(self.model.apply(*given)))


def make_title(network: Any, data_name: str) -> str:
    """What is trained on what, for people."""
    return f"{type(network).__name__} on {Path(data_name).name}"


def in_batches(function: Callable, array: np.ndarray) -> Any:
    """`function` of an array, part by part, as NumPy arrays."""
    starts = range(0, len(array), BATCH_SIZE)
    parts = [function(array[start : start + BATCH_SIZE]) for start in starts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def check_images(
    image: Any, shape: tuple[int, int, int]
) -> Float[np.ndarray, "n h w c"]:
    """Images in [0, 1] as float32. Raises ValueError, naming size, type or value, for what a model of `shape` does not take."""
    image = np.asarray(image)
    if image.ndim == 3 and shape[2] == 1:
        image = image[..., None]
    if image.ndim != 4 or image.shape[1:] != shape or len(image) == 0:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"images of shape {image.shape}, but must be [n, {wanted}]")
    if image.dtype == np.uint8:
        return image / np.float32(255)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(
            f"images are {image.dtype}, but must be uint8, or float in [0, 1]"
        )
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"images lie in [{image.min():.4g}, {image.max():.4g}], but floats must lie in [0, 1]"
        )
    return image.astype(np.float32)


TRAINED = {"vae": TrainedVAE, "classifier": TrainedClassifier}
