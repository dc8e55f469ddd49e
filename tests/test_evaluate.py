"""Evaluation: independent of batches and devices, repeatable; means over examples and seeds; closed forms."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vae_jax import batch, data, families
from vae_jax.batch import Split, has_grey
from vae_jax.evaluation.baselines import (
    convert,
    covariance_eigenvalues,
    cross_entropy_baselines,
    histogram_loss,
    linear_vae_baselines,
    linear_vae_loss,
    ppca_loss,
)
from vae_jax.evaluation.classification import (
    class_accuracy,
    confusion_matrix,
    expected_calibration_error,
)
from vae_jax.evaluation.statistics import mean_and_interval
from vae_jax.evaluation.verdict import verdict
from vae_jax.families import Probes
from vae_jax.run import evaluate
from vae_jax.run.devices import Devices
from vae_jax.run.evaluate import make_evaluate, map_examples
from vae_jax.run.seeds import combine_seeds, mean_metrics, reduce_seeds, root_keys
from vae_jax.steps import eval_metrics

KEY = jax.random.key(3)
NO_PROBES = Probes(lambda variables, batch, keys: {}, lambda arrays, split: {})


@pytest.fixture(scope="module")
def vae():
    model = families.vae.make((8, 8, 1), latent_dim=3, encoder_features=(4, 4), decoder_features=(4, 4))
    return families.vae.make_objective(model), jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    return Split(
        rng.integers(0, 256, (23, 8, 8, 1), np.uint8),
        np.arange(23, dtype=np.int32) % 10,
    )


@pytest.fixture(scope="module")
def undivided(vae, split):
    """Each test image's metrics, evaluated in one batch."""
    objective, variables = vae
    return map_examples(functools.partial(eval_metrics, objective), split)(variables, KEY)


def assert_close(tree, other, rtol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), tree, other)


@pytest.mark.parametrize("batch_size", [1, 7, 23, 64])
def test_result_does_not_depend_on_the_batch_size(vae, split, undivided, batch_size):
    objective, variables = vae
    names = ("loss", "reconstruction", "kl", "bound")
    assert {name: values.shape for name, values in undivided.items()} == dict.fromkeys(names, (23,))
    divided = map_examples(functools.partial(eval_metrics, objective), split, batch_size=batch_size)(variables, KEY)
    assert_close(divided, undivided)


def label_means(batch_sizes):
    """An objective that notes the batches it is traced for, and probes of each image's mean and label."""

    def objective(variables, batch, keys, train, step, axis_name=None):
        batch_sizes.append(len(batch.label))
        noise = jax.vmap(jax.random.normal)(keys)
        return {"loss": noise, "labelled": (noise, batch.label / 10)}, {}

    def measure(variables, batch, keys):
        return {"mean": batch.image.mean(axis=(1, 2, 3)), "label": batch.label}

    def reduce(arrays, split):
        assert (arrays["label"] == split.label).all()
        return {"mean by label": [float(arrays["mean"][split.label == label].mean()) for label in range(10)]}

    return objective, Probes(measure, reduce)


@pytest.mark.parametrize("decodes,batch_size", [(0, 23), (1, 23), (36, 7), (256, 1), (1000, 1)])
def test_more_decodes_make_smaller_batches_and_the_same_numbers(split, decodes, batch_size):
    sizes = []
    numbers, arrays = make_evaluate(*label_means(sizes), split, decodes_per_example=decodes)({}, KEY)
    assert set(sizes) == {batch_size}
    expected, expected_arrays = make_evaluate(*label_means([]), split)({}, KEY)
    assert set(numbers) == {"loss", "labelled", "mean by label"} and set(arrays) == {"mean", "label"}
    assert_close(numbers, expected)
    assert_close(arrays, expected_arrays)


@pytest.mark.parametrize("count", [2, 8])
def test_result_does_not_depend_on_the_devices(vae, split, undivided, count):
    """23 images on 8 devices: 3 each, and a row of padding."""
    objective, variables = vae
    found = map_examples(functools.partial(eval_metrics, objective), split, batch_size=2, devices=Devices(count))(
        variables, KEY
    )
    assert_close(found, undivided)


def test_evaluation_repeats_exactly_and_has_noise_of_the_key(vae, split, undivided):
    objective, variables = vae
    evaluate = map_examples(functools.partial(eval_metrics, objective), split)
    np.testing.assert_array_equal(evaluate(variables, KEY)["loss"], undivided["loss"])
    other = evaluate(variables, jax.random.key(4))
    assert (undivided["reconstruction"] != other["reconstruction"]).all()
    np.testing.assert_array_equal(undivided["kl"], other["kl"])


def test_evaluation_is_the_mean_over_the_split(vae, split, undivided):
    objective, variables = vae
    numbers, arrays = make_evaluate(objective, NO_PROBES, split)(variables, KEY)
    assert arrays == {}
    assert_close(numbers, {name: values.mean() for name, values in undivided.items()})


def test_evaluation_passes_no_step_and_does_not_train(split):
    seen = []

    def objective(variables, batch, keys, train, step, axis_name=None):
        seen.append((train, step, axis_name))
        return {"loss": batch.weight}, {}

    make_evaluate(objective, NO_PROBES, split)({}, KEY)
    assert set(seen) == {(False, None, None)}


@pytest.mark.parametrize("count,seeds", [(1, 1), (2, 2)])
def test_a_split_larger_than_a_block_is_sent_in_blocks(split, monkeypatch, count, seeds):
    """Of 23 images, 4 or 8 at once: the index, of which the noise is a function, is the position in the split."""

    def measure(variables, batch, keys):
        return {"index": batch.index, "image": batch.image, "noise": jax.vmap(jax.random.normal)(keys)}

    roots = KEY if seeds == 1 else root_keys(range(seeds))
    variables = {"none": np.zeros(seeds)}
    expected = map_examples(measure, split, seeds, 2, Devices(count))(variables, roots)
    monkeypatch.setattr(evaluate, "BLOCK", 2 * 2 * count * 64 + 63)
    found = map_examples(measure, split, seeds, 2, Devices(count))(variables, roots)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (np.broadcast_to(found["index"], (seeds, 23)) == np.arange(23)).all()


@pytest.mark.parametrize("of_images", [cross_entropy_baselines, histogram_loss, has_grey])
def test_what_looks_at_all_images_does_so_in_parts(monkeypatch, of_images):
    """Parts of three images, of which the last is one; the only grey pixel is its last."""
    image = np.random.default_rng(0).choice([0, 255], (10, 8, 8, 1)).astype(np.uint8)
    image[-1, -1, -1] = 7
    expected = of_images(image)
    monkeypatch.setattr(batch, "CHUNK", 3)
    assert of_images(image) == expected
    assert [len(part) for part in batch.chunks(image)] == [3, 3, 3, 1]
    assert of_images is not has_grey or expected


def test_padding_is_inert(split):
    """Rows of weight 0 fill the last batch and are cut off afterwards; all weights that remain are 1."""

    def rows(variables, batch, key):
        return {"weight": batch.weight, "index": batch.index, "label": batch.label, "image": batch.image}

    arrays = map_examples(rows, split, batch_size=7)({}, KEY)
    np.testing.assert_array_equal(arrays["weight"], 1)
    np.testing.assert_array_equal(arrays["index"], np.arange(23))
    np.testing.assert_array_equal(arrays["label"], split.label)
    np.testing.assert_allclose(arrays["image"], split.image / np.float32(255), rtol=2e-7)


def test_padding_has_no_weight(split):
    """23 images make four batches of 7; the last one holds 5 rows of weight 0."""

    def total_weight(variables, batch, key):
        return jnp.broadcast_to(batch.weight.sum(), batch.weight.shape)

    totals = map_examples(total_weight, split, batch_size=7)({}, KEY)
    np.testing.assert_array_equal(totals, [7] * 21 + [2] * 2)


def test_a_metric_with_its_own_weight_has_the_weighted_mean():
    """One of total weight 0 is left out: its mean does not exist."""
    value = np.array([1.0, 2.0, 6.0], np.float32)
    arrays = {
        "loss": value,
        "uneven": (value, np.array([0.0, 3.0, 1.0], np.float32)),
        "none": (value, np.zeros(3, np.float32)),
    }
    expected = {"loss": 3.0, "uneven": 3.0}
    assert mean_metrics(arrays) == expected
    arrays["uneven"] = (value, np.array([2.0, 0.0, 0.5], np.float32))
    expected["uneven"] = 2.0
    assert mean_metrics(arrays) == expected


def test_means_are_summed_in_float64():
    """A float32 sum of a million values would lose digits."""
    value = np.full(1_000_000, 0.1, np.float32)
    exact = float(np.float32(0.1))
    means = mean_metrics({"loss": value, "pair": (value, value)})
    assert means["loss"] == pytest.approx(exact, rel=1e-12)
    assert means["pair"] == pytest.approx(exact, rel=1e-12)


def test_weights_count_in_evaluation(split):
    """From the objective to the number; a metric of no image is left out."""

    def objective(variables, batch, keys, train, step, axis_name=None):
        value = batch.index.astype(jnp.float32)
        weight = (batch.label == 3).astype(jnp.float32)
        return {"loss": value, "threes": (value, weight), "none": (value, 0 * weight)}, {}

    numbers, _ = make_evaluate(objective, NO_PROBES, split)({}, KEY)
    assert numbers == {"loss": 11.0, "threes": np.mean([3, 13])}


def test_seeds_are_combined_to_mean_interval_and_each_own():
    each = [{"loss": 1.0, "rare": 2.0}, {"loss": 2.0}, {"loss": 6.0, "rare": 3.0}]
    numbers = combine_seeds(each, range(5, 8))
    low, high = scipy.stats.t.interval(0.95, 2, loc=3.0, scale=np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    assert numbers.pop("loss/interval") == pytest.approx((high - low) / 2)
    assert numbers == {"loss": 3.0, "loss/seed5": 1.0, "loss/seed6": 2.0, "loss/seed7": 6.0}


def test_lists_are_combined_entry_by_entry():
    values = np.random.default_rng(0).random((3, 2, 4))
    mean, interval = mean_and_interval(values.tolist())
    np.testing.assert_allclose(mean, values.mean(axis=0))
    numbers = combine_seeds([{"kl": value.tolist()} for value in values], range(3))
    assert numbers["kl"] == mean and numbers["kl/interval"] == interval
    for i, j in np.ndindex(2, 4):
        assert mean_and_interval(values[:, i, j].tolist())[1] == pytest.approx(interval[i][j])
    for seed in range(3):
        assert numbers[f"kl/seed{seed}"] == values[seed].tolist()
    assert json.loads(json.dumps(numbers)) == numbers


def test_one_seed_has_its_numbers_as_they_are():
    assert reduce_seeds(mean_metrics, {"loss": np.array([1.0, 3.0])}, range(4, 5)) == {"loss": 2.0}


def test_several_seeds_equal_each_alone(split):
    """Weighted metrics and the lists of probes. The arrays are those of the first seed."""
    objective, plain = label_means([])
    shift = jnp.array([0.0, 1.0, 5.0])

    def shifted(variables, batch, keys):
        arrays = plain.measure(variables, batch, keys)
        return arrays | {"mean": arrays["mean"] + variables}

    probes = plain._replace(measure=shifted)
    numbers, arrays = make_evaluate(objective, probes, split, range(7, 10))(shift, root_keys(range(7, 10)))
    alone = [make_evaluate(objective, probes, split)(shift[i], jax.random.key(7 + i)) for i in range(3)]
    assert_close(arrays, alone[0][1])
    expected = combine_seeds([numbers for numbers, _ in alone], range(7, 10))
    assert list(numbers) == list(expected) and len(numbers) == 3 * 5
    assert_close(numbers, expected)
    assert len(numbers["mean by label/interval"]) == 10
    assert numbers["mean by label/seed9"] == pytest.approx(np.add(numbers["mean by label/seed7"], 5), rel=1e-5)


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
    """0.5 belongs to the lower of two bins, where its gap and the gap of 0.4 cancel."""
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
        loss = ((1 - w * a) ** 2 * value + w**2 * v) / 2 + beta / 2 * (a**2 * value + v - 1 - np.log(v))
        lowest.append(loss.min())
    np.testing.assert_allclose(linear_vae_loss(eigenvalues, 3, beta), sum(lowest) + 0.2, atol=0.01)
    assert linear_vae_loss(eigenvalues, 0, beta) == eigenvalues.sum() / 2
    assert linear_vae_loss(eigenvalues, 3, 0.0) == pytest.approx(0.2)  # PCA's error


def test_baselines_are_those_of_the_images():
    image = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), np.uint8)
    eigenvalues = covariance_eigenvalues(image)
    expected = {"collapsed model": eigenvalues.sum() / 2, "best linear VAE": linear_vae_loss(eigenvalues, 3, 0.05)}
    assert linear_vae_baselines(image, 3, 0.05) == pytest.approx(expected)
    assert expected["best linear VAE"] < expected["collapsed model"]


def test_a_given_scale_weighs_the_error_and_so_the_kl():
    """1/s^2 (squared error / 2 + s^2 KL): the loss of beta = s^2, divided by s^2."""
    image = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), np.uint8)
    scaled = linear_vae_baselines(image, 3, 1.0, 0.5)
    weighed = linear_vae_baselines(image, 3, 0.25)
    assert scaled == pytest.approx({name: value / 0.25 for name, value in weighed.items()})


def test_the_best_scale_of_a_linear_vae_is_that_of_probabilistic_pca():
    """-log p of the data under the maximum-likelihood model, by SciPy, less ln(2 pi) / 2 a pixel."""
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(128, 1, (4000, 6)) + rng.normal(0, 30, (4000, 2)) @ rng.normal(0, 1, (2, 6)), 0, 255)
    image = np.round(image).astype(np.uint8).reshape(4000, 2, 3, 1)
    flat = image.reshape(4000, 6) / 255
    values, vectors = np.linalg.eigh(np.cov(flat.T, bias=True))
    noise = values[:4].mean()
    covariance = vectors @ np.diag([noise] * 4 + [*values[4:]]) @ vectors.T
    expected = -scipy.stats.multivariate_normal.logpdf(flat, flat.mean(axis=0), covariance).mean()
    found = linear_vae_baselines(image, 2, scale=None)["best linear VAE"]
    assert found == pytest.approx(expected - 3 * np.log(2 * np.pi), abs=2e-3)


def test_cross_entropy_baselines():
    """Two images of two pixels: (0, 255) and (255, 128)."""
    image = np.array([[0, 255], [255, 128]], np.uint8).reshape(2, 1, 2, 1)
    found = cross_entropy_baselines(image)
    h = scipy.stats.bernoulli.entropy
    assert found["collapsed model"] == pytest.approx(h(0.5) + h((255 + 128) / 510))
    assert found["floor: the entropy of the pixels"] == pytest.approx(h(128 / 255) / 2)


TWO_PIXELS = families.vae.make((1, 2, 1), latent_dim=1, network="mlp")


def test_thresholded_pixels_have_the_baselines_of_what_the_model_sees():
    image = np.array([[0, 100], [255, 128]], np.uint8).reshape(2, 1, 2, 1)
    found = families.vae.baselines(TWO_PIXELS, image, likelihood="bernoulli", binarize="threshold")
    assert found == pytest.approx({"collapsed model": 2 * np.log(2), "floor: the entropy of the pixels": 0.0})


def test_the_histogram_of_each_pixel():
    """A logistic cannot reach it without latents, so a bound above it does not mean an undertrained model."""
    image = np.array([[0, 7], [0, 9]], np.uint8).reshape(2, 1, 2, 1)
    assert histogram_loss(image) == pytest.approx(np.log(2))
    found = families.vae.baselines(TWO_PIXELS, image, likelihood="discretised_logistic")
    numbers = {"test/kl": 2.0, "test/bound": 9.0, "test/active_units": 2}
    assert found and verdict(numbers, "test", found)["verdict"].startswith("healthy")


def test_conventions_convert_into_each_other():
    """A uniform density on [0, 1] has 0 nats and 8 bits per dequantised dimension; a uniform mass on 256 levels has 8
    bits.
    """
    assert convert(0.0, "nats", 784)["bits per dequantised dimension"] == 8
    assert convert(784 * np.log(256), "nats", 784)["bits per dimension"] == pytest.approx(8)
    constant = 0.5 * np.log(2 * np.pi)
    found = convert(18.5, "loss", 784, constant)
    assert found["nats"] == pytest.approx(18.5 + 720.45, abs=0.01)
    for source, value in found.items():
        assert convert(value, source, 784, constant) == pytest.approx(found)
    with pytest.raises(ValueError, match="there is no convention 'bpd': give one of loss, nats"):
        convert(1.0, "bpd", 784)


def test_other_baselines_of_mnist(mnist_dir):
    """The figures of a computation of its own; 10,000 test images, and the training covariance for the Gaussians."""
    splits = data.load(name="mnist", manual_dir=mnist_dir).splits
    found = cross_entropy_baselines(splits["test"].image)
    assert found["floor: the entropy of the pixels"] == pytest.approx(45.53, abs=0.005)
    assert found["collapsed model"] == pytest.approx(205.97, abs=0.5)  # there with the training mean
    assert histogram_loss(splits["train"].image) == pytest.approx(918.0, abs=5)
    eigenvalues = covariance_eigenvalues(splits["train"].image)
    for latent_dim, expected in [(0, 54.3), (2, -12.4), (5, -90.7), (10, -182.2), (20, -299.8), (50, -507.9)]:
        normalised = convert(ppca_loss(eigenvalues, latent_dim), "loss", 784, 0.5 * np.log(2 * np.pi))["nats"]
        assert normalised == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("side,known", [(8, 3), (40, 3), (8, 12), (40, 12)])
def test_a_loss_without_a_lower_limit_is_no_baseline(side, known):
    """Eight images have seven directions; with more latents the optimal scale is 0. Pixels: both sides of the limit."""
    image = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), np.uint8)
    found = linear_vae_baselines(image, latent_dim=known, scale=None)
    assert [*found] == ["collapsed model", "best linear VAE"][: 2 if known < 7 else 1]
    assert np.isfinite([*found.values()]).all()


def test_baselines_of_mnist(mnist_dir):
    eigenvalues = covariance_eigenvalues(data.load(name="mnist", manual_dir=mnist_dir).splits["train"].image)
    assert eigenvalues.sum() == pytest.approx(52.73, abs=0.005)
    assert linear_vae_loss(eigenvalues, 0) == pytest.approx(26.36, abs=0.005)
    assert linear_vae_loss(eigenvalues, 20) == pytest.approx(22.74, abs=0.005)
    assert (eigenvalues[:20] > 1).sum() == 12
