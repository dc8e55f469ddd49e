"""Layers, as Flax Linen modules: pure functions of their parameters."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from vae_jax.nn import convolution

kernel_init = nn.initializers.glorot_uniform()


def is_stored_as_float32(dtype: Any) -> bool:
    """Whether `dtype` is bfloat16 on a CPU, which only rounds its values: loops over float32 are faster there."""
    return dtype == jnp.bfloat16 and jax.default_backend() == "cpu"


def rounded(x: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Round x to `dtype`, the input precision of a layer.

    Both accelerators and CPUs multiply rounded operands and sum the products in float32.
    """
    if is_stored_as_float32(dtype):
        return lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def _all_rounded(*args: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:  # the signature is Flax's
    return [rounded(array, dtype) for array in args]


def dense(features: int, dtype: Any, name: str) -> nn.Dense:
    """A dense layer that computes in `dtype`, for use in compact modules."""
    product = _as_convolution if is_stored_as_float32(dtype) else None
    return nn.Dense(
        features, dtype=dtype, kernel_init=kernel_init, promote_dtype=_all_rounded, dot_general=product, name=name
    )


def _as_convolution(x: Any, kernel: Any, *_: Any, **__: Any) -> Any:  # the signature is that of lax.dot_general
    # The products of a convolution, and of its gradients, are in the forms that are fast in bfloat16.
    return convolution.conv(x[:, None, None], kernel[None, None], dtype=jnp.bfloat16)[:, 0, 0]


@jax.custom_jvp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0), with derivative 0 at 0 like `jax.nn.relu`."""
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    # The derivative reads the output, so XLA never stores the input.
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)


@jax.custom_jvp
def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 + e^x), with the derivative sigmoid(x) itself: that of `jax.nn.softplus` takes two more exponentials."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    return softplus(*primals), jax.nn.sigmoid(primals[0]) * tangents[0]


def add_bias(x: Float[Array, "*place c"], bias: Float[Array, " c"]) -> Float[Array, "*place c"]:
    """x + bias in the dtype of x, added in float32 because the gradient of the bias would lose precision in bfloat16."""
    bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


class Conv(nn.Module):
    """3x3 SAME convolution or its transpose, with bias and the parameters of `nn.Conv` or `nn.ConvTranspose`."""

    features: int
    stride: int
    transpose: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c_in"]) -> Float[Array, "batch h_out w_out c_out"]:
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        apply = convolution.conv_transpose if self.transpose else convolution.conv
        y = apply(rounded(x, self.dtype), rounded(kernel, self.dtype), self.stride, self.dtype)
        return add_bias(y, bias)


class ProjectAndReshape(nn.Module):
    """The transposed convolution of a 1x1 map to a map of the kernel's size, computed as the equivalent dense layer.

    It has the parameters of `nn.ConvTranspose`, which stores the kernel flipped.
    """

    size: tuple[int, int]
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "batch c_in"]) -> Float[Array, "batch h w c_out"]:
        kernel = self.param("kernel", kernel_init, (*self.size, z.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        z, kernel = rounded(z, self.dtype), rounded(kernel[::-1, ::-1], self.dtype)
        return add_bias(jnp.einsum("bz,hwzc->bhwc", z, kernel), bias)


class ConvForPool(nn.Module):
    """`Conv` with stride 1 that groups its output into the 2x2 windows of max pooling, 4 adjacent vectors per window.

    A window depends on 4x4 inputs, so one convolution with stride 2 and the 3x3 kernel at four positions computes it.
    On the CPU this moves less than half the memory. The last row or column of an odd size belongs to no window and is
    dropped.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c_in"]) -> Float[Array, "batch h_out w_out 4 c_out"]:
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = rounded(kernel, self.dtype)
        places = [jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in (0, 1) for j in (0, 1)]
        wide = jnp.stack(places, axis=3).reshape(4, 4, x.shape[-1], -1)
        height, width = (size // 2 for size in x.shape[1:3])
        y = convolution.conv(rounded(x, self.dtype), wide, 2, self.dtype)[:, :height, :width]
        return add_bias(y.reshape(*y.shape[:3], 4, -1), bias)


@jax.custom_jvp
def window_extreme(x: Float[Array, "batch h w window c"], largest: Bool[Array, " c"]) -> Float[Array, "batch h w c"]:
    """The maximum of each window, or the minimum in channels where `largest` is false; ties share the gradient."""
    return jnp.where(largest.reshape(1, 1, 1, -1), x.max(axis=3), x.min(axis=3))


@window_extreme.defjvp
def _window_extreme_jvp(primals, tangents):
    # The same derivative as JAX's max, with one comparison for maximum and minimum, and a selection instead of a
    # product.
    x, y = primals[0], window_extreme(*primals)
    hit = x == y[:, :, :, None]
    count = hit.sum(axis=3).astype(x.dtype)
    return y, jnp.where(hit, tangents[0], 0).sum(axis=3) / count


class BatchNormMaxPool(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015), followed by max pooling if x comes in windows.

    Normalisation is monotone in each channel. So the code pools first, with the minimum where the scale is negative,
    and normalises only a quarter of the values. Parameters and statistics are those of `nn.BatchNorm`.
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
    """The mean over all axes but channels, in two steps because XLA's sum into few channels is slow on the CPU."""
    rows = x.reshape(math.prod(x.shape[:3]), -1)
    return rows.mean(axis=0).reshape(-1, x.shape[-1]).mean(axis=0)
