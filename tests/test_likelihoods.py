"""Each likelihood against quadrature, SciPy and its own samples; the contract that all share."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from vae_jax.likelihoods import LIKELIHOODS, distortion, unit_gaussian

RAW = np.array([-30.0, -2.0, 0.0, 0.7, 5.0], np.float32)


def pixels(values):
    """One image a value, of one pixel."""
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1)


def test_unit_gaussian_is_a_density():
    """exp(-(energy + constant)) integrates to 1 over x, with mean sigmoid(raw) and variance 1."""
    likelihood = unit_gaussian()
    x, step = np.linspace(-10, 11, 2101, retstep=True)
    for raw in RAW:
        energy = likelihood.energy({}, pixels(np.full(len(x), raw)), pixels(x))
        density = np.exp(-(np.float64(energy).ravel() + likelihood.constant))
        mean = np.sum(x * density) * step
        assert np.sum(density) * step == pytest.approx(1, abs=1e-6)
        assert mean == pytest.approx(scipy.special.expit(raw), abs=1e-6)
        assert np.sum((x - mean) ** 2 * density) * step == pytest.approx(1, abs=1e-5)


def test_unit_gaussian_equals_scipy():
    likelihood = unit_gaussian()
    raw = np.repeat(RAW, 3)
    x = np.tile(np.float32([0.0, 0.3, 1.0]), len(RAW))
    energy = np.float64(likelihood.energy({}, pixels(raw), pixels(x))).ravel()
    expected = -scipy.stats.norm.logpdf(x, scipy.special.expit(raw), 1)
    np.testing.assert_allclose(energy + likelihood.constant, expected, rtol=1e-6)
    assert isinstance(likelihood.constant, float)
    assert likelihood.constant == pytest.approx(0.5 * math.log(2 * math.pi), rel=1e-15)


def test_unit_gaussian_draws_with_its_mean_and_variance():
    likelihood = unit_gaussian()
    n = 100_000
    raw = jnp.tile(pixels(RAW).reshape(1, 5, 1, 1, 1), (n, 1, 1, 1, 1))
    x = np.float64(likelihood.sample({}, jax.random.key(0), raw)).reshape(n, 5)
    np.testing.assert_allclose(x.mean(axis=0), scipy.special.expit(RAW), atol=5 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(x.T), np.eye(5), atol=5 * np.sqrt(2 / n))


def test_distortion_is_half_the_squared_error_summed_over_pixels():
    image = jnp.zeros((2, 3, 4, 1))
    raw = jnp.full((2, 3, 4, 1), scipy.special.logit(0.5))
    np.testing.assert_allclose(distortion(unit_gaussian(), {}, raw, image), 0.5 * 12 * 0.25)
    image = jnp.asarray(np.random.default_rng(0).random((2, 3, 4, 3), np.float32))
    raw = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 4, 3)), jnp.float32)
    error = np.float64(image) - scipy.special.expit(np.float64(raw))
    expected = [0.5 * np.sum(one**2) for one in error]
    np.testing.assert_allclose(distortion(unit_gaussian(), {}, raw, image), expected, rtol=1e-6)


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request):
    return LIKELIHOODS[request.param]()


def arrays(likelihood, samples):
    """The likelihood's variables, raw decoder outputs with leading sample axes, and images."""
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((*samples, 2, 3, 4, 3 * likelihood.channels))
    variables = {"params": {"likelihood": likelihood.init(jax.random.key(0))}}
    return variables, jnp.asarray(raw, jnp.float32), jnp.asarray(rng.random((2, 3, 4, 3), np.float32))


@pytest.mark.parametrize("samples", [(1,), (5,), (2, 3)])
def test_leading_samples_are_those_of_each_alone(likelihood, samples):
    """Energy, mean and distortion of several samples at once equal those of one sample after the other."""
    variables, raw, image = arrays(likelihood, samples)
    energy = likelihood.energy(variables, raw, image)
    mean = likelihood.mean(variables, raw)
    nats = distortion(likelihood, variables, raw, image)
    assert energy.shape == mean.shape == (*samples, *image.shape) and nats.shape == (*samples, 2)
    for place in np.ndindex(*samples):
        np.testing.assert_array_equal(energy[place], likelihood.energy(variables, raw[place], image))
        np.testing.assert_array_equal(mean[place], likelihood.mean(variables, raw[place]))
        expected = np.float64(energy[place]).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(nats[place], expected, rtol=1e-5)


def test_each_likelihood_keeps_the_contract(likelihood):
    variables, raw, image = arrays(likelihood, (4,))
    assert likelihood.support in ("density on [0, 1]", "mass on {0, 1}", "mass on 0..255")
    mean = likelihood.mean(variables, 20 * raw)
    assert 0 <= mean.min() and mean.max() <= 1
    key = jax.random.key(1)
    drawn = likelihood.sample(variables, key, raw)
    assert drawn.shape == (4, *image.shape) and drawn.dtype == jnp.float32
    np.testing.assert_array_equal(drawn, likelihood.sample(variables, jax.random.key(1), raw))
    assert (drawn != likelihood.sample(variables, jax.random.key(2), raw)).any()
    for name, arguments in {"energy": 3, "mean": 2, "sample": 3}.items():
        first, *others = inspect.signature(getattr(likelihood, name)).parameters
        assert first == "variables" and len(others) == arguments - 1
