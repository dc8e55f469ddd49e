"""generate.py on a linear pair, where the answers are known."""

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax.generate import reconstruct, sample_prior

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


def test_prior_samples_are_standard_normal_and_follow_the_key():
    image = sample_prior(decode, {}, jax.random.key(0), 20_000, latent_dim=2)
    z = image.reshape(-1, 4) @ W
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=0.05)
    np.testing.assert_array_equal(
        image[:5], sample_prior(decode, {}, jax.random.key(0), 20_000, 2)[:5]
    )
    assert (
        image[:5] != sample_prior(decode, {}, jax.random.key(1), 20_000, 2)[:5]
    ).all()
