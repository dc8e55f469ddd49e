"""Objectives against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax.augment import augment, rotate, translate
from vae_jax.batch import Batch, example_keys
from vae_jax.objectives import (
    cross_entropy,
    elbo,
    half_squared_error,
    kl_to_standard_normal,
    reparameterize,
)

ROOT = jax.random.key(0)


def make_batch(image):
    n = len(image)
    return Batch(image, -jnp.ones(n, jnp.int32), jnp.ones(n), jnp.arange(n))


def test_kl_equals_monte_carlo():
    mean, logvar = jnp.array([[0.5, -1.0, 0.0]]), jnp.array([[0.2, -1.5, 0.0]])
    samples = 200_000
    z = mean + jnp.exp(logvar / 2) * jax.random.normal(ROOT, (samples, 3))
    log_ratio = 0.5 * jnp.sum(
        z**2 - (z - mean) ** 2 / jnp.exp(logvar) - logvar, axis=-1
    )
    error = 5 * log_ratio.std() / np.sqrt(samples)
    np.testing.assert_allclose(
        kl_to_standard_normal(mean, logvar)[0], log_ratio.mean(), atol=error
    )


def test_kl_of_the_prior_is_zero_and_sums_over_latents():
    np.testing.assert_array_equal(
        kl_to_standard_normal(jnp.zeros((2, 4)), jnp.zeros((2, 4))), 0
    )
    np.testing.assert_allclose(
        kl_to_standard_normal(jnp.full((1, 4), 2.0), jnp.zeros((1, 4))), 4 * 2.0**2 / 2
    )


def test_reconstruction_is_half_the_squared_error_summed_over_pixels():
    image = jnp.zeros((2, 3, 4, 1))
    np.testing.assert_allclose(half_squared_error(image, image + 0.5), 0.5 * 12 * 0.25)


def test_reparameterize_has_the_given_mean_and_deviation():
    n = 50_000
    keys = example_keys(ROOT, 0, jnp.arange(n))
    z = reparameterize(
        jnp.full((n, 2), 3.0), jnp.full((n, 2), np.log(4.0), jnp.float32), keys
    )[0]
    np.testing.assert_allclose(z.mean(axis=0), 3.0, atol=5 * 2 / np.sqrt(n))
    np.testing.assert_allclose(z.std(axis=0), 2.0, rtol=0.02)


def linear_gaussian():
    """x = W z + e with z, e ~ N(0, I) and orthogonal columns: the posterior is diagonal, log p(x) is known."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((6, 2)))
    w = q * np.array([2.0, 0.7])
    precision = 1 + np.array([2.0, 0.7]) ** 2
    x = rng.standard_normal((1, 6)) @ np.linalg.cholesky(w @ w.T + np.eye(6)).T
    covariance = w @ w.T + np.eye(6)
    log_p = (
        -0.5
        * (
            x @ np.linalg.solve(covariance, x.T)
            + np.linalg.slogdet(covariance)[1]
            + 6 * np.log(2 * np.pi)
        ).item()
    )
    w, precision = jnp.asarray(w, jnp.float32), jnp.asarray(precision, jnp.float32)

    def encode(variables, image):
        mean = (image.reshape(-1, 6) @ w) / precision[None, :] + variables["shift"]
        return mean, jnp.broadcast_to(-jnp.log(precision), mean.shape)

    def decode(variables, z):
        return (z @ w.T).reshape(*z.shape[:-1], 2, 3, 1)

    return encode, decode, jnp.asarray(x, jnp.float32).reshape(1, 2, 3, 1), log_p


@pytest.mark.parametrize("shift,kl", [(0.0, 0.0), (0.5, 0.5 * 0.25 * (5 + 1.49))])
def test_elbo_of_a_linear_gaussian_model_is_its_evidence_less_the_posterior_gap(
    shift, kl
):
    """-ELBO = -log p(x) + KL(q || posterior), D/2 ln(2 pi) left out; the KL of a shift s is 1/2 s^2 sum(precision)."""
    encode, decode, image, log_p = linear_gaussian()
    n = 40_000
    batch = make_batch(jnp.broadcast_to(image, (n, *image.shape[1:])))
    objective = functools.partial(elbo, encode=encode, decode=decode)
    metrics, model_state = objective(
        {"shift": jnp.full((1, 2), shift)},
        batch,
        example_keys(ROOT, 0, batch.index),
        train=True,
        step=0,
    )
    assert model_state == {}
    loss = metrics["loss"] + 6 / 2 * np.log(2 * np.pi)
    np.testing.assert_allclose(
        loss.mean(), -log_p + kl, atol=5 * loss.std() / np.sqrt(n)
    )


def test_beta_weighs_the_kl():
    encode, decode, image, _ = linear_gaussian()
    batch = make_batch(image)
    variables = {"shift": jnp.zeros((1, 2))}
    keys = example_keys(ROOT, 0, batch.index)
    metrics, _ = elbo(
        variables, batch, keys, True, 0, encode=encode, decode=decode, beta=3.0
    )
    np.testing.assert_allclose(
        metrics["loss"], metrics["reconstruction"] + 3 * metrics["kl"], rtol=1e-6
    )


def test_noise_belongs_to_the_example():
    index = jnp.array([7, 3, 3])
    keys = example_keys(ROOT, 5, index)
    zeros = jnp.zeros((3, 2))
    z = reparameterize(zeros, zeros, keys)[0]
    np.testing.assert_array_equal(z[1], z[2])
    np.testing.assert_array_equal(
        z[:1], reparameterize(zeros[:1], zeros[:1], example_keys(ROOT, 5, index[:1]))[0]
    )
    assert not np.isin(z[0], z[1]).any()
    assert not np.isin(
        z, reparameterize(zeros, zeros, example_keys(ROOT, 6, index))
    ).any()


def labelled_batch(n=5):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random((n, 4, 4, 1), np.float32))
    return make_batch(image)._replace(label=jnp.arange(n) % 3)


def linear(variables, image, train, axis_name):
    """Three logits, linear in the image; as model state, what it was called with."""
    logits = image.reshape(len(image), -1) @ variables["kernel"]
    return logits, {"image": image, "train": train, "axis_name": axis_name}


KERNEL = {"kernel": jax.random.normal(jax.random.key(7), (16, 3))}


def numpy_probabilities(batch):
    logits = np.float64(batch.image).reshape(len(batch.image), -1) @ KERNEL["kernel"]
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True)


def test_cross_entropy_in_evaluation():
    """Smoothing and augmentation belong to training: here the loss is the plain negative log-likelihood."""
    batch = labelled_batch()
    keys = example_keys(ROOT, 0, batch.index)
    fields = {"label_smoothing": 0.3, "shift": 2, "rotation": 90.0}
    metrics, state = cross_entropy(
        KERNEL, batch, keys, False, None, "devices", apply=linear, **fields
    )
    p, label = numpy_probabilities(batch), np.asarray(batch.label)
    np.testing.assert_allclose(metrics["loss"], -np.log(p[range(5), label]), rtol=1e-5)
    np.testing.assert_array_equal(metrics["prediction"], p.argmax(axis=1))
    assert metrics["prediction"].dtype == jnp.int32
    np.testing.assert_array_equal(metrics["accuracy"], p.argmax(axis=1) == label)
    np.testing.assert_allclose(metrics["confidence"], p.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(state["image"], batch.image)
    assert state["train"] is False and state["axis_name"] == "devices"


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing(smoothing):
    """(1 - s) of the negative log-likelihood, and s of its mean over all labels."""
    batch = labelled_batch()
    keys = example_keys(ROOT, 0, batch.index)
    metrics, _ = cross_entropy(
        KERNEL, batch, keys, True, 0, apply=linear, label_smoothing=smoothing
    )
    log_p = np.log(numpy_probabilities(batch))
    likelihood = log_p[range(5), np.asarray(batch.label)]
    expected = -(1 - smoothing) * likelihood - smoothing * log_p.mean(axis=1)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert set(metrics) == {"loss", "accuracy"}


def test_training_sees_the_augmented_images():
    batch = labelled_batch()

    def seen(**fields):
        keys = example_keys(ROOT, 0, batch.index)
        _, state = cross_entropy(KERNEL, batch, keys, True, 0, apply=linear, **fields)
        return state["image"]

    keys = example_keys(ROOT, 0, batch.index)
    np.testing.assert_array_equal(
        seen(shift=1, rotation=20.0), augment(batch.image, keys, 1, 20.0)
    )
    assert (seen(shift=1) != batch.image).any()
    assert (seen(rotation=20.0) != batch.image).any()
    np.testing.assert_array_equal(seen(), batch.image)


def test_translate_is_exact():
    image = jnp.asarray(np.random.default_rng(0).random((4, 5, 6, 2), np.float32))
    offset = np.array([[0, 0], [2, -1], [-2, 2], [1, 0]])
    moved = translate(image, jnp.asarray(offset), 2)
    for before, after, (down, right) in zip(np.asarray(image), moved, offset):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
        expected = padded[2 - down : 7 - down, 2 - right : 8 - right]
        np.testing.assert_array_equal(after, expected)


def test_rotate():
    image = jnp.asarray(np.random.default_rng(0).random((4, 7, 7, 2), np.float32))
    turned = rotate(image, jnp.array([0.0, 90.0, -90.0, 180.0]))
    for turns, before, after in zip((0, 1, -1, 2), np.asarray(image), turned):
        np.testing.assert_allclose(after, np.rot90(before, turns), atol=1e-5)


def test_rotate_interpolates_and_fills_with_zeros():
    """A plane stays a plane under bilinear interpolation; what comes from outside the image is 0."""
    row, column = np.mgrid[:9, :9] - 4.0
    plane = jnp.asarray(10 + row + 2 * column, jnp.float32).reshape(1, 9, 9, 1)
    turned = rotate(plane, jnp.array([30.0]))[0, :, :, 0]
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    expected = 10 + (cos * row + sin * column) + 2 * (cos * column - sin * row)
    inside = row**2 + column**2 <= 16
    np.testing.assert_allclose(turned[inside], expected[inside], rtol=1e-5)
    assert turned[0, 0] == 0


def test_augment_belongs_to_the_example_and_keeps_to_its_bounds():
    n = 400
    image = jnp.zeros((n, 9, 9, 1)).at[:, 4, 4].set(1.0)

    def moved(step=3, shift=2, rows=slice(None)):
        keys = example_keys(ROOT, step, jnp.arange(n)[rows])
        return augment(image[rows], keys, shift, 0.0)

    np.testing.assert_array_equal(moved(), moved())
    np.testing.assert_array_equal(moved()[7:9], moved(rows=slice(7, 9)))
    _, row, column, _ = np.nonzero(np.asarray(moved()))
    assert len(row) == n and {*row} == {*column} == {2, 3, 4, 5, 6}
    assert np.bincount(row * 9 + column).max() < 40  # 25 places, 16 expected in each
    assert (moved() != moved(step=4)).any()
    np.testing.assert_array_equal(moved(shift=0), image)


def test_rotations_are_of_up_to_the_given_angle_either_way():
    n = 400
    image = jnp.zeros((n, 9, 9, 1)).at[:, 0, 4].set(1.0)
    turned = augment(image, example_keys(ROOT, 0, jnp.arange(n)), 0, 30.0)[..., 0]
    column = (turned * jnp.arange(9.0)[None, None, :]).sum((1, 2)) / turned.sum((1, 2))
    angle = np.degrees(np.arcsin((4 - column) / 4))  # counterclockwise is to the left
    assert -33 < angle.min() < -25 and 25 < angle.max() < 33
    assert abs(angle.mean()) < 3 * 30 / np.sqrt(3 * n)
