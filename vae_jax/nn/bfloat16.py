"""Products in bfloat16, of convolutions and dense layers, on CPUs that multiply it faster than float32.

Intel's AMX (Xeons since 2023) multiplies bfloat16 and sums in float32 over four times as fast as the float32
instructions, AMD's AVX-512 (since Zen 4) up to twice as fast. Only the operands of products are bfloat16, because XLA's
loops over bfloat16 are slow. Unlike in convolution.py, small pixels are not combined, because narrow products are fast
enough here.
"""

import functools
from pathlib import Path

import jax.numpy as jnp
from jax import lax

from vae_jax.nn.patches import col2im, im2col

CPU_INFO = Path("/proc/cpuinfo")  # Linux's


@functools.cache
def is_fast() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32.

    On Intel that takes AMX: its AVX-512 instructions for bfloat16 are no faster than those for float32.
    """
    info = set(CPU_INFO.read_text(errors="replace").split()) if CPU_INFO.is_file() else set()
    return "amx_bf16" in info or {"AuthenticAMD", "avx512_bf16"} <= info


def conv(x, kernel, geometry):
    """im2col(x) w: [batch, *large, c], [kh, kw, c, k] -> [batch, *small, k]."""
    out = _multiply(_patches(x, geometry), _columns(kernel), (1, 0))
    return out.reshape(x.shape[0], *geometry.small, kernel.shape[3])


def input_grad(g, kernel, geometry):
    """col2im(g w^T): [batch, *small, k], [kh, kw, c, k] -> [batch, *large, c]."""
    return col2im(_multiply(_columns(g), _columns(kernel), (1, 1)), geometry)


def kernel_grad(x, g, geometry):
    """im2col(x)^T g: [batch, *large, c], [batch, *small, k] -> [kh, kw, c, k].

    A product that contracts the rows of both operands is slow, and XLA's way to transpose one is too. So the narrower
    one is transposed by a product with the identity, which is exact.
    """
    x, g = _patches(x, geometry), _columns(g)
    if x.shape[1] < g.shape[1]:
        kernel = _multiply(_transpose(x), g, (1, 0))
    else:
        kernel = _multiply(_transpose(g), x, (1, 0)).T
    return kernel.reshape(*geometry.size, -1, g.shape[1])


def _transpose(x):
    return _multiply(jnp.eye(x.shape[1], dtype=x.dtype), x, (1, 1)).astype(x.dtype)


def _patches(x, geometry):
    # im2col adds zero-padded slices. XLA adds integers faster than bfloat16, and adding zero keeps the bits.
    bits = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return lax.bitcast_convert_type(im2col(bits, geometry), jnp.bfloat16)


def _columns(x):
    return x.astype(jnp.bfloat16).reshape(-1, x.shape[-1])


def _multiply(a, b, contracted):
    product = lax.dot_general(a, b, ((contracted[:1], contracted[1:]), ((), ())), preferred_element_type=jnp.float32)
    # Only a few forms of this product are fast in XLA, so its simplifier must not transpose it.
    return lax.optimization_barrier(product)
