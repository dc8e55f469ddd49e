"""generate.py on a linear pair, where the answers are known."""

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax.generate import interpolate, prior, reconstruct, traverse

W = jnp.asarray(
    np.linalg.qr(np.random.default_rng(0).standard_normal((4, 2)))[0], jnp.float32
)


def encode(variables, image):
    mean = image.reshape(-1, 4) @ W
    return mean, jnp.full_like(mean, 5.0)  # a wide posterior: its noise would show


def decode(variables, z):
    return (z @ W.T).reshape(-1, 2, 2, 1)


def test_reconstruction_decodes_the_posterior_mean():
    image = jnp.arange(8.0).reshape(2, 2, 2, 1)
    expected = (image.reshape(2, 4) @ W @ W.T).reshape(image.shape)
    np.testing.assert_allclose(
        reconstruct(encode, decode, {}, image), expected, rtol=1e-4
    )


def test_the_prior_is_standard_normal_and_follows_the_key():
    z = prior(jax.random.key(0), 20_000, latent_dim=2)
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=0.05)
    np.testing.assert_array_equal(z, prior(jax.random.key(0), 20_000, 2))
    assert (z != prior(jax.random.key(1), 20_000, 2)).all()


def test_an_interpolation_is_a_line():
    start, end = jnp.array([0.0, 1.0]), jnp.array([1.0, -1.0])
    expected = [[0, 1], [0.25, 0.5], [0.5, 0], [0.75, -0.5], [1, -1]]
    np.testing.assert_allclose(interpolate(start, end, 5), expected)


def test_a_traversal_moves_one_latent_at_a_time():
    z = traverse(jnp.array([7.0, 8.0]), jnp.array([-1.0, 0.0, 1.0]))
    expected = [[[-1, 8], [0, 8], [1, 8]], [[7, -1], [7, 0], [7, 1]]]
    np.testing.assert_array_equal(z, expected)
