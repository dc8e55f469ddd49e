"""SAME convolution and its transpose: matrix products on the CPU, and on GPUs for few channels; otherwise lax.

XLA's CPU convolution is far slower than its matrix product, and even slower inside a loop. So on the CPU each of the
three bilinear maps that make up a convolution is one product:

    conv(x, w)               small = im2col(x) w               forward
    conv_input_grad(g, w)    large = col2im(g w^T)             its transpose in x: the transposed convolution
    conv_kernel_grad(x, g)   w     = im2col(x)^T g             its transpose in w

If the small side has few channels, several pixels of a row are combined into one pixel with all their channels.

The transposes of each map are the other two. As JAX primitives the three are therefore closed under differentiation of
any order, in forward and reverse mode, and the backward pass of a transposed convolution is one im2col and two
products. On TPUs the same primitives lower to `lax.conv_general_dilated` and its transposes. On NVIDIA GPUs they do so
too, unless the large side has few channels, where cuDNN is slower than the products. Kernels have Flax's layout,
[height, width, in, out], so weights are interchangeable between platforms and with `flax.linen`.

In bfloat16, products and overlapping sums accumulate in float32. CPUs store the rounded values as float32; those that
multiply bfloat16 faster do so (bfloat16.py).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from vae_jax.nn import bfloat16
from vae_jax.nn.patches import Geometry, col2im, im2col, padding

FEW_CHANNELS = 16  # NVIDIA GPUs use products up to this many channels; measured on an H100
WIDE = 64  # columns that a product needs to reach nearly its full rate on the CPU


def conv(
    x: Float[Array, "batch h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    stride: int = 1,
    dtype: Any = jnp.float32,
) -> Float[Array, "batch h_out w_out c_out"]:
    """SAME convolution: `lax.conv_general_dilated`, output [batch, ceil(h / stride), ceil(w / stride), c_out].

    `dtype` is the type that x and kernel are rounded to, even where they are stored as float32.
    """
    _check_channels(x, kernel)
    size, large = kernel.shape[:2], x.shape[1:3]
    small = tuple(-(-n // stride) for n in large)
    low = tuple(max((n - 1) * stride + k - m, 0) // 2 for k, n, m in zip(size, small, large))
    geometry = Geometry(size, (stride, stride), low, small, large)
    return conv_p.bind(x, kernel, geometry=geometry, dtype=dtype)


def conv_transpose(
    x: Float[Array, "batch h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    stride: int = 1,
    dtype: Any = jnp.float32,
) -> Float[Array, "batch h_out w_out c_out"]:
    """SAME transposed convolution: `lax.conv_transpose`, output [batch, h * stride, w * stride, c_out].

    `dtype` is the type that x and kernel are rounded to, even where they are stored as float32.
    """
    _check_channels(x, kernel)
    size, small = kernel.shape[:2], x.shape[1:3]
    low = tuple(max(k - stride, 0) // 2 for k in size)
    large = tuple(n * stride for n in small)
    # lax.conv_transpose does not flip its kernel; the transpose of a convolution does.
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    geometry = Geometry(size, (stride, stride), low, small, large)
    return conv_input_grad_p.bind(x, flipped, geometry=geometry, dtype=dtype)


def _check_channels(x, kernel):
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(f"images have {x.shape[3]} channels, but the kernel takes {kernel.shape[2]}")


def _widen(geometry, channels):
    """Combine n small pixels of a row into one with all their channels, since narrow products are slow.

    Returns the new geometry and n. The n kernels lie side by side in a wider one, with at most as many zeros as
    weights.
    """
    (kh, kw), (sh, sw), low, (h, w), large = geometry

    def fits(n):
        return w % n == 0 and n * channels <= WIDE and (n - 1) * sw <= kw

    n = max(filter(fits, (2, 4)), default=1)
    return Geometry((kh, kw + (n - 1) * sw), (sh, n * sw), low, (h, w // n), large), n


def _widen_kernel(kernel, geometry, n):
    """[kh, kw, c, k] -> [kh * (kw + (n - 1) * stride) * c, n * k], the matrix that multiplies the patches."""
    stride = geometry.stride[1]
    shifted = [jnp.pad(kernel, ((0, 0), (i * stride, (n - 1 - i) * stride), (0, 0), (0, 0))) for i in range(n)]
    return jnp.concatenate(shifted, axis=3).reshape(-1, n * kernel.shape[3])


def _conv(x, kernel, geometry):
    wide, n = _widen(geometry, kernel.shape[3])
    out = im2col(x, wide) @ _widen_kernel(kernel, geometry, n)
    return out.reshape(x.shape[0], *geometry.small, kernel.shape[3])


def _input_grad(g, kernel, geometry):
    wide, n = _widen(geometry, kernel.shape[3])
    weights = _widen_kernel(kernel, geometry, n)
    return col2im(g.reshape(-1, weights.shape[1]) @ weights.T, wide)


def _contract_rows(a, b):
    """a^T b, with the wider operand on the right, where XLA's CPU product is up to twice as fast.

    It transposes neither operand; XLA copies the transposed columns for other forms.
    """
    rows = (((0,), (0,)), ((), ()))
    if a.shape[1] <= b.shape[1]:
        return lax.dot_general(a, b, rows)
    # Without the barrier XLA exchanges the operands again.
    return lax.optimization_barrier(lax.dot_general(b, a, rows)).T


def _kernel_grad(x, g, geometry):
    channels = x.shape[3], g.shape[3]
    wide, n = _widen(geometry, channels[1])
    product = _contract_rows(im2col(x, wide), g.reshape(-1, n * channels[1]))
    exact = jnp.promote_types(product.dtype, jnp.float32)
    kernel = jax.ShapeDtypeStruct((*geometry.size, *channels), exact)
    fold = jax.linear_transpose(lambda k: _widen_kernel(k, geometry, n), kernel)
    return fold(product.astype(exact))[0].astype(product.dtype)


def _lax_conv(x, kernel, geometry):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, geometry.stride, padding(geometry), dimension_numbers=layout)


def _lax_input_grad(g, kernel, geometry):
    x = jax.ShapeDtypeStruct((g.shape[0], *geometry.large, kernel.shape[2]), g.dtype)
    return jax.linear_transpose(lambda x: _lax_conv(x, kernel, geometry), x)(g)[0]


def _lax_kernel_grad(x, g, geometry):
    kernel = jax.ShapeDtypeStruct((*geometry.size, x.shape[3], g.shape[3]), g.dtype)
    return jax.linear_transpose(lambda kernel: _lax_conv(x, kernel, geometry), kernel)(g)[0]


def _primitive(name, product, in_bfloat16, convolution, shape, channels, has_kernel=True):
    """A primitive that lowers to a matrix product, to one `in_bfloat16`, or to a lax convolution.

    `shape(a, b, geometry)` returns the shape of the result, and `channels(a, b)` the number of channels of the large
    side. `has_kernel` says whether b is a kernel.
    """
    primitive = Primitive(name)

    def on_cpu(a, b, geometry, dtype):
        rounded = (dtype, a.dtype, b.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
        # The few products of one channel take less time than rounding its operands.
        faster = rounded and channels(a, b) > 1 and bfloat16.is_fast()
        return (in_bfloat16 if faster else product)(a, b, geometry)

    def on_gpu(a, b, geometry, dtype):
        few = channels(a, b) <= FEW_CHANNELS
        return (product if few else convolution)(a, b, geometry)

    def elsewhere(a, b, geometry, dtype):
        return convolution(a, b, geometry)

    def abstract(a, b, geometry, dtype):
        return jax.core.ShapedArray(shape(a, b, geometry), jnp.promote_types(a.dtype, b.dtype))

    def batch(operands, axes, geometry, dtype):
        how = {"geometry": geometry, "dtype": dtype}
        if has_kernel and axes[1] is None:  # a shared kernel: one larger batch of images
            images = jnp.moveaxis(operands[0], axes[0], 0)
            out = primitive.bind(images.reshape(-1, *images.shape[2:]), operands[1], **how)
            return out.reshape(*images.shape[:2], *out.shape[1:]), 0
        # With several kernels, lax would use a grouped convolution, which is slow on GPUs too.
        gpu = functools.partial(product, geometry=geometry)
        forms = {"cpu": functools.partial(on_cpu, **how), "cuda": gpu, "default": functools.partial(elsewhere, **how)}
        forms = {platform: jax.vmap(form, axes) for platform, form in forms.items()}
        return lax.platform_dependent(*operands, **forms), 0

    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("geometry", "dtype")))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    for platform, form in {None: elsewhere, "cpu": on_cpu, "cuda": on_gpu}.items():
        lowering = mlir.lower_fun(form, multiple_results=False)
        mlir.register_lowering(primitive, lowering, platform=platform)
    return primitive


def _image_channels(x, _):
    return x.shape[3]


def _kernel_channels(_, kernel):
    return kernel.shape[2]


def _small_shape(x, kernel, geometry):
    return x.shape[0], *geometry.small, kernel.shape[3]


def _large_shape(g, kernel, geometry):
    return g.shape[0], *geometry.large, kernel.shape[2]


def _kernel_shape(x, g, geometry):
    return *geometry.size, x.shape[3], g.shape[3]


conv_p = _primitive("conv", _conv, bfloat16.conv, _lax_conv, _small_shape, _image_channels)
conv_input_grad_p = _primitive(
    "conv_input_grad", _input_grad, bfloat16.input_grad, _lax_input_grad, _large_shape, _kernel_channels
)
conv_kernel_grad_p = _primitive(
    "conv_kernel_grad",
    _kernel_grad,
    bfloat16.kernel_grad,
    _lax_kernel_grad,
    _kernel_shape,
    _image_channels,
    has_kernel=False,
)

# defbilinear takes the transposes with respect to the first and the second operand.
ad.defbilinear(
    conv_p,
    lambda ct, x, kernel, **how: conv_input_grad_p.bind(ct, kernel, **how),
    lambda ct, x, kernel, **how: conv_kernel_grad_p.bind(x, ct, **how),
)
ad.defbilinear(
    conv_input_grad_p,
    lambda ct, g, kernel, **how: conv_p.bind(ct, kernel, **how),
    lambda ct, g, kernel, **how: conv_kernel_grad_p.bind(ct, g, **how),
)
ad.defbilinear(
    conv_kernel_grad_p,
    lambda ct, x, g, **how: conv_input_grad_p.bind(g, ct, **how),
    lambda ct, x, g, **how: conv_p.bind(x, ct, **how),
)
