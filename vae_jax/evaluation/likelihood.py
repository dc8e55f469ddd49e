"""Estimates of log p(x) by importance sampling from q(z | x), and diagnostics of their reliability.

The estimate is the bound with K samples (Burda et al. 2016), log(1/K sum_k w_k) with w_k = p(x, z_k) / q(z_k | x). Its
mean is at most log p(x) for every K. For images drawn from the model there is also an upper bound.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from vae_jax.batch import Batch
from vae_jax.model import Model, Variables
from vae_jax.objectives import log_weights, reparameterize

TRUSTED = 0.7  # the largest Pareto k-hat of a reliable estimate (Vehtari et al. 2024)
SAMPLES_AT_ONCE = 32  # samples of each image that are decoded together
WEIGHED = 16  # images in a batch of a likelihood estimate
LEAST_TAIL = 5  # fewest weights for a Pareto fit
SMALLEST = 1e-300  # the fit would overflow with a smaller quartile


def make_log_weights(model: Model, samples: int, chunk: int = SAMPLES_AT_ONCE) -> Callable[..., Array]:
    """`measure(variables, batch, keys)`: log w_k of `samples` draws for each image, [batch, samples].

    They omit the likelihood's constant. At most `chunk` draws per image are decoded at once, to bound the memory. Draw
    k depends only on the example's key and on k, so the results do not depend on `chunk`.
    """
    chunk = min(chunk, samples)

    def measure(variables: Variables, batch: Batch, keys: Key[Array, " batch"]) -> Float[Array, "batch samples"]:
        net = model.of(batch)
        mean, logvar = net.encode(variables, batch.image)

        def some(first):
            z = reparameterize(mean, logvar, keys, chunk, first)
            raw = net.decode_raw(variables, z)
            return log_weights(net, variables, raw, z, mean, logvar, batch.image)

        log_w = lax.map(some, jnp.arange(0, samples, chunk))
        return log_w.reshape(-1, len(batch.image))[:samples].T

    return measure


def simulate(
    model: Model, variables: Variables, key: Key[Array, ""], count: int
) -> tuple[Float[Array, "count latent"], Float[Array, "count height width channel"]]:
    """`count` draws z ~ p(z), x ~ p(x | z). Each z is then a draw from the exact posterior of its x."""
    of_z, of_x = jax.random.split(key)
    z = model.prior.sample(variables, of_z, count)
    return z, model.likelihood.sample(variables, of_x, model.decode_raw(variables, z))


def log_weight_at(
    model: Model, variables: Variables, batch: Batch, z: Float[Array, "batch latent"]
) -> Float[Array, " batch"]:
    """log w at one given z per image."""
    net = model.of(batch)
    mean, logvar = net.encode(variables, batch.image)
    raw = net.decode_raw(variables, z[None])
    return log_weights(net, variables, raw, z[None], mean, logvar, batch.image)[0]


def log_mean_exp(log_w: Float[np.ndarray, "*n samples"]) -> Float[np.ndarray, "*n"]:
    """log(1/K sum_k w_k) over the last axis, in float64."""
    log_w = log_w.astype(np.float64)
    most = log_w.max(axis=-1)
    return most + np.log(np.mean(np.exp(log_w - most[..., None]), axis=-1))


def effective_sample_size(log_w: Float[np.ndarray, "n samples"]) -> Float[np.ndarray, " n"]:
    """(sum_k w_k)^2 / sum_k w_k^2, between 1 and K (Kong 1992)."""
    return np.exp(2 * log_mean_exp(log_w) - log_mean_exp(2 * log_w)) * log_w.shape[1]


def bound_of(log_w: Float[np.ndarray, "n samples"], count: int) -> Float[np.ndarray, " n"]:
    """Each image's importance-weighted bound on -log p(x) with `count` samples, averaged over disjoint blocks of
    samples.
    """
    blocks = log_w.shape[1] // count
    return -log_mean_exp(log_w[:, : blocks * count].reshape(len(log_w), blocks, count)).mean(axis=1)


def sandwich(
    log_w: Float[np.ndarray, "n samples"], log_w_true: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """A lower and an upper bound on log p(x), in expectation, for images drawn from the model.

        lower = log(1/K sum_k w_k),    upper = the same with z_1 replaced by the z that generated x

    That z is a draw from the posterior, so the mean of `upper` exceeds log p(x) by a KL divergence. Source: the
    bidirectional idea of Grosse et al. 2015, with importance sampling instead of annealing.
    """
    return log_mean_exp(log_w), log_mean_exp(np.concatenate([log_w_true[:, None], log_w[:, 1:]], axis=1))


def pareto_k(log_w: Float[np.ndarray, "n samples"]) -> Float[np.ndarray, " n"]:
    """Pareto k-hat of each image's largest weights. Above 0.7 the mean of the weights is unreliable.

    It is the shape of a generalised Pareto distribution fitted to the excesses of the min(K / 5, 3 sqrt(K)) largest
    weights over the next one. NaN if these are fewer than five. Source: Vehtari et al. 2024 (PSIS).
    """
    samples = log_w.shape[1]
    tail = math.ceil(min(samples / 5, 3 * math.sqrt(samples)))
    if tail < LEAST_TAIL:
        return np.full(len(log_w), np.nan)
    largest = np.sort(log_w.astype(np.float64), axis=1)[:, -tail - 1 :]
    weight = np.exp(largest - largest[:, -1:])
    return np.array([fit_pareto(row[1:] - row[0]) for row in weight])


def fit_pareto(excess: Float[np.ndarray, " tail"]) -> float:
    """The shape k of a generalised Pareto distribution fitted to ascending values.

    It is infinite if their first quartile is 0 or nearly so: -inf if all are, and inf if the others are so much larger.
    Source: Zhang & Stephens 2009, with the weak prior of Vehtari et al. 2024, which shrinks k towards 1/2.
    """
    n = len(excess)
    quarter = excess[int(n / 4 + 0.5) - 1]
    if quarter < SMALLEST:
        return math.inf if excess[-1] > 0 else -math.inf
    grid = 30 + int(math.sqrt(n))
    theta = 1 / excess[-1] + (1 - np.sqrt(grid / (np.arange(grid) + 0.5))) / (3 * quarter)
    k = np.mean(np.log1p(-theta[:, None] * excess), axis=1)
    log_posterior = n * (np.log(-theta / k) - k - 1)
    weight = np.exp(log_posterior - log_posterior.max())
    found = np.mean(np.log1p(-np.sum(weight * theta) / weight.sum() * excess))
    return float((n * found + 10 * 0.5) / (n + 10))


def summarize(log_w: Float[np.ndarray, "n samples"]) -> dict[str, Float[np.ndarray, " n"]]:
    """Per image: -log p(x) without the constant, effective sample size, Pareto k-hat, and the bounds with fewer
    samples.
    """
    samples = log_w.shape[1]
    fewer = [10**power for power in range(9) if 10**power < samples]
    return {
        "nll": -log_mean_exp(log_w),
        "effective_sample_size": effective_sample_size(log_w),
        "pareto_k": pareto_k(log_w),
        **{f"bound_{count}": bound_of(log_w, count) for count in fewer},
    }
