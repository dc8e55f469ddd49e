"""Trained models for use in other code: no command line, no config, no training set."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vae_jax import generate, weights
from vae_jax.batch import Batch, binarize_as_evaluated, example_keys
from vae_jax.evaluation.likelihood import WEIGHED, log_mean_exp, make_log_weights
from vae_jax.families import FAMILIES, Model
from vae_jax.likelihoods import BINARY
from vae_jax.objectives import reparameterize
from vae_jax.pretrained import show
from vae_jax.pretrained.arguments import check_images, check_integer, check_labels, check_latents, root_key
from vae_jax.pretrained.loading import load_variables, make_model
from vae_jax.priors import Prior
from vae_jax.run.config import make_title
from vae_jax.run.devices import compiler_options

BATCH_SIZE = 256  # bounds the memory; the results do not depend on it
MOST_SAMPLES = 1_000_000  # largest `count` of `sample`, and largest `samples` of a likelihood estimate


def load(workdir: str | os.PathLike, checkpoint: str | int = "", seed: int | None = None) -> "Pretrained":
    """Load the model of a run directory or an exported folder, also one moved from another machine, or a bundled model.

    Args:
        workdir: the folder; "mnist-vae" and "mnist-classifier" are bundled models, unless a folder here has that name.
        checkpoint: "latest", "best" or a step; by default the best if there is one, else the latest.
        seed: one of several seeds that were trained together; by default the first.

    Raises ValueError if there is no such checkpoint or seed, or if it is damaged.
    """
    workdir = weights.resolve(os.fspath(workdir))
    return of_seed(workdir, *load_variables(workdir, checkpoint), seed)


def of_seed(workdir: str, metadata: dict, variables: dict, seed: int | None = None) -> "Pretrained":
    """The model of one seed, from the result of `load_variables`. Raises ValueError if that seed was not trained."""
    first, count = metadata["config"]["seed"], metadata["config"]["seeds"]
    seed = first if seed is None else seed
    check_integer("seed", seed, 0, 2**32 - 1)
    if seed not in range(first, first + count):
        last = f" to {first + count - 1}" if count > 1 else ""
        raise ValueError(f"seed {seed} was not trained in {workdir}: give {first}{last}")
    if count > 1:
        variables = jax.tree.map(lambda leaf: leaf[seed - first], variables)
        metadata = metadata | {"metrics": {}}  # what the run logged are means over its seeds
    metadata = metadata | {"config": metadata["config"] | {"seed": seed, "seeds": 1}}
    return Pretrained(metadata, jax.device_put(variables))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A trained model. Its methods wrap the pure functions of `model`, which take `variables` first.

    Images are [n, height, width, channel], or without the channel axis if there is one channel: uint8, or float in
    [0, 1]. A model of binary images binarizes them as evaluation does (`data.binarize`). Results are NumPy arrays.
    Every method raises ValueError for input that does not fit, and if the model's family has no such method. Models can
    be pickled.
    """

    metadata: dict  # of its checkpoint, with this model's seed
    variables: dict
    prior: Prior | None = None  # in place of the model's own

    @functools.cached_property
    def model(self) -> Model:
        model = make_model(self.metadata)
        return model if self.prior is None else model._replace(prior=self.prior)

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
        """The number of images in each split of its data set, and the data's SHA-256."""
        return self.metadata["data"]

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))

    @property
    def title(self) -> str:
        """Family and data set, for people."""
        return make_title(FAMILIES[self.config["model"]["name"]], self.config["data"]["name"])

    def __repr__(self):
        return show.describe(self)

    def _repr_html_(self):
        return show.describe_in_html(self)

    def __reduce__(self):
        if self.prior is not None:
            raise ValueError(
                "a model with another prior cannot be pickled: pickle the model, and call with_prior again"
            )
        return Pretrained, (self.metadata, jax.device_get(self.variables))

    def with_prior(self, prior: Prior) -> "Pretrained":
        """The same model with another p(z), such as one that `evaluation.aggregate.fit_gmm` fits.

        Raises ValueError for a conditional model, whose prior belongs to p(z | c).
        """
        if self.model.condition_on:
            raise ValueError(f"this model is conditioned on the {self.model.condition_on}: it keeps its prior")
        return dataclasses.replace(self, prior=prior)

    def own_label(self, label: Any) -> dict[str, Any]:
        """The keyword argument `label`, if the model is conditioned on labels."""
        return {"label": label} if self.model.condition_on == "label" else {}

    def seen_label(self, label: Any) -> dict[str, Any]:
        """The keyword argument `label`, if the encoder takes it."""
        return {"label": label} if self.model.encoder_takes_label else {}

    def condition_of(self, image: np.ndarray, label: Any) -> dict[str, Any]:
        """The keyword arguments that condition the model on an image or its label."""
        return {"image": image} if self._sees_images else self.own_label(label)

    def encode(self, image, label=None, draw: bool = False, seed: int = 0) -> Any:
        """Mean and log-variance of q(z | image), each [n, latent], or with `draw` one draw z ~ q(z | image) instead.

        A conditional model also uses the label or the visible part. The noise depends on `seed` and on each image's
        position.
        """
        self.check_has("encode", "encoder")
        seen, condition = self._as_seen(image), None
        if self._sees_images or self.model.encoder_takes_label or label is not None:
            condition = self._condition(len(seen), label, seen if self._sees_images else None)
        q = self._map("encode", seen, condition)
        if not draw:
            return q
        keys = example_keys(root_key(seed), None, jnp.arange(len(seen)))
        return np.asarray(reparameterize(*map(jnp.asarray, q), keys)[0])

    def decode(
        self, z, label=None, image=None, pixels: bool = False, seed: int = 0
    ) -> Float[np.ndarray, "n height width channel"]:
        """Mean images of p(x | z), in [0, 1], or with `pixels` one draw x ~ p(x | z) for each z instead.

        A conditional model also uses the label or the image's visible part. Draws of a Gaussian or a Laplace may leave
        [0, 1]; their noise depends on `seed` and on each z's position.
        """
        self.check_has("decode_raw", "decoder")
        z = check_latents(z, self.model.latent_dim)
        condition = self._condition(len(z), label, image)
        if not pixels:
            return self._map("decode", z, condition)
        return self._map("draw_pixels", z, condition, jax.random.split(root_key(seed), len(z)))

    def sample(
        self, count: int, seed: int = 0, label=None, image=None
    ) -> Float[np.ndarray, "count height width channel"]:
        """Mean images of `count` draws z ~ p(z), in [0, 1]; count is 1 to a million, seed at most 2**32 - 1.

        A conditional model needs a label, or an image to complete from its visible part: one for all, or one for each.
        """
        self.check_has("decode_raw", "decoder")
        check_integer("count", count, 1, MOST_SAMPLES)
        condition = self._condition(count, label, image)
        z = self._given(condition).prior.sample(self.variables, root_key(seed), count)
        return self._map("decode", np.asarray(z), condition)

    def reconstruct(self, image, label=None) -> Float[np.ndarray, "n height width channel"]:
        """decode(mean of q(z | image)); a conditional model also uses the label or the image's visible part."""
        return self.decode(self.encode(image, label)[0], label, image if self._sees_images else None)

    def log_likelihood(self, image, samples: int = 1000, label=None) -> Float[np.ndarray, " n"]:
        """Estimate log p(image) in nats, including the likelihood's constant, from `samples` draws of q(z | image).

        The estimate's mean lies below log p(image), by less with more samples (Burda et al. 2016, equation 8).
        `evaluation.likelihood` has diagnostics of its reliability. An image's noise depends only on its position. A
        conditional model gives log p(image | label), or log p(hidden pixels | visible pixels). With a Bernoulli, grey
        images raise ValueError, since it is not a likelihood of them.
        """
        self.check_has("encode", "encoder")
        self.check_has("decode_raw", "decoder")
        self.check_has_density()
        check_integer("samples", samples, 1, MOST_SAMPLES)
        seen, root = self._as_seen(image), jax.random.key(self.config["seed"])
        if self.model.likelihood.support == BINARY and ((seen > 0) & (seen < 1)).any():
            raise ValueError("these images have grey pixels, but a Bernoulli is a likelihood of 0 and 1: binarize them")
        label = self._labels(len(seen), label)
        measure, parts = self.log_weights(samples), []
        for start in range(0, len(seen), WEIGHED):
            index = start + jnp.arange(WEIGHED)  # the last batch is padded, so that nothing is compiled twice
            rows = np.minimum(index, len(seen) - 1)
            batch = Batch(jnp.asarray(seen[rows]), jnp.asarray(label[rows]), weight=index, index=index)
            log_w = measure(self.variables, batch, example_keys(root, None, index))
            parts.append(log_mean_exp(np.asarray(log_w)[: len(seen) - start]))
        return np.concatenate(parts) - np.prod(self.image_shape) * self.model.likelihood.constant

    @property
    def _sees_images(self) -> bool:
        return self.model.condition_on == "image"

    def _given(self, condition) -> Model:
        return self.model if condition is None else self.model.given(jnp.asarray(condition))

    def _labels(self, count: int, label: Any) -> Int[np.ndarray, " count"]:
        """The labels of `count` examples; -1 if the model takes none. Raises ValueError for labels that do not fit."""
        if self.model.condition_on == "label":
            return check_labels(label, count, self.model.num_classes)
        if label is not None:
            raise ValueError("label is given, but this model is not conditioned on labels: leave it out")
        return np.full(count, -1, np.int32)

    def _condition(self, count: int, label: Any, image: Any) -> np.ndarray | None:
        """The conditions of `count` examples, or None. Raises ValueError for a missing or an unexpected condition."""
        labels = self._labels(count, label)
        if not self._sees_images:
            if image is not None:
                raise ValueError("image (or --input) is given, but this model does not complete images: leave it out")
            return np.asarray(self.model.condition(None, labels)) if self.model.condition_on else None
        if image is None:
            raise ValueError("this model completes images: give image= (or --input), whose visible part it keeps")
        image = self._as_seen(image)
        if len(image) not in (1, count):
            raise ValueError(f"there are {len(image)} images, but there must be 1 or {count}")
        return np.broadcast_to(np.asarray(self.model.condition(image, labels)), (count, *self.image_shape))

    def probabilities(self, image) -> Float[np.ndarray, "n classes"]:
        """p(label | image) of every class."""
        self.check_has("probabilities", "classes")
        return self._map("probabilities", self._as_seen(image))

    def predict(self, image) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The most probable label of each image, and its probability."""
        probabilities = self.probabilities(image)
        return probabilities.argmax(axis=1), probabilities.max(axis=1)

    def _as_seen(self, image):
        """The images in [0, 1] as the model sees them: binarized if it was trained on binary images."""
        image, how = check_images(image, self.image_shape), self.config["data"]["binarize"]
        if how == "none":
            return image
        return np.asarray(binarize_as_evaluated(jnp.asarray(image), jnp.arange(len(image)), how, self.config["seed"]))

    def check_has(self, function: str, what: str) -> None:
        """Raise ValueError if the model's family has no such function."""
        if getattr(self.model, function) is None:
            raise ValueError(f"a model of the family {self.config['model']['name']} has no {what}")

    def check_has_density(self) -> None:
        """Raise ValueError if p(z), which importance sampling needs, has no closed form."""
        if self.model.prior.log_prob is None:
            name = self.config["model"]["name"]
            raise ValueError(f"a model of the family {name} has no p(z) in closed form: take its bound for log p(x)")

    @functools.cached_property
    def _functions(self):
        functions = {
            "encode": lambda variables, image, c=None: self._given(c).encode(variables, image),
            "decode": lambda variables, z, c=None: generate.decode(self._given(c), variables, z),
            "draw_pixels": lambda variables, z, c, keys: generate.draw_pixels(self._given(c), variables, keys[0], z),
            "probabilities": self.model.probabilities,
        }
        return {name: self._jit(f) for name, f in functions.items() if f is not None}

    @functools.cached_property
    def log_weights(self) -> Callable[[int], Callable]:
        """`log_weights(samples)` is `evaluation.likelihood.make_log_weights` of this model, compiled once."""
        return functools.cache(lambda samples: self._jit(make_log_weights(self.model, samples)))

    def _jit(self, function):
        options = compiler_options(training=False, precision=self.config["model"].get("precision"))
        return jax.jit(function, compiler_options=options)

    def _map(self, name, *arrays):
        return in_batches(functools.partial(self._functions[name], self.variables), *arrays)


def in_batches(function: Callable, *arrays: Any) -> Any:
    """Apply `function` to arrays batch by batch; returns NumPy arrays. An array may be None."""
    parts = [
        function(*(array if array is None else array[start : start + BATCH_SIZE] for array in arrays))
        for start in range(0, len(arrays[0]), BATCH_SIZE)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
