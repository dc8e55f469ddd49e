"""Named data sets and a person's own images -> uint8 arrays in memory; splits; the order of the examples."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from vae_jax.batch import Dataset
from vae_jax.data.named import DATASETS, MNIST_FAMILY, _tfds
from vae_jax.data.own import SPLIT_SEED as SPLIT_SEED
from vae_jax.data.own import _folder, _npz, _take
from vae_jax.data.own import read_images as read_images


def load(
    *,
    name: str = "mnist",
    manual_dir: str = "",
    validation: int = 0,
    shuffle: bool = True,
) -> Dataset:
    """Load a data set.

    Args:
        name: "digits" (bundled), "mnist", "fashion_mnist", "kmnist", any other image classification data set of
            TensorFlow Datasets, or the path of a person's own images: an .npz with `image` [n, h, w] or [n, h, w, c]
            (uint8, or float in [0, 1]) and optionally `label`, `test_image`, `test_label`; or a folder of PNG or JPEG
            files, in one subfolder a class or in none, its path with a slash in it. Without a test set, a fifth of the
            images becomes one.
        manual_dir: folder that holds the files of the MNIST family, for machines that cannot download.
        validation: how many training images to hold out.
        shuffle: whether each epoch has an order of its own.

    Raises ValueError or OSError, in one line, for whatever cannot be loaded.
    """
    if name in DATASETS:
        load_splits = DATASETS[name]
    elif name.lower().endswith(".npz"):
        load_splits = _npz
    elif name.startswith((".", "~", "/")) or ("/" in name and Path(name).is_dir()):
        load_splits = _folder
    else:
        load_splits = _tfds
    if manual_dir and name not in MNIST_FAMILY:
        raise ValueError(f"data.manual_dir is {manual_dir!r}, but only {', '.join(MNIST_FAMILY)} are read from there")
    train, test = load_splits(name, manual_dir)
    if not 0 <= validation < len(train.label):
        raise ValueError(
            f"data.validation is {validation}, but must be from 0 to {len(train.label) - 1}, below the training images"
        )
    splits = {"train": train, "test": test}
    if validation:
        order = np.random.default_rng(SPLIT_SEED).permutation(len(train.label))
        held_out, kept = np.sort(order[:validation]), np.sort(order[validation:])
        splits |= {"train": _take(train, kept), "validation": _take(train, held_out)}
    return Dataset(splits, int(max(train.label.max(), test.label.max())) + 1, shuffle)


def epoch_order(seed: int, epoch: int, size: int, shuffle: bool) -> Int[np.ndarray, " size"]:
    """The order of the `size` training examples in an epoch: a pure function of (seed, epoch)."""
    if not shuffle:
        return np.arange(size, dtype=np.int32)
    return np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
