"""generate.py with a linear encoder and decoder, for which the answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from vae_jax.families import Model
from vae_jax.generate import decode, interpolate, perturb, reconstruct, sample, traverse
from vae_jax.likelihoods import unit_gaussian
from vae_jax.priors import standard_normal

W = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((4, 2)))[0], jnp.float32)


def encode(variables, image):
    mean = image.reshape(-1, 4) @ W
    return mean, jnp.full_like(mean, 5.0)  # a wide posterior: its noise would show


def decode_raw(variables, z):
    return (z @ W.T).reshape(*z.shape[:-1], 2, 2, 1)


MODEL = Model(
    init=lambda key: {},
    latent_dim=2,
    encode=encode,
    decode_raw=decode_raw,
    likelihood=unit_gaussian(),
    prior=standard_normal(2),
)


def test_decoding_gives_the_likelihoods_mean():
    """Also with leading sample axes, and for one z."""
    z = np.random.default_rng(1).standard_normal((3, 5, 2)).astype(np.float32)
    expected = scipy.special.expit(np.float64(z) @ np.float64(W).T).reshape(3, 5, 2, 2, 1)
    np.testing.assert_allclose(decode(MODEL, {}, jnp.asarray(z)), expected, rtol=1e-5)
    np.testing.assert_allclose(decode(MODEL, {}, jnp.asarray(z[0, 0])), expected[0, 0], rtol=1e-5)


def test_reconstruction_decodes_the_posterior_mean():
    image = jnp.arange(8.0).reshape(2, 2, 2, 1) - 3
    w = np.float64(W)
    expected = scipy.special.expit(np.float64(image).reshape(2, 4) @ w @ w.T).reshape(image.shape)
    np.testing.assert_allclose(reconstruct(MODEL, {}, image), expected, rtol=1e-4)


def test_samples_are_decoded_draws_from_the_prior():
    """W is orthonormal, so the draws follow from the images."""
    image = sample(MODEL, {}, jax.random.key(0), 20_000)
    z = scipy.special.logit(np.float64(image).reshape(-1, 4)) @ np.float64(W)
    np.testing.assert_allclose(z, MODEL.prior.sample({}, jax.random.key(0), 20_000), atol=1e-4)
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=0.05)
    assert (image != sample(MODEL, {}, jax.random.key(1), 20_000)).all()


def test_a_perturbation_moves_its_share_of_latents_by_its_noise():
    z = jnp.tile(jnp.arange(10.0), (4000, 1))
    keys = jax.random.split(jax.random.key(0), len(z))
    change = perturb(z, keys, share=0.3, scale=0.5) - z
    moved = change != 0
    np.testing.assert_array_equal(moved.sum(axis=1), 3)
    np.testing.assert_allclose(moved.mean(axis=0), 0.3, atol=0.03)
    np.testing.assert_allclose(np.mean(change[moved]), 0, atol=0.02)
    np.testing.assert_allclose(np.std(change[moved]), 0.5, rtol=0.03)
    # A row's noise depends on its own key only.
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
