"""The conditional VAE: closed forms of its prior, conditions that belong to their example, Bayes' rule, completions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from small_run import run_job

import vae_jax
from configs import conditional as config_file
from vae_jax import commands, generate
from vae_jax.batch import Batch, Dataset, Split, example_keys
from vae_jax.families import conditional
from vae_jax.likelihoods import distortion
from vae_jax.priors import conditional_normal, standard_normal
from vae_jax.run import session

SMALL = {"latent_dim": 3, "network": "mlp", "hidden": (8,)}


def make(channels=1, **fields):
    model = conditional.make((4, 4, channels), 3, **SMALL | fields)
    variables = jax.jit(model.init)(jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), 50))
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(noise), leaf.shape), variables)
    return model, moved


def batch_of(n=6, channels=1):
    rng = np.random.default_rng(0)
    index = jnp.arange(n)
    return Batch(jnp.asarray(rng.random((n, 4, 4, channels), np.float32)), index % 3, jnp.ones(n), index)


def test_the_conditional_normal_is_a_density_with_its_kl_and_its_draws():
    m, log_v = jnp.array([[0.5], [-1.0]]), jnp.array([[-0.7], [0.4]])
    prior = conditional_normal(lambda variables: (m, log_v))
    z = jnp.linspace(-9, 9, 4001)
    density = np.exp(np.float64(prior.log_prob({}, jnp.broadcast_to(z[:, None, None], (4001, 2, 1)))))
    np.testing.assert_allclose(np.trapezoid(density, np.asarray(z), axis=0), 1, atol=1e-5)
    mean, logvar = jnp.array([[0.1], [0.2]]), jnp.array([[-1.0], [0.3]])
    q, p = (
        scipy.stats.norm(np.asarray(a)[:, 0], np.exp(np.asarray(b)[:, 0] / 2)) for a, b in ((mean, logvar), (m, log_v))
    )
    grid = np.linspace(-9, 9, 20_001)[:, None]
    expected = np.trapezoid(q.pdf(grid) * (q.logpdf(grid) - p.logpdf(grid)), grid, axis=0)
    np.testing.assert_allclose(prior.kl({}, mean, logvar)[:, 0], expected, rtol=1e-4)
    wide = conditional_normal(lambda variables: (jnp.full((20_000, 1), 0.5), jnp.full((20_000, 1), -0.7)))
    draws = np.asarray(wide.sample({}, jax.random.key(0), 20_000))
    assert draws.mean() == pytest.approx(0.5, abs=0.02) and draws.var() == pytest.approx(math.exp(-0.7), rel=0.05)


def test_a_learned_prior_starts_as_the_standard_normal():
    model = conditional.make((4, 4, 1), 3, prior="learned", **SMALL)
    variables, batch = model.init(jax.random.key(0)), batch_of()
    net = model.of(batch)
    z = jax.random.normal(jax.random.key(1), (5, 6, 3))
    np.testing.assert_allclose(net.prior.log_prob(variables, z), standard_normal(3).log_prob({}, z), rtol=1e-5)
    mean, logvar = net.encode(variables, batch.image)
    expected = standard_normal(3).kl({}, mean, logvar)
    np.testing.assert_allclose(net.prior.kl(variables, mean, logvar), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"prior": "learned"}, {"condition": "quadrant2", "condition_hidden": (5,)}])
def test_each_example_has_its_own_condition(fields):
    """In a batch, with leading sample axes, and alone: the same numbers."""
    model, variables = make(**fields)
    objective = conditional.make_objective(model, samples=4)
    batch = batch_of()

    def evaluate(batch):
        return objective(variables, batch, example_keys(jax.random.key(2), 0, batch.index), True, 0)[0]

    evaluate = jax.jit(evaluate)
    together = evaluate(batch)
    for i in (0, 4):
        alone = evaluate(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch))
        for name in together:
            np.testing.assert_allclose(together[name][i], alone[name][0], rtol=1e-5)
    other = evaluate(batch._replace(label=(batch.label + 1) % 3))
    assert np.any(np.abs(together["loss"] - other["loss"]) > 1e-3) == (model.condition_on == "label")


def test_without_latents_it_is_a_regression():
    """The loss is -log p(hidden | visible) of the decoder at the condition; nothing is drawn, and there is no encoder."""
    model, variables = make(condition="quadrant1", likelihood="bernoulli", latent_dim=0)
    assert set(variables["params"]["autoencoder"]) == {"decoder"} and set(variables["params"]) == {"autoencoder"}
    batch = batch_of()
    objective = conditional.make_objective(model)
    metrics, other = (
        objective(variables, batch, example_keys(jax.random.key(seed), 0, batch.index), True, 0)[0] for seed in (0, 1)
    )
    net = model.of(batch)
    raw = net.decode_raw(variables, jnp.zeros((6, 0)))
    energy = np.asarray(jnp.logaddexp(0.0, raw) - batch.image * raw)
    hidden = np.ones((4, 4), bool)
    hidden[2:, :2] = False
    np.testing.assert_allclose(metrics["loss"], energy[:, hidden].sum(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(metrics["loss"], other["loss"])
    np.testing.assert_array_equal(metrics["kl"], 0)
    with pytest.raises(ValueError, match="model.latent_dim is 0, but must be at least 1"):
        make(latent_dim=0)


def test_without_a_condition_there_is_no_answer():
    model, variables = make()
    for function in (model.encode, model.decode_raw, model.prior.log_prob):
        with pytest.raises(ValueError, match="needs a condition"):
            function(variables, jnp.zeros((1, 3)))


def test_labels_by_bayes_rule():
    """log p(y | x) = log p(x | y) - lse_y log p(x | y), each the importance-weighted bound given that label.

    The noise is the same for all images, so an image's result does not depend on its place.
    """
    model, variables = make(likelihood="bernoulli")
    batch = batch_of()
    found = np.asarray(jax.jit(model.probabilities)(variables, batch.image))
    objective = conditional.make_objective(model, samples=conditional.BAYES_SAMPLES)
    bound = []
    for label in range(3):
        keys = example_keys(jax.random.key(0), None, jnp.zeros(6, jnp.int32))
        metrics, _ = objective(variables, batch._replace(label=jnp.full(6, label)), keys, False, None)
        bound.append(-np.float64(metrics["bound"]))
    expected = np.exp(bound - np.logaddexp.reduce(bound, axis=0)).T
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (np.abs(found - 1 / 3) > 0.01).any()
    np.testing.assert_allclose(model.probabilities(variables, batch.image[4:]), found[4:], rtol=1e-4)


@pytest.mark.parametrize(
    "condition,count,seen,hidden",
    [
        ("quadrant1", 4, (3, 0), (0, 0)),
        ("quadrant2", 8, (0, 1), (0, 2)),
        ("quadrant3", 12, (3, 3), (0, 3)),
        ("column", 4, (1, 2), (1, 1)),
    ],
)
def test_the_visible_part(condition, count, seen, hidden):
    visible = conditional.visible_part((4, 4, 1), condition)
    assert visible.sum() == count and visible[seen] == 1 and visible[hidden] == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_only_hidden_pixels_count_and_visible_ones_are_kept(channels):
    model, variables = make(channels, condition="quadrant1", likelihood="gaussian", scale=0.5)
    batch = batch_of(channels=channels)
    net, raw = model.of(batch), jnp.zeros((2, 6, 4, 4, channels))
    energy = net.likelihood.energy(variables, raw, batch.image)
    whole = conditional.LIKELIHOODS["gaussian"](0.5)
    assert (energy[:, :, 2:, :2] == 0).all()
    np.testing.assert_array_equal(energy[:, :, :2], whole.energy(variables, raw, batch.image)[:, :, :2])
    nats = distortion(net.likelihood, variables, raw, batch.image)
    np.testing.assert_allclose(nats, energy.sum(axis=(-3, -2, -1)), rtol=1e-6)
    assert 16 * net.likelihood.constant == pytest.approx(12 * whole.constant)
    decoded = generate.decode(net, variables, jnp.zeros((6, 3)))
    np.testing.assert_array_equal(decoded[:, 2:, :2], batch.image[:, 2:, :2])
    assert (decoded[:, :2] != batch.image[:, :2]).all()


def test_a_row_of_the_figure_has_one_style(monkeypatch):
    """With a decoder that ignores its condition all images of a row are equal, and the rows differ."""
    model, variables = make()
    decode = lambda variables, z: jnp.tile(z[:, :1, None, None], (1, 4, 4, 1))
    unconditional = model._replace(decode_raw=decode, prior=standard_normal(3))
    blind = model._replace(given=lambda c: unconditional)
    test = Split(np.zeros((6, 4, 4, 1), np.uint8), np.arange(6, dtype=np.int32) % 3)
    monkeypatch.setattr(conditional.figures, "image_rows", lambda image, rows, heading, title: (image, heading))
    drawn = conditional.make_figures(blind, test, jax.random.key(0), "Title")(
        variables, {"mean": np.zeros((6, 3))}, [], {}
    )
    image, heading = drawn["samples"]()
    assert heading == ["0", "1", "2"] and image.shape[1:] == (3, 4, 4, 1)
    assert (image == image[:, :1]).all()
    assert len(np.unique(image[:, 0, 0, 0, 0])) == len(image)


def test_a_likelihood_given_the_label_says_so():
    numbers = {"test/bound": 8.0, "test/nll": 7.0}
    for condition, said in [("label", True), ("quadrant3", False)]:
        model, _ = make(condition=condition, likelihood="bernoulli")
        found = conditional.ledger(model, numbers, "test", 16, True, likelihood="bernoulli")
        assert (found.get("test/nll measures") == "-log p(x | y), given each image's own label") == said
        assert ("given each image's own label" in found["the numbers measure"]) == said


def test_numbers_of_hidden_pixels_are_divided_by_hidden_pixels():
    model, _ = make(condition="quadrant3", likelihood="discretised_logistic", scale=0.1)
    found = conditional.ledger(model, {"test/bound": 8.0}, "test", 16, False, likelihood="discretised_logistic")
    assert found["the numbers measure"] == "-log of a mass on 0..255, of 4 hidden pixels"
    assert found["test/bound, bits per dimension"] == pytest.approx(8.0 / (4 * math.log(2)))
    model, _ = make(condition="quadrant3")
    found = conditional.ledger(model, {"test/bound": 8.0, "test/reconstruction": 0.5}, "test", 16, False)
    assert found["test/bound, with its constant, nats"] == pytest.approx(8 + 4 * 0.5 * math.log(2 * math.pi))
    assert found["test/scale that this error implies"] == pytest.approx(0.5)


def test_a_learned_prior_has_no_aggregate_kl():
    """There is no one p(z) that the aggregate posterior could be compared with."""
    batch = batch_of()
    for prior, expected in (("learned", set()), ("standard_normal", {"aggregate_kl"})):
        model, variables = make(prior=prior)
        probes = conditional.make_final_probes(model, 3, "none")
        arrays = jax.device_get(probes.measure(variables, batch, example_keys(jax.random.key(0), None, batch.index)))
        numbers = probes.reduce(arrays, Split(np.zeros((6, 4, 4, 1), np.uint8), np.asarray(batch.label)))
        assert {"aggregate_kl"} & set(numbers) == expected and "mutual_information" in numbers
        assert model.of(batch).prior.shared == model.prior.shared


def test_an_encoder_of_labels_is_measured_where_labels_are_known():
    model, variables = make()
    probes, batch = conditional.make_probes(model), batch_of()
    label = np.where(np.arange(6) < 4, np.asarray(batch.label), -1).astype(np.int32)
    arrays = jax.device_get(jax.jit(probes.measure)(variables, batch._replace(label=jnp.asarray(label)), None))
    numbers = probes.reduce(arrays, Split(np.zeros((6, 4, 4, 1), np.uint8), label))
    np.testing.assert_allclose(numbers["kl_by_latent"], arrays["kl_by_latent"][:4].mean(axis=0), rtol=1e-6)
    assert probes.reduce(arrays, Split(np.zeros((6, 4, 4, 1), np.uint8), np.full(6, -1, np.int32))) == {}
    for label in (3, -1):
        with pytest.raises(ValueError, match=f"labels go from {label} to {label}, but must be from 0 to 2"):
            model.condition(batch.image, np.full(6, label))


def test_a_regression_refuses_what_only_a_kl_has():
    model, _ = make(condition="quadrant1", latent_dim=0)
    for fields in ({"beta": 0.5}, {"warmup_steps": 3}, {"free_bits": 0.1}, {"samples": 2}):
        with pytest.raises(ValueError, match="model.latent_dim is 0, a regression without KL: leave objective.beta"):
            conditional.make_objective(model, **fields)


def test_a_completion_never_asks_the_encoder():
    """The recognition network sees the hidden pixels: with NaN in its place the completion is the same."""
    model, variables = make(condition="quadrant1", prior="learned")
    poisoned = jax.tree.map(lambda leaf: leaf, variables)
    poisoned["params"]["autoencoder"]["encoder"] = jax.tree.map(
        lambda leaf: leaf * jnp.nan, variables["params"]["autoencoder"]["encoder"]
    )
    net = model.of(batch_of())
    z = net.prior.sample(variables, jax.random.key(0), 6)
    np.testing.assert_array_equal(net.prior.sample(poisoned, jax.random.key(0), 6), z)
    np.testing.assert_array_equal(generate.decode(net, poisoned, z), generate.decode(net, variables, z))


@pytest.mark.parametrize(
    "shape,classes,fields,message",
    [
        ((4, 4, 1), 0, {}, "model.condition is 'label', but the data have 0 classes"),
        ((4, 5, 1), 3, {"condition": "quadrant1"}, "images of 4x5 have no equal quadrants"),
        ((4, 4, 1), 3, {"condition": "corner"}, "model.condition is 'corner', but must be one of label, quadrant1"),
        ((4, 4, 1), 3, {"prior": "vamp"}, "model.prior is 'vamp', but must be one of standard_normal, learned"),
        (
            (4, 4, 1),
            3,
            {"condition": "column", "likelihood": "optimal_gaussian"},
            "model.likelihood is 'optimal_gaussian', whose variance is computed over all pixels",
        ),
        *(
            (
                (4, 4, 1),
                3,
                {"condition": condition, "condition_hidden": (0,)},
                "model.condition_hidden is 0, but must be",
            )
            for condition in ("label", "quadrant1")
        ),
    ],
)
def test_bad_fields_are_refused(shape, classes, fields, message):
    with pytest.raises(ValueError, match=message):
        conditional.make(shape, classes, **SMALL | fields)


def test_an_unlabelled_image_is_refused():
    image, label = np.zeros((4, 4, 4, 1), np.uint8), np.array([0, 1, -1, 2], np.int32)
    splits = {"train": Split(image, label), "test": Split(image[:1], label[:1])}
    dataset = Dataset(splits, num_classes=3, shuffle=True)
    with pytest.raises(ValueError, match="1 of 4 train images have no label: label them all, or use the family vae"):
        conditional.check_data(dataset)
    conditional.check_data(dataset, condition="quadrant1")
    splits["train"] = Split(image, np.array([0, 1, 1, 0], np.int32))
    with pytest.raises(ValueError, match="no training image labelled 2, though labels go up to 2"):
        conditional.check_data(dataset)


def train(path, **changes):
    config = config_file.get_config("smoke").to_dict()
    config["model"] |= {"network": "mlp", "hidden": (16,), "latent_dim": 4} | changes
    job = session.build(config)
    run_job(job, config, path)
    return vae_jax.load(str(path)), config


@pytest.fixture(scope="module")
def by_label(tmp_path_factory):
    path = tmp_path_factory.mktemp("label")
    return path, *train(path)


@pytest.mark.slow
def test_a_loaded_model_takes_labels(by_label):
    path, vae, config = by_label
    image = vae.sample(4, seed=1, label=[0, 1, 2, 3])
    np.testing.assert_allclose(vae.sample(4, seed=1, label=2)[2], image[2], atol=1e-6)
    mean, _ = vae.encode(image, label=3)
    np.testing.assert_allclose(vae.reconstruct(image, label=3), vae.decode(mean, label=3), atol=1e-6)
    assert vae.decode(mean, label=3, pixels=True).shape == image.shape
    by_class = [vae.log_likelihood(image[:1], samples=100, label=label) for label in range(10)]
    expected = np.exp(by_class - np.logaddexp.reduce(by_class, axis=0)).T
    np.testing.assert_allclose(vae.probabilities(image)[:1], expected, rtol=1e-3)
    with pytest.raises(ValueError, match="conditioned on the label: it keeps its prior"):
        vae.with_prior(standard_normal(4))
    paths = commands.sample(str(path), config, "", 6, 0, labels=[3, 5])
    assert paths[0].name == "sample-step2-count6-seed0-labels3-5.png"
    for written in (
        commands.reconstruct(str(path), config, "", "test", 3),
        commands.interpolate(str(path), config, "", "test", 3, None, [0, 1]),
        commands.traverse(str(path), config, "", "test", 3, None, [7]),
    ):
        assert all(file.exists() for file in written)


@pytest.mark.slow
@pytest.mark.parametrize(
    "call,message",
    [
        (lambda vae: vae.sample(2), r"conditioned on the label: give label= \(or --labels\), from 0 to 9"),
        (lambda vae: vae.sample(2, label=10), "label is 10, but must be from 0 to 9"),
        (lambda vae: vae.sample(2, label=[1, -1]), "label is -1, but must be from 0 to 9"),
        (lambda vae: vae.sample(2, label=[1, 2, 3]), "must be an integer, or one for each of 2"),
        (lambda vae: vae.sample(2, label=1.5), "label is 1.5, but must be an integer"),
        (lambda vae: vae.decode(np.zeros((1, 4)), label=1, image=np.zeros((1, 28, 28, 1))), "does not complete images"),
    ],
)
def test_labels_that_do_not_fit_are_refused(by_label, call, message):
    with pytest.raises(ValueError, match=message):
        call(by_label[1])


@pytest.mark.slow
def test_a_loaded_model_completes_images(tmp_path):
    vae, _ = train(tmp_path, condition="quadrant2", prior="learned", condition_hidden=(8,), likelihood="bernoulli")
    image = np.random.default_rng(0).random((3, 28, 28, 1)).astype(np.float32)
    completed = vae.sample(3, image=image)
    np.testing.assert_array_equal(completed[:, :, :14], image[:, :, :14])
    drawn = vae.decode(np.zeros((3, 4)), image=image, pixels=True)
    np.testing.assert_array_equal(drawn[:, :, :14], image[:, :, :14])
    assert set(np.unique(drawn[:, :, 14:])) == {0, 1}
    changed = image.copy()
    changed[:, :, 14:] = 0  # the hidden half tells nothing
    np.testing.assert_array_equal(vae.sample(3, image=changed), completed)
    assert vae.log_likelihood(np.round(image), samples=3).shape == (3,)
    with pytest.raises(ValueError, match="these images have grey pixels, but a Bernoulli is a likelihood of 0 and 1"):
        vae.log_likelihood(image, samples=3)
    np.savez(tmp_path / "mine.npz", image=np.round(255 * image[..., 0]).astype(np.uint8))
    picture, drawn = commands.sample(str(tmp_path), vae.config, "latest", 5, 0, own=str(tmp_path / "mine.npz"))
    assert "-mine-" in picture.name
    left = np.load(drawn)["image"][:, :, :14]
    np.testing.assert_allclose(left, np.resize(image, (5, 28, 28, 1))[:, :, :14], atol=0.5 / 255 + 1e-6)
    with pytest.raises(ValueError, match="this model completes images: give image="):
        vae.sample(3)
    with pytest.raises(ValueError, match="this model is not conditioned on labels"):
        vae.sample(3, label=1, image=image)
    with pytest.raises(ValueError, match="a model of the family conditional has no classes"):
        vae.predict(image)
