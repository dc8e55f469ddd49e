"""Checks of what a user passes to a trained model. Each ValueError names the argument, its value and the rule."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

LARGEST_LATENT = 1e4  # far outside any prior; beyond it the decoder's float32 would overflow


def check_labels(label: Any, count: int, num_classes: int) -> Int[np.ndarray, " count"]:
    """Labels of `count` examples, from one integer or `count` of them. Raises ValueError for anything else."""
    last = num_classes - 1
    if label is None:
        raise ValueError(f"this model is conditioned on the label: give label= (or --labels), from 0 to {last}")
    given = np.asarray(label)
    if given.dtype.kind not in "iu" or given.shape not in ((), (count,)):
        raise ValueError(f"label is {str(label)[:60]}, but must be an integer, or one for each of {count}")
    for worst in (given.min(), given.max()):
        if not 0 <= worst <= last:
            raise ValueError(f"label is {worst}, but must be from 0 to {last}")
    return np.broadcast_to(given, count).astype(np.int32)


def check_all_labelled(split: str, label: np.ndarray) -> None:
    """Raise ValueError if an image of a split has no label, for a model that is conditioned on the label."""
    if (label < 0).any():
        raise ValueError(
            f"{split} has unlabelled images, but this model is conditioned on the label: choose another --split"
        )


def check_images(image: Any, shape: tuple[int, int, int]) -> Float[np.ndarray, "n h w c"]:
    """Images in [0, 1] as float32. Raises ValueError, naming shape, type or value, if they do not fit the model."""
    image = as_array("images", image)
    if image.ndim == 3 and shape[2] == 1:
        image = image[..., None]
    if image.ndim != 4 or image.shape[1:] != shape or len(image) == 0:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"images have shape {image.shape}, but must be [n, {wanted}]")
    if image.dtype == np.uint8:
        return image / np.float32(255)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"images are {image.dtype}, but must be uint8, or float in [0, 1]")
    check_range("images", image, 0.0, 1.0)
    return image.astype(np.float32)


def check_latents(z: Any, latent_dim: int) -> Float[np.ndarray, "n latent"]:
    """Latents as float32. Raises ValueError, naming shape, type or value, if a decoder cannot take them."""
    z = as_array("z", z)
    if z.ndim != 2 or z.shape[1] != latent_dim or len(z) == 0:
        raise ValueError(f"z has shape {z.shape}, but must be [n, {latent_dim}]")
    if z.dtype.kind not in "iuf":
        raise ValueError(f"z is {z.dtype}, but must be real numbers")
    check_range("z", z, -LARGEST_LATENT, LARGEST_LATENT)
    return z.astype(np.float32)


def as_array(name: str, values: Any) -> np.ndarray:
    """Convert to a plain array. Raises ValueError for a masked array: NumPy would drop the mask silently."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(  # noqa: TRY004
            f"{name} is a masked array, but must be a plain one: fill what is masked"
        )
    return np.asarray(values)


def check_range(name: str, values: np.ndarray, least: float, most: float) -> None:
    """Raise ValueError, naming the first value that is not a number in [least, most]."""
    wrong = values[~((values >= least) & (values <= most))]  # NaN fails both comparisons
    if wrong.size:
        raise ValueError(f"{name} has the value {wrong[0]}, but must lie in [{least:g}, {most:g}]")


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError unless `value` is an integer in [least, most]; booleans do not count."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        shown = repr(value).splitlines()[0][:60]
        raise ValueError(f"{name} is {shown}, but must be an integer from {least} to {most}")


def root_key(seed: int) -> Key[Array, ""]:
    """The key of a seed. Raises ValueError unless it is an integer from 0 to 2**32 - 1."""
    check_integer("seed", seed, 0, 2**32 - 1)
    return jax.random.key(seed)
