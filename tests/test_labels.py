"""Few labels: which images keep theirs, what a batch holds, the label summed out, and a VAE that classifies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vae_jax
from vae_jax import data
from vae_jax.batch import Batch, Split, example_keys
from vae_jax.families import semisupervised, sparse_labels
from vae_jax.likelihoods import unit_gaussian
from vae_jax.objectives import marginalize_label
from vae_jax.run.job import check_data
from vae_jax.steps import init_state, make_train_step


def split_of(counts):
    label = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return Split(np.zeros((len(label), 2, 2, 1), np.uint8), label)


@pytest.mark.parametrize("labelled", [3, 10, 11, 30])
def test_each_class_keeps_as_many_labels(labelled):
    split = split_of([20, 30, 40])
    hidden = data.hide_labels(split, labelled, 0, 3)
    kept = hidden.label >= 0
    assert kept.sum() == labelled and (hidden.label[kept] == split.label[kept]).all()
    counts = np.bincount(hidden.label[kept], minlength=3)
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(hidden.label, data.hide_labels(split, labelled, 0, 3).label)
    assert (hidden.label != data.hide_labels(split, labelled, 1, 3).label).any()


def test_a_data_set_hides_the_training_labels_by_the_seed():
    plain = data.load("digits")
    for seed in (0, 1):
        hidden = data.load("digits", labelled=100, label_seed=seed)
        expected = data.hide_labels(plain.splits["train"], 100, seed, 10).label
        np.testing.assert_array_equal(hidden.splits["train"].label, expected)
        np.testing.assert_array_equal(hidden.splits["test"].label, plain.splits["test"].label)


def test_all_and_no_labels():
    split = split_of([2, 3])
    assert data.hide_labels(split, -1, 0, 2) is split
    assert (data.hide_labels(split, 0, 0, 2).label == -1).all()
    unlabelled = split._replace(label=np.full(5, -1, np.int32))
    assert data.hide_labels(unlabelled, 0, 0, 0) is unlabelled


@pytest.mark.parametrize(
    "labelled,seed,message",
    [
        (2, 0, "data.labelled is 2, but must be -1 for all, 0 for none, or from 3, one per class, to 90"),
        (91, 0, "data.labelled is 91, but must be"),
        (-2, 0, "data.labelled is -2, but must be"),
        (63, 0, "data.labelled is 63, 21 of class 0, which has 20 training images: give fewer, or -1"),
        (9, -1, "data.label_seed is -1, but must be at least 0"),
    ],
)
def test_numbers_of_labels_that_cannot_be_kept(labelled, seed, message):
    with pytest.raises(ValueError, match=message):
        data.hide_labels(split_of([20, 30, 40]), labelled, seed, 3)


def test_a_batch_holds_so_many_labelled_images_and_each_image_once():
    label = np.where(np.arange(103) % 10 == 0, 1, -1)  # 11 labelled
    order = data.epoch_order(0, 1, label, True, 20, 4)
    assert order.shape == (103,)
    batches = order[:100].reshape(5, 20)
    assert ((label[batches] >= 0).sum(axis=1) == 4).all()
    assert all(len(np.unique(batch)) == 20 for batch in batches)
    np.testing.assert_array_equal(order, data.epoch_order(0, 1, label, True, 20, 4))
    assert (order != data.epoch_order(0, 2, label, True, 20, 4)).any()


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"labelled": 100, "labelled_per_batch": 101}, "of 64 must hold 1 to 100 labelled and 1 to 1337 unlabelled"),
        ({"labelled": 100, "labelled_per_batch": 64}, "of 64 must hold 1 to 100 labelled and 1 to 1337 unlabelled"),
        ({"labelled": 0}, "no training image has a label, but this family needs some: raise data.labelled"),
        ({"labelled": 0, "labelled_per_batch": 3}, "which needs data.labelled above 0 and shuffled images"),
        ({"labelled": 50, "labelled_per_batch": 3, "shuffle": False}, "which needs data.labelled above 0 and shuffled"),
    ],
)
def test_batches_that_cannot_be_filled(fields, message):
    with pytest.raises(ValueError, match=message):
        check_data(semisupervised, data.load(name="digits", **fields), batch_size=64, patience=0)


def test_the_label_summed_out_is_the_evidence_at_the_exact_posterior():
    """Two classes with p(x, y) = p(y) N(x; m_y, 1): at q = p(y | x) U(x) = -log p(x); elsewhere it is above."""
    x, m, p = 0.7, np.array([-1.0, 0.5]), np.array([0.3, 0.7])
    log_joint = np.log(p) - 0.5 * (x - m) ** 2 - 0.5 * math.log(2 * math.pi)
    evidence = np.logaddexp(*log_joint)
    by_label, log_q = (
        jnp.asarray(-log_joint[:, None], jnp.float32),
        jnp.asarray((log_joint - evidence)[None], jnp.float32),
    )
    assert float(marginalize_label(by_label, log_q)[0]) == pytest.approx(-evidence, abs=1e-6)
    uniform = jnp.full((1, 2), -math.log(2))
    expected = -log_joint.mean() - math.log(2)
    assert float(marginalize_label(by_label, uniform)[0]) == pytest.approx(expected, abs=1e-6)
    assert expected > -evidence


SMALL = {"network": "mlp", "hidden": (8,), "latent_dim": 3, "likelihood": "bernoulli"}


@pytest.fixture(scope="module")
def model():
    return sparse_labels.make((4, 4, 1), 3, **SMALL)


@pytest.fixture(scope="module")
def variables(model):
    noise = iter(jax.random.split(jax.random.key(1), 50))
    variables = jax.jit(model.init)(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(noise), leaf.shape), variables)


def batch_of(label):
    n = len(label)
    image = np.random.default_rng(0).random((n, 4, 4, 1), np.float32).round()
    return Batch(jnp.asarray(image), jnp.asarray(label, jnp.int32), jnp.ones(n), jnp.arange(n))


def metrics_of(model, variables, batch, train=True, **fields):
    objective = sparse_labels.make_objective(model, 0.5, **fields)
    keys = example_keys(jax.random.key(2), 0 if train else None, batch.index)
    return jax.jit(lambda *given: objective(*given, train, 0 if train else None)[0])(variables, batch, keys)


def test_the_bound_is_that_of_a_mixture_of_labels(model, variables):
    """U(x) = sum_y pi_y (-log p(x | z, y)) + KL + sum_y pi_y log(pi_y C), with each label's reconstruction from the
    model.
    """
    batch = batch_of([-1, -1, 1, 2])
    found = metrics_of(model, variables, batch)
    pi = np.float64(model.probabilities(variables, batch.image))
    costs = []
    for label in range(3):
        known = metrics_of(model, variables, batch._replace(label=jnp.full(4, label)), alpha=0.0)
        costs.append(np.float64(known["loss"]) - math.log(3) - np.float64(known["kl"]))
    expected = (pi * np.array(costs).T).sum(axis=1) + np.float64(found["kl"]) + (pi * np.log(3 * pi)).sum(axis=1)
    np.testing.assert_allclose(found["bound"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["loss"][:2], found["bound"][:2], rtol=1e-6)
    own = -np.log(pi[[2, 3], [1, 2]])
    np.testing.assert_allclose(found["cross_entropy"][0][2:], own, rtol=1e-4)
    known = np.array(costs)[[1, 2], [2, 3]] + math.log(3) + np.float64(found["kl"])[2:]
    np.testing.assert_allclose(found["loss"][2:], known + 0.1 / 0.5 * own, rtol=1e-5)


def test_one_soft_label_is_another_number(model, variables):
    """As published: one pass through the decoder, whose loss lies below the bound that pays for the label."""
    batch = batch_of([-1] * 5)
    published, charged = (metrics_of(model, variables, batch, charge=charge) for charge in (False, True))
    assert "bound" not in published
    assert (np.abs(published["loss"] - charged["loss"]) > 1e-3).any()
    evaluated = metrics_of(model, variables, batch, train=False, charge=False)
    assert (evaluated["loss"] < evaluated["bound"]).all()


def test_a_likelihood_brings_its_own_variables(monkeypatch):
    monkeypatch.setitem(
        sparse_labels.LIKELIHOODS, "mine", lambda: unit_gaussian()._replace(init=lambda key: {"scale": 2.0})
    )
    model = sparse_labels.make((4, 4, 1), 3, **SMALL | {"likelihood": "mine"})
    assert model.init(jax.random.key(0))["params"]["likelihood"] == {"scale": 2.0}


@pytest.mark.parametrize("charge", [True, False])
def test_beta_weighs_the_kl_of_z_alone(model, variables, charge):
    once, thrice = (metrics_of(model, variables, batch_of([0, -1]), charge=charge, beta=beta) for beta in (1.0, 3.0))
    np.testing.assert_allclose(thrice["loss"] - once["loss"], 2 * once["kl"], rtol=1e-4)


def test_labels_of_a_split_never_enter_its_bound(model, variables):
    batch = batch_of([0, 1, 2])
    found = metrics_of(model, variables, batch, train=False)
    other = metrics_of(model, variables, batch._replace(label=jnp.array([2, 2, 0])), train=False)
    for name in ("loss", "bound", "reconstruction", "kl"):
        np.testing.assert_array_equal(found[name], other[name])
    assert (found["accuracy"][0] != other["accuracy"][0]).any()


def test_unlabelled_images_change_no_gradient_of_the_cross_entropy(model, variables):
    def gradient(batch):
        def total(variables):
            value, weight = metrics_of(model, variables, batch)["cross_entropy"]
            return jnp.sum(value * weight)

        return jax.grad(total)(variables)

    few = batch_of([1, 2, -1, -1])
    alone = jax.tree.map(lambda leaf: leaf[:2], few)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(few), gradient(alone))


def test_a_metric_of_the_labelled_counts_them_alone(model, variables):
    optimizer = vae_jax.optimizers.make_adam(10, 64)
    step = jax.jit(make_train_step(sparse_labels.make_objective(model, 0.5), optimizer))
    state = init_state(variables, optimizer, jax.random.key(0))
    _, metrics = step(state, batch_of([1, -1, -1, 2]))
    assert metrics["accuracy"].weight == 2 and metrics["loss"].weight == 4
    _, none = step(state, batch_of([-1] * 4))
    assert none["accuracy"].weight == 0 and np.isfinite(none["loss"].mean)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: sparse_labels.make((4, 4, 1), 1), "labels of at least 2 classes are needed, but the data have 1"),
        (
            lambda: sparse_labels.make((4, 4, 1), 3, likelihood="optimal_gaussian"),
            "model.likelihood is 'optimal_gaussian'",
        ),
        (
            lambda: sparse_labels.make_objective(sparse_labels.make((4, 4, 1), 3, **SMALL), 0.5, alpha=-1.0),
            "objective.alpha is -1.0, but must be at least 0",
        ),
    ],
)
def test_bad_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
