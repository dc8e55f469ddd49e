"""Objectives against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax.objectives import (
    Batch,
    elbo,
    example_keys,
    half_squared_error,
    kl_to_standard_normal,
    reparameterize,
)

ROOT = jax.random.key(0)


def make_batch(image):
    n = len(image)
    return Batch(image, -jnp.ones(n, jnp.int32), jnp.ones(n), jnp.arange(n))


def test_kl_equals_monte_carlo():
    mean, logvar = jnp.array([[0.5, -1.0, 0.0]]), jnp.array([[0.2, -1.5, 0.0]])
    samples = 200_000
    z = mean + jnp.exp(logvar / 2) * jax.random.normal(ROOT, (samples, 3))
    log_ratio = 0.5 * jnp.sum(
        z**2 - (z - mean) ** 2 / jnp.exp(logvar) - logvar, axis=-1
    )
    error = 5 * log_ratio.std() / np.sqrt(samples)
    np.testing.assert_allclose(
        kl_to_standard_normal(mean, logvar)[0], log_ratio.mean(), atol=error
    )


def test_kl_of_the_prior_is_zero_and_sums_over_latents():
    np.testing.assert_array_equal(
        kl_to_standard_normal(jnp.zeros((2, 4)), jnp.zeros((2, 4))), 0
    )
    np.testing.assert_allclose(
        kl_to_standard_normal(jnp.full((1, 4), 2.0), jnp.zeros((1, 4))), 4 * 2.0**2 / 2
    )


def test_reconstruction_is_half_the_squared_error_summed_over_pixels():
    image = jnp.zeros((2, 3, 4, 1))
    np.testing.assert_allclose(half_squared_error(image, image + 0.5), 0.5 * 12 * 0.25)


def test_reparameterize_has_the_given_mean_and_deviation():
    n = 50_000
    keys = example_keys(ROOT, 0, jnp.arange(n))
    z = reparameterize(
        jnp.full((n, 2), 3.0), jnp.full((n, 2), np.log(4.0), jnp.float32), keys
    )
    np.testing.assert_allclose(z.mean(axis=0), 3.0, atol=5 * 2 / np.sqrt(n))
    np.testing.assert_allclose(z.std(axis=0), 2.0, rtol=0.02)


def linear_gaussian():
    """x = W z + e with z, e ~ N(0, I) and orthogonal columns: the posterior is diagonal, log p(x) is known."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((6, 2)))
    w = q * np.array([2.0, 0.7])
    precision = 1 + np.array([2.0, 0.7]) ** 2
    x = rng.standard_normal((1, 6)) @ np.linalg.cholesky(w @ w.T + np.eye(6)).T
    covariance = w @ w.T + np.eye(6)
    log_p = (
        -0.5
        * (
            x @ np.linalg.solve(covariance, x.T)
            + np.linalg.slogdet(covariance)[1]
            + 6 * np.log(2 * np.pi)
        ).item()
    )
    w, precision = jnp.asarray(w, jnp.float32), jnp.asarray(precision, jnp.float32)

    def encode(variables, image):
        mean = (image.reshape(-1, 6) @ w) / precision[None, :] + variables["shift"]
        return mean, jnp.broadcast_to(-jnp.log(precision), mean.shape)

    def decode(variables, z):
        return (z @ w.T).reshape(-1, 2, 3, 1)

    return encode, decode, jnp.asarray(x, jnp.float32).reshape(1, 2, 3, 1), log_p


@pytest.mark.parametrize("shift,kl", [(0.0, 0.0), (0.5, 0.5 * 0.25 * (5 + 1.49))])
def test_elbo_of_a_linear_gaussian_model_is_its_evidence_less_the_posterior_gap(
    shift, kl
):
    """-ELBO = -log p(x) + KL(q || posterior), D/2 ln(2 pi) left out; the KL of a shift s is 1/2 s^2 sum(precision)."""
    encode, decode, image, log_p = linear_gaussian()
    n = 40_000
    batch = make_batch(jnp.broadcast_to(image, (n, *image.shape[1:])))
    objective = functools.partial(elbo, encode=encode, decode=decode)
    metrics, model_state = objective(
        {"shift": jnp.full((1, 2), shift)},
        batch,
        example_keys(ROOT, 0, batch.index),
        train=True,
    )
    assert model_state == {}
    loss = metrics["loss"] + 6 / 2 * np.log(2 * np.pi)
    np.testing.assert_allclose(
        loss.mean(), -log_p + kl, atol=5 * loss.std() / np.sqrt(n)
    )


def test_beta_weighs_the_kl():
    encode, decode, image, _ = linear_gaussian()
    batch = make_batch(image)
    variables = {"shift": jnp.zeros((1, 2))}
    keys = example_keys(ROOT, 0, batch.index)
    metrics, _ = elbo(
        variables, batch, keys, True, encode=encode, decode=decode, beta=3.0
    )
    np.testing.assert_allclose(
        metrics["loss"], metrics["reconstruction"] + 3 * metrics["kl"], rtol=1e-6
    )


def test_noise_belongs_to_the_example():
    index = jnp.array([7, 3, 3])
    keys = example_keys(ROOT, 5, index)
    zeros = jnp.zeros((3, 2))
    z = reparameterize(zeros, zeros, keys)
    np.testing.assert_array_equal(z[1], z[2])
    np.testing.assert_array_equal(
        z[:1], reparameterize(zeros[:1], zeros[:1], example_keys(ROOT, 5, index[:1]))
    )
    assert not np.isin(z[0], z[1]).any()
    assert not np.isin(
        z, reparameterize(zeros, zeros, example_keys(ROOT, 6, index))
    ).any()
