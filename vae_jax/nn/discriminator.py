"""The discriminator of a VAE/GAN."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vae_jax.nn.layers import Conv, dense

SLOPE = 0.2  # slope of the leaky ReLU below 0 (Radford et al. 2016)


class Discriminator(nn.Module):
    """Image -> the logit of being real, and the activations of every convolution.

    Convolutions of 3x3 with stride 2 and leaky ReLU, then a dense layer. There is no batch normalisation, so the logit
    of an image does not depend on other images.
    """

    features: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width channel"]
    ) -> tuple[Float[Array, " batch"], list[Float[Array, "batch h w c"]]]:
        x, activations = image, []
        for i, features in enumerate(self.features, start=1):
            x = jax.nn.leaky_relu(Conv(features, 2, dtype=self.dtype, name=f"conv{i}")(x), SLOPE)
            activations.append(x.astype(jnp.float32))
        logit = dense(1, self.dtype, "fc")(x.reshape(x.shape[0], -1))
        return logit.astype(jnp.float32)[:, 0], activations


def check_discriminator(image_shape: tuple[int, int, int], features: tuple[int, ...], layer: int) -> None:
    """Raise ValueError if the image cannot be halved once per convolution, or if there is no convolution number
    `layer`.
    """
    height, width, _ = image_shape
    depth, most = len(features), min(height, width).bit_length() - 1
    if depth > most:
        raise ValueError(
            f"model.discriminator_features has {depth} entries, but images of {height}x{width} can be halved {most} "
            "times: give it fewer"
        )
    if not 1 <= layer <= depth:
        raise ValueError(f"model.feature_layer is {layer}, but the discriminator has convolutions 1 to {depth}")
