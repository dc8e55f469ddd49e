"""M2 and M1 + M2: closed forms of two classes with linear-Gaussian parts, and which network learns from which term."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from small_run import run_job

import vae_jax
from vae_jax import commands
from vae_jax.batch import Batch, example_keys
from vae_jax.families import conditional, semisupervised, stacked, vae
from vae_jax.likelihoods import HALF_LOG_2PI, Likelihood, align
from vae_jax.model import Model
from vae_jax.objectives import reparameterize
from vae_jax.priors import log_normal, standard_normal
from vae_jax.run import session

W, SPREAD, MEANS = 1.3, 0.7, jnp.array([-1.0, 0.5])  # x = W z + MEANS[y] + SPREAD e


def batch_of(label, shape=(4, 4, 1)):
    n = len(label)
    image = np.random.default_rng(0).random((n, *shape), np.float32).round()
    return Batch(jnp.asarray(image), jnp.asarray(label, jnp.int32), jnp.ones(n), jnp.arange(n))


def moved(init):
    """Variables at which no layer is zero."""
    noise = iter(jax.random.split(jax.random.key(1), 60))
    variables = jax.jit(init)(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(noise), leaf.shape), variables)


def metrics_of(family, model, variables, batch, train=True, step=0, share=0.5, **fields):
    objective = family.make_objective(model, share, **fields)
    keys = example_keys(jax.random.key(2), step if train else None, batch.index)
    return jax.jit(lambda variables, batch: objective(variables, batch, keys, train, step if train else None)[0])(
        variables, batch
    )


# Closed forms


def linear_gaussian(log_q):
    """Two classes, one latent, one pixel, with the exact q(z | x, y), and `log_q(x)` for q(y | x)."""
    variance = 1 / (1 + W**2 / SPREAD**2)

    def energy(variables, raw, image):
        return 0.5 * ((align(image, raw) - raw) / SPREAD) ** 2

    p_x = Likelihood("test", energy, None, constant=HALF_LOG_2PI + math.log(SPREAD))

    def given(y):
        mean_x = y @ MEANS

        def encode(variables, image):
            mean = variance * W * (image.reshape(-1, 1) - mean_x[:, None]) / SPREAD**2
            return mean, jnp.full_like(mean, math.log(variance))

        return model._replace(
            encode=encode, decode_raw=lambda variables, z: (W * z + mean_x[None, :, None])[..., None, None], given=None
        )

    model = Model(
        init=lambda key: {},
        latent_dim=1,
        likelihood=p_x,
        prior=standard_normal(1),
        num_classes=2,
        condition=lambda image, label: jax.nn.one_hot(label, 2),
        given=given,
        apply=lambda variables, image: log_q(image.reshape(-1)),
    )
    return model


def log_joint(x):
    """log p(x, y), [batch, 2], with p(y) = 1/2."""
    scale = math.sqrt(W**2 + SPREAD**2)
    return scipy.stats.norm.logpdf(np.asarray(x, np.float64)[:, None], np.asarray(MEANS), scale) - math.log(2)


def exact_bound(log_q, monkeypatch):
    """U(x) of three x with its constant. The mean over z is exact: -log p(x | z) is quadratic in it, so e = +1 and -1
    suffice.
    """
    x = jnp.array([0.7, -1.2, 0.1])
    batch = Batch(x.reshape(3, 1, 1, 1), jnp.full(3, -1), jnp.ones(3), jnp.arange(3))
    model, found = linear_gaussian(log_q), []
    for e in (1.0, -1.0):
        monkeypatch.setattr(
            vae, "reparameterize", lambda mean, logvar, keys, samples, e=e: (mean + e * jnp.exp(logvar / 2))[None]
        )
        found.append(np.float64(metrics_of(semisupervised, model, {}, batch)["bound"]))
    return np.asarray(x), np.mean(found, axis=0) + model.likelihood.constant


def test_at_the_exact_posterior_the_bound_is_the_evidence(monkeypatch):
    def exact(x):
        return jax.nn.log_softmax(-0.5 * (x[:, None] - MEANS[None]) ** 2 / (W**2 + SPREAD**2))

    x, bound = exact_bound(exact, monkeypatch)
    np.testing.assert_allclose(bound, -np.logaddexp.reduce(log_joint(x), axis=1), atol=1e-6)


def test_with_a_uniform_posterior_the_bound_is_the_mean_over_labels_less_ln_2(monkeypatch):
    x, bound = exact_bound(lambda x: jnp.zeros((len(x), 2)), monkeypatch)
    np.testing.assert_allclose(bound, -log_joint(x).mean(axis=1) - math.log(2), atol=1e-6)
    assert (bound > -np.logaddexp.reduce(log_joint(x), axis=1)).all()


# M2

SMALL = {"network": "mlp", "hidden": (8,), "latent_dim": 3, "likelihood": "bernoulli"}


@pytest.fixture(scope="module")
def m2():
    model = semisupervised.make((4, 4, 1), 3, **SMALL)
    return model, moved(model.init)


def test_a_labelled_image_costs_its_joint_bound_and_its_cross_entropy(m2):
    """L(x, y) is the conditional VAE's loss given y, plus ln C."""
    model, variables = m2
    batch = batch_of([1, 2, -1, 0])
    found = metrics_of(semisupervised, model, variables, batch, beta=0.7)
    given = conditional.make_objective(model, beta=0.7)
    keys = example_keys(jax.random.key(2), 0, batch.index)
    any_label = batch._replace(label=jnp.maximum(batch.label, 0))
    known = np.asarray(given(variables, any_label, keys, True, 0)[0]["loss"])[[0, 1, 3]] + math.log(3)
    own = -np.log(np.asarray(model.probabilities(variables, batch.image))[[0, 1, 3], [1, 2, 0]])
    np.testing.assert_allclose(found["loss"][jnp.array([0, 1, 3])], known + 0.1 / 0.5 * own, rtol=1e-5)
    np.testing.assert_array_equal(found["cross_entropy"][1], [1, 1, 0, 1])


def test_labels_of_a_split_never_enter_its_bound(m2):
    model, variables = m2
    batch = batch_of([0, 1, 2])
    found, other = (
        metrics_of(semisupervised, model, variables, batch._replace(label=jnp.array(label)), train=False)
        for label in ([0, 1, 2], [2, 0, -1])
    )
    for name in ("loss", "bound", "reconstruction", "kl", "label_entropy"):
        np.testing.assert_array_equal(found[name], other[name])
    np.testing.assert_array_equal(found["loss"], found["bound"])


def gradients(family, model, variables, batch, **fields):
    def total(variables):
        return jnp.sum(metrics_of(family, model, variables, batch, **fields)["loss"])

    return jax.grad(total)(variables)["params"]


def norms(grads):
    return {name: float(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(part))) for name, part in grads.items()}


def test_which_network_learns_from_which_term(m2):
    """Labels known: the classifier learns from the cross-entropy alone, the others from L(x, y) alone. Unknown: all
    from U(x).
    """
    model, variables = m2
    known, unknown = batch_of([0, 1, 2]), batch_of([-1] * 3)
    without, with_labels = (gradients(semisupervised, model, variables, known, alpha=alpha) for alpha in (0.0, 0.1))
    found = norms(without)
    assert found.pop("classifier") == 0 and 0 < min(found[name] for name in ("autoencoder", "shift"))
    assert norms(with_labels)["classifier"] > 0
    for name in ("autoencoder", "shift"):
        jax.tree.map(np.testing.assert_array_equal, without[name], with_labels[name])
    unlabelled = norms(gradients(semisupervised, model, variables, unknown))
    assert min(unlabelled[name] for name in ("autoencoder", "shift", "classifier")) > 0


def test_the_label_warm_up_scales_the_classifiers_gradient_alone(m2):
    model, variables = m2
    batch = batch_of([-1] * 3)
    full = gradients(semisupervised, model, variables, batch)
    quarter = gradients(semisupervised, model, variables, batch, label_warmup_steps=4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 4 * b, rtol=1e-4, atol=1e-6),
        full["classifier"],
        quarter["classifier"],
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), full["autoencoder"], quarter["autoencoder"])
    same = [metrics_of(semisupervised, model, variables, batch, label_warmup_steps=steps)["loss"] for steps in (0, 4)]
    np.testing.assert_allclose(*same, rtol=1e-6)


# M1 + M2


@pytest.fixture(scope="module")
def both():
    model = stacked.make((4, 4, 1), 3, **SMALL, code_latent_dim=2, code_hidden=(5,))
    return model, moved(model.init)


def test_layers_of_m1_alone_do_not_describe_the_stack(both):
    """Its decoder takes a condition, so an export by layers would be wrong."""
    assert both[0].layers is None


def test_m1_is_the_vae_whatever_m2_does(both):
    model, variables = both
    batch = batch_of([0, -1, 2])
    m1 = model.apply[0]
    keys = example_keys(jax.random.key(2), 0, batch.index)
    objective = vae.make_objective(m1)

    def total(params):
        return jnp.sum(objective({"params": params}, batch, keys, True, 0)[0]["loss"])

    alone = jax.jit(jax.grad(total))(variables["params"])
    found = gradients(stacked, model, variables, batch)
    for name in ("encoder", "decoder"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[name], alone[name])
    assert norms(found)["codes"] > 0 and norms(alone)["codes"] == 0


def test_with_m2_at_the_standard_normal_the_bound_is_that_of_m1(both):
    """A decoder of zeros gives p(c | y, z) = N(0, I), whatever the label: then U(c) = -log N(c; 0, I)."""
    model, variables = both
    params = variables["params"]
    nothing = {"codes": jax.tree.map(jnp.zeros_like, params["codes"])}
    variables = {"params": {**params, **nothing}}
    batch = batch_of([0, -1, 2])
    found = metrics_of(stacked, model, variables, batch)
    mean, logvar = model.encode(variables, batch.image)
    keys = example_keys(jax.random.key(2), 0, batch.index)
    code = reparameterize(mean, logvar, keys)[0]
    log_prior = standard_normal(3).log_prob({}, code)
    np.testing.assert_allclose(found["code_bound"], -log_prior, rtol=1e-5)
    expected = found["reconstruction"] + log_normal(code, mean, logvar) - log_prior
    np.testing.assert_allclose(found["bound"], expected, rtol=1e-5)


def test_evaluation_classifies_the_mean_code_as_predict_does(both):
    model, variables = both
    batch = batch_of([0, 1, 2])
    keys = example_keys(jax.random.key(2), None, batch.index)
    objective = jax.jit(stacked.make_objective(model, 0.5), static_argnames="train")
    found, _ = objective(variables, batch, keys, train=False, step=None)
    cross_entropy, _ = found["cross_entropy"]
    p = jax.jit(model.probabilities)(variables, batch.image)
    np.testing.assert_allclose(cross_entropy, -np.log(p[jnp.arange(3), batch.label]), rtol=1e-5)


def test_the_density_of_codes_is_normalised_and_drawn_from():
    p = stacked.density_of_codes()
    raw = jnp.array([0.4, -0.8]).reshape(1, 1, 1, 2)
    grid = jnp.linspace(-8, 8, 4001).reshape(-1, 1, 1, 1)
    density = np.exp(-np.float64(p.energy({}, jnp.broadcast_to(raw, (4001, 1, 1, 2)), grid) + p.constant))
    assert np.trapezoid(density.ravel(), np.asarray(grid).ravel()) == pytest.approx(1, abs=1e-6)
    draws = np.asarray(p.sample({}, jax.random.key(0), jnp.broadcast_to(raw, (40_000, 1, 1, 2))))
    assert draws.mean() == pytest.approx(0.4, abs=0.02) and draws.var() == pytest.approx(math.exp(-0.8), rel=0.03)


@pytest.mark.parametrize("family", [semisupervised, stacked])
@pytest.mark.parametrize(
    "fields,message",
    [
        ({"label_warmup_steps": -1}, "objective.label_warmup_steps is -1, but must be at least 0"),
        ({"alpha": -1.0}, "objective.alpha is -1.0, but must be at least 0"),
        ({"beta": -1.0}, "objective.beta is -1.0, but must be at least 0"),
    ],
)
def test_numbers_out_of_range(family, fields, message):
    with pytest.raises(ValueError, match=message):
        family.make_objective(family.make((4, 4, 1), 3, **SMALL), 0.5, **fields)


@pytest.mark.parametrize("family", [semisupervised, stacked])
def test_data_without_classes_and_a_likelihood_of_one_reconstruction(family):
    with pytest.raises(ValueError, match="labels of at least 2 classes are needed, but the data have 1"):
        family.make((4, 4, 1), 1, **SMALL)


def test_m2_reconstructs_once_for_each_label_and_m1_once():
    """So only M1 can have the variance that is optimal for a batch."""
    optimal = SMALL | {"likelihood": "optimal_gaussian"}
    with pytest.raises(ValueError, match="model.likelihood is 'optimal_gaussian'"):
        semisupervised.make((4, 4, 1), 3, **optimal)
    model, alone = stacked.make((4, 4, 1), 3, **optimal), vae.make((4, 4, 1), **optimal)
    variables, batch = model.init(jax.random.key(0)), batch_of([0, -1, 2])
    keys = example_keys(jax.random.key(1), 0, batch.index)
    metrics, state = stacked.make_objective(model, 0.5)(variables, batch, keys, True, 0)
    expected, expected_state = vae.make_objective(alone)(variables, batch, keys, True, 0)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    np.testing.assert_array_equal(metrics["reconstruction"], expected["reconstruction"])
    assert state["likelihood"]["weight"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse_labels", "semisupervised", "stacked"])
def test_a_trained_model_predicts_and_generates(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config("smoke").to_dict()
    config["model"] |= {"network": "mlp", "hidden": (16,), "latent_dim": 4}
    job = session.build(config)._replace(figures=lambda *_: {})
    _, directory = run_job(job, config, tmp_path)
    assert "train/accuracy" in directory.history[0] and "test/bound" in directory.history[-1]
    model = vae_jax.load(str(tmp_path))
    image = np.round(255 * model.sample(3, label=[0, 1, 2])).astype(np.uint8)
    label, probability = model.predict(image)
    assert image.shape == (3, 28, 28, 1) and label.shape == probability.shape == (3,)
    np.savez(tmp_path / "own.npz", image=image)
    path, *_ = commands.predict(str(tmp_path), "latest", str(tmp_path / "own.npz"))
    assert [int(line.split(",")[1]) for line in path.read_text().splitlines()[1:]] == label.tolist()
    with pytest.raises(ValueError, match="label"):
        model.sample(3)
    if name == "stacked":
        with pytest.raises(
            ValueError, match="a model of the family stacked has no p.z. in closed form: take its bound"
        ):
            model.log_likelihood(image, samples=2, label=label)
    else:
        assert np.isfinite(model.log_likelihood(image, samples=2, label=label)).all()
