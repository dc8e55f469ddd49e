"""p(x | decoder output) as values. An image's negative log-likelihood is the sum of `energy + constant` over its pixels."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class Likelihood(NamedTuple):
    """Pure functions that take the model's `variables` first and read only `params/likelihood`.

    Attributes:
        support: what the number measures: "density on [0, 1]", "mass on {0, 1}" or "mass on 0..255".
        channels: raw channels that the decoder gives for each image channel.
        init: key -> the parameters, {} where there are none.
        energy: (variables, raw, image) -> -log p(image | raw) of each pixel less `constant`, in nats. `raw` may have
            leading sample axes.
        constant: nats per pixel. Reports add it; a loss never does, since in float32 it would cost digits.
        mean: (variables, raw) -> mean image, in [0, 1].
        sample: (variables, key, raw) -> image drawn from p(x | raw).
    """

    support: str
    channels: int
    init: Callable[[Any], dict]
    energy: Callable[[Any, Any, Any], Float[Array, "*samples batch h w c"]]
    constant: float
    mean: Callable[[Any, Any], Float[Array, "*samples h w c"]]
    sample: Callable[[Any, Any, Any], Float[Array, "*samples h w c"]]


def unit_gaussian() -> Likelihood:
    """N(x; sigmoid(raw), 1): energy (x - mean)^2 / 2, constant ln(2 pi) / 2 (the post's squared error)."""

    def mean(variables, raw):
        return jax.nn.sigmoid(raw)

    def energy(
        variables,
        raw: Float[Array, "*samples batch h w c"],
        image: Float[Array, "batch h w c"],
    ) -> Float[Array, "*samples batch h w c"]:
        image = image.reshape((1,) * (raw.ndim - image.ndim) + image.shape)
        return 0.5 * (image - mean(variables, raw)) ** 2

    def sample(variables, key: Key[Array, ""], raw: Float[Array, "*samples h w c"]):
        return mean(variables, raw) + jax.random.normal(key, raw.shape, raw.dtype)

    return Likelihood(
        support="density on [0, 1]",
        channels=1,
        init=lambda key: {},
        energy=energy,
        constant=0.5 * math.log(2 * math.pi),
        mean=mean,
        sample=sample,
    )


def distortion(
    likelihood: Likelihood,
    variables: Any,
    raw: Float[Array, "*samples batch h w raw"],
    image: Float[Array, "batch h w c"],
) -> Float[Array, "*samples batch"]:
    """-log p(x | z) of each image less the likelihood's constant, in nats: the energy summed over pixels."""
    return jnp.sum(likelihood.energy(variables, raw, image), axis=(-3, -2, -1))


LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {"unit_gaussian": unit_gaussian}
