"""generate.py on a linear pair, where the answers are known."""

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax.generate import interpolate, perturb, prior, reconstruct, traverse

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


def test_a_perturbation_moves_its_share_of_latents_by_its_noise():
    z = jnp.tile(jnp.arange(10.0), (4000, 1))
    keys = jax.random.split(jax.random.key(0), len(z))
    change = perturb(z, keys, share=0.3, scale=0.5) - z
    moved = change != 0
    np.testing.assert_array_equal(moved.sum(axis=1), 3)
    np.testing.assert_allclose(moved.mean(axis=0), 0.3, atol=0.03)
    np.testing.assert_allclose(np.mean(change[moved]), 0, atol=0.02)
    np.testing.assert_allclose(np.std(change[moved]), 0.5, rtol=0.03)
    # A row has the noise of its own key, whatever is beside it.
    keys = jax.random.split(jax.random.key(0), len(z))
    alone = perturb(z[5:6], keys[5:6], 0.3, 0.5)
    np.testing.assert_array_equal(alone, (z + change)[5:6])


def test_an_interpolation_is_a_line():
    start, end = jnp.array([0.0, 1.0]), jnp.array([1.0, -1.0])
    expected = [[0, 1], [0.25, 0.5], [0.5, 0], [0.75, -0.5], [1, -1]]
    np.testing.assert_allclose(interpolate(start, end, 5), expected)


def test_a_traversal_moves_one_latent_at_a_time():
    z = traverse(jnp.array([7.0, 8.0]), jnp.array([-1.0, 0.0, 1.0]))
    expected = [[[-1, 8], [0, 8], [1, 8]], [[7, -1], [7, 0], [7, 1]]]
    np.testing.assert_array_equal(z, expected)
