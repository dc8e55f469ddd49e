"""The networks, as Flax Linen modules: pure functions of their parameters. The only file that knows flax.linen."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vae_jax import convolution

kernel_init = nn.initializers.glorot_uniform()


@jax.custom_jvp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0), with derivative 0 at 0 as `jax.nn.relu` has."""
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    # The derivative reads the output, so that XLA never has to store the input.
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)


class Conv(nn.Module):
    """SAME convolution, or its transpose, with bias; parameters as `nn.Conv` and `nn.ConvTranspose` have them."""

    features: int
    stride: int
    transpose: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c_in"]
    ) -> Float[Array, "batch h_out w_out c_out"]:
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        apply = convolution.conv_transpose if self.transpose else convolution.conv
        return apply(x, kernel, self.stride) + bias.reshape(1, 1, 1, -1)


class Spread(nn.Module):
    """The transposed convolution of a 1x1 map onto one of the kernel's size: a dense layer, and computed as one.

    Its parameters are those of `nn.ConvTranspose`, whose kernel lies flipped.
    """

    size: tuple[int, int]
    features: int

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch c_in"]
    ) -> Float[Array, "batch h w c_out"]:
        kernel = self.param(
            "kernel", kernel_init, (*self.size, z.shape[-1], self.features)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.einsum("bz,hwzc->bhwc", z, kernel[::-1, ::-1]) + bias.reshape(
            1, 1, 1, -1
        )


class Encoder(nn.Module):
    """Image -> mean and log-variance of q(z | x): 3x3 convolutions of stride 2, then one dense layer (the post, Table 1)."""

    latent_dim: int
    features: tuple[int, ...]

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width channel"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
        x = image
        for i, features in enumerate(self.features):
            x = relu(Conv(features, stride=2, name=f"conv{i + 1}")(x))
        x = nn.Dense(2 * self.latent_dim, kernel_init=kernel_init, name="fc")(
            x.reshape(x.shape[0], -1)
        )
        mean, logvar = jnp.split(x, 2, axis=-1)
        return mean, logvar


class Decoder(nn.Module):
    """z -> mean of p(x | z), in [0, 1]: transposed convolutions (the post, Table 2)."""

    image_shape: tuple[int, int, int]
    features: tuple[int, ...]

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch latent"]
    ) -> Float[Array, "batch height width channel"]:
        height, width, channels = self.image_shape
        scale = 2 ** len(self.features)
        x = relu(
            Spread((height // scale, width // scale), self.features[0], name="tconv1")(
                z
            )
        )
        for i, features in enumerate(self.features):
            x = relu(Conv(features, stride=2, transpose=True, name=f"tconv{i + 2}")(x))
        x = Conv(
            channels, stride=1, transpose=True, name=f"tconv{len(self.features) + 2}"
        )(x)
        return nn.sigmoid(x)


class VAE(nn.Module):
    """The post's encoder and decoder: `encode(image) -> (mean, logvar)` and `decode(z) -> image`."""

    image_shape: tuple[int, int, int]
    latent_dim: int
    encoder_features: tuple[int, ...]
    decoder_features: tuple[int, ...]

    def setup(self):
        self.encoder = Encoder(self.latent_dim, self.encoder_features)
        self.decoder = Decoder(self.image_shape, self.decoder_features)

    def encode(self, image):
        return self.encoder(image)

    def decode(self, z):
        return self.decoder(z)

    def __call__(self, image):
        return self.decode(self.encode(image)[0])


def make_vae(
    image_shape: tuple[int, int, int],
    *,
    latent_dim: int = 20,
    encoder_features: tuple[int, ...] = (32, 64),
    decoder_features: tuple[int, ...] = (64, 32),
) -> VAE:
    """The post's VAE for images of `image_shape` (height, width, channels).

    Args:
        latent_dim: size of z.
        encoder_features: channels after each convolution, of which every one halves the image.
        decoder_features: channels after each transposed convolution but the last; every one doubles the image.

    Raises ValueError if a size is below 1, or if the decoder, which doubles the size once for each of its features,
    cannot reach the image's height and width.
    """
    for name, value in [
        ("latent_dim", (latent_dim,)),
        ("encoder_features", encoder_features),
        ("decoder_features", decoder_features),
    ]:
        if not value or min(value) < 1:
            raise ValueError(
                f"model.{name} is {value if len(value) != 1 else value[0]}, but must be at least 1"
            )
    height, width, _ = image_shape
    scale = 2 ** len(decoder_features)
    if height % scale or width % scale:
        near = tuple(math.ceil(size / scale) * scale for size in (height, width))
        raise ValueError(
            f"images of {height}x{width} are not divisible by {scale}, as a decoder with {len(decoder_features)} "
            f"doublings needs: pad them to {near[0]}x{near[1]} or give model.decoder_features fewer entries"
        )
    return VAE(
        tuple(image_shape), latent_dim, tuple(encoder_features), tuple(decoder_features)
    )


MODELS = {"vae": make_vae}
