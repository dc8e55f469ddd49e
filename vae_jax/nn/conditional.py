"""Networks that take a condition."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vae_jax.nn.layers import kernel_init
from vae_jax.nn.networks import Autoencoder, tanh_layers


class ConditionalAutoencoder(nn.Module):
    """An autoencoder given conditions c. If `hidden` is not empty, dense layers with tanh first embed c.

    The encoder adds a linear function of c to the mean and log-variance of q(z | x, c). The decoder takes z and c
    concatenated. `prior(c)` returns the mean and log-variance of p(z | c), initially N(0, I). If `latent_dim` is 0 only
    the decoder remains, a regression on c.
    """

    autoencoder: Autoencoder
    latent_dim: int
    hidden: tuple[int, ...] = ()
    learned_prior: bool = False

    def setup(self):
        self.embedding = Embedding(self.hidden)
        self.shift = nn.Dense(2 * self.latent_dim, kernel_init=kernel_init)
        self.of_prior = nn.Dense(2 * self.latent_dim, kernel_init=nn.initializers.zeros)

    def encode(self, image, condition):
        if not self.latent_dim:
            return self.nothing(condition)
        mean, logvar = self.autoencoder.encode(image)
        by_mean, by_logvar = jnp.split(self.shift(self.embedding(condition)), 2, axis=-1)
        return mean + by_mean, logvar + by_logvar

    def decode(self, z: Float[Array, "*samples batch latent"], condition):
        c = self.embedding(condition)
        c = jnp.broadcast_to(c.reshape((1,) * (z.ndim - 2) + c.shape), (*z.shape[:-1], c.shape[-1]))
        return self.autoencoder.decode(jnp.concatenate([z, c], axis=-1))

    def prior(self, condition):
        if not self.latent_dim:
            return self.nothing(condition)
        mean, logvar = jnp.split(self.of_prior(self.embedding(condition)), 2, axis=-1)
        return mean, logvar

    def nothing(self, condition):
        """Mean and log-variance for zero latents."""
        empty = jnp.zeros((condition.shape[0], 0))
        return empty, empty

    def __call__(self, image, condition):
        """Call everything that has parameters, for `init`."""
        prior = self.prior(condition) if self.learned_prior else None
        return self.decode(self.encode(image, condition)[0], condition), prior


class Embedding(nn.Module):
    """Flattened conditions -> dense layers with tanh; without layers the flattened conditions themselves."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, condition: Float[Array, "batch ..."]) -> Float[Array, "batch width"]:
        return tanh_layers(condition.reshape(condition.shape[0], -1), self.hidden, jnp.float32)
