"""Images made by a trained model. `encode` and `decode` are (variables, array) -> ..., as in `objectives.elbo`."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Key


def reconstruct(
    encode: Callable,
    decode: Callable,
    variables: dict,
    image: Float[Array, "batch height width channel"],
) -> Float[Array, "batch height width channel"]:
    """decode(mean of q(z | image)), in [0, 1]."""
    mean, _ = encode(variables, image)
    return decode(variables, mean)


def sample_prior(
    decode: Callable, variables: dict, key: Key[Array, ""], count: int, latent_dim: int
) -> Float[Array, "count height width channel"]:
    """The mean images of `count` draws z ~ N(0, 1), in [0, 1]."""
    return decode(variables, jax.random.normal(key, (count, latent_dim)))
