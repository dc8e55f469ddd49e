"""The networks of the post (its Tables 1, 2 and 4)."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vae_jax.nn.layers import (
    Conv,
    NormPool,
    Spread,
    WindowConv,
    kernel_init,
    relu,
    window_extreme,
)


class Encoder(nn.Module):
    """Image -> mean and log-variance of q(z | x): 3x3 convolutions of stride 2, then one dense layer (the post, Table 1).

    With `pooling` the convolutions have stride 1, and 2x2 max pooling halves the image (the post, Figure 6).
    """

    latent_dim: int
    features: tuple[int, ...]
    pooling: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width channel"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
        x = image
        for i, features in enumerate(self.features):
            if self.pooling:
                x = WindowConv(features, self.dtype, name=f"conv{i + 1}")(x)
                x = relu(window_extreme(x, jnp.ones(features, bool)))
            else:
                conv = Conv(features, 2, dtype=self.dtype, name=f"conv{i + 1}")
                x = relu(conv(x))
        dense = nn.Dense(
            2 * self.latent_dim, dtype=self.dtype, kernel_init=kernel_init, name="fc"
        )
        x = dense(x.reshape(x.shape[0], -1)).astype(jnp.float32)
        mean, logvar = jnp.split(x, 2, axis=-1)
        return mean, logvar


class Decoder(nn.Module):
    """z -> mean of p(x | z), in [0, 1]: transposed convolutions (the post, Table 2)."""

    image_shape: tuple[int, int, int]
    features: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch latent"]
    ) -> Float[Array, "batch height width channel"]:
        height, width, channels = self.image_shape
        scale = 2 ** len(self.features)
        size = (height // scale, width // scale)
        x = relu(Spread(size, self.features[0], self.dtype, name="tconv1")(z))
        layers = [(features, 2) for features in self.features] + [(channels, 1)]
        for i, (features, stride) in enumerate(layers, start=2):
            layer = Conv(features, stride, True, self.dtype, name=f"tconv{i}")
            x = layer(x) if i > len(layers) else relu(layer(x))
        return nn.sigmoid(x.astype(jnp.float32))


class VAE(nn.Module):
    """The post's encoder and decoder: `encode(image) -> (mean, logvar)` and `decode(z) -> image`."""

    image_shape: tuple[int, int, int]
    latent_dim: int
    encoder_features: tuple[int, ...]
    decoder_features: tuple[int, ...]
    pooling: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.encoder = Encoder(
            self.latent_dim, self.encoder_features, self.pooling, self.dtype
        )
        self.decoder = Decoder(self.image_shape, self.decoder_features, self.dtype)

    def encode(self, image):
        return self.encoder(image)

    def decode(self, z):
        image = self.decoder(z.reshape(-1, z.shape[-1]))
        return image.reshape(*z.shape[:-1], *self.image_shape)

    def __call__(self, image):
        return self.decode(self.encode(image)[0])


class Classifier(nn.Module):
    """Image -> logits: 3x3 convolutions with batch normalisation and ReLU, max pooling between them (the post, Table 4)."""

    num_classes: int
    features: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "batch height width channel"],
        train: bool = False,
        axis_name: str | None = None,
    ) -> Float[Array, "batch classes"]:
        x = image
        for i, features in enumerate(self.features, start=1):
            if i < len(self.features):
                x = WindowConv(features, self.dtype, name=f"conv{i}")(x)
            else:
                x = Conv(features, 1, dtype=self.dtype, name=f"conv{i}")(x)
            x = relu(NormPool(name=f"norm{i}")(x, train, axis_name))
        dense = nn.Dense(
            self.num_classes, dtype=self.dtype, kernel_init=kernel_init, name="fc"
        )
        return dense(x.reshape(x.shape[0], -1)).astype(jnp.float32)


def make_vae(
    image_shape: tuple[int, int, int],
    *,
    latent_dim: int = 20,
    encoder_features: tuple[int, ...] = (32, 64),
    decoder_features: tuple[int, ...] = (64, 32),
    pooling: bool = False,
    precision: str = "float32",
) -> VAE:
    """The post's VAE for images of `image_shape` (height, width, channels).

    Args:
        latent_dim: size of z.
        encoder_features: channels after each convolution, of which every one halves the image.
        decoder_features: channels after each transposed convolution but the last; every one doubles the image.
        pooling: halve the image by max pooling instead of strided convolutions, which the post found to fail.
        precision: "float32", or "bfloat16": what the layers compute in; parameters, statistics and the loss are float32.

    Raises ValueError if a size is below 1, if the decoder, which doubles the size once for each of its features,
    cannot reach the image's height and width, or if pooling leaves nothing of the image.
    """
    check_sizes(
        latent_dim=(latent_dim,),
        encoder_features=encoder_features,
        decoder_features=decoder_features,
    )
    height, width, _ = image_shape
    scale = 2 ** len(decoder_features)
    if height % scale or width % scale:
        near = tuple(math.ceil(size / scale) * scale for size in (height, width))
        raise ValueError(
            f"images of {height}x{width} are not divisible by {scale}, as a decoder with {len(decoder_features)} "
            f"doublings needs: pad them to {near[0]}x{near[1]} or give model.decoder_features fewer entries"
        )
    if pooling:
        check_pooling(image_shape, len(encoder_features), "encoder_features")
    return VAE(
        tuple(image_shape),
        latent_dim,
        tuple(encoder_features),
        tuple(decoder_features),
        pooling,
        check_precision(precision),
    )


def make_classifier(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    features: tuple[int, ...] = (8, 16, 32),
    precision: str = "float32",
) -> Classifier:
    """The post's classifier (its Table 4), with pooling after every convolution but the last.

    Args:
        features: channels after each convolution.
        precision: as in `make_vae`.

    Raises ValueError if there are fewer than 2 classes, a size is below 1, or pooling leaves nothing of the image.
    """
    check_sizes(features=features)
    if num_classes < 2:
        raise ValueError(
            f"the classifier needs labels of at least 2 classes, but the data have {num_classes}"
        )
    check_pooling(image_shape, len(features) - 1, "features")
    return Classifier(num_classes, tuple(features), check_precision(precision))


def check_sizes(**fields: tuple[int, ...]) -> None:
    """Raise ValueError for a field that is empty or holds a size below 1."""
    for name, value in fields.items():
        if not value or min(value) < 1:
            raise ValueError(
                f"model.{name} is {value if len(value) != 1 else value[0]}, but must be at least 1"
            )


def check_precision(precision: str) -> Any:
    """The type of a precision's name. Raises ValueError for another name."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"model.precision is {precision!r}, but must be one of {', '.join(PRECISIONS)}"
        )
    return PRECISIONS[precision]


def check_pooling(image_shape: tuple[int, int, int], times: int, field: str) -> None:
    """Raise ValueError if an image cannot be halved so often."""
    height, width, _ = image_shape
    smallest = 2**times
    if min(height, width) < smallest:
        raise ValueError(
            f"images of {height}x{width} are below the {smallest}x{smallest} that {times} poolings need: "
            f"give model.{field} fewer entries"
        )


PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MODELS = {"vae": make_vae, "classifier": make_classifier}
