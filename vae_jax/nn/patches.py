"""The patches of images as rows of a matrix, and the transpose: overlapping patches added to images."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax


class Geometry(NamedTuple):
    """How the large side of a convolution, [height, width], maps to the small side."""

    size: tuple[int, ...]  # of the kernel
    stride: tuple[int, ...]
    low: tuple[int, ...]  # padding above and left of the large side
    small: tuple[int, ...]
    large: tuple[int, ...]


def padding(geometry):
    """The padding (low, high) of each axis of the large side; negative if the kernel does not reach the end of the
    axis.
    """
    return [(low, (n - 1) * stride + k - low - m) for k, stride, low, n, m in zip(*geometry)]


def im2col(x, geometry):
    """The patches of x as rows, [batch * small, kh * kw * c].

    Each slice takes `stride` pixels of a row, so there are few slices. XLA's CPU backend fuses a sum of padded slices
    into one loop; a concatenation would copy them again.
    """
    (kh, kw), (sh, sw), _, (h, w), large = geometry
    batch, channels = x.shape[0], x.shape[3]
    wide = w + -(-kw // sw) - 1
    (above, below), (left, _) = padding(geometry)
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


def col2im(columns, geometry):
    """The transpose of im2col: [batch * small, kh * kw * c] -> [batch, *large, c], adding overlaps.

    Outputs with the same remainder modulo the stride form a plane. Each plane is a sum of unstrided shifts of the
    columns, and one reshape interleaves the planes. (Interior dilation by `lax.pad` is slower.)
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
