"""Data sets, batches, and the random keys of each example."""

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt8

CHUNK = 4096  # images processed at once


class Split(NamedTuple):
    """Images and labels of one part of a data set, on the host."""

    image: UInt8[np.ndarray, "n height width channel"]
    label: Int[np.ndarray, " n"]  # int32, -1 = unlabelled


class Dataset(NamedTuple):
    """A data set; its images are in memory or memory-mapped (`np.memmap`).

    `splits` has "train", "test" and, if there are validation images, "validation".
    """

    splits: dict[str, Split]
    num_classes: int  # 0 = unlabelled
    shuffle: bool
    binarize: str = "none"
    labelled_per_batch: int = 0  # 0 = no fixed number
    notes: tuple[str, ...] = ()  # how the images were changed on loading

    def is_binary(self, split: str) -> bool:
        """Whether the model sees only the pixel values 0 and 1 of a split."""
        return self.binarize != "none" or not has_grey(self.splits[split].image)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.splits["train"].image.shape[1:]


def mean_image(image: UInt8[np.ndarray, "n ..."]) -> Float[np.ndarray, "..."]:
    """The mean image, scaled to [0, 1], as float64."""
    return image.mean(axis=0, dtype=np.float64) / 255


def chunks(image: UInt8[np.ndarray, "n ..."]) -> Iterator[UInt8[np.ndarray, "m ..."]]:
    """Yield chunks of at most `CHUNK` images and 16 MiB, to bound the memory of a computation over all images."""
    count = min(CHUNK, max(1, 2**24 // max(1, image[0].nbytes)))
    for start in range(0, len(image), count):
        yield image[start : start + count]


def has_grey(image: UInt8[np.ndarray, "n height width channel"]) -> bool:
    """Whether any pixel is neither 0 nor 255."""
    return any(((part > 0) & (part < 255)).any() for part in chunks(image))


BINARIZE = ("none", "dynamic", "threshold")


class Batch(NamedTuple):
    """The examples of one step."""

    image: Float[Array, "batch height width channel"]  # in [0, 1]
    label: Int[Array, " batch"]  # -1 = unlabelled
    weight: Float[Array, " batch"]  # 0 = padding, which only batch normalisation does not ignore
    index: Int[Array, " batch"]  # type: ignore[assignment]  # position in the data set


def make_batch(image: UInt8[Array, "batch height width channel"], label, weight, index) -> Batch:
    """Make a batch of float images in [0, 1] from stored bytes in 0..255."""
    return Batch(image.astype(jnp.float32) / 255, label, weight, index)


def binarize(batch: Batch, keys: Key[Array, " batch"], how: str) -> Batch:
    """Make the pixels binary: "dynamic" draws each pixel from Bernoulli(x), "threshold" rounds it, "none" does nothing.

    The draws use each example's key stream "binarize". They are new in each training step and always the same in
    evaluation. Source of "dynamic": Salakhutdinov & Murray 2008; Burda et al. 2016, section 5.
    """
    if how == "none":
        return batch
    threshold: Any = 0.5
    if how == "dynamic":
        shape = batch.image.shape[1:]
        threshold = jax.vmap(lambda key: jax.random.uniform(key, shape))(named_key(keys, "binarize"))
    return batch._replace(image=(threshold < batch.image).astype(batch.image.dtype))


def binarize_as_evaluated(
    image: Float[Array, "batch height width channel"], index: Int[Array, " batch"], how: str, seed: int
) -> Float[Array, "batch height width channel"]:
    """Binarize images as evaluation does with this seed; `index` holds their positions in the split."""
    batch = Batch(image, label=index, weight=index, index=index)
    return binarize(batch, example_keys(jax.random.key(seed), None, index), how).image


def weighted_mean(
    values: Float[Array, "batch ..."], weight: Float[Array, " batch"], axis_name: str | None = None
) -> Float[Array, "..."]:
    """The weighted mean over the examples of a batch, across all devices if `axis_name` is given."""
    spread = weight.reshape(-1, *(1,) * (values.ndim - 1))
    sums = jnp.sum(spread * values, axis=0), jnp.sum(weight)
    total, count = sums if axis_name is None else lax.psum(sums, axis_name)
    return total / count


def first_of_each_label(label: Int[np.ndarray, " n"]) -> Int[np.ndarray, " shown"]:
    """Positions of the first example of each label, at most ten, or of the first ten examples if all are unlabelled."""
    known = np.flatnonzero(label >= 0)
    if not len(known):
        return np.arange(min(10, len(label)))
    return known[np.unique(label[known], return_index=True)[1][:10]]


def mixed_order(label: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """An order of a split in which the first images represent all: its own, or a fixed random one if the images come
    class by class, as from folders.
    """
    if (np.diff(label[label >= 0]) < 0).any():
        return np.arange(len(label))
    return np.random.default_rng(0).permutation(len(label))


def named_key(key: Key[Array, "*batch"], name: str) -> Key[Array, "*batch"]:
    """Derive the key of a named stream from each given key. Streams with different names are independent."""
    fold_in = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))
    return fold_in(key, zlib.crc32(name.encode()))


def example_keys(
    root: Key[Array, ""], step: Int[Array, ""] | int | None, index: Int[Array, " batch"]
) -> Key[Array, " batch"]:
    """One key per example, a pure function of (root key, step, index), so splitting a batch does not change its noise.

    Pass step None in evaluation, where the noise is always the same.
    """
    if step is None:
        key = named_key(root, "evaluation")
    else:
        key = jax.random.fold_in(named_key(root, "training"), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
