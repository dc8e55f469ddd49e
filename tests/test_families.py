"""The families: the contract of each, and their objectives against closed forms."""

import functools
import inspect
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from vae_jax import generate
from vae_jax.augment import augment
from vae_jax.batch import Batch, Split, example_keys, named_key
from vae_jax.evaluation.classification import expected_calibration_error
from vae_jax.families import (
    FAMILIES,
    Family,
    Metric,
    Model,
    classifier,
    conditional,
    reports,
    semisupervised,
    sparse_labels,
    stacked,
    vae,
    vaegan,
)
from vae_jax.figures import codes
from vae_jax.likelihoods import LIKELIHOODS, unit_gaussian
from vae_jax.priors import PRIORS, standard_normal

ROOT = jax.random.key(0)
SHAPE = (8, 8, 1)
# What `session.build` knows of the data and the training, and fills in by name.
PANELS = {vae: ("loss", "reconstruction", "kl"), classifier: ("loss", "accuracy")}
KNOWN = {
    "image_shape": SHAPE,
    "num_classes": 3,
    "train_size": 6,
    "steps_per_epoch": 2,
    "labelled_share": 1.0,
    "binarize": "none",
}


def make_batch(image, label=None):
    n = len(image)
    label = -jnp.ones(n, jnp.int32) if label is None else label
    return Batch(image, label, jnp.ones(n), jnp.arange(n))


def small_split(n=6, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), np.uint8)
    return Split(image, np.arange(n, dtype=np.int32) % 3)


def small_batch(n=6):
    split = small_split(n)
    return make_batch(jnp.asarray(split.image / np.float32(255)), jnp.asarray(split.label))


def fill_in(function, **known):
    parameters = inspect.signature(function).parameters
    return function(**{name: value for name, value in known.items() if name in parameters})


SIZES = {"network": "conv", "latent_dim": 3, "encoder_features": (4, 4), "decoder_features": (4, 4), "features": (4, 4)}
SIZES["discriminator_features"] = (4, 4)


@functools.cache
def small(family):
    """A small model of the family, its variables, and `evaluate(train)(variables, batch) -> metrics, model_state`."""
    model = fill_in(family.make, **KNOWN, **SIZES)
    objective = fill_in(family.make_objective, model=model, **KNOWN)

    @functools.cache
    def evaluate(train):
        def run(variables, batch):
            return objective(variables, batch, example_keys(ROOT, 3, batch.index), train, 3 if train else None)

        return jax.jit(run)

    return model, jax.jit(model.init)(jax.random.key(0)), evaluate


every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def members(protocol):
    names = {*vars(protocol), *protocol.__annotations__}
    return sorted(name for name in names if not name.startswith("_"))


def test_the_contract_is_what_this_file_takes_it_for():
    expected = "METRICS NAME baselines check_data decodes_per_example ledger make make_figures make_final_probes make_objective make_probes"
    assert members(Family) == expected.split()


@every_family
@pytest.mark.parametrize("name", members(Family))
def test_every_family_has_every_member(family, name):
    member = getattr(family, name, None)
    if name == "NAME":
        assert isinstance(member, str) and member
    elif name != "METRICS":
        assert callable(member) and member.__doc__


@every_family
@pytest.mark.parametrize("name", ["make", "make_objective", "baselines", "decodes_per_example"])
def test_fields_are_keywords_with_defaults_and_all_else_is_filled_in(family, name):
    known = {*KNOWN, "model", "image"}
    for parameter in inspect.signature(getattr(family, name)).parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY:
            assert parameter.default is not parameter.empty, parameter
            assert parameter.annotation is not parameter.empty, parameter
        else:
            assert parameter.name in known, parameter


@every_family
@pytest.mark.parametrize("name", ["baselines", "decodes_per_example"])
def test_functions_of_the_config_fields_have_their_defaults(family, name):
    fields = {
        **inspect.signature(family.make).parameters,
        **inspect.signature(family.make_objective).parameters,
    }
    for parameter in inspect.signature(getattr(family, name)).parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY:
            assert fields[parameter.name].default == parameter.default


@every_family
def test_metrics_have_a_meaning_a_unit_and_a_direction(family):
    assert family.METRICS["loss"].better == "lower"
    for name, metric in family.METRICS.items():
        assert isinstance(metric, Metric) and metric.meaning and metric.unit, name
        assert metric.better in ("lower", "higher", ""), name


@every_family
@pytest.mark.parametrize("train", [True, False])
def test_METRICS_holds_everything_that_the_objective_returns(family, train):
    """Each metric is one value an example, unreduced, and the model state keeps its structure."""
    _, variables, evaluate = small(family)
    metrics, model_state = evaluate(train)(variables, small_batch())
    assert "loss" in metrics and not isinstance(metrics["loss"], tuple)
    assert set(metrics) <= set(family.METRICS)
    for value in jax.tree.leaves(metrics):
        assert value.shape == (6,) and value.dtype == jnp.float32
    stored = {name: value for name, value in variables.items() if name != "params"}
    assert jax.tree.map(jnp.shape, model_state) == jax.tree.map(jnp.shape, stored)


def test_evaluation_leaves_the_model_state_alone():
    _, variables, evaluate = small(classifier)
    _, model_state = evaluate(False)(variables, small_batch())
    for name, state in model_state.items():
        jax.tree.map(np.testing.assert_array_equal, state, variables[name])


@every_family
def test_examples_do_not_see_each_other_in_evaluation(family):
    _, variables, evaluate = small(family)
    batch = small_batch()
    metrics, _ = evaluate(False)(variables, batch)
    other, _ = evaluate(False)(variables, batch._replace(image=batch.image.at[:4].set(1 - batch.image[:4])))
    for name, values in metrics.items():
        np.testing.assert_allclose(values[4:], other[name][4:], rtol=1e-6)
    assert (metrics["loss"][:4] != other["loss"][:4]).all()


@every_family
def test_probes_give_one_row_an_example_and_numbers_a_split(family):
    model, variables, evaluate = small(family)
    probes = family.make_probes(model)
    arrays = jax.device_get(jax.jit(probes.measure)(variables, small_batch(), None))
    assert all(len(values) == 6 for values in arrays.values())
    numbers = probes.reduce(arrays, small_split())
    metrics, _ = evaluate(False)(variables, small_batch())
    assert not set(numbers) & set(metrics)  # both are in one row of metrics.jsonl
    optional = {"scale", "penalty"}  # this likelihood learns no scale, and the penalty exists only in training
    assert set(numbers) | set(metrics) == set(family.METRICS) - optional
    for value in numbers.values():
        assert isinstance(value, float | int | list) and np.isfinite(value).all()


def test_decodes_per_example():
    assert fill_in(vae.decodes_per_example, **KNOWN) == fill_in(stacked.decodes_per_example, **KNOWN) == 1
    assert fill_in(classifier.decodes_per_example, **KNOWN) == 0


@every_family
def test_a_family_has_its_own_capabilities_and_no_others(family):
    model, _, _ = small(family)
    capabilities = {
        vae: {"latent_dim", "encode", "decode_raw", "likelihood", "prior", "layers"},
        conditional: {
            *("latent_dim", "encode", "decode_raw", "likelihood", "prior", "probabilities", "num_classes"),
            *("condition_on", "condition", "given"),
        },
        classifier: {"probabilities", "num_classes", "features", "layers", "apply"},
    }
    for few_labels in (sparse_labels, semisupervised, stacked):
        capabilities[few_labels] = capabilities[conditional] | {"apply"}
    for given_label in (conditional, semisupervised):
        capabilities[given_label] = capabilities[given_label] | {"encoder_takes_label"}
    capabilities[vaegan] = capabilities[vae] | {"apply", "features"}
    present = {name for name, value in model._asdict().items() if value not in (None, "", False)}
    assert present == {"init"} | capabilities[family]


def draw(family, variables, arrays, test, baselines):
    history = [
        {"epoch": epoch, **{f"{part}/{name}": 1.0 + epoch for name in family.METRICS}}
        for epoch in (0.5, 1.0)
        for part in ("train", "test")
    ]
    make = family.make_figures(small(family)[0], test, jax.random.key(5), "Title")
    figures = {name: draw() for name, draw in make(variables, arrays, history, baselines).items()}
    assert all("Title" in figure.get_suptitle() for figure in figures.values())
    panels = [ax.get_title() for ax in figures["training"].axes]
    meanings = [family.METRICS[name].meaning for name in PANELS[family]]
    assert panels == (["loss", *meanings[1:]] if family is vae else meanings)
    return figures


# The VAE


def test_decoding_samples_equals_decoding_each():
    model, variables, _ = small(vae)
    z = jax.random.normal(jax.random.key(1), (2, 5, 3))
    decode = jax.jit(model.decode_raw)
    raw = decode(variables, z)
    assert raw.shape == (2, 5, *SHAPE)
    np.testing.assert_allclose(raw, jnp.stack([decode(variables, one) for one in z]), atol=1e-6)


def test_figures_of_a_vae():
    """Ten images of the test split and their reconstructions, 100 samples from the prior, and the losses."""
    model, variables, _ = small(vae)
    test = small_split()
    mean, _ = model.encode(variables, jnp.asarray(test.image / np.float32(255)))
    figures = draw(vae, variables, {"mean": np.asarray(mean)}, test, {"a baseline": 2.0})
    assert set(figures) == {"training", "reconstructions", "samples", "codes", "manifold"}
    points = figures["codes"].axes[0].collections[0]
    np.testing.assert_allclose(
        points.get_offsets(), reports.principal_axes(np.asarray(mean)).project(np.asarray(mean)), atol=1e-6
    )
    np.testing.assert_array_equal(points.get_array(), test.label)
    assert figures["training"].axes[0].get_yscale() == "linear"
    assert [text.get_text() for text in figures["training"].axes[0].texts] == ["a baseline: 2.00"]
    axes = figures["reconstructions"].axes
    assert [ax.get_title() for ax in axes[:3]] == ["0", "1", "2"]
    expected = generate.reconstruct(model, variables, jnp.asarray(test.image[:3] / np.float32(255)))
    for i, ax in enumerate(axes[:3]):
        np.testing.assert_array_equal(ax.images[0].get_array(), test.image[i, ..., 0] / np.float32(255))
        np.testing.assert_allclose(axes[3 + i].images[0].get_array(), expected[i, ..., 0], atol=1e-6)
    grid = figures["samples"].axes[0].images[0].get_array()
    expected = generate.sample(model, variables, jax.random.key(5), 100)
    assert grid.shape[:2] == (100, 100)
    np.testing.assert_allclose(np.squeeze(grid[11:19, 1:9]), expected[10, ..., 0], atol=1e-6)


def test_codes_without_a_label_are_grey_and_each_label_keeps_its_colour():
    label = np.array([-1, *range(10)])
    figure = codes(np.zeros((11, 2)), label, ("", ""), "a\udcffb")
    grey, coloured = figure.axes[0].collections
    assert len(grey.get_offsets()) == 1
    assert len({tuple(colour) for colour in coloured.to_rgba(coloured.get_array())}) == 10
    figure.savefig(io.BytesIO())  # a name that is not UTF-8 can be drawn


def test_the_manifold_of_two_latents_lies_at_the_quantiles_of_the_prior(monkeypatch):
    """z0 grows to the right and z1 upwards; the middle fifth of the grid has the middle fifth of the probability."""
    model = fill_in(vae.make, **KNOWN, **SIZES | {"latent_dim": 2})
    seen = []
    mean = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    made = reports.figures_of_codes(
        model, lambda z: (seen.append(z), np.zeros((len(z), *SHAPE)))[1], mean, np.full(50, -1), ""
    )
    made["manifold"]()
    np.testing.assert_allclose(made["codes"]().axes[0].collections[0].get_offsets(), mean, atol=1e-6)
    grid = seen[0].reshape(reports.MANIFOLD, reports.MANIFOLD, 2)
    assert (np.diff(grid[..., 0], axis=1) > 0).all() and (np.diff(grid[..., 1], axis=0) < 0).all()
    expected = (np.arange(reports.MANIFOLD) + 0.5) / reports.MANIFOLD
    np.testing.assert_allclose(scipy.special.ndtr(grid[0, :, 0]), expected, rtol=1e-5)
    one = fill_in(vae.make, **KNOWN, **SIZES | {"latent_dim": 1})
    assert reports.figures_of_codes(one, seen.append, mean[:, :1], np.full(50, -1), "") == {}


def learned_gaussian():
    """N(sigmoid(first raw channel), exp(logvar)): a likelihood from outside, with a parameter and two raw channels."""
    plain = unit_gaussian()

    def energy(variables, raw, image):
        logvar = variables["params"]["likelihood"]["logvar"]
        return plain.energy(variables, raw[..., :1], image) * jnp.exp(-logvar) + logvar / 2

    return plain._replace(channels=2, init=lambda key: {"logvar": jnp.full((), 0.5)}, energy=energy)


def shifted_normal(latent_dim):
    """N(shift, I): a prior from outside, with a parameter."""
    plain = standard_normal(latent_dim)

    def kl(variables, mean, logvar):
        return plain.kl(variables, mean - variables["params"]["prior"]["shift"][None], logvar)

    return plain._replace(init=lambda key: {"shift": jnp.full(latent_dim, 2.0)}, kl=kl)


def test_a_likelihood_and_a_prior_from_outside_own_their_parameters(monkeypatch):
    """`make` reserves the likelihood's raw channels and stores both's parameters; the loss trains them."""
    monkeypatch.setitem(LIKELIHOODS, "learned", learned_gaussian)
    monkeypatch.setitem(PRIORS, "shifted", shifted_normal)
    model = fill_in(vae.make, **SIZES, image_shape=SHAPE, likelihood="learned", prior="shifted")
    variables = jax.jit(model.init)(jax.random.key(0))
    assert set(variables["params"]) == {"encoder", "decoder", "likelihood", "prior"}
    assert set(small(vae)[1]["params"]) == {"encoder", "decoder"}
    assert jax.eval_shape(model.decode_raw, variables, jnp.zeros((1, 6, 3))).shape == (1, 6, 8, 8, 2)
    batch = small_batch()

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grad(params):
        keys = example_keys(ROOT, 0, batch.index)
        metrics, _ = vae.make_objective(model)({"params": params}, batch, keys, True, 0)
        return metrics["loss"].mean(), metrics

    grads, metrics = grad(variables["params"])
    mean, logvar = (np.float64(part) for part in jax.jit(model.encode)(variables, batch.image))
    expected = 0.5 * np.sum(np.exp(logvar) + (mean - 2.0) ** 2 - 1 - logvar, axis=1)
    np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-5)
    np.testing.assert_allclose(grads["prior"]["shift"], (2.0 - mean).mean(axis=0), rtol=1e-4)
    # -log N(x; m, exp(v)) = exp(-v) (x - m)^2 / 2 + v / 2: at v = 1/2, over 64 pixels.
    slope = 64 / 2 - (metrics["reconstruction"] - 64 / 4).mean()
    np.testing.assert_allclose(grads["likelihood"]["logvar"], slope, rtol=1e-4)


def identity_gaussian():
    """N(raw, 1)."""

    def energy(variables, raw, image):
        return 0.5 * (image[None] - raw) ** 2

    return unit_gaussian()._replace(energy=energy, mean=lambda variables, raw: raw)


def linear_gaussian():
    """x = W z + e with z, e ~ N(0, I) and orthogonal columns: the posterior is diagonal, log p(x) is known.

    `variables["shift"]` is added to the posterior mean.
    """
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((6, 2)))
    w = q * np.array([2.0, 0.7])
    precision = 1 + np.array([2.0, 0.7]) ** 2
    covariance = w @ w.T + np.eye(6)
    x = rng.standard_normal((1, 6)) @ np.linalg.cholesky(covariance).T
    log_p = -0.5 * (x @ np.linalg.solve(covariance, x.T) + np.linalg.slogdet(covariance)[1] + 6 * np.log(2 * np.pi))
    w, precision = jnp.asarray(w, jnp.float32), jnp.asarray(precision, jnp.float32)

    def encode(variables, image):
        mean = (image.reshape(-1, 6) @ w) / precision[None, :] + variables["shift"]
        return mean, jnp.broadcast_to(-jnp.log(precision), mean.shape)

    def decode_raw(variables, z):
        return (z @ w.T).reshape(*z.shape[:-1], 2, 3, 1)

    model = Model(
        init=lambda key: {"shift": jnp.zeros((1, 2))},
        latent_dim=2,
        encode=encode,
        decode_raw=decode_raw,
        likelihood=identity_gaussian(),
        prior=standard_normal(2),
    )
    return model, jnp.asarray(x, jnp.float32).reshape(1, 2, 3, 1), log_p.item()


@pytest.mark.parametrize("shift,kl", [(0.0, 0.0), (0.5, 0.5 * 0.25 * (5 + 1.49))])
def test_bound_of_a_linear_gaussian_model_is_its_evidence_less_the_posterior_gap(shift, kl):
    """-ELBO = -log p(x) + KL(q || posterior); the KL of a shift s is 1/2 s^2 sum(precision)."""
    model, image, log_p = linear_gaussian()
    n = 40_000
    batch = make_batch(jnp.broadcast_to(image, (n, *image.shape[1:])))
    metrics, model_state = vae.make_objective(model)(
        {"shift": jnp.full((1, 2), shift)}, batch, example_keys(ROOT, 0, batch.index), train=True, step=0
    )
    assert model_state == {}
    for name in ("loss", "bound"):
        nats = metrics[name] + 6 * model.likelihood.constant
        np.testing.assert_allclose(nats.mean(), -log_p + kl, atol=5 * nats.std() / np.sqrt(n))


def test_baselines_are_those_of_a_unit_gaussian_and_a_standard_normal():
    model, image = small(vae)[0], small_split().image
    assert set(vae.baselines(model, image)) == {"collapsed model", "best linear VAE"}
    assert vae.baselines(model, image, likelihood="learned") == vae.baselines(model, image, prior="shifted") == {}
    assert fill_in(classifier.baselines, model=model, image=image) == {}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_beta_weighs_the_kl_of_the_loss_but_not_of_the_bound(beta, train):
    model, image, _ = linear_gaussian()
    batch = make_batch(jnp.concatenate([image, 2 * image]))
    variables = {"shift": jnp.full((1, 2), 0.3)}

    def metrics(beta):
        keys = example_keys(ROOT, 0, batch.index)
        return vae.make_objective(model, beta=beta)(variables, batch, keys, train, 0 if train else None)[0]

    found = metrics(beta)
    parts = found["reconstruction"], found["kl"]
    np.testing.assert_allclose(found["loss"], parts[0] + beta * parts[1], rtol=1e-6)
    np.testing.assert_allclose(found["bound"], parts[0] + parts[1], rtol=1e-6)
    np.testing.assert_array_equal(found["bound"], metrics(1.0)["loss"])
    assert (parts[1] > 0.1).all()


def test_parts_of_the_loss_are_those_of_the_equations():
    """Reconstruction: half the squared error of one decoded sample. KL: summed over latents."""
    model, variables, evaluate = small(vae)
    batch = small_batch()
    metrics, _ = evaluate(True)(variables, batch)
    mean, logvar = (np.float64(part) for part in jax.jit(model.encode)(variables, batch.image))
    keys = named_key(example_keys(ROOT, 3, batch.index), "noise")
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (3,)))(keys)
    z = jnp.asarray(mean + np.exp(logvar / 2) * noise, jnp.float32)
    decoded = jax.jit(functools.partial(generate.decode, model))(variables, z)
    error = 0.5 * np.sum((np.float64(batch.image) - decoded) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["reconstruction"], error, rtol=1e-5)
    kl = 0.5 * np.sum(np.exp(logvar) + mean**2 - 1 - logvar, axis=1)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)


# The classifier

KERNEL = {"kernel": jax.random.normal(jax.random.key(7), (64, 3))}


def linear_classifier():
    """Three logits, linear in the image. Its model state is what it was called with."""

    def apply(variables, image, train, axis_name):
        logits = image.reshape(len(image), -1) @ variables["kernel"]
        return logits, {"image": image, "train": train, "axis_name": axis_name}

    return Model(init=lambda key: KERNEL, apply=apply)


def linear_log_probabilities(batch):
    logits = np.float64(batch.image).reshape(len(batch.image), -1) @ KERNEL["kernel"]
    return scipy.special.log_softmax(np.float64(logits), axis=1)


def classify(batch, train, axis_name=None, **fields):
    objective = classifier.make_objective(linear_classifier(), SHAPE, **fields)
    return objective(KERNEL, batch, example_keys(ROOT, 0, batch.index), train, 0 if train else None, axis_name)


def test_cross_entropy_in_evaluation():
    """Smoothing and augmentation belong to training: here the loss is the plain negative log-likelihood."""
    batch = small_batch()
    metrics, state = classify(batch, False, "devices", label_smoothing=0.3, shift=2, rotation=90.0)
    log_p, label = linear_log_probabilities(batch), np.asarray(batch.label)
    np.testing.assert_allclose(metrics["loss"], -log_p[range(6), label], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(metrics["accuracy"], log_p.argmax(axis=1) == label)
    np.testing.assert_array_equal(state["image"], batch.image)
    assert state["train"] is False and state["axis_name"] == "devices"
    assert set(metrics) == {"loss", "accuracy"}


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing(smoothing):
    """(1 - s) of the negative log-likelihood, and s of its mean over all labels."""
    batch = small_batch()
    metrics, state = classify(batch, True, label_smoothing=smoothing)
    log_p = linear_log_probabilities(batch)
    likelihood = log_p[range(6), np.asarray(batch.label)]
    expected = -(1 - smoothing) * likelihood - smoothing * log_p.mean(axis=1)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5, atol=1e-6)
    assert set(metrics) == {"loss", "accuracy"}
    assert state["train"] is True and state["axis_name"] is None


def test_training_sees_the_augmented_images():
    batch = small_batch()

    def seen(**fields):
        return classify(batch, True, **fields)[1]["image"]

    keys = example_keys(ROOT, 0, batch.index)
    np.testing.assert_array_equal(seen(shift=1, rotation=20.0), augment(batch.image, keys, 1, 20.0))
    assert (seen(shift=1) != batch.image).any()
    assert (seen(rotation=20.0) != batch.image).any()
    np.testing.assert_array_equal(seen(), batch.image)


def test_probes_of_a_classifier_are_its_prediction_and_its_confidence():
    model, variables, _ = small(classifier)
    batch, split = small_batch(), small_split()
    logits, _ = jax.jit(functools.partial(model.apply, train=False, axis_name=None))(variables, batch.image)
    p = scipy.special.softmax(np.float64(logits), axis=1)
    np.testing.assert_allclose(jax.jit(model.probabilities)(variables, batch.image), p, rtol=1e-5)
    probes = classifier.make_probes(model)
    arrays = jax.device_get(jax.jit(probes.measure)(variables, batch, None))
    np.testing.assert_array_equal(arrays["prediction"], p.argmax(axis=1))
    assert arrays["prediction"].dtype == np.int32
    np.testing.assert_allclose(arrays["confidence"], p.max(axis=1), rtol=1e-5)
    correct = np.float32(arrays["prediction"] == split.label)
    expected = expected_calibration_error(arrays["confidence"], correct)
    assert probes.reduce(arrays, split)["calibration_error"] == pytest.approx(expected)


def test_figures_of_a_classifier():
    """Mistakes are shown in the order of their confidence; classes that are never seen keep their row."""
    test = Split(small_split().image, np.array([0, 1, 0, 1, 0, 0], np.int32))
    arrays = {
        "prediction": np.array([0, 0, 1, 1, 1, 0], np.int32),
        "confidence": np.array([0.9, 0.5, 0.7, 0.8, 0.6, 1.0], np.float32),
    }
    figures = draw(classifier, small(classifier)[1], arrays, test, {})
    assert set(figures) == {"training", "confusion", "mistakes"}
    assert figures["training"].axes[0].get_yscale() == "log"
    assert "3 errors in 6 images" in figures["confusion"].get_suptitle()
    assert figures["confusion"].axes[0].images[0].get_array().shape == (3, 3)
    shown = [ax for ax in figures["mistakes"].axes if ax.images]
    titles = ["0 taken for 1\n70.0 %", "0 taken for 1\n60.0 %", "1 taken for 0\n50.0 %"]
    assert [ax.get_title() for ax in shown] == titles
    for ax, i in zip(shown, (2, 4, 1)):
        np.testing.assert_array_equal(ax.images[0].get_array(), test.image[i, ..., 0] / np.float32(255))
