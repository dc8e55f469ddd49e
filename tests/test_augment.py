"""Random shifts and rotations: exact where they can be, each image's own, within their bounds."""

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax.augment import augment, rotate, translate
from vae_jax.batch import example_keys

ROOT = jax.random.key(0)


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
