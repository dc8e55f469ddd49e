"""Load named data sets or a user's own images as uint8 arrays, in memory or mapped; make splits; order the examples."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from vae_jax.batch import BINARIZE, Dataset, Split
from vae_jax.data.cache import cached
from vae_jax.data.images import COLOURS, SMALLEST
from vae_jax.data.images import Preparation as Preparation
from vae_jax.data.named import DATASETS, MNIST_FAMILY, find_tfds, load_tfds
from vae_jax.data.own import SPLIT_SEED as SPLIT_SEED
from vae_jax.data.own import fit_splits, load_own, take
from vae_jax.data.own import read_images as read_images
from vae_jax.run.files import local_path
from vae_jax.run.memory import TooLarge


def load(
    name: str = "mnist",
    *,
    manual_dir: str = "",
    size: int = 0,
    colour: str = "auto",
    skip_unreadable: bool = False,
    validation: int = 0,
    shuffle: bool = True,
    binarize: str = "none",
    labelled: int = -1,
    label_seed: int = 0,
    labelled_per_batch: int = 0,
) -> Dataset:
    """Load a data set.

    Args:
        name: "digits" (bundled), "mnist", "fashion_mnist", "kmnist", another image classification data set of
            TensorFlow Datasets, or the path of your own images: an .npz with `image` [n, h, w] or [n, h, w, c] (uint8,
            or float in [0, 1]) and optionally `label`, `test_image`, `test_label`; or a folder, with a slash in its
            path, of PNG, JPEG, WEBP, BMP or GIF files: all in it, in one subfolder per class, or in subfolders train,
            test and validation. Without a test set, a fifth of the images becomes one.
        manual_dir: folder with the original files of the MNIST family, for machines that cannot download.
        size: scale and crop each image to a square of this many pixels a side, at least 8; 0: keep images of one size.
        colour: "grey" or "colour" converts; "auto" keeps grey images grey unless others are coloured.
        skip_unreadable: leave out files that cannot be read, and name them, instead of refusing the folder.
        validation: number of training images to hold out for validation.
        shuffle: whether to shuffle the training images anew in each epoch.
        binarize: "dynamic" draws each pixel from Bernoulli(x) at each use, "threshold" rounds it, "none" keeps it.
        labelled: number of training images that keep their label, balanced over the classes; -1: all, 0: none.
        label_seed: seed that chooses the images that keep their label.
        labelled_per_batch: number of labelled images in each batch, the others being unlabelled; 0: as they come.

    Raises ValueError or OSError, in one line, for anything that cannot be loaded.
    """
    if manual_dir and name not in MNIST_FAMILY:
        raise ValueError(f"data.manual_dir is {manual_dir!r}, but only {', '.join(MNIST_FAMILY)} are read from there")
    if binarize not in BINARIZE:
        raise ValueError(f"data.binarize is {binarize!r}, but must be one of {', '.join(BINARIZE)}")
    if size and size < SMALLEST:
        raise ValueError(f"data.size is {size}, but must be 0, for images of one size, or at least {SMALLEST}")
    if colour not in COLOURS:
        raise ValueError(f"data.colour is {colour!r}, but must be one of {', '.join(COLOURS)}")
    if skip_unreadable and name and (not is_own(name) or name.lower().endswith(".npz")):
        raise ValueError(f"data.skip_unreadable is true, but {name} is not a folder of images: leave it at false")
    splits, notes = load_prepared(name, manual_dir, Preparation(size, colour), skip_unreadable, validation)
    if binarize != "none" and splits["train"].image.shape[-1] != 1:
        raise ValueError(
            f"data.binarize is {binarize!r}, but the images of {name} are coloured: only grey ones can be binary"
        )
    num_classes = int(max(split.label.max() for split in splits.values())) + 1
    splits["train"] = hide_labels(splits["train"], labelled, label_seed, num_classes)
    if labelled_per_batch and (labelled <= 0 or not shuffle):
        raise ValueError(
            f"data.labelled_per_batch is {labelled_per_batch}, which needs data.labelled above 0 and shuffled images: "
            "leave it at 0"
        )
    return Dataset(splits, num_classes, shuffle, binarize, labelled_per_batch, tuple(notes))


def load_prepared(
    name: str, manual_dir: str, wanted: Preparation, skip_unreadable: bool, validation: int
) -> tuple[dict[str, Split], list[str]]:
    """Load the splits by name, with notes on how the images were prepared.

    Images that memory cannot hold are kept in files and mapped.
    """

    def read(scratch):
        loaded, notes = load_splits(name, manual_dir, wanted._replace(scratch=scratch), skip_unreadable)
        return hold_out(loaded, validation, name, scratch), notes

    try:
        return read(None)
    except TooLarge as error:
        if name in DATASETS:  # they are in memory before they are scaled
            raise
        source = local_path(name) if is_own(name) else Path(find_tfds(name).data_path)
        fields = {"size": wanted.size, "colour": wanted.colour, "skip": skip_unreadable, "validation": validation}
        return cached(source, fields, read, error.nbytes)


def is_own(name: str) -> bool:
    """Whether the name of a data set is the path of a user's images."""
    marked = name.lower().endswith((".npz", "/")) or name.startswith((".", "~", "/"))
    return marked or ("/" in name and Path(name).is_dir())


def load_splits(
    name: str, manual_dir: str, wanted: Preparation, skip_unreadable: bool
) -> tuple[list[Split], list[str]]:
    """Load the training, test and, if there is one, validation split, with notes on how the images were prepared."""
    if not name:
        raise ValueError("data.name is empty: give your images, --config.data.name=FOLDER/ or FILE.npz")
    if name in DATASETS:
        return fit_splits([*DATASETS[name](name, manual_dir)], wanted)
    if is_own(name):
        return load_own(name, wanted, skip_unreadable)
    return fit_splits(load_tfds(find_tfds(name), wanted.scratch), wanted)


def hold_out(loaded: list[Split], validation: int, name: str, scratch: Path | None = None) -> dict[str, Split]:
    """The splits by name, with `validation` training images held out. Raises ValueError for an impossible number."""
    train, test, *given = loaded
    count = len(train.label)
    if not 0 <= validation < count:
        raise ValueError(
            f"data.validation is {validation}, but must be from 0 to {count - 1}, fewer than the training images"
        )
    if validation and given:
        raise ValueError(f"data.validation is {validation}, but {name} has validation images of its own: leave it at 0")
    if not validation:
        return dict(zip(("train", "test", "validation"), loaded))
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    held, kept = (take(train, np.sort(part), scratch) for part in (order[:validation], order[validation:]))
    return {"train": kept, "test": test, "validation": held}


def hide_labels(split: Split, labelled: int, seed: int, num_classes: int) -> Split:
    """Replace the labels of all but `labelled` images by -1; `labelled` = -1 keeps all.

    Every class keeps the same number, or one more if they do not divide evenly. `seed` chooses them at random.
    """
    known = int(np.sum(split.label >= 0))
    if labelled == -1 or labelled == known == 0:
        return split
    if labelled and not num_classes <= labelled <= known:
        raise ValueError(
            f"data.labelled is {labelled}, but must be -1 for all, 0 for none, or from {num_classes}, one per class, "
            f"to {known}"
        )
    if seed < 0:
        raise ValueError(f"data.label_seed is {seed}, but must be at least 0")
    rng = np.random.default_rng(seed)
    more = rng.permutation(num_classes) < labelled % num_classes
    hidden = np.full_like(split.label, -1)
    for label in range(num_classes if labelled else 0):
        count = labelled // num_classes + int(more[label])
        members = np.flatnonzero(split.label == label)
        if len(members) < count:
            raise ValueError(
                f"data.labelled is {labelled}, {count} of class {label}, which has {len(members)} training images: "
                "give fewer, or -1"
            )
        hidden[rng.permutation(members)[:count]] = label
    return split._replace(label=hidden)


def epoch_order(
    seed: int, epoch: int, label: Int[np.ndarray, " size"], shuffle: bool, batch_size: int = 1, labelled: int = 0
) -> Int[np.ndarray, " size"]:
    """The order of the training examples in an epoch: a pure function of seed, epoch and which examples are labelled.

    If `labelled` is above 0, each batch starts with that many labelled examples, and the rest is unlabelled. Labelled
    examples repeat in an epoch if there are few, but never within a batch.
    """
    size = len(label)
    if not shuffle:
        return np.arange(size, dtype=np.int32)
    rng = np.random.default_rng((seed, epoch))
    if not labelled:
        return rng.permutation(size).astype(np.int32)
    batches = size // batch_size
    parts = [
        rounds(rng, np.flatnonzero(chosen), each, batches)
        for chosen, each in ((label >= 0, labelled), (label < 0, batch_size - labelled))
    ]
    order = np.concatenate(parts, axis=1).reshape(-1)
    return np.resize(order, size).astype(np.int32)


def rounds(
    rng: np.random.Generator, index: Int[np.ndarray, " n"], each: int, count: int
) -> Int[np.ndarray, "count each"]:
    """`count` rows of `each` distinct entries, from as many permutations as needed."""
    rows: list[np.ndarray] = []
    while len(rows) < count:
        whole = len(index) // each * each
        rows.extend(rng.permutation(index)[:whole].reshape(-1, each))
    return np.stack(rows[:count])
