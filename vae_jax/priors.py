"""p(z) as values."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class Prior(NamedTuple):
    """Pure functions that take the model's `variables` first and read only `params/prior`.

    Attributes:
        init: key -> the parameters, {} where there are none.
        log_prob: (variables, z) -> log p(z), the sum over latents, in nats. `z` may have leading sample axes.
        sample: (variables, key, count) -> `count` draws z ~ p(z), [count, latent].
        kl: (variables, mean, logvar) -> KL(N(mean, exp(logvar)) || p) of each latent, in nats, [batch, latent].
    """

    init: Callable[[Any], dict]
    log_prob: Callable[[Any, Any], Float[Array, "*samples batch"]]
    sample: Callable[[Any, Any, int], Float[Array, "count latent"]]
    kl: Callable[[Any, Any, Any], Float[Array, "batch latent"]]


def standard_normal(latent_dim: int) -> Prior:
    """N(0, I), with KL_j = -1/2 (1 + logvar_j - mean_j^2 - exp(logvar_j)).

    Source: Kingma & Welling 2013, appendix B; the post's formula lacks the factor -1/2.
    """

    def log_prob(variables, z: Float[Array, "*samples batch latent"]) -> Float[Array, "*samples batch"]:
        return -0.5 * jnp.sum(z**2 + math.log(2 * math.pi), axis=-1)

    def sample(variables, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        return jax.random.normal(key, (count, latent_dim))

    def kl(
        variables,
        mean: Float[Array, "batch latent"],
        logvar: Float[Array, "batch latent"],
    ) -> Float[Array, "batch latent"]:
        return -0.5 * (1 + logvar - mean**2 - jnp.exp(logvar))

    return Prior(init=lambda key: {}, log_prob=log_prob, sample=sample, kl=kl)


PRIORS: dict[str, Callable[[int], Prior]] = {"standard_normal": standard_normal}
