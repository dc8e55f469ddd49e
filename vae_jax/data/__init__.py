"""Named data sets and a user's own images -> uint8 arrays in memory; splits; the order of the examples."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from vae_jax.batch import BINARIZE, Dataset
from vae_jax.data.named import DATASETS, MNIST_FAMILY, load_tfds
from vae_jax.data.own import SPLIT_SEED as SPLIT_SEED
from vae_jax.data.own import load_own, take
from vae_jax.data.own import read_images as read_images


def load(
    *, name: str = "mnist", manual_dir: str = "", validation: int = 0, shuffle: bool = True, binarize: str = "none"
) -> Dataset:
    """Load a data set.

    Args:
        name: "digits" (bundled), "mnist", "fashion_mnist", "kmnist", another image classification data set of TensorFlow
            Datasets, or a path with your own images: an .npz with `image` [n, h, w] or [n, h, w, c] (uint8, or float in
            [0, 1]) and optionally `label`, `test_image`, `test_label`; or a folder of PNG or JPEG files, all in it or in
            one subfolder per class, with a slash in its path. Without a test set, a fifth of the images becomes one.
        manual_dir: folder with the original files of the MNIST family, for machines that cannot download.
        validation: number of training images to hold out for validation.
        shuffle: whether to shuffle the training images anew in each epoch.
        binarize: "dynamic" draws each pixel from Bernoulli(x) at each use, "threshold" rounds it, "none" keeps it.

    Raises ValueError or OSError, in one line, for anything that cannot be loaded.
    """
    if name in DATASETS:
        load_splits = DATASETS[name]
    elif name.lower().endswith(".npz") or name.startswith((".", "~", "/")) or ("/" in name and Path(name).is_dir()):
        load_splits = load_own
    else:
        load_splits = load_tfds
    if manual_dir and name not in MNIST_FAMILY:
        raise ValueError(f"data.manual_dir is {manual_dir!r}, but only {', '.join(MNIST_FAMILY)} are read from there")
    if binarize not in BINARIZE:
        raise ValueError(f"data.binarize is {binarize!r}, but must be one of {', '.join(BINARIZE)}")
    train, test = load_splits(name, manual_dir)
    if binarize != "none" and train.image.shape[-1] != 1:
        raise ValueError(
            f"data.binarize is {binarize!r}, but the images of {name} are coloured: only grey ones can be binary"
        )
    size = len(train.label)
    if not 0 <= validation < size:
        raise ValueError(
            f"data.validation is {validation}, but must be from 0 to {size - 1}, below the training images"
        )
    splits = {"train": train, "test": test}
    if validation:
        order = np.random.default_rng(SPLIT_SEED).permutation(size)
        splits["train"] = take(train, np.sort(order[validation:]))
        splits["validation"] = take(train, np.sort(order[:validation]))
    return Dataset(splits, int(max(train.label.max(), test.label.max())) + 1, shuffle, binarize)


def epoch_order(seed: int, epoch: int, size: int, shuffle: bool) -> Int[np.ndarray, " size"]:
    """The order of the `size` training examples in an epoch, a pure function of (seed, epoch)."""
    if not shuffle:
        return np.arange(size, dtype=np.int32)
    return np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
