"""Each likelihood against quadrature, SciPy and its own samples; the contract that all share."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from vae_jax.likelihoods import (
    BINARY,
    DENSITY,
    LEVELS,
    LIKELIHOODS,
    bernoulli,
    continuous_bernoulli,
    discretised_logistic,
    distortion,
    elementwise,
    gaussian,
    laplace,
    optimal_gaussian,
    unit_gaussian,
)
from vae_jax.nn.layers import softplus

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


SCALED = {
    "gaussian at 0.3": lambda: gaussian(0.3),
    "gaussian, learned": lambda: gaussian(0.3, learn_scale=True),
    "laplace, learned": lambda: laplace(0.3, learn_scale=True),
    "discretised_logistic, learned": lambda: discretised_logistic(0.3, learn_scale=True),
}


@pytest.fixture(params=[*LIKELIHOODS, *SCALED])
def likelihood(request):
    return (LIKELIHOODS | SCALED)[request.param]()


def variables_of(likelihood):
    state = {} if likelihood.init_state is None else {"likelihood": likelihood.init_state()}
    return {"params": {"likelihood": likelihood.init(jax.random.key(0))}} | state


def arrays(likelihood, samples):
    """The likelihood's variables, raw decoder outputs with leading sample axes, and images."""
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((*samples, 2, 3, 4, 3 * likelihood.channels))
    return variables_of(likelihood), jnp.asarray(raw, jnp.float32), jnp.asarray(rng.random((2, 3, 4, 3), np.float32))


def negative_log(likelihood, raw, x):
    """-log p(x | raw) of single pixels, with the constant, in float64."""
    energy = likelihood.energy(variables_of(likelihood), pixels(np.full(len(x), raw)), pixels(x))
    return np.float64(energy).ravel() + likelihood.constant


EXTREME = [-60.0, -9.0, -2.0, -1e-3, -1e-6, 0.0, 1e-5, 3e-3, 0.7, 5.0, 60.0]


@pytest.mark.parametrize("raw", EXTREME)
def test_each_likelihood_is_normalised(likelihood, raw):
    """Masses sum to 1 over their support, and densities integrate to 1: the continuous Bernoulli over [0, 1], the
    others over R.
    """
    if likelihood.support == BINARY:
        total = np.exp(-negative_log(likelihood, raw, np.array([0.0, 1.0]))).sum()
    elif likelihood.support == LEVELS:
        total = np.exp(-negative_log(likelihood, raw, np.arange(256) / 255)).sum()
    else:
        near, far = np.linspace(-0.2, 1.2, 100_001), np.linspace(1.2, 12, 10_001)
        if likelihood.energy.__qualname__.startswith("continuous"):
            near, far = np.linspace(0, 1, 100_001), np.zeros(0)
        parts = [part for part in (near, far, np.sort(1 - far)) if len(part)]
        total = sum(np.trapezoid(np.exp(-negative_log(likelihood, raw, part)), part) for part in parts)
    assert total == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("raw", [-60.0, -3.0, 0.0, 0.4, 60.0])
def test_the_logistic_masses_sum_to_one_at_any_scale(scale, raw):
    likelihood = discretised_logistic(scale)
    nats = negative_log(likelihood, raw, np.arange(256) / 255)
    assert np.isfinite(nats).all()
    assert np.exp(-nats).sum() == pytest.approx(1, abs=1e-5 if scale >= 1e-2 else 1e-4)


@pytest.mark.parametrize(
    "make,scipy_logpdf",
    [
        (lambda: gaussian(0.2), lambda x, m: scipy.stats.norm.logpdf(x, m, 0.2)),
        (lambda: gaussian(0.2, True), lambda x, m: scipy.stats.norm.logpdf(x, m, 0.2)),
        (lambda: laplace(0.2), lambda x, m: scipy.stats.laplace.logpdf(x, m, 0.2)),
        (lambda: laplace(0.2, True), lambda x, m: scipy.stats.laplace.logpdf(x, m, 0.2)),
        (bernoulli, lambda x, m: scipy.stats.bernoulli.logpmf(np.round(x), m)),
        (
            lambda: discretised_logistic(0.05),
            lambda x, m: np.log(
                scipy.stats.logistic.cdf(np.where(x == 1, np.inf, 255 * x + 0.5), 255 * m, 255 * 0.05)
                - scipy.stats.logistic.cdf(np.where(x == 0, -np.inf, 255 * x - 0.5), 255 * m, 255 * 0.05)
            ),
        ),
    ],
)
def test_each_equals_scipy(make, scipy_logpdf):
    x = np.array([0, 51, 128, 254, 255]) / 255 if make is not bernoulli else np.array([0.0, 1.0])
    for raw in (-3.0, 0.0, 1.5):
        expected = -scipy_logpdf(x, scipy.special.expit(raw))
        np.testing.assert_allclose(negative_log(make(), raw, x), expected, rtol=2e-5, atol=1e-5)


def test_the_continuous_bernoulli_is_the_cross_entropy_less_its_constant():
    """log C(l), in float64: l = 0.5, 0.3, 0.1, 0.01 and the limit 1e-4."""
    for l, log_c in [(0.5, 0.693147), (0.3, 0.750588), (0.1, 1.010339), (0.01, 1.545198), (1e-4, 2.220516)]:
        for x in (0.0, 0.3, 1.0):
            raw, at = scipy.special.logit(l), np.array([x])
            difference = negative_log(bernoulli(), raw, at) - negative_log(continuous_bernoulli(), raw, at)
            assert difference[0] == pytest.approx(log_c, abs=2e-5)


def test_softplus_and_its_derivatives():
    x = jnp.asarray([-np.inf, *EXTREME, np.inf], jnp.float32)
    np.testing.assert_allclose(softplus(x), np.logaddexp(0, np.float64(x)), rtol=1e-6, atol=1e-30)
    p = scipy.special.expit(np.float64(x))
    np.testing.assert_allclose(jax.vmap(jax.grad(softplus))(x), p, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(jax.vmap(jax.hessian(softplus))(x), p * (1 - p), rtol=1e-5, atol=1e-30)


def test_bernoulli_on_grey_pixels_is_its_mean_over_binary_images():
    x, raw = 0.3, 1.2
    both = negative_log(bernoulli(), raw, np.array([0.0, 1.0]))
    assert negative_log(bernoulli(), raw, np.array([x]))[0] == pytest.approx((1 - x) * both[0] + x * both[1], rel=1e-6)


def test_means_and_draws_agree(likelihood):
    """The mean of many draws is `mean`; for levels to half a grey level, as its docstring says."""
    n, raw = 40_000, jnp.asarray([-3.0, -1e-5, 0.0, 0.8, 4.0]).reshape(5, 1, 1)
    variables = variables_of(likelihood)
    drawn = np.float64(likelihood.sample(variables, jax.random.key(0), jnp.broadcast_to(raw, (n, 5, 1, 1))))
    error = 5 * drawn.std(axis=0) / math.sqrt(n) + (0.5 / 255 if likelihood.support == LEVELS else 1e-6)
    assert (np.abs(drawn.mean(axis=0) - likelihood.mean(variables, raw)) < error).all()
    if likelihood.support != DENSITY:
        assert drawn.min() >= 0 and drawn.max() <= 1


def test_derivatives_are_finite(likelihood):
    """At pixels 0, 1 and between, at raw outputs near 0 and far out, for raw and for the parameters."""
    variables = variables_of(likelihood)
    raw = jnp.asarray([*EXTREME, -1e4, 1e4], jnp.float32).reshape(-1, 1, 1, 1)

    def total(raw, params, x):
        image = jnp.full(raw.shape, x)
        return likelihood.energy({**variables, "params": params}, raw, image).sum()

    for x in (0.0, 1 / 255, 0.5, 1.0):
        for grads in jax.grad(total, (0, 1))(raw, variables["params"], x):
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_optimal_variance_is_the_mean_squared_error():
    """Its energy is D/2 (ln s^2 + 1) on average, and by the envelope theorem s^2 needs no gradient."""
    likelihood = optimal_gaussian()
    rng = np.random.default_rng(0)
    raw = jnp.asarray(rng.standard_normal((3, 4, 5, 6, 1)), jnp.float32)
    image = jnp.asarray(rng.random((4, 5, 6, 1)), jnp.float32)
    weight = jnp.asarray([1.0, 2.0, 0.0, 1.0])
    variables = variables_of(likelihood)
    error = np.mean((np.float64(image) - scipy.special.expit(np.float64(raw))) ** 2, axis=(0, 2, 3, 4))
    best = np.sum(weight * error) / np.sum(weight)

    used, state = likelihood.update(variables, raw, image, weight, None)
    assert likelihood.scale(used) == pytest.approx(math.sqrt(best), rel=1e-5)
    nats = np.float64(distortion(likelihood, used, raw, image)).mean(axis=0)
    assert np.sum(weight * nats) / np.sum(weight) == pytest.approx(30 / 2 * (math.log(best) + 1), rel=1e-5)
    assert likelihood.scale({"likelihood": state}) == pytest.approx(math.sqrt(best), rel=1e-5)  # debiased

    def loss(raw, through):
        used, _ = likelihood.update(variables, raw, image, weight, None)
        used = used if through == "stopped" else {"likelihood": {"total": variance(raw), "weight": jnp.ones(())}}
        return jnp.sum(weight * distortion(likelihood, used, raw, image).mean(axis=0))

    def variance(raw):
        errors = jnp.mean((image[None] - jax.nn.sigmoid(raw)) ** 2, axis=(0, 2, 3, 4))
        return jnp.sum(weight * errors) / jnp.sum(weight)

    stopped, through = (jax.grad(loss)(raw, how) for how in ("stopped", "through"))
    np.testing.assert_allclose(stopped, through, rtol=1e-3, atol=1e-6)


def test_evaluation_uses_the_variance_that_training_kept():
    likelihood = optimal_gaussian()
    state = likelihood.init_state()
    assert likelihood.scale({"likelihood": state}) == 1  # before training
    image, weight = jnp.zeros((1, 2, 2, 1)), jnp.ones(1)
    for size in (0.5, 0.3):
        raw = jnp.full((1, 1, 2, 2, 1), scipy.special.logit(size), jnp.float32)
        _, state = likelihood.update({"likelihood": state}, raw, image, weight, None)
    expected = (0.99 * 0.5**2 + 0.3**2) / 1.99
    assert likelihood.scale({"likelihood": state}) == pytest.approx(math.sqrt(expected), rel=1e-5)
    energy = likelihood.energy({"likelihood": state}, raw, image)
    np.testing.assert_allclose(energy, 0.5 * (0.3**2 / expected + math.log(expected)), rtol=1e-4)


def test_a_learned_scale_is_best_at_the_root_mean_square():
    likelihood = gaussian(0.3, learn_scale=True)
    image = jnp.asarray(np.random.default_rng(0).random((5, 4, 4, 1)), jnp.float32)
    raw = jnp.zeros((5, 4, 4, 1))
    best = math.log(np.sqrt(np.mean((np.float64(image) - 0.5) ** 2)))

    def loss(log_scale):
        return likelihood.energy({"params": {"likelihood": {"log_scale": log_scale}}}, raw, image).sum()

    assert jax.grad(loss)(jnp.float32(best)) == pytest.approx(0, abs=1e-3)
    assert jax.grad(loss)(jnp.float32(best + 0.1)) > 1 and jax.grad(loss)(jnp.float32(best - 0.1)) < -1


@pytest.mark.parametrize("make", [gaussian, laplace, discretised_logistic])
@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_above_zero(make, scale):
    with pytest.raises(ValueError, match=f"model.scale is {scale}, but must be above 0"):
        make(scale)


@pytest.mark.parametrize("samples", [(1,), (5,), (2, 3)])
def test_leading_samples_are_those_of_each_alone(likelihood, samples):
    """Energy, mean and distortion of several samples at once equal those of one sample after the other."""
    variables, raw, image = arrays(likelihood, samples)
    image = jnp.round(image) if likelihood.support == BINARY else image
    energy = likelihood.energy(variables, raw, image)
    mean = likelihood.mean(variables, raw)
    nats = distortion(likelihood, variables, raw, image)
    assert energy.shape == mean.shape == (*samples, *image.shape) and nats.shape == (*samples, 2)
    for place in np.ndindex(*samples):
        np.testing.assert_array_equal(energy[place], likelihood.energy(variables, raw[place], image))
        np.testing.assert_array_equal(mean[place], likelihood.mean(variables, raw[place]))
        expected = np.float64(energy[place]).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(nats[place], expected, rtol=1e-5)


def test_only_an_energy_of_each_pixel_alone_is_given_rows():
    """A copy with another energy is given images again."""
    given = []

    def energy(variables, raw, image):
        given.append(raw.shape)
        return 0 * raw

    image = jnp.zeros((2, 3, 4, 1))
    for of_pixels in (energy, elementwise(lambda *arguments: energy(*arguments))):
        distortion(unit_gaussian()._replace(energy=of_pixels), {}, image, image)
    assert given == [(2, 3, 4, 1), (2, 1, 1, 12)]


def test_each_likelihood_keeps_the_contract(likelihood):
    variables, raw, image = arrays(likelihood, (4,))
    assert likelihood.energy.is_elementwise
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
