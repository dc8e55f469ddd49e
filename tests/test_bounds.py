"""The importance-weighted bound and the warm-up of beta, on a model whose evidence is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import run_job, small_job

from vae_jax.batch import Batch, example_keys
from vae_jax.families import Model, vae
from vae_jax.likelihoods import unit_gaussian
from vae_jax.objectives import importance_weighted_bound, log_normal, warm_up
from vae_jax.priors import standard_normal
from vae_jax.run import session

W, NOISE, X = 1.3, 0.5, 0.7  # x = W z + e, z ~ N(0, 1), e ~ N(0, NOISE)
LOG_P = -0.5 * (math.log(2 * math.pi * (W**2 + NOISE)) + X**2 / (W**2 + NOISE))
POSTERIOR = W * X / (W**2 + NOISE), NOISE / (W**2 + NOISE)


def linear_gaussian(mean, variance):
    """The model above with q(z | x) = N(mean, variance), as a likelihood of its own."""
    energy = lambda variables, raw, image: 0.5 * (raw - image[None]) ** 2 / NOISE
    p_x = unit_gaussian()._replace(energy=energy, constant=0.5 * math.log(2 * math.pi * NOISE))

    def encode(variables, image):
        n = len(image)
        return jnp.full((n, 1), mean) + variables["shift"], jnp.full((n, 1), math.log(variance))

    return Model(
        init=lambda key: {"shift": jnp.zeros(())},
        latent_dim=1,
        encode=encode,
        decode_raw=lambda variables, z: W * z.reshape(*z.shape[:-1], 1, 1, 1),
        likelihood=p_x,
        prior=standard_normal(1),
    )


def batch_of(n):
    return Batch(jnp.full((n, 1, 1, 1), X), -jnp.ones(n, jnp.int32), jnp.ones(n), jnp.arange(n))


def log_bounds(model, samples, n=20_000):
    """The bound on log p(x) of n independent draws, with the likelihood's constant."""
    batch, keys = batch_of(n), example_keys(jax.random.key(0), 0, jnp.arange(n))
    objective = vae.make_objective(model, samples=samples)
    metrics, _ = jax.jit(lambda batch, keys: objective({"shift": jnp.zeros(())}, batch, keys, True, 0))(batch, keys)
    return -np.float64(metrics["bound"]) - model.likelihood.constant


def test_the_evidence_of_the_linear_gaussian_model():
    assert pytest.approx(-1.422761, abs=1e-6) == LOG_P
    np.testing.assert_allclose(POSTERIOR, (0.415525, 0.228311), atol=1e-6)


@pytest.mark.parametrize("samples,expected", [(1, -1.855378), (5, -1.463), (50, -1.426)])
def test_bounds_rise_to_the_evidence(samples, expected):
    """With q = N(0.2, 0.6); the values of 5 and 50 samples are Monte Carlo estimates to 0.002."""
    values = log_bounds(linear_gaussian(0.2, 0.6), samples)
    error = 4 * values.std() / math.sqrt(len(values)) + (0.003 if samples > 1 else 0)
    assert values.mean() == pytest.approx(expected, abs=error)
    assert values.mean() < LOG_P + error


@pytest.mark.parametrize("samples", [2, 7])
def test_every_draw_gives_the_evidence_if_q_is_the_posterior(samples):
    np.testing.assert_allclose(log_bounds(linear_gaussian(*POSTERIOR), samples, n=50), LOG_P, atol=1e-5)


def test_one_sample_is_the_elbo_and_equal_weights_are_themselves():
    log_w = jax.random.normal(jax.random.key(0), (1, 5))
    np.testing.assert_allclose(importance_weighted_bound(log_w), -log_w[0], rtol=1e-6)
    np.testing.assert_allclose(importance_weighted_bound(jnp.full((9, 5), 3.0)), -3.0, rtol=1e-6)
    far = jnp.array([[-1e4], [-2e4]])  # no underflow
    np.testing.assert_allclose(importance_weighted_bound(far), 1e4 + math.log(2), rtol=1e-6)


def test_the_log_density_integrates_to_one():
    mean, logvar = jnp.array([[0.3]]), jnp.array([[-0.7]])
    z = jnp.linspace(-9, 9, 20_001).reshape(-1, 1, 1)
    density = np.exp(np.float64(log_normal(z, mean, logvar)))[:, 0]
    assert np.trapezoid(density, np.asarray(z)[:, 0, 0]) == pytest.approx(1, abs=1e-5)


def test_beta_weighs_the_ratio_in_the_loss_but_not_in_the_bound():
    model, batch = linear_gaussian(0.2, 0.6), batch_of(3)
    keys = example_keys(jax.random.key(0), 0, batch.index)
    runs = [
        vae.make_objective(model, samples=4, beta=beta)({"shift": jnp.zeros(())}, batch, keys, True, 0)[0]
        for beta in (1.0, 0.0)
    ]
    np.testing.assert_array_equal(runs[0]["bound"], runs[1]["bound"])
    np.testing.assert_array_equal(runs[0]["loss"], runs[0]["bound"])
    assert (runs[1]["loss"] != runs[1]["bound"]).all()


def test_the_weight_rises_linearly_and_is_whole_in_evaluation():
    rising = [float(warm_up(2.0, jnp.asarray(step), 4)) for step in range(6)]
    np.testing.assert_allclose(rising, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert warm_up(2.0, None, 4) == 2.0 and warm_up(2.0, 0, 0) == 2.0


@pytest.mark.parametrize("fields", [{"warmup_steps": 12}, {"samples": 3}])
def test_two_epochs_and_one_more_equal_three(tmp_path, fields):
    def job_of(epochs):
        _, config = small_job({"epochs": epochs})
        config["objective"] |= fields
        return session.build(config)._replace(figures=lambda *_: {}), config

    straight, _ = run_job(*job_of(3), tmp_path / "straight")
    run_job(*job_of(2), tmp_path / "parts")
    parts, _ = run_job(*job_of(3), tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, straight.params, parts.params)


@pytest.mark.parametrize("field,value,least", [("samples", 0, 1), ("warmup_steps", -1, 0), ("beta", -0.5, 0)])
def test_fields_out_of_range(field, value, least):
    with pytest.raises(ValueError, match=f"objective.{field} is {value}, but must be at least {least}"):
        vae.make_objective(linear_gaussian(0.2, 0.6), **{field: value})
