"""SAME convolution and its transpose: matrix products on the CPU, and on GPUs for few channels; otherwise lax.

XLA's CPU convolution is far slower than its matrix product, and even slower inside a loop. So on the CPU each of the three
bilinear maps that make up a convolution is one product:

    conv(x, w)               small = im2col(x) w               forward
    conv_input_grad(g, w)    large = col2im(g w^T)             its transpose in x: the transposed convolution
    conv_kernel_grad(x, g)   w     = im2col(x)^T g             its transpose in w

If the small side has few channels, several pixels of a row are combined into one pixel with all their channels.

The transposes of each map are the other two. As JAX primitives the three are therefore closed under differentiation of
any order, in forward and reverse mode, and the backward pass of a transposed convolution is one im2col and two products.
On TPUs the same primitives lower to `lax.conv_general_dilated` and its transposes. On NVIDIA GPUs they do so too, unless the
large side has few channels, where cuDNN is slower than the products. Kernels have Flax's layout, [height, width, in, out],
so weights are interchangeable between platforms and with `flax.linen`.

In bfloat16, products and overlapping sums accumulate in float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

FEW_CHANNELS = 16  # NVIDIA GPUs use products up to this many channels; measured on an H100
WIDE = 64  # columns that a product needs to reach nearly its full rate on the CPU


class Geometry(NamedTuple):
    """How the large side of a convolution, [height, width], maps to the small side."""

    size: tuple[int, ...]  # of the kernel
    stride: tuple[int, ...]
    low: tuple[int, ...]  # padding above and left of the large side
    small: tuple[int, ...]
    large: tuple[int, ...]


def conv(
    x: Float[Array, "batch h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    stride: int = 1,
) -> Float[Array, "batch h_out w_out c_out"]:
    """SAME convolution: `lax.conv_general_dilated`, output [batch, ceil(h / stride), ceil(w / stride), c_out]."""
    _check_channels(x, kernel)
    size, large = kernel.shape[:2], x.shape[1:3]
    small = tuple(-(-n // stride) for n in large)
    low = tuple(max((n - 1) * stride + k - m, 0) // 2 for k, n, m in zip(size, small, large))
    geometry = Geometry(size, (stride, stride), low, small, large)
    return conv_p.bind(x, kernel, geometry=geometry)


def conv_transpose(
    x: Float[Array, "batch h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    stride: int = 1,
) -> Float[Array, "batch h_out w_out c_out"]:
    """SAME transposed convolution: `lax.conv_transpose`, output [batch, h * stride, w * stride, c_out]."""
    _check_channels(x, kernel)
    size, small = kernel.shape[:2], x.shape[1:3]
    low = tuple(max(k - stride, 0) // 2 for k in size)
    large = tuple(n * stride for n in small)
    # lax.conv_transpose does not flip its kernel; the transpose of a convolution does.
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    geometry = Geometry(size, (stride, stride), low, small, large)
    return conv_input_grad_p.bind(x, flipped, geometry=geometry)


def _check_channels(x, kernel):
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(f"images have {x.shape[3]} channels, but the kernel takes {kernel.shape[2]}")


def _pads(geometry):
    """The padding (low, high) of each axis of the large side; negative if the kernel does not reach the end of the axis."""
    return [(low, (n - 1) * stride + k - low - m) for k, stride, low, n, m in zip(*geometry)]


def _im2col(x, geometry):
    """The patches of x as rows, [batch * small, kh * kw * c].

    Each slice takes `stride` pixels of a row, so there are few slices. XLA's CPU backend fuses a sum of padded slices into
    one loop; a concatenation would copy them again.
    """
    (kh, kw), (sh, sw), _, (h, w), large = geometry
    batch, channels = x.shape[0], x.shape[3]
    wide = w + -(-kw // sw) - 1
    (above, below), (left, _) = _pads(geometry)
    right = wide * sw - left - large[1]
    zero, size = jnp.zeros((), x.dtype), kh * kw * channels
    x = lax.pad(x, zero, ((0, 0, 0), (above, below, 0), (left, right, 0), (0, 0, 0)))
    x = x.reshape(batch, x.shape[1], wide, sw * channels)
    columns = jnp.zeros((batch, h, w, size), x.dtype)
    for i in range(kh):
        for j in range(0, kw, sw):
            start, count = (i * kw + j) * channels, min(sw, kw - j) * channels
            rows = slice(i, i + (h - 1) * sh + 1, sh)
            cols = slice(j // sw, j // sw + w)
            pads = ((0, 0, 0),) * 3 + ((start, size - start - count, 0),)
            columns += lax.pad(x[:, rows, cols, :count], zero, pads)
    return columns.reshape(batch * h * w, size)


def _col2im(columns, geometry):
    """The transpose of im2col: [batch * small, kh * kw * c] -> [batch, *large, c], adding overlaps.

    Outputs with the same remainder modulo the stride form a plane. Each plane is a sum of unstrided shifts of the columns,
    and one reshape interleaves the planes. (Interior dilation by `lax.pad` is slower.)
    """
    (kh, kw), (sh, sw), low, (h, w), large = geometry
    columns = columns.reshape(-1, h, w, kh, kw, columns.shape[-1] // (kh * kw))
    batch, channels = columns.shape[0], columns.shape[-1]
    zero = jnp.zeros((), columns.dtype)
    exact = jnp.promote_types(columns.dtype, jnp.float32)
    rows, cols = -(-large[0] // sh), -(-large[1] // sw)

    def plane(row, col):
        total = jnp.zeros((batch, rows, cols, channels), exact)
        for i in range(kh):
            for j in range(kw):
                (down, below), (right, beside) = (
                    divmod(row + low[0] - i, sh),
                    divmod(col + low[1] - j, sw),
                )
                if below == beside == 0:
                    pads = (
                        (0, 0, 0),
                        (-down, rows + down - h, 0),
                        (-right, cols + right - w, 0),
                        (0, 0, 0),
                    )
                    total += lax.pad(columns[:, :, :, i, j], zero, pads).astype(exact)
        return total.astype(columns.dtype)

    planes = jnp.stack(
        [jnp.stack([plane(r, c) for c in range(sw)], axis=3) for r in range(sh)],
        axis=2,
    )
    return planes.reshape(batch, rows * sh, cols * sw, channels)[:, : large[0], : large[1]]


def _widen(geometry, channels):
    """Combine n small pixels of a row into one with all their channels, since narrow products are slow.

    Returns the new geometry and n. The n kernels lie side by side in a wider one, with at most as many zeros as weights.
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
    out = _im2col(x, wide) @ _widen_kernel(kernel, geometry, n)
    return out.reshape(x.shape[0], *geometry.small, kernel.shape[3])


def _input_grad(g, kernel, geometry):
    wide, n = _widen(geometry, kernel.shape[3])
    weights = _widen_kernel(kernel, geometry, n)
    return _col2im(g.reshape(-1, weights.shape[1]) @ weights.T, wide)


def _kernel_grad(x, g, geometry):
    channels = x.shape[3], g.shape[3]
    wide, n = _widen(geometry, channels[1])
    # Contracting over the rows of both operands avoids the transposed copy of the columns that XLA makes for other forms.
    product = lax.dot_general(_im2col(x, wide), g.reshape(-1, n * channels[1]), (((0,), (0,)), ((), ())))
    exact = jnp.promote_types(product.dtype, jnp.float32)
    kernel = jax.ShapeDtypeStruct((*geometry.size, *channels), exact)
    fold = jax.linear_transpose(lambda k: _widen_kernel(k, geometry, n), kernel)
    return fold(product.astype(exact))[0].astype(product.dtype)


def _lax_conv(x, kernel, geometry):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, geometry.stride, _pads(geometry), dimension_numbers=layout)


def _lax_input_grad(g, kernel, geometry):
    x = jax.ShapeDtypeStruct((g.shape[0], *geometry.large, kernel.shape[2]), g.dtype)
    return jax.linear_transpose(lambda x: _lax_conv(x, kernel, geometry), x)(g)[0]


def _lax_kernel_grad(x, g, geometry):
    kernel = jax.ShapeDtypeStruct((*geometry.size, x.shape[3], g.shape[3]), g.dtype)
    return jax.linear_transpose(lambda kernel: _lax_conv(x, kernel, geometry), kernel)(g)[0]


def _primitive(name, product, convolution, shape, channels, has_kernel=True):
    """A primitive that lowers to a matrix product or to a lax convolution.

    `shape(a, b, geometry)` returns the shape of the result, and `channels(a, b)` the number of channels of the large side.
    `has_kernel` says whether b is a kernel.
    """
    primitive = Primitive(name)

    def on_gpu(a, b, geometry):
        few = channels(a, b) <= FEW_CHANNELS
        return (product if few else convolution)(a, b, geometry)

    def abstract(a, b, geometry):
        dtype = jnp.promote_types(a.dtype, b.dtype)
        return jax.core.ShapedArray(shape(a, b, geometry), dtype)

    def batch(operands, axes, geometry):
        if has_kernel and axes[1] is None:  # a shared kernel: one larger batch of images
            images = jnp.moveaxis(operands[0], axes[0], 0)
            out = primitive.bind(images.reshape(-1, *images.shape[2:]), operands[1], geometry=geometry)
            return out.reshape(*images.shape[:2], *out.shape[1:]), 0
        # lax would turn several kernels into a grouped convolution, which is slow also on GPUs.
        products, convolutions = (
            jax.vmap(functools.partial(form, geometry=geometry), axes) for form in (product, convolution)
        )
        forms = {"cpu": products, "cuda": products, "default": convolutions}
        return lax.platform_dependent(*operands, **forms), 0

    primitive.def_impl(jax.jit(primitive.bind, static_argnames="geometry"))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    for platform, form in {None: convolution, "cpu": product, "cuda": on_gpu}.items():
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


conv_p = _primitive("conv", _conv, _lax_conv, _small_shape, _image_channels)
conv_input_grad_p = _primitive("conv_input_grad", _input_grad, _lax_input_grad, _large_shape, _kernel_channels)
conv_kernel_grad_p = _primitive(
    "conv_kernel_grad",
    _kernel_grad,
    _lax_kernel_grad,
    _kernel_shape,
    _image_channels,
    has_kernel=False,
)

# defbilinear takes the transposes with respect to the first and the second operand.
ad.defbilinear(
    conv_p,
    lambda ct, x, kernel, geometry: conv_input_grad_p.bind(ct, kernel, geometry=geometry),
    lambda ct, x, kernel, geometry: conv_kernel_grad_p.bind(x, ct, geometry=geometry),
)
ad.defbilinear(
    conv_input_grad_p,
    lambda ct, g, kernel, geometry: conv_p.bind(ct, kernel, geometry=geometry),
    lambda ct, g, kernel, geometry: conv_kernel_grad_p.bind(ct, g, geometry=geometry),
)
ad.defbilinear(
    conv_kernel_grad_p,
    lambda ct, x, g, geometry: conv_input_grad_p.bind(g, ct, geometry=geometry),
    lambda ct, x, g, geometry: conv_p.bind(x, ct, geometry=geometry),
)
