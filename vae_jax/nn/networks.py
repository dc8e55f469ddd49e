"""The networks of the post (its Tables 1, 2 and 4), dense networks, and checks of their sizes."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vae_jax.nn.layers import (
    BatchNormMaxPool,
    Conv,
    ConvForPool,
    ProjectAndReshape,
    dense,
    relu,
    window_extreme,
)

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Encoder(nn.Module):
    """Image -> `outputs` numbers: 3x3 convolutions with stride 2, then one dense layer (the post, Table 1).

    With `pooling` the convolutions have stride 1, and 2x2 max pooling halves the image (the post, Figure 6).
    """

    outputs: int
    features: tuple[int, ...]
    pooling: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width channel"]) -> Float[Array, "batch outputs"]:
        x = image
        for i, features in enumerate(self.features):
            if self.pooling:
                x = ConvForPool(features, self.dtype, name=f"conv{i + 1}")(x)
                x = relu(window_extreme(x, jnp.ones(features, bool)))
            else:
                conv = Conv(features, 2, dtype=self.dtype, name=f"conv{i + 1}")
                x = relu(conv(x))
        x = dense(self.outputs, self.dtype, "fc")(x.reshape(x.shape[0], -1))
        return x.astype(jnp.float32)


class Decoder(nn.Module):
    """z -> raw parameters of p(x | z), before a likelihood's sigmoid: transposed convolutions (the post, Table 2)."""

    output_shape: tuple[int, int, int]
    features: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "batch latent"]) -> Float[Array, "batch height width channel"]:
        height, width, channels = self.output_shape
        scale = 2 ** len(self.features)
        size = (height // scale, width // scale)
        project = ProjectAndReshape(size, self.features[0], self.dtype, name="tconv1")
        x = relu(project(z))
        layers = [(features, 2) for features in self.features] + [(channels, 1)]
        for i, (features, stride) in enumerate(layers, start=2):
            layer = Conv(features, stride, True, self.dtype, name=f"tconv{i}")
            x = layer(x) if i > len(layers) else relu(layer(x))
        return x.astype(jnp.float32)


def tanh_layers(x: Float[Array, "batch width"], widths: tuple[int, ...], dtype: Any) -> Array:
    """Dense layers of these widths with tanh. Call it in a compact module; the layers become part of that module."""
    for i, width in enumerate(widths, start=1):
        x = jnp.tanh(dense(width, dtype, f"fc{i}")(x))
    return x


class DenseEncoder(nn.Module):
    """Image -> `outputs` numbers: dense layers with tanh (Burda et al. 2016, section 5)."""

    outputs: int
    hidden: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width channel"]) -> Float[Array, "batch outputs"]:
        x = tanh_layers(image.reshape(image.shape[0], -1), self.hidden, self.dtype)
        return dense(self.outputs, self.dtype, "fc")(x).astype(jnp.float32)


class DenseDecoder(nn.Module):
    """z -> raw parameters of p(x | z): dense layers with tanh; `hidden` is in the encoder's order and used in reverse."""

    output_shape: tuple[int, int, int]
    hidden: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "batch latent"]) -> Float[Array, "batch height width channel"]:
        x = tanh_layers(z, self.hidden[::-1], self.dtype)
        x = dense(math.prod(self.output_shape), self.dtype, "fc")(x)
        return x.astype(jnp.float32).reshape(-1, *self.output_shape)


class Autoencoder(nn.Module):
    """An encoder and a decoder in one tree of parameters: `encode(image)` and `decode(z)`."""

    encoder: nn.Module
    decoder: nn.Module

    def encode(self, image):
        """Mean and log-variance of q(z | x)."""
        mean, logvar = jnp.split(self.encoder(image), 2, axis=-1)
        return mean, logvar

    def decode(self, z: Float[Array, "*samples latent"]):
        raw = self.decoder(z.reshape(-1, z.shape[-1]))
        return raw.reshape(*z.shape[:-1], *raw.shape[1:])

    def __call__(self, image):
        return self.decode(self.encode(image)[0])


def conv_autoencoder(
    image_shape: tuple[int, int, int],
    latent_dim: int,
    channels: int,
    dtype: Any,
    encoder_features: tuple[int, ...],
    decoder_features: tuple[int, ...],
    pooling: bool,
) -> Autoencoder:
    """The post's networks, with `channels` raw output channels per image channel.

    `encoder_features` defaults to `fitting_features`, and `decoder_features` to the encoder's in reverse.
    """
    encoder_features = encoder_features or fitting_features(image_shape)
    decoder_features = decoder_features or encoder_features[::-1]
    check_sizes(encoder_features=encoder_features, decoder_features=decoder_features)
    check_doublings(image_shape, len(decoder_features))
    if pooling:
        check_pooling(image_shape, len(encoder_features), "encoder_features")
    height, width, colours = image_shape
    return Autoencoder(
        Encoder(2 * latent_dim, encoder_features, pooling, dtype),
        Decoder((height, width, colours * channels), decoder_features, dtype),
    )


def fitting_features(image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """32, 64, 128, ...: one entry for each time that the image can be halved evenly to 7 pixels or more, and at least
    one.

    28x28 gives (32, 64), as in the post; 64x64 gives (32, 64, 128).
    """
    height, width, _ = image_shape
    halvings = 0
    while min(height, width) >= 14 and height % 2 == width % 2 == 0:
        height, width, halvings = height // 2, width // 2, halvings + 1
    return tuple(32 * 2**i for i in range(max(1, halvings)))


def mlp_autoencoder(
    image_shape: tuple[int, int, int], latent_dim: int, channels: int, dtype: Any, hidden: tuple[int, ...]
) -> Autoencoder:
    """The dense networks of Burda et al. 2016."""
    check_sizes(hidden=hidden)
    height, width, colours = image_shape
    return Autoencoder(
        DenseEncoder(2 * latent_dim, hidden, dtype), DenseDecoder((height, width, colours * channels), hidden, dtype)
    )


def make_autoencoder(
    network: str,
    image_shape: tuple[int, int, int],
    latent_dim: int,
    channels: int,
    dtype: Any,
    *,
    encoder_features: tuple[int, ...],
    decoder_features: tuple[int, ...],
    hidden: tuple[int, ...],
    pooling: bool = False,
) -> Any:
    """The `Autoencoder` named by the field `network`. Raises ValueError as `configure` does."""
    sizes = {"image_shape": image_shape, "latent_dim": latent_dim, "channels": channels, "dtype": dtype}
    fields = {
        "encoder_features": (tuple(encoder_features), ()),
        "decoder_features": (tuple(decoder_features), ()),
        "pooling": (pooling, False),
        "hidden": (tuple(hidden), (200, 200)),
    }
    return configure(NETWORKS, "network", network, sizes, **fields)


def init_output_bias(params: Mapping[str, Any], pixel_mean: Float[np.ndarray, "height width channel"]) -> dict:
    """Set the output bias of an `mlp` decoder to logit(mean image), with the mean clipped to [.001, .999]."""
    mean = np.clip(pixel_mean, 0.001, 0.999)
    bias = jnp.asarray(np.log(mean / (1 - mean)), jnp.float32).reshape(-1)
    decoder = dict(params["decoder"])
    decoder["fc"] = {**decoder["fc"], "bias": bias}
    return {**params, "decoder": decoder}


NETWORKS: dict[str, Callable[..., nn.Module]] = {"conv": conv_autoencoder, "mlp": mlp_autoencoder}


class Classifier(nn.Module):
    """Image -> logits: 3x3 convolutions, batch normalisation, ReLU, max pooling between them (the post, Table 4)."""

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
                x = ConvForPool(features, self.dtype, name=f"conv{i}")(x)
            else:
                x = Conv(features, 1, dtype=self.dtype, name=f"conv{i}")(x)
            x = relu(BatchNormMaxPool(name=f"norm{i}")(x, train, axis_name))
        self.sow("intermediates", "pooled", x.mean(axis=(1, 2)).astype(jnp.float32))
        x = dense(self.num_classes, self.dtype, "fc")(x.reshape(x.shape[0], -1))
        return x.astype(jnp.float32)


def check_sizes(**fields: tuple[int, ...]) -> None:
    """Raise ValueError if a field of the model section is empty or holds a size below 1."""
    for name, value in fields.items():
        if not value or min(value) < 1:
            raise ValueError(f"model.{name} is {value if len(value) != 1 else value[0]}, but must be at least 1")


def choose(choices: Mapping[str, Any], field: str, name: str) -> Any:
    """The entry named by a field of the config. Raises ValueError for an unknown name."""
    if name not in choices:
        raise ValueError(f"model.{field} is {name!r}, but must be one of {', '.join(choices)}")
    return choices[name]


def configure(
    choices: Mapping[str, Callable[..., Any]], field: str, name: str, known: Mapping[str, Any], **fields: Any
) -> Any:
    """Call the function `choices[name]` with those of `known` and `fields` that it takes.

    `fields` are fields of the config, each as (value, default). Raises ValueError for an unknown name, and for a field
    that the function does not take unless it has its default value, since it would have no effect.
    """
    make = choose(choices, field, name)
    taken = inspect.signature(make).parameters
    for unused, (value, default) in fields.items():
        if unused not in taken and value != default:
            raise ValueError(f"model.{unused} is {value}, but the {field} {name} has none: leave it at {default}")
    given = {**known, **{key: value for key, (value, _) in fields.items()}}
    return make(**{key: given[key] for key in given if key in taken})


def check_doublings(image_shape: tuple[int, int, int], times: int) -> None:
    """Raise ValueError if a decoder cannot reach the image's size by doubling `times` times."""
    height, width, _ = image_shape
    scale = 2**times
    if height % scale or width % scale:
        near = tuple(math.ceil(size / scale) * scale for size in (height, width))
        how = ", as data.size does" if near[0] == near[1] else ""
        fewer = (
            "give model.decoder_features fewer entries" if times > 1 else "take model.network=mlp, if the family has it"
        )
        raise ValueError(
            f"images of {height}x{width} are not divisible by {scale}, as a decoder with {times} "
            f"doublings needs: bring them to {near[0]}x{near[1]}{how}, or {fewer}"
        )


def check_pooling(image_shape: tuple[int, int, int], times: int, field: str) -> None:
    """Raise ValueError if an image cannot be halved `times` times."""
    height, width, _ = image_shape
    smallest = 2**times
    if min(height, width) < smallest:
        raise ValueError(
            f"images of {height}x{width} are below the {smallest}x{smallest} that {times} poolings need: "
            f"give model.{field} fewer entries"
        )
