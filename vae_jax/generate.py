"""Generate images with a trained model; pure functions of its variables."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vae_jax.model import Model


def decode(
    model: Model, variables: dict, z: Float[Array, "*samples latent"]
) -> Float[Array, "*samples height width channel"]:
    """The mean image of p(x | z), in [0, 1]."""
    return model.likelihood.mean(variables, model.decode_raw(variables, z))


def draw_pixels(
    model: Model, variables: dict, key: Key[Array, ""], z: Float[Array, "*samples latent"]
) -> Float[Array, "*samples height width channel"]:
    """One draw x ~ p(x | z) for each z."""
    return model.likelihood.sample(variables, key, model.decode_raw(variables, z))


def reconstruct(
    model: Model, variables: dict, image: Float[Array, "batch height width channel"]
) -> Float[Array, "batch height width channel"]:
    """decode(mean of q(z | image))."""
    mean, _ = model.encode(variables, image)
    return decode(model, variables, mean)


def sample(
    model: Model, variables: dict, key: Key[Array, ""], count: int
) -> Float[Array, "count height width channel"]:
    """decode(z) for `count` draws z ~ p(z)."""
    return decode(model, variables, model.prior.sample(variables, key, count))


def perturb(
    z: Float[Array, "batch latent"],
    keys: Key[Array, " batch"],
    share: float,
    scale: float,
) -> Float[Array, "batch latent"]:
    """Add scale * e with e ~ N(0, 1) to a random subset of the latents of each row.

    The subset has round(share * latents) latents and is drawn for each row. Source: the post, section "Experiment and
    Evaluation", which specifies neither the number of latents nor the amount of noise.
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
    """`count` points on the line from `start` to `end`, both included."""
    return jnp.linspace(start, end, count)


def traverse(z: Float[Array, " latent"], values: Float[Array, " count"]) -> Float[Array, "latent count latent"]:
    """Copies of `z` with one latent at a time set to each of the values (Higgins et al. 2017, Figure 4)."""
    moved = jnp.eye(len(z), dtype=bool)[:, None, :]
    return jnp.where(moved, values[None, :, None], z[None, None, :])
