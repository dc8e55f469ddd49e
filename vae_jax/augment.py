"""Random shifts and rotations, with one key per image (Simard et al. 2003)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, Key

from vae_jax.batch import named_key


def rotate(
    image: Float[Array, "batch height width channel"], degrees: Float[Array, " batch"]
) -> Float[Array, "batch height width channel"]:
    """Rotate each image counterclockwise about its centre, with bilinear interpolation; pixels from outside are 0."""
    _, height, width, _ = image.shape
    row, column = jnp.mgrid[:height, :width]
    down, right = row - (height - 1) / 2, column - (width - 1) / 2

    def turn(image, angle):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        sources = [
            cos * down + sin * right + (height - 1) / 2,
            cos * right - sin * down + (width - 1) / 2,
        ]
        return jax.vmap(lambda plane: map_coordinates(plane, sources, 1), -1, -1)(image)

    return jax.vmap(turn)(image, jnp.deg2rad(degrees))


def translate(
    image: Float[Array, "batch height width channel"],
    offset: Int[Array, "batch 2"],
    max_shift: int,
) -> Float[Array, "batch height width channel"]:
    """Shift each image by its `offset` (down, right), at most `max_shift` pixels; pixels from outside are 0."""
    margin = (max_shift, max_shift)
    padded = jnp.pad(image, ((0, 0), margin, margin, (0, 0)))

    def cut(padded, offset):
        down, right = max_shift - offset
        return lax.dynamic_slice(padded, (down, right, 0), image.shape[1:])

    return jax.vmap(cut)(padded, offset)


def augment(
    image: Float[Array, "batch height width channel"],
    keys: Key[Array, " batch"],
    shift: int,
    rotation: float,
) -> Float[Array, "batch height width channel"]:
    """Rotate each image by up to `rotation` degrees, then shift it by up to `shift` pixels.

    The amounts are uniform and come from each example's key streams "rotation" and "shift".
    """
    if rotation:
        draw = functools.partial(jax.random.uniform, minval=-rotation, maxval=rotation)
        image = rotate(image, jax.vmap(draw)(named_key(keys, "rotation")))
    if shift:
        draw = functools.partial(jax.random.randint, shape=(2,), minval=-shift, maxval=shift + 1)
        image = translate(image, jax.vmap(draw)(named_key(keys, "shift")), shift)
    return image
