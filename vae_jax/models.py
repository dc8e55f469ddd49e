"""The networks, as Flax Linen modules: pure functions of their parameters. The only file that knows flax.linen."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

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


def add_bias(
    x: Float[Array, "*place c"], bias: Float[Array, " c"]
) -> Float[Array, "*place c"]:
    """x + bias, in the type of x, but added in float32: a sum over all places in bfloat16 would ruin the bias's gradient."""
    bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


class Conv(nn.Module):
    """SAME convolution, or its transpose, with bias; parameters as `nn.Conv` and `nn.ConvTranspose` have them."""

    features: int
    stride: int
    transpose: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c_in"]
    ) -> Float[Array, "batch h_out w_out c_out"]:
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        apply = convolution.conv_transpose if self.transpose else convolution.conv
        y = apply(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
        return add_bias(y, bias)


class Spread(nn.Module):
    """The transposed convolution of a 1x1 map onto one of the kernel's size: a dense layer, and computed as one.

    Its parameters are those of `nn.ConvTranspose`, whose kernel lies flipped.
    """

    size: tuple[int, int]
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch c_in"]
    ) -> Float[Array, "batch h w c_out"]:
        kernel = self.param(
            "kernel", kernel_init, (*self.size, z.shape[-1], self.features)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        z, kernel = z.astype(self.dtype), kernel[::-1, ::-1].astype(self.dtype)
        return add_bias(jnp.einsum("bz,hwzc->bhwc", z, kernel), bias)


class WindowConv(nn.Module):
    """`Conv` of stride 1 whose output comes in the 2x2 windows that a max pooling reads, as 4 adjacent vectors each.

    It is one convolution of stride 2: a window sees 4x4 inputs, so its kernel is the 3x3 one at four places. On the CPU
    that moves less than half the memory. The last row or column of an odd size is in no window, and left out.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c_in"]
    ) -> Float[Array, "batch h_out w_out 4 c_out"]:
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = kernel.astype(self.dtype)
        places = [
            jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)))
            for i in (0, 1)
            for j in (0, 1)
        ]
        wide = jnp.stack(places, axis=3).reshape(4, 4, x.shape[-1], -1)
        height, width = (size // 2 for size in x.shape[1:3])
        y = convolution.conv(x.astype(self.dtype), wide, stride=2)[:, :height, :width]
        return add_bias(y.reshape(*y.shape[:3], 4, -1), bias)


@jax.custom_jvp
def window_extreme(
    x: Float[Array, "batch h w window c"], largest: Bool[Array, " c"]
) -> Float[Array, "batch h w c"]:
    """The largest value of each window, or the smallest in channels where `largest` is false; ties share the gradient."""
    return jnp.where(largest.reshape(1, 1, 1, -1), x.max(axis=3), x.min(axis=3))


@window_extreme.defjvp
def _window_extreme_jvp(primals, tangents):
    # As JAX differentiates max, but with one comparison for both, and a selection where it multiplies.
    x, y = primals[0], window_extreme(*primals)
    hit = x == y[:, :, :, None]
    count = hit.sum(axis=3).astype(x.dtype)
    return y, jnp.where(hit, tangents[0], 0).sum(axis=3) / count


class NormPool(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015); of an x in windows, then the maximum of each window.

    Normalising is monotone in each channel, so the maximum is taken first, or the minimum where the scale is negative,
    and a quarter of the values is left to normalise. Parameters and statistics are those of `nn.BatchNorm`.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w *window c"],
        train: bool,
        axis_name: str | None = None,
    ) -> Float[Array, "batch h w c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        stored_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if train:
            exact = x.astype(jnp.float32)
            mean, square = channel_mean(exact), channel_mean(exact * exact)
            if axis_name is not None:
                mean, square = lax.pmean((mean, square), axis_name)
            var = jnp.maximum(square - mean**2, 0)
            if not self.is_initializing():
                stored_mean.value += (1 - self.momentum) * (mean - stored_mean.value)
                stored_var.value += (1 - self.momentum) * (var - stored_var.value)
        else:
            mean, var = stored_mean.value, stored_var.value
        factor = scale * lax.rsqrt(var + self.epsilon)
        if x.ndim == 5:
            x = window_extreme(x, scale >= 0)
        offset = (bias - mean * factor).reshape(1, 1, 1, -1)
        return (x * factor.reshape(1, 1, 1, -1) + offset).astype(x.dtype)


def channel_mean(x: Float[Array, "batch h w *window c"]) -> Float[Array, " c"]:
    """The mean over all but channels, in two steps: XLA's CPU sums are slow where few channels are left."""
    rows = x.reshape(math.prod(x.shape[:3]), -1)
    return rows.mean(axis=0).reshape(-1, x.shape[-1]).mean(axis=0)


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
        return self.decoder(z)

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


def derive(function: Callable, **known: Any) -> Any:
    """`function` called with those of the known values that its positional parameters name."""
    parameters = inspect.signature(function).parameters.values()
    wanted = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    return function(**{name: known[name] for name in wanted})


PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MODELS = {"vae": make_vae, "classifier": make_classifier}
