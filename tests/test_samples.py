"""Distances between generated and real images: closed forms, order of the arguments, copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vae_jax import data, weights
from vae_jax.evaluation.samples import (
    frechet_distance,
    manifold,
    memorisation,
    nearest,
    precision_recall_density_coverage,
)


def normal(n, features, seed=0, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, features))


def exact(n, features, seed, shift=0.0, scale=1.0):
    """Points whose mean and covariance are exactly `shift` and `scale`^2 I."""
    points = normal(n, features, seed)
    points -= points.mean(axis=0)
    return shift + scale * points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T


def test_the_frechet_distance_of_gaussians():
    """N(0, I) and N(m, s^2 I): |m|^2 + d (1 - s)^2."""
    real, fake = exact(500, 8, 0), exact(300, 8, 1, shift=0.5, scale=3.0)
    assert frechet_distance(real, fake) == pytest.approx(8 * 0.25 + 8 * 4, rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(real, fake) == pytest.approx(frechet_distance(fake, real), rel=1e-9)


def test_the_frechet_distance_does_not_depend_on_a_rotation():
    real, fake = normal(500, 8), normal(500, 8, 1, 0.2) @ np.diag(np.linspace(0.5, 2, 8))
    rotation = scipy.stats.special_ortho_group.rvs(8, random_state=0)
    assert frechet_distance(real @ rotation, fake @ rotation) == pytest.approx(frechet_distance(real, fake), rel=1e-9)


def test_too_few_images_for_a_covariance_are_refused():
    with pytest.raises(ValueError, match="79 generated images are fewer than the 80 that 8 features need"):
        frechet_distance(normal(500, 8), normal(79, 8))
    assert np.isfinite(frechet_distance(normal(500, 8), np.zeros((80, 8))))  # a collapsed model has no covariance


def compare(real, fake):
    return precision_recall_density_coverage(manifold(real), manifold(fake))


def test_two_samples_of_one_distribution():
    """Coverage is 1 - prod_{i<=5} (n - i) / (n + m - i) in expectation, and density 1."""
    n = 2000
    found = compare(normal(n, 4, 0), normal(n, 4, 1))
    expected = 1 - np.prod([(n - i) / (2 * n - i) for i in range(1, 6)])
    assert found["coverage"] == pytest.approx(expected, abs=0.015)
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["precision"] == pytest.approx(found["recall"], abs=0.05)


@pytest.mark.slow
def test_two_samples_of_one_distribution_at_the_published_size():
    found = compare(normal(10_000, 8, 0), normal(10_000, 8, 1))
    assert found["coverage"] == pytest.approx(0.96877, abs=0.005)


def test_one_mode_of_two_is_precise_but_not_recalled():
    real = np.concatenate([normal(500, 3, 0), normal(500, 3, 1, shift=50)])
    found = compare(real, normal(1000, 3, 2, scale=0.7))
    assert found["precision"] > 0.95 and found["recall"] < 0.55
    one_point = compare(real, normal(1000, 3, 2, scale=1e-3))
    assert one_point["precision"] > 0.99 and one_point["recall"] < 0.01
    exchanged = compare(normal(1000, 3, 2, scale=1e-3), real)
    assert exchanged["precision"] < 0.01 and exchanged["recall"] > 0.99


def test_balls_are_closed_for_precision_and_open_for_coverage():
    """On a line of equal steps the third neighbour is two steps away (one, one, two), and the fifth three."""
    line = np.arange(0.0, 40.0)[:, None]
    balls = manifold(line)
    assert balls.radius[3][20] == 2 and balls.radius[5][20] == 3
    copies = compare(line, line)
    assert copies["precision"] == copies["recall"] == copies["coverage"] == 1
    duplicates = compare(np.zeros((10, 2)), np.zeros((10, 2)))
    assert duplicates["precision"] == 1 and duplicates["coverage"] == duplicates["density"] == 0


def test_copies_of_training_images_fail_the_test_for_memorisation():
    training, test, fresh = (normal(1000, 5, seed) for seed in range(3))
    of_test, _ = nearest(test, training)
    copied = memorisation(nearest(training[:500], training)[0], of_test)
    assert copied["nearest_training_distance"] == 0
    assert copied["nearest_training_distance/rank_test"] == 1
    assert copied["nearest_training_distance/closer_than_1_percent"] == 1
    honest = memorisation(nearest(fresh, training)[0], of_test)
    assert honest["nearest_training_distance/rank_test"] == pytest.approx(0.5, abs=0.05)
    assert abs(honest["nearest_training_distance/rank_test_z"]) < 3
    assert honest["nearest_training_distance/closer_than_1_percent"] < 0.03
    far = memorisation(nearest(fresh + 10, training)[0], of_test)
    assert far["nearest_training_distance/rank_test"] < 0.01 and far["nearest_training_distance/rank_test_z"] < -10


def test_the_nearest_training_image_is_found():
    training = normal(50, 4)
    distance, which = nearest(training[[7, 3]] + 1e-3, training)
    assert which.tolist() == [7, 3]
    np.testing.assert_allclose(distance, 2e-3, rtol=1e-6)


def test_the_pinned_classifier_is_the_one_that_was_shipped(monkeypatch):
    model, variables = weights.pinned_classifier()
    image = jnp.zeros((3, 28, 28, 1))
    features = np.asarray(model.features(variables, image))
    assert features.shape == (3, 42)
    probabilities = np.asarray(model.probabilities(variables, image))
    logits = features[:, 32:]
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), probabilities, rtol=1e-5)
    monkeypatch.setitem(weights.SHA256, weights.CLASSIFIER, "0" * 64)
    with pytest.raises(
        ValueError, match="mnist-classifier/model.safetensors is damaged or changed: install vae_jax again"
    ):
        weights.pinned_classifier()


def test_the_pinned_classifier_reads_mnist(mnist_dir):
    """The accuracy that the comment in weights/__init__.py states."""
    model, variables = weights.pinned_classifier()
    test = data.load(name="mnist", manual_dir=mnist_dir).splits["test"]
    probabilities = jax.jit(model.probabilities)(variables, jnp.asarray(test.image / np.float32(255)))
    assert np.mean(probabilities.argmax(axis=1) == test.label) == pytest.approx(0.9926, abs=5e-4)
