"""p(z) as values."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

ABSENT: Any = None


class Prior(NamedTuple):
    """Pure functions that take the model's `variables` first. They read `params/prior`; vamp also reads the encoder,
    and a learned p(z | c) reads only the networks.

    Attributes:
        init: key -> the parameters, {} if there are none.
        log_prob: (variables, z) -> log p(z), summed over latents, in nats. `z` may have leading sample axes.
        sample: (variables, key, count) -> `count` draws z ~ p(z), [count, latent]; for p(z | c) one per condition.
        kl: (variables, mean, logvar) -> KL(N(mean, exp(logvar)) || p) of each latent, in nats, [batch, latent]; ABSENT
            (None) if there is no closed form.
        shared: whether p is the same for all examples; a learned p(z | c) is not.
    """

    init: Callable[[Any], dict]
    log_prob: Callable[[Any, Any], Float[Array, "*samples batch"]]
    sample: Callable[[Any, Any, int], Float[Array, "count latent"]]
    kl: Callable[[Any, Any, Any], Float[Array, "batch latent"]] = ABSENT
    shared: bool = True


def log_normal(
    z: Float[Array, "*samples batch latent"],
    mean: Float[Array, "batch latent"],
    logvar: Float[Array, "batch latent"],
) -> Float[Array, "*samples batch"]:
    """log N(z; mean, exp(logvar)), summed over latents, in nats."""
    mean, logvar = (part.reshape((1,) * (z.ndim - 2) + part.shape) for part in (mean, logvar))
    square = (z - mean) ** 2 * jnp.exp(-logvar)
    return -0.5 * jnp.sum(square + logvar + math.log(2 * math.pi), axis=-1)


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


def conditional_normal(parts: Callable[[Any], tuple]) -> Prior:
    """p(z | c) = N(m, diag(v)) for a batch of conditions; `parts(variables)` returns m and ln v, both [batch, latent].

    KL_j = 1/2 (ln v - logvar + (exp(logvar) + (mean - m)^2) / v - 1) for each latent.
    Source: Sohn et al. 2015, section 4.1.
    """

    def log_prob(variables, z: Float[Array, "*samples batch latent"]) -> Float[Array, "*samples batch"]:
        return log_normal(z, *parts(variables))

    def sample(variables, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        m, log_v = parts(variables)
        return m + jnp.exp(log_v / 2) * jax.random.normal(key, (count, m.shape[-1]))

    def kl(variables, mean: Float[Array, "batch latent"], logvar: Float[Array, "batch latent"]):
        m, log_v = parts(variables)
        return 0.5 * (log_v - logvar + (jnp.exp(logvar) + (mean - m) ** 2) * jnp.exp(-log_v) - 1)

    return Prior(init=lambda key: {}, log_prob=log_prob, sample=sample, kl=kl, shared=False)


def mixture_log_prob(
    z: Float[Array, "*samples batch latent"],
    log_weight: Float[Array, " components"],
    mean: Float[Array, "components latent"],
    logvar: Float[Array, "components latent"],
) -> Float[Array, "*samples batch"]:
    """log sum_c exp(log_weight_c) N(z; mean_c, exp(logvar_c)), in nats."""
    ones = (1,) * (z.ndim - 1)
    log_weight, mean, logvar = (part.reshape(*ones, *part.shape) for part in (log_weight, mean, logvar))
    square = (z[..., None, :] - mean) ** 2 * jnp.exp(-logvar)
    log_prob = -0.5 * jnp.sum(square + logvar + math.log(2 * math.pi), axis=-1)
    return jax.nn.logsumexp(log_weight + log_prob, axis=-1)


def mixture(latent_dim: int, components: int = 100) -> Prior:
    """sum_c w_c N(m_c, diag(v_c)) with learned weights, means and variances.

    Its KL has no closed form; objectives estimate it from the drawn z.
    """
    check_components(components)

    def init(key):
        return {
            "mean": jax.random.normal(key, (components, latent_dim)),
            "logvar": jnp.zeros((components, latent_dim)),
            "logit": jnp.zeros(components),
        }

    def parts(variables):
        own = variables["params"]["prior"]
        return jax.nn.log_softmax(own["logit"]), own["mean"], own["logvar"]

    return mixture_of(init, parts)


def vamp(
    latent_dim: int, encode: Callable[..., Any], image_shape: tuple[int, int, int], components: int = 100
) -> Prior:
    """The VampPrior: 1/C sum_c q(z | u_c), the mean of the posteriors of C learned pseudo-images in [0, 1].

    Its gradient reaches the encoder. The pseudo-images are initialised from N(0.05, 0.01^2), as in the authors' code.
    Source: Tomczak & Welling 2018, section 3.
    """
    check_components(components)

    def init(key):
        return {"image": 0.05 + 0.01 * jax.random.normal(key, (components, *image_shape))}

    def parts(variables):
        image = jnp.clip(variables["params"]["prior"]["image"], 0, 1)
        return (jnp.full(components, -math.log(components)), *encode(variables, image))

    return mixture_of(init, parts)


def mixture_of(init: Callable[[Any], dict], parts: Callable[[Any], tuple]) -> Prior:
    """A mixture of Gaussians; `parts(variables)` returns its log weights, means and log-variances."""
    return Prior(
        init=init,
        log_prob=lambda variables, z: mixture_log_prob(z, *parts(variables)),
        sample=lambda variables, key, count: mixture_sample(key, count, *parts(variables)),
    )


def mixture_sample(
    key: Key[Array, ""],
    count: int,
    log_weight: Float[Array, " components"],
    mean: Float[Array, "components latent"],
    logvar: Float[Array, "components latent"],
) -> Float[Array, "count latent"]:
    """Draw `count` samples from the mixture."""
    which, noise = jax.random.split(key)
    chosen = jax.random.categorical(which, log_weight, shape=(count,))
    return mean[chosen] + jnp.exp(logvar[chosen] / 2) * jax.random.normal(noise, (count, mean.shape[1]))


def check_components(components: int) -> None:
    """Raise ValueError if `components` is below 1."""
    if components < 1:
        raise ValueError(f"model.components is {components}, but must be at least 1")


PRIORS: dict[str, Callable[..., Prior]] = {"standard_normal": standard_normal, "mixture": mixture, "vamp": vamp}
