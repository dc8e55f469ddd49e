"""Trained models for use in other code: no command line, no config, no training set."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vae_jax import generate
from vae_jax.batch import Batch, binarize_as_evaluated, example_keys
from vae_jax.evaluation.likelihood import SAMPLES_AT_ONCE, log_mean_exp, make_log_weights
from vae_jax.families import FAMILIES, Model
from vae_jax.priors import Prior
from vae_jax.run import checkpoint
from vae_jax.run.config import bind, changes, choose, fill_in, make_title
from vae_jax.run.directory import read_config
from vae_jax.run.files import local_path

BATCH_SIZE = 256  # bounds the memory; the results do not depend on it
WEIGHED = 16  # images of which SAMPLES_AT_ONCE are decoded at once for a likelihood
LARGEST_LATENT = 1e4  # far outside any prior; beyond it the decoder's float32 would overflow


def load(workdir: str, checkpoint: str | int = "", seed: int | None = None) -> "Pretrained":
    """The model that a run directory holds; the directory may have been moved from another machine.

    Args:
        checkpoint: "latest", "best" or a step; by default the best where there is one, else the latest.
        seed: which one of several that were trained together; by default the first.

    Raises ValueError if there is no such checkpoint or seed, or if it is damaged.
    """
    metadata, variables = load_variables(workdir, checkpoint)
    first, count = metadata["config"]["seed"], metadata["config"]["seeds"]
    seed = first if seed is None else seed
    check_integer("seed", seed, 0, 2**32 - 1)
    if seed not in range(first, first + count):
        last = f" to {first + count - 1}" if count > 1 else ""
        raise ValueError(f"seed {seed} was not trained in {workdir}: give {first}{last}")
    if count > 1:
        variables = jax.tree.map(lambda leaf: leaf[seed - first], variables)
    return Pretrained(metadata, jax.device_put(variables))


def load_variables(workdir: str, which: str | int = "") -> tuple[dict, dict]:
    """A checkpoint's metadata and its variables; with several seeds these have a leading seed axis.

    Raises ValueError as `load` does, and if the run's config.json is another config than the checkpoint's.
    """
    metadata, variables = checkpoint.load(local_path(workdir) / "checkpoints", which, seeded_shapes)
    try:
        stored = read_config(str(local_path(workdir))) or metadata["config"]
    except OSError as error:
        if str(which) == str(metadata["step"]):  # the one that was asked for
            return metadata, variables
        raise ValueError(
            f"{error}; so nobody knows which checkpoint is the latest: restore it, or choose a step"
        ) from error
    if changed := changes(metadata["config"] | {"epochs": stored["epochs"]}, stored):
        raise ValueError(
            f"config.json in {workdir} is not what checkpoint {metadata['step']} was trained with "
            f"({'; '.join(changed)}): restore the one or the other"
        )
    return metadata, variables


def seeded_shapes(metadata: dict) -> dict:
    """The shapes of a checkpoint's variables, with a leading seed axis if there are several seeds."""
    like = jax.eval_shape(make_model(metadata).init, jax.random.key(0))
    seeds = metadata["config"]["seeds"]
    if seeds == 1:
        return like
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype), like)


def make_model(metadata: dict) -> Model:
    """The model that a checkpoint's metadata describes."""
    family, values = choose("model", FAMILIES, metadata["config"]["model"])
    values = {
        name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        for name, value in values.items()
    }
    make = bind("model", family.make, values)
    shape = tuple(metadata["image_shape"])
    return fill_in(make, image_shape=shape, num_classes=metadata["num_classes"])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A trained model. The functions of `model`, which take `variables` first, are the pure ones below each method.

    Images are [n, height, width, channel], or without the channel axis if there is one channel: uint8, or float in
    [0, 1]. A model of binary images binarizes them as evaluation does (`data.binarize`). Results are NumPy arrays. Every
    method raises ValueError for input that does not fit, and if the model's family has no such method. It can be pickled.
    """

    metadata: dict  # of its checkpoint
    variables: dict

    @functools.cached_property
    def model(self) -> Model:
        return make_model(self.metadata)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.metadata["image_shape"]
        return height, width, channels

    @property
    def step(self) -> int:
        return self.metadata["step"]

    @property
    def config(self) -> dict:
        return self.metadata["config"]

    @property
    def data(self) -> dict:
        """The number of images of each split that it was trained with, and their SHA-256."""
        return self.metadata["data"]

    @property
    def title(self) -> str:
        """Family and data set, for people."""
        return make_title(FAMILIES[self.config["model"]["name"]], self.config["data"]["name"])

    def __repr__(self):
        size = sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        return f"<{self.title}: step {self.step}, {size:,} parameters>"

    def __reduce__(self):
        return Pretrained, (self.metadata, jax.device_get(self.variables))

    def with_prior(self, prior: Prior) -> "Pretrained":
        """The same model with another p(z), such as one that `evaluation.aggregate.fit_gmm` fits."""
        other = dataclasses.replace(self)
        vars(other)["model"] = self.model._replace(prior=prior)
        return other

    def encode(self, image) -> tuple[Float[np.ndarray, "n latent"], Float[np.ndarray, "n latent"]]:
        """Mean and log-variance of q(z | image)."""
        self.check_has("encode", "encoder")
        return self._map("encode", self._as_seen(image))

    def decode(self, z) -> Float[np.ndarray, "n height width channel"]:
        """Mean images of p(x | z), in [0, 1]."""
        self.check_has("decode_raw", "decoder")
        return self._map("decode", check_latents(z, self.model.latent_dim))

    def sample(self, count: int, seed: int = 0) -> Float[np.ndarray, "count height width channel"]:
        """Mean images of `count` draws z ~ p(z), in [0, 1]; count is 1 to a million, seed at most 2**32 - 1."""
        self.check_has("decode_raw", "decoder")
        check_integer("count", count, 1, 1_000_000)
        check_integer("seed", seed, 0, 2**32 - 1)
        z = self.model.prior.sample(self.variables, jax.random.key(seed), count)
        return self.decode(z)

    def reconstruct(self, image) -> Float[np.ndarray, "n height width channel"]:
        """decode(mean of q(z | image))."""
        return self.decode(self.encode(image)[0])

    def log_likelihood(self, image, samples: int = 1000) -> Float[np.ndarray, " n"]:
        """An estimate of log p(image) in nats, with the likelihood's constant, from `samples` draws of q(z | image).

        Its mean lies below log p(image), by less with more samples (Burda et al. 2016, equation 8). `evaluation.likelihood` says
        how to see whether it can be trusted. The noise of an image depends on its position alone.
        """
        log_w = self.log_weights(image, samples, log_mean_exp)
        return log_w - np.prod(self.image_shape) * self.model.likelihood.constant

    def log_weights(self, image, samples: int, reduce: Callable = np.asarray) -> Any:
        """`reduce` of each image's log p(x, z_k) - log q(z_k | x), less the likelihood's constant, [n, samples]."""
        self.check_has("encode", "encoder")
        self.check_has("decode_raw", "decoder")
        check_integer("samples", samples, 1, 1_000_000)
        seen, root = self._as_seen(image), jax.random.key(self.config["seed"])
        measure = jax.jit(make_log_weights(self.model, samples, SAMPLES_AT_ONCE))
        parts = []
        for start in range(0, len(seen), WEIGHED):
            index = start + jnp.arange(WEIGHED)  # the last batch is filled up, so that nothing is compiled twice
            given = jnp.asarray(seen[np.minimum(index, len(seen) - 1)])
            batch = Batch(given, label=index, weight=index, index=index)
            log_w = measure(self.variables, batch, example_keys(root, None, index))
            parts.append(reduce(np.asarray(log_w)[: len(seen) - start]))
        return np.concatenate(parts)

    def probabilities(self, image) -> Float[np.ndarray, "n classes"]:
        """p(label | image) of every class."""
        self.check_has("probabilities", "classes")
        return self._map("probabilities", self._as_seen(image))

    def predict(self, image) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The most probable label of each image, and its probability."""
        probabilities = self.probabilities(image)
        return probabilities.argmax(axis=1), probabilities.max(axis=1)

    def _as_seen(self, image):
        """The images in [0, 1] as the model knows them: with binary pixels if it was trained on such."""
        image, how = check_images(image, self.image_shape), self.config["data"]["binarize"]
        if how == "none":
            return image
        index = jnp.arange(len(image))
        return np.asarray(binarize_as_evaluated(jnp.asarray(image), index, how, self.config["seed"]))

    def check_has(self, function: str, what: str) -> None:
        """Raise ValueError if the model's family has no such function."""
        if getattr(self.model, function) is None:
            name = self.config["model"]["name"]
            raise ValueError(f"a model of the family {name} has no {what}")

    @functools.cached_property
    def _functions(self):
        functions = {
            "encode": self.model.encode,
            "decode": functools.partial(generate.decode, self.model),
            "probabilities": self.model.probabilities,
        }
        return {name: jax.jit(f) for name, f in functions.items() if f is not None}

    def _map(self, name, array):
        function = functools.partial(self._functions[name], self.variables)
        return in_batches(function, array)


def in_batches(function: Callable, array: np.ndarray) -> Any:
    """`function` of an array, batch by batch, as NumPy arrays."""
    starts = range(0, len(array), BATCH_SIZE)
    parts = [function(array[start : start + BATCH_SIZE]) for start in starts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def check_images(image: Any, shape: tuple[int, int, int]) -> Float[np.ndarray, "n h w c"]:
    """Images in [0, 1] as float32. Raises ValueError, naming size, type or value, for what a model of `shape` does not take."""
    image = as_array("images", image)
    if image.ndim == 3 and shape[2] == 1:
        image = image[..., None]
    if image.ndim != 4 or image.shape[1:] != shape or len(image) == 0:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"images of shape {image.shape}, but must be [n, {wanted}]")
    if image.dtype == np.uint8:
        return image / np.float32(255)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"images are {image.dtype}, but must be uint8, or float in [0, 1]")
    check_range("images", image, 0.0, 1.0)
    return image.astype(np.float32)


def check_latents(z: Any, latent_dim: int) -> Float[np.ndarray, "n latent"]:
    """Latents as float32. Raises ValueError, naming shape, type or value, for what a decoder does not take."""
    z = as_array("z", z)
    if z.ndim != 2 or z.shape[1] != latent_dim or len(z) == 0:
        raise ValueError(f"z has shape {z.shape}, but must be [n, {latent_dim}]")
    if z.dtype.kind not in "iuf":
        raise ValueError(f"z is {z.dtype}, but must be real numbers")
    check_range("z", z, -LARGEST_LATENT, LARGEST_LATENT)
    return z.astype(np.float32)


def as_array(name: str, values: Any) -> np.ndarray:
    """A plain array. Raises ValueError for a masked one, whose mask NumPy would drop silently."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(  # noqa: TRY004
            f"{name} is a masked array, but must be a plain one: fill what is masked"
        )
    return np.asarray(values)


def check_range(name: str, values: np.ndarray, least: float, most: float) -> None:
    """Raise ValueError, naming the first value that is not a number in [least, most]."""
    wrong = values[~((values >= least) & (values <= most))]  # NaN is not either
    if wrong.size:
        raise ValueError(f"{name} has the value {wrong[0]}, but must lie in [{least:g}, {most:g}]")


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError unless `value` is an integer in [least, most]; a boolean is none."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        shown = repr(value).splitlines()[0][:60]
        raise ValueError(f"{name} is {shown}, but must be an integer from {least} to {most}")
