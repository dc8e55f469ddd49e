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
from vae_jax.objectives import free_bits_kl, importance_weighted_bound, warm_up
from vae_jax.priors import log_normal, standard_normal

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


def test_the_elbo_is_exact_where_the_noise_has_its_moments(monkeypatch):
    """The ELBO with q = N(0.2, 0.6) is quadratic in the noise, so e = 1 and e = -1 give its exact mean."""
    draw = lambda mean, logvar, keys, samples: (mean + jnp.exp(logvar / 2) * jnp.array([[1.0], [-1.0]]))[None]
    monkeypatch.setattr(vae, "reparameterize", draw)
    values = log_bounds(linear_gaussian(0.2, 0.6), 1, n=2)
    assert values.mean() == pytest.approx(-1.855378, abs=1e-6)


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


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"objective.warmup_steps": 12}, {"objective.samples": 3}])
def test_two_epochs_and_one_more_equal_three(tmp_path, changes):
    three = small_job(changes | {"epochs": 3})
    straight, _ = run_job(*three, tmp_path / "straight")
    run_job(*small_job(changes), tmp_path / "parts")
    parts, _ = run_job(*three, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, straight.params, parts.params)


def trained(mean, variance):
    """The linear-Gaussian model whose q has parameters phi = (mean, logvar) and whose decoder has w as theta."""
    base = linear_gaussian(0.0, 1.0)

    def encode(variables, image):
        phi, n = variables["params"]["phi"], len(image)
        return jnp.full((n, 1), phi[0]), jnp.full((n, 1), phi[1])

    def decode_raw(variables, z):
        return variables["params"]["theta"] * z.reshape(*z.shape[:-1], 1, 1, 1)

    variables = {"params": {"phi": jnp.array([mean, math.log(variance)]), "theta": jnp.array(W)}}
    return base._replace(encode=encode, decode_raw=decode_raw), variables


def gradient(model, variables, n, **fields):
    """Each image's gradient of the loss, {name: [n, ...]}, and the losses."""
    objective = vae.make_objective(model, **fields)
    keys = example_keys(jax.random.key(0), 0, jnp.arange(n))

    def loss(params, key):
        one = jax.tree.map(lambda leaf: leaf[:1], batch_of(1))
        return objective({"params": params}, one, key[None], True, 0)[0]["loss"][0]

    losses, grads = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(variables["params"], keys)
    return np.float64(losses), jax.tree.map(np.float64, grads)


def test_the_doubly_reparameterised_gradient_of_q_is_zero_at_the_posterior():
    model, variables = trained(*POSTERIOR)
    _, plain = gradient(model, variables, 50, samples=5)
    _, dreg = gradient(model, variables, 50, samples=5, estimator="dreg")
    assert np.abs(dreg["phi"]).max() < 1e-5
    assert np.abs(plain["phi"]).max() > 0.01


@pytest.mark.parametrize(
    "fields,rtol", [({}, 1e-6), ({"warmup_steps": 4}, 1e-5)]
)  # at the first of four steps beta is 1/4
def test_the_two_estimators_agree(fields, rtol):
    """Value and gradient of theta with the same noise, and the gradient of phi on average, at less variance."""
    model, variables = trained(0.2, 0.6)
    values, plain = gradient(model, variables, 100_000, samples=5, **fields)
    same, dreg = gradient(model, variables, 100_000, samples=5, estimator="dreg", **fields)
    np.testing.assert_allclose(values, same, rtol=rtol)
    np.testing.assert_allclose(dreg["theta"], plain["theta"], rtol=1e-4, atol=1e-5)
    error = np.sqrt((plain["phi"].var(axis=0) + dreg["phi"].var(axis=0)) / 100_000)
    assert (np.abs(plain["phi"].mean(axis=0) - dreg["phi"].mean(axis=0)) < 5 * error).all()
    assert (dreg["phi"].var(axis=0) < plain["phi"].var(axis=0)).all()


@pytest.mark.slow
def test_the_reported_value_falls_along_the_negative_gradient():
    for fields in ({}, {"samples": 5}, {"samples": 5, "estimator": "dreg"}):
        model, variables = trained(0.2, 0.6)
        before, grads = gradient(model, variables, 2000, **fields)
        step = jax.tree.map(lambda leaf, grad: leaf - 0.05 * grad.mean(axis=0), variables["params"], grads)
        step = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), step)
        after, _ = gradient(model, {"params": step}, 2000, **fields)
        assert after.mean() < before.mean() - 0.01


@pytest.mark.slow
def test_bounds_fall_with_the_samples():
    """On average over images, with a model of random weights, and an estimated KL where the prior has none in closed
    form.
    """
    for prior in ("standard_normal", "mixture", "vamp"):
        model = vae.make(
            (8, 8, 1), latent_dim=3, encoder_features=(4,), decoder_features=(4,), prior=prior, **some(prior)
        )
        variables = model.init(jax.random.key(0))
        image = jax.random.uniform(jax.random.key(1), (200, 8, 8, 1))
        batch = Batch(image, -jnp.ones(200, jnp.int32), jnp.ones(200), jnp.arange(200))
        keys = example_keys(jax.random.key(2), 0, batch.index)
        bounds = []
        for samples in (1, 4, 32):
            objective = vae.make_objective(model, samples=samples)
            metrics, _ = jax.jit(lambda *given: objective(*given, False, None))(variables, batch, keys)  # noqa: B023
            assert all(value.shape == (200,) for value in metrics.values())
            bounds.append(float(metrics["bound"].mean()))
        assert bounds == sorted(bounds, reverse=True), prior


def some(prior):
    return {} if prior == "standard_normal" else {"components": 5}


def test_free_bits_are_paid_by_the_mean_over_the_batch():
    """sum_j max(least, mean_i KL_ij) in value, and in gradient only the latents above the least."""
    kl = jnp.asarray(np.random.default_rng(0).gamma(1.0, [0.05, 0.3, 2.0], (6, 3)), jnp.float32)
    weight = jnp.asarray([1.0, 1.0, 2.0, 1.0, 0.0, 1.0])
    mean = np.average(kl, axis=0, weights=weight)
    assert mean[0] < 0.25 < mean[1]
    paid = free_bits_kl(kl, weight, 0.25)
    assert np.average(paid, weights=weight) == pytest.approx(np.maximum(0.25, mean).sum(), rel=1e-5)
    grads = jax.grad(lambda kl: jnp.sum(weight * free_bits_kl(kl, weight, 0.25)))(kl)
    np.testing.assert_allclose(grads, np.outer(weight, [0.0, 1.0, 1.0]))
    # Several devices: the mean is that of all.
    split = jax.vmap(lambda kl, weight: free_bits_kl(kl, weight, 0.25, "device"), axis_name="device")
    parts = split(kl.reshape(3, 2, 3), weight.reshape(3, 2))
    np.testing.assert_allclose(parts.reshape(-1), paid, rtol=1e-6)


def test_free_bits_count_in_the_training_loss_alone():
    model = vae.make((8, 8, 1), latent_dim=3, network="mlp", hidden=(8,))
    variables = model.init(jax.random.key(0))
    image = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
    batch = Batch(image, -jnp.ones(6, jnp.int32), jnp.ones(6), jnp.arange(6))
    keys = example_keys(jax.random.key(2), 0, batch.index)
    objective = vae.make_objective(model, free_bits=4.0)
    for train in (True, False):
        metrics, _ = objective(variables, batch, keys, train, 0 if train else None)
        np.testing.assert_allclose(metrics["bound"], metrics["reconstruction"] + metrics["kl"], rtol=1e-5)
        extra = metrics["loss"] - metrics["bound"]
        np.testing.assert_allclose(extra, 12 - metrics["kl"] if train else 0, rtol=1e-4, atol=1e-4)
    # Two devices, one of which has a smaller mean KL than is free: what counts is the mean of both.
    batch = batch._replace(image=batch.image * jnp.repeat(jnp.array([0.1, 1.0]), 3)[:, None, None, None])
    kl = model.prior.kl(variables, *model.encode(variables, batch.image)).reshape(2, 3, 3).mean(axis=1)
    differs = int(jnp.ptp(kl, axis=0).argmax())
    objective = vae.make_objective(model, free_bits=float(kl[:, differs].min() + kl[:, differs].mean()) / 2)
    alone = objective(variables, batch, keys, True, 0)[0]["loss"]
    shards = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), (batch, keys))
    share = jax.vmap(lambda *given: objective(variables, *given, True, 0, "device")[0]["loss"], axis_name="device")
    np.testing.assert_allclose(share(*shards).reshape(-1), alone, rtol=1e-5)
    apart = jax.vmap(lambda *given: objective(variables, *given, True, 0)[0]["loss"])(*shards).reshape(-1)
    assert (np.abs(apart - alone) > 1e-3).any()


def test_the_optimal_variance_is_that_of_the_elbo():
    model = vae.make((4, 4, 1), latent_dim=2, network="mlp", likelihood="optimal_gaussian")
    with pytest.raises(
        ValueError, match="objective.samples is 2, but this likelihood's variance is optimal only for the ELBO"
    ):
        vae.make_objective(model, samples=2)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"estimator": "dreg"}, "with one sample is the ELBO without its score term"),
        ({"estimator": "vimco"}, "objective.estimator is 'vimco', but must be one of iwae, dreg"),
        ({"free_bits": -0.1}, "objective.free_bits is -0.1, but must be at least 0"),
        ({"free_bits": 0.1, "samples": 2}, "only the ELBO has them: leave objective.samples at 1"),
        ({"binarize": "dynamic"}, r"model.likelihood is a density on \[0, 1\], but data.binarize is 'dynamic'"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        vae.make_objective(linear_gaussian(0.2, 0.6), **fields)
    assert "\n" not in str(error.value)


def test_free_bits_need_a_closed_kl():
    model = vae.make((8, 8, 1), prior="mixture", components=2)
    with pytest.raises(ValueError, match="this prior has no KL in closed form: leave it at 0"):
        vae.make_objective(model, free_bits=0.1)


@pytest.mark.parametrize("field,value,least", [("samples", 0, 1), ("warmup_steps", -1, 0), ("beta", -0.5, 0)])
def test_fields_out_of_range(field, value, least):
    with pytest.raises(ValueError, match=f"objective.{field} is {value}, but must be at least {least}"):
        vae.make_objective(linear_gaussian(0.2, 0.6), **{field: value})
