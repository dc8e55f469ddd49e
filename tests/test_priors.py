"""Each prior against SciPy, Monte Carlo and its own samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vae_jax.priors import PRIORS, standard_normal


def test_log_prob_equals_scipy():
    """Summed over latents, normalised, for any leading sample axes."""
    z = np.random.default_rng(0).normal(scale=3, size=(4, 2, 5, 3)).astype(np.float32)
    expected = scipy.stats.norm.logpdf(np.float64(z)).sum(axis=-1)
    prior = standard_normal(3)
    np.testing.assert_allclose(prior.log_prob({}, jnp.asarray(z)), expected, rtol=1e-6)
    np.testing.assert_allclose(prior.log_prob({}, jnp.asarray(z[0, 0])), expected[0, 0], rtol=1e-6)


def test_kl_equals_the_closed_form_of_each_latent():
    """KL(N(m, s^2) || N(0, 1)) = ln(1 / s) + (s^2 + m^2 - 1) / 2, not summed over latents."""
    mean, deviation = np.array([[0.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), np.array([[1.0, 1.0, 0.3], [2.0, 0.1, 1.0]])
    logvar = jnp.asarray(2 * np.log(deviation), jnp.float32)
    expected = -np.log(deviation) + (deviation**2 + mean**2 - 1) / 2
    kl = standard_normal(3).kl({}, jnp.asarray(mean, jnp.float32), logvar)
    np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-7)


def test_kl_at_the_standard_normal_is_exactly_zero():
    np.testing.assert_array_equal(standard_normal(4).kl({}, jnp.zeros((2, 4)), jnp.zeros((2, 4))), 0)


@pytest.fixture(params=PRIORS)
def prior(request):
    """A prior of three latents, and the variables that it reads."""
    prior = PRIORS[request.param](3)
    return prior, {"params": {"prior": prior.init(jax.random.key(0))}}


def test_kl_equals_monte_carlo(prior):
    """The mean of log q(z) - log p(z) over z ~ q, of each latent and of all together."""
    prior, variables = prior
    mean, logvar = jnp.array([[0.5, -1.0, 0.0]]), jnp.array([[0.2, -1.5, 0.0]])
    n = 200_000
    z = mean + jnp.exp(logvar / 2) * jax.random.normal(jax.random.key(1), (n, 3))
    log_q = scipy.stats.norm.logpdf(z, mean, np.exp(logvar / 2)).sum(axis=-1)
    log_ratio = log_q - prior.log_prob(variables, z)
    kl = prior.kl(variables, mean, logvar)
    assert kl.shape == mean.shape
    np.testing.assert_allclose(kl.sum(), log_ratio.mean(), atol=5 * log_ratio.std() / np.sqrt(n))


def test_draws_have_the_moments_and_follow_the_key():
    sample = standard_normal(2).sample
    z = sample({}, jax.random.key(0), 20_000)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=5 / np.sqrt(20_000))
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=0.05)
    np.testing.assert_allclose((z**4).mean(axis=0), 3, atol=5 * np.sqrt(96 / 20_000))
    np.testing.assert_array_equal(z, sample({}, jax.random.key(0), 20_000))
    assert (z != sample({}, jax.random.key(1), 20_000)).all()


def test_draws_are_of_the_density(prior):
    """The mean of g(z) / p(z) over z ~ p is 1 for any density g, which ties `sample` to `log_prob`."""
    prior, variables = prior
    n = 200_000
    z = prior.sample(variables, jax.random.key(2), n)
    assert z.shape == (n, 3)
    log_g = scipy.stats.norm.logpdf(z, 0.3, 0.7).sum(axis=-1)
    ratio = np.exp(log_g - np.float64(prior.log_prob(variables, z)))
    np.testing.assert_allclose(ratio.mean(), 1, atol=5 * ratio.std() / np.sqrt(n))
