"""Binary pixels: how they are drawn, where, and what the numbers are then called."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from small_run import run_job, small_job

import vae_jax
from vae_jax import commands, data
from vae_jax.batch import BINARIZE, Batch, binarize, example_keys
from vae_jax.commands import examples
from vae_jax.families import vae
from vae_jax.run.evaluate import as_seen
from vae_jax.steps import init_state, make_train_step

BERNOULLI = {"model.likelihood": "bernoulli", "data.binarize": "dynamic"}


def batch_of(value, n=4000):
    return Batch(jnp.full((n, 2, 3, 1), value), -jnp.ones(n, jnp.int32), jnp.ones(n), jnp.arange(n))


def keys_of(step, n=4000):
    return example_keys(jax.random.key(0), step, jnp.arange(n))


@pytest.mark.parametrize("value", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_dynamic_pixels_are_one_with_their_probability(value):
    image = binarize(batch_of(value), keys_of(0), "dynamic").image
    assert set(np.unique(image)) <= {0.0, 1.0} and image.dtype == jnp.float32
    assert image.mean() == pytest.approx(value, abs=5 * np.sqrt(value * (1 - value) / image.size) + 1e-7)


def test_dynamic_pixels_are_drawn_afresh_in_training_and_stay_in_evaluation():
    batch = batch_of(0.5, 50)
    drawn = [binarize(batch, keys_of(step, 50), "dynamic").image for step in (0, 1, None, None)]
    assert (drawn[0] != drawn[1]).any() and (drawn[1] != drawn[2]).any()
    np.testing.assert_array_equal(drawn[2], drawn[3])
    some = binarize(batch._replace(image=batch.image[7:9]), keys_of(0, 50)[7:9], "dynamic").image
    np.testing.assert_array_equal(some, drawn[0][7:9])  # it belongs to the example, not to the batch


def test_threshold_and_none():
    batch = batch_of(0.0, 1)._replace(image=jnp.asarray([0, 0.2, 0.5, 128 / 255, 0.9, 1]).reshape(1, 2, 3, 1))
    image = binarize(batch, keys_of(0, 1), "threshold").image
    np.testing.assert_array_equal(image.reshape(-1), [0, 0, 0, 1, 1, 1])
    assert binarize(batch, keys_of(0, 1), "none") is batch


def test_each_training_step_draws_its_own_pixels():
    def objective(variables, batch, keys, train, step, axis_name=None):
        return {"loss": batch.image.mean(axis=(1, 2, 3)) + 0 * variables["params"]}, {}

    optimizer = optax.sgd(0.1)
    train_step = make_train_step(objective, optimizer, prepare=functools.partial(binarize, how="dynamic"))
    state = init_state({"params": jnp.zeros(())}, optimizer, jax.random.key(0))
    for step in range(3):
        state, metrics = train_step(state, batch_of(0.5, 50))
        expected = binarize(batch_of(0.5, 50), keys_of(step, 50), "dynamic").image.mean()
        assert metrics["loss"].mean == pytest.approx(float(expected), rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("binary")
    job, config = small_job(BERNOULLI, steps_per_call=2)
    return path, job, config, *run_job(job, config, path)


@pytest.mark.slow
def test_a_stopped_binary_training_continues_bit_for_bit(trained, tmp_path):
    _, job, config, state, directory = trained
    stops = iter([False, False, True])
    run_job(job, config, tmp_path, lambda: next(stops))
    again, other = run_job(job, config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    assert [row["train/loss"] for row in directory.history if "train/loss" in row] == [
        row["train/loss"] for row in other.history if "train/loss" in row
    ]


def test_training_evaluation_and_load_see_the_same_test_images(trained):
    """The mean of what `load` encodes gives the KL that training logged; nowhere does a model see a grey pixel."""
    path, job, config, _, directory = trained
    model = vae_jax.load(str(path))
    test = job.dataset.splits["test"]
    binary = as_seen(test, "dynamic", config["seed"])
    assert set(np.unique(binary.image)) == {0, 255}
    for image in (test.image, binary.image):  # binary ones stay as they are
        mean, logvar = model.encode(image)
        kl = model.model.prior.kl({}, jnp.asarray(mean), jnp.asarray(logvar)).sum(axis=1)
        assert float(kl.mean()) == pytest.approx(directory.history[-1]["test/kl"], rel=1e-4)
    _, stored = examples.load_examples(str(path), config, "", "test", None)
    np.testing.assert_array_equal(stored.image, binary.image)


@pytest.mark.slow
def test_a_bernoulli_on_grey_pixels_is_named_grey_cross_entropy(tmp_path):
    job, config = small_job({"model.likelihood": "bernoulli", "run.likelihood_samples": 3}, drawn=True)
    run_job(job, config, tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    assert "| the numbers measure | grey cross-entropy: " in summary and "bits per dimension" not in summary
    assert "test/mutual_information" in summary and "test/nll" not in summary
    found = commands.evaluate(str(tmp_path), config, "", "test")
    assert found["the numbers measure"].startswith("grey cross-entropy")
    figures = vae.make_figures(job.model, job.dataset.splits["test"], jax.random.key(0), "Title")
    row = {"epoch": 1.0, "test/loss": 1.0, "test/reconstruction": 1.0}
    curve = figures(None, {"mean": np.zeros((2, 20))}, [row], {})["training"]()
    assert [ax.get_title() for ax in curve.axes] == ["loss", "grey cross-entropy"]


def test_the_numbers_of_binary_pixels_are_a_likelihood(trained):
    path, _, config, *_ = trained
    found = commands.evaluate(str(path), config, "", "test")
    assert found["the numbers measure"] == "-log of a mass on {0, 1}"
    bits = found["test/bound, bits per dimension"]
    assert bits == pytest.approx(found["test/bound"] / (784 * np.log(2)))
    assert found["floor: the entropy of the pixels"] < found["collapsed model"]
    assert found["floor: the entropy of the pixels"] < found["test/bound"]


@pytest.mark.parametrize("likelihood", ["unit_gaussian", "continuous_bernoulli", "discretised_logistic"])
def test_a_likelihood_of_grey_pixels_refuses_binary_ones(likelihood):
    with pytest.raises(ValueError, match="model.likelihood is a .*, but data.binarize is 'dynamic': take") as error:
        small_job(BERNOULLI | {"model.likelihood": likelihood})
    assert "\n" not in str(error.value)


def test_coloured_images_are_not_binarized(tmp_path):
    np.savez(tmp_path / "colour.npz", image=np.zeros((20, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="data.binarize is 'dynamic', but the images of .* are coloured"):
        data.load(name=str(tmp_path / "colour.npz"), binarize="dynamic")
    with pytest.raises(ValueError, match="data.binarize is 'static', but must be one of none, dynamic, threshold"):
        data.load(name="digits", binarize="static")
    assert BINARIZE[0] == "none"


def test_binarized_mnist_of_tfds(monkeypatch):
    """With mock data: its server was not reachable. It has no labels, and its pixels 0 and 1 become 0 and 255."""
    pytest.importorskip("array_record")
    splits = {name: types.SimpleNamespace(num_examples=7) for name in ("train", "validation", "test")}
    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", splits)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "is_prepared", lambda self: True)
    with tfds.testing.mock_data(num_examples=7):
        dataset = data.load(name="binarized_mnist")
    assert dataset.splits["train"].image.shape == dataset.splits["test"].image.shape == (7, 28, 28, 1)
    assert set(np.unique(dataset.splits["train"].image)) == {0, 255} and dataset.is_binary("train")
    grey = dataset.splits["test"]._replace(image=np.full((7, 28, 28, 1), 100, np.uint8))
    assert not dataset._replace(splits=dataset.splits | {"test": grey}).is_binary("test")
    assert dataset.num_classes == 0 and (dataset.splits["train"].label == -1).all()
