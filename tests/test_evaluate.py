"""Evaluation: independent of the division into batches, repeatable; the closed forms of the yardsticks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax import batch, data
from vae_jax.evaluation.baselines import covariance_eigenvalues, linear_vae_loss
from vae_jax.evaluation.classification import (
    class_accuracy,
    confusion_matrix,
    expected_calibration_error,
)
from vae_jax.nn.networks import make_vae
from vae_jax.objectives import elbo
from vae_jax.run.evaluate import make_evaluate
from vae_jax.run.seeds import mean_metrics

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def vae():
    network = make_vae(
        (8, 8, 1), latent_dim=3, encoder_features=(4, 4), decoder_features=(4, 4)
    )
    variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    encode, decode = (
        functools.partial(network.apply, method=method)
        for method in ("encode", "decode")
    )
    return functools.partial(elbo, encode=encode, decode=decode), variables


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    return batch.Split(
        rng.integers(0, 256, (23, 8, 8, 1), np.uint8),
        np.arange(23, dtype=np.int32) % 10,
    )


def test_result_does_not_depend_on_the_batch_size(vae, split):
    objective, variables = vae
    whole = make_evaluate(objective, split)(variables, KEY)
    assert {name: values.shape for name, values in whole.items()} == dict.fromkeys(
        ("loss", "reconstruction", "kl"), (23,)
    )
    for batch_size in (1, 7, 23, 64):
        divided = make_evaluate(objective, split, batch_size=batch_size)(variables, KEY)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5), divided, whole
        )


def test_evaluation_repeats_exactly_and_has_noise_of_the_key(vae, split):
    objective, variables = vae
    evaluate = make_evaluate(objective, split)
    first = evaluate(variables, KEY)
    np.testing.assert_array_equal(first["loss"], evaluate(variables, KEY)["loss"])
    assert (
        first["reconstruction"]
        != evaluate(variables, jax.random.key(4))["reconstruction"]
    ).all()


def test_padding_is_inert(split):
    """Rows of weight 0 fill up the last batch; an objective that counts them shows that they are cut off."""

    def objective(variables, batch, keys, train, step, axis_name=None):
        return {
            "loss": batch.weight,
            "index": batch.index.astype(float),
            "label": batch.label.astype(float),
        }, {}

    arrays = make_evaluate(objective, split, batch_size=7)({}, KEY)
    np.testing.assert_array_equal(arrays["loss"], 1)
    np.testing.assert_array_equal(arrays["index"], np.arange(23))
    np.testing.assert_array_equal(arrays["label"], split.label)


def test_mean_metrics():
    assert mean_metrics({"loss": np.array([1.0, 2.0, 6.0], np.float32)}) == {
        "loss": 3.0
    }


def test_whole_numbers_are_no_metrics():
    arrays = {"accuracy": np.ones(3, np.float32), "prediction": np.arange(3)}
    assert mean_metrics(arrays) == {"accuracy": 1.0}


def test_expected_calibration_error():
    """Two bins in use: of 4 examples at 0.9 half are right, of 6 at 0.55 all are."""
    confidence = np.repeat([0.9, 0.55], [4, 6])
    correct = np.array([1, 0, 1, 0, 1, 1, 1, 1, 1, 1], float)
    error = expected_calibration_error(confidence, correct)
    assert error == pytest.approx(0.4 * 0.4 + 0.6 * 0.45)
    # In one bin only the means count; opposite errors in two bins do not cancel.
    one_bin = expected_calibration_error(confidence, correct, bins=1)
    assert one_bin == pytest.approx(abs(0.8 - 0.69))
    assert expected_calibration_error(np.ones(5), np.ones(5)) == 0
    assert expected_calibration_error(np.zeros(5), np.zeros(5)) == 0


def test_bins_of_calibration_are_closed_above():
    """0.5 belongs to the lower of two bins, where its gap cancels that of 0.4."""
    error = expected_calibration_error(np.array([0.5, 0.4]), np.array([1.0, 0.0]), 2)
    assert error == pytest.approx(0.05)


def test_calibrated_predictions_have_almost_no_error():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 1, 200_000)
    correct = (rng.random(200_000) < confidence).astype(float)
    assert expected_calibration_error(confidence, correct) < 0.01
    assert expected_calibration_error(confidence, correct**2 * 0.9) > 0.04


def test_confusion_matrix_and_class_accuracy():
    label = np.array([0, 0, 0, 1, 1, 3], np.int32)
    prediction = np.array([0, 0, 2, 1, 0, 3], np.int32)
    counts = confusion_matrix(label, prediction, 4)
    expected = [[2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(class_accuracy(counts), [2 / 3, 1 / 2, np.nan, 1])


def test_eigenvalues_are_those_of_the_covariance():
    image = np.random.default_rng(0).integers(0, 256, (5000, 2, 3, 1), np.uint8)
    flat = image.reshape(5000, 6) / 255
    np.testing.assert_allclose(
        covariance_eigenvalues(image),
        np.linalg.eigvalsh(np.cov(flat.T, bias=True))[::-1],
        rtol=1e-4,
    )


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_linear_vae_loss_is_the_minimum_over_linear_vaes(beta):
    """Per eigenvalue l: encoder N(a x, v), decoder w z. The loss (1 - w a)^2 l / 2 + w^2 v / 2 + beta KL, on a grid."""
    eigenvalues = np.array([9.0, 3.0, 1.5, 0.4])
    w, u, v = np.meshgrid(
        np.linspace(0, 4, 161),
        np.linspace(0, 1, 161),
        np.geomspace(0.05, 1, 81),
        indexing="ij",
    )
    lowest = []
    for value in eigenvalues[:3]:
        a = u / np.maximum(w, 1e-9) * (w > 0)  # u = w a
        loss = ((1 - w * a) ** 2 * value + w**2 * v) / 2 + beta / 2 * (
            a**2 * value + v - 1 - np.log(v)
        )
        lowest.append(loss.min())
    np.testing.assert_allclose(
        linear_vae_loss(eigenvalues, 3, beta), sum(lowest) + 0.2, atol=0.01
    )
    assert linear_vae_loss(eigenvalues, 0, beta) == eigenvalues.sum() / 2
    assert linear_vae_loss(eigenvalues, 3, 0.0) == pytest.approx(0.2)  # PCA's error


def test_yardsticks_of_mnist(mnist_dir):
    eigenvalues = covariance_eigenvalues(
        data.load(name="mnist", manual_dir=mnist_dir).splits["train"].image
    )
    assert eigenvalues.sum() == pytest.approx(52.73, abs=0.005)
    assert linear_vae_loss(eigenvalues, 0) == pytest.approx(26.36, abs=0.005)
    assert linear_vae_loss(eigenvalues, 20) == pytest.approx(22.74, abs=0.005)
    assert (eigenvalues[:20] > 1).sum() == 12
