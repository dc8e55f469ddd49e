"""Images made by a trained model. `encode` and `decode` are (variables, array) -> ..., as in `objectives.elbo`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
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


def prior(
    key: Key[Array, ""], count: int, latent_dim: int
) -> Float[Array, "count latent_dim"]:
    """Draws z ~ N(0, 1)."""
    return jax.random.normal(key, (count, latent_dim))


def perturb(
    z: Float[Array, "batch latent"],
    keys: Key[Array, " batch"],
    share: float,
    scale: float,
) -> Float[Array, "batch latent"]:
    """z + scale * e with e ~ N(0, 1) in `share` of the latents, rounded to a whole number and drawn for each row; else z.

    Source: the post, section "Experiment and Evaluation", which says neither how many latents nor how much noise.
    """
    count = round(share * z.shape[1])

    def one(z, key):
        choose, draw = jax.random.split(key)
        chosen = jax.random.permutation(choose, len(z)) < count
        return z + jnp.where(chosen, scale * jax.random.normal(draw, z.shape), 0)

    return jax.vmap(one)(z, keys)


def interpolate(
    start: Float[Array, " latent"], end: Float[Array, " latent"], count: int
) -> Float[Array, "count latent"]:
    """`count` points from `start` to `end`, both included, on a line."""
    return jnp.linspace(start, end, count)


def traverse(
    z: Float[Array, " latent"], values: Float[Array, " count"]
) -> Float[Array, "latent count latent"]:
    """`z` with each latent in turn at each of the values (Higgins et al. 2017, Figure 4)."""
    moved = jnp.eye(len(z), dtype=bool)[:, None, :]
    return jnp.where(moved, values[None, :, None], z[None, None, :])
