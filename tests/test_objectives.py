"""The equations of the objectives against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax.batch import example_keys
from vae_jax.objectives import cross_entropy, negative_elbo, reparameterize

ROOT = jax.random.key(0)


def test_reparameterize_has_the_given_mean_and_deviation():
    n = 50_000
    keys = example_keys(ROOT, 0, jnp.arange(n))
    z = reparameterize(jnp.full((n, 2), 3.0), jnp.full((n, 2), np.log(4.0), jnp.float32), keys)[0]
    np.testing.assert_allclose(z.mean(axis=0), 3.0, atol=5 * 2 / np.sqrt(n))
    np.testing.assert_allclose(z.std(axis=0), 2.0, rtol=0.02)


def test_samples_of_one_example_are_independent():
    """[samples, batch, latent]: each example's samples have its mean and deviation, and nothing correlates."""
    mean, logvar = jnp.array([[1.0, -2.0], [0.0, 3.0]]), jnp.log(jnp.array([[4.0, 1.0], [0.25, 9.0]]))
    keys = example_keys(ROOT, 0, jnp.arange(2))
    n = 50_000
    z = np.float64(reparameterize(mean, logvar, keys, samples=n))
    assert z.shape == (n, 2, 2)
    mean, deviation = np.float64(mean), np.exp(np.float64(logvar) / 2)
    assert (np.abs(z.mean(axis=0) - mean) < 5 * deviation / np.sqrt(n)).all()
    np.testing.assert_allclose(z.std(axis=0), deviation, rtol=0.02)
    noise = ((z - mean) / deviation).reshape(n, 4)
    correlation = np.corrcoef(np.concatenate([noise[:-1], noise[1:]], axis=1).T)
    np.testing.assert_allclose(correlation, np.eye(8), atol=5 / np.sqrt(n))


def test_noise_belongs_to_the_example():
    index = jnp.array([7, 3, 3])
    keys = example_keys(ROOT, 5, index)
    zeros = jnp.zeros((3, 2))
    z = reparameterize(zeros, zeros, keys)[0]
    np.testing.assert_array_equal(z[1], z[2])
    alone = reparameterize(zeros[:1], zeros[:1], example_keys(ROOT, 5, index[:1]))[0]
    np.testing.assert_array_equal(z[:1], alone)
    assert not np.isin(z[0], z[1]).any()
    assert not np.isin(z, reparameterize(zeros, zeros, example_keys(ROOT, 6, index))).any()


def test_negative_elbo_is_the_mean_distortion_plus_the_weighted_kl():
    distortion = jnp.array([[1.0, 2.0], [4.0, 0.0], [1.0, 7.0]])
    kl = jnp.array([0.5, 10.0])
    np.testing.assert_array_equal(negative_elbo(distortion, kl), [2.5, 13.0])
    np.testing.assert_array_equal(negative_elbo(distortion, kl, 3.0), [3.5, 33.0])
    np.testing.assert_array_equal(negative_elbo(distortion[:1], kl, jnp.float32(0)), [1.0, 2.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_is_the_negative_log_likelihood_smoothed(smoothing):
    """(1 - s) of the label's negative log-likelihood, and s of the mean over all labels."""
    logits = 3 * jax.random.normal(jax.random.key(1), (5, 3))
    label = jnp.arange(5) % 3
    p = np.exp(np.float64(logits))
    log_p = np.log(p / p.sum(axis=1, keepdims=True))
    expected = -(1 - smoothing) * log_p[range(5), label] - smoothing * log_p.mean(axis=1)
    np.testing.assert_allclose(cross_entropy(logits, label, smoothing), expected, rtol=1e-5)
