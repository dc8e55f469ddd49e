"""log p(x) by importance sampling: known evidence, any chunk, weights that cannot be trusted, the sandwich, a trained
model.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from small_run import run_job, small_job
from test_bounds import LOG_P, POSTERIOR, batch_of, linear_gaussian

import vae_jax
from vae_jax.batch import Batch, example_keys
from vae_jax.evaluation.likelihood import (
    bound_of,
    effective_sample_size,
    fit_pareto,
    log_mean_exp,
    log_weight_at,
    make_log_weights,
    pareto_k,
    sandwich,
    simulate,
    summarize,
)

VARIABLES = {"shift": jnp.zeros(())}


def log_weights(model, samples, chunk, n=400, **given):
    keys = example_keys(jax.random.key(0), None, jnp.arange(n))
    batch = batch_of(n)._replace(**given)
    return np.asarray(jax.jit(make_log_weights(model, samples, chunk))(VARIABLES, batch, keys))


def test_the_estimate_reaches_the_known_evidence_within_its_interval():
    model = linear_gaussian(0.2, 0.6)
    found = -log_mean_exp(log_weights(model, 1000, 100)) + model.likelihood.constant
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert found.mean() == pytest.approx(-LOG_P, abs=4 * error)
    assert error < 0.005


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunks_of_any_size_agree(chunk):
    model = linear_gaussian(0.2, 0.6)
    np.testing.assert_allclose(log_weights(model, 64, chunk, 16), log_weights(model, 64, 64, 16), atol=1e-5)


def test_at_the_posterior_every_weight_is_the_evidence_and_counts_fully():
    model = linear_gaussian(*POSTERIOR)
    log_w = log_weights(model, 50, 50, 16)
    np.testing.assert_allclose(log_w - model.likelihood.constant, LOG_P, atol=1e-5)
    np.testing.assert_allclose(effective_sample_size(log_w), 50, rtol=1e-6)


@pytest.mark.parametrize("samples", [1, 3, 1000])
def test_constant_weights_return_themselves(samples):
    """The mean divides by the number of samples that were really drawn."""
    for value in (0.0, -1490.25, -1e5):
        log_w = np.full((4, samples), value, np.float32)
        np.testing.assert_allclose(log_mean_exp(log_w), log_w[:, 0], atol=1e-10)
        for count in {1, 3, samples}:
            if count <= samples:
                np.testing.assert_allclose(bound_of(log_w, count), -log_w[:, 0], atol=1e-10)


def test_the_effective_sample_size_of_known_weights():
    log_w = np.log(np.array([[1.0, 1.0, 1e-300, 1e-300], [3.0, 1.0, 1e-300, 1e-300]]))
    np.testing.assert_allclose(effective_sample_size(log_w), [2, 16 / 10])


def test_fewer_samples_give_a_higher_bound_and_one_the_elbo():
    log_w = log_weights(linear_gaussian(0.2, 0.6), 1000, 1000)
    bounds = [bound_of(log_w, count).mean() for count in (1, 10, 100)] + [-log_mean_exp(log_w).mean()]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == pytest.approx(-log_w.mean(dtype=np.float64), rel=1e-12)
    assert {"bound_1", "bound_10", "bound_100"} < {*summarize(log_w)} and "bound_1000" not in summarize(log_w)


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.9])
def test_a_pareto_fit_finds_the_shape(shape):
    """The prior counts as ten of the 4,000 values."""
    excess = np.sort(scipy.stats.genpareto.rvs(shape, scale=2.5, size=4000, random_state=0))
    assert fit_pareto(excess) == pytest.approx(shape, abs=0.06)


def test_k_hat_tells_weights_without_a_variance_from_bounded_ones():
    rng = np.random.default_rng(0)
    heavy = rng.pareto(1.0, (20, 2000)) + 1  # k = 1: the mean is infinite
    bounded = rng.uniform(1, 2, (20, 2000))
    assert np.median(pareto_k(np.log(heavy))) > 0.7
    assert np.median(pareto_k(np.log(bounded))) < 0.3
    assert (pareto_k(np.zeros((2, 2000))) == -math.inf).all()
    assert (pareto_k(1000 * rng.normal(size=(5, 2000))) == math.inf).all()  # the other weights underflow
    assert np.isnan(pareto_k(np.zeros((2, 20)))).all()


def test_the_sandwich_holds_the_evidence_and_closes():
    """Images simulated from x = 1.3 z + e, whose evidence is known for each."""
    model = linear_gaussian(0.2, 0.6)
    model = model._replace(
        likelihood=model.likelihood._replace(
            sample=lambda variables, key, raw: raw + math.sqrt(0.5) * jax.random.normal(key, raw.shape)
        )
    )
    z, image = simulate(model, VARIABLES, jax.random.key(1), 400)
    evidence = scipy.stats.norm.logpdf(np.asarray(image).ravel(), scale=math.sqrt(1.3**2 + 0.5)).mean()
    widths = []
    for samples in (3, 30, 1000):
        log_w = log_weights(model, samples, samples, image=image)
        true = jax.jit(functools.partial(log_weight_at, model))(VARIABLES, batch_of(400)._replace(image=image), z)
        lower, upper = sandwich(log_w, np.asarray(true))
        error = 3 * (upper - lower).std() / 20
        assert lower.mean() - model.likelihood.constant <= evidence + error
        assert upper.mean() - model.likelihood.constant >= evidence - error
        widths.append((upper - lower).mean())
    assert widths[0] > widths[1] > widths[2] > 0 and widths[2] < 0.2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    run_job(*small_job({"epochs": 1}), path)
    return vae_jax.load(str(path))


def test_a_loaded_model_estimates_and_adds_the_constant(trained):
    image = trained.sample(5)
    found = trained.log_likelihood(image, samples=40)
    batch = Batch(jnp.asarray(image), jnp.zeros(5, jnp.int32), jnp.ones(5), jnp.arange(5))
    keys = example_keys(jax.random.key(0), None, batch.index)
    weights = np.asarray(make_log_weights(trained.model, 40, 40)(trained.variables, batch, keys))
    expected = log_mean_exp(weights) - 784 * 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(trained.log_likelihood(image[:2], samples=40), found[:2], rtol=1e-6)


@pytest.mark.parametrize("samples", [0, -3, True, 10**7])
def test_a_wrong_number_of_samples_is_refused(trained, samples):
    with pytest.raises(ValueError, match="samples is .*, but must be an integer from 1 to 1000000"):
        trained.log_likelihood(trained.sample(1), samples=samples)
