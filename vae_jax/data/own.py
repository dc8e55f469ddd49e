"""A user's own images: an .npz or a folder of image files, already split or not."""

import math
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from vae_jax.batch import Split
from vae_jax.data.cache import store, unpack
from vae_jax.data.images import FORMATS, SUFFIXES, UNREADABLE, Preparation, check_size, fit_array, read_files, some
from vae_jax.run.files import local_path
from vae_jax.run.memory import TooLarge

SPLIT_SEED = 0  # a split belongs to the data set: it is the same for all seeds of runs
TEST_SHARE = 0.2  # of images that come without a test set
LARGEST_LABEL = 65_535
PARTS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
KINDS = ", ".join(FORMATS[:-1]) + f" or {FORMATS[-1]}"
RESIZE = "bring all images to one size, which --config.data.size=64 does"
TO_THE_MODEL = "resize all images to the size that the model takes"
LEAVE_OUT = "replace it, or leave such files out by --config.data.skip_unreadable=true"


def take(split: Split, positions: Int[np.ndarray, " n"], scratch: Path | None = None) -> Split:
    """The examples of a split at these positions; `scratch` as in `store`."""
    if scratch is None:
        return Split(split.image[positions], split.label[positions])
    rows = (split.image[i] for i in positions)
    return Split(store(rows, (len(positions), *split.image.shape[1:]), scratch), split.label[positions])


def split_off_test(
    image: UInt8[np.ndarray, "n h w c"], label: Int[np.ndarray, " n"], scratch: Path | None = None
) -> tuple[Split, Split]:
    """Split off a test set, stratified by label, or at random if labels are missing or too rare."""
    from sklearn.model_selection import train_test_split

    size = math.ceil(TEST_SHARE * len(label))
    if not 0 < size < len(label):
        raise ValueError(f"{len(label)} images are too few to split off a fifth for testing: give at least 2")
    _, counts = np.unique(label, return_counts=True)
    stratify = label if counts.min() >= 2 and len(counts) <= min(size, len(label) - size) else None
    positions = np.arange(len(label))
    parts = train_test_split(positions, test_size=size, stratify=stratify, random_state=SPLIT_SEED)
    train, test = (take(Split(image, label), np.sort(part), scratch) for part in parts)
    return train, test


def load_own(name: str, wanted: Preparation, skip_unreadable: bool = False) -> tuple[list[Split], list[str]]:
    """Load the training, test and, if any, validation split of a user's own images, with notes on their preparation.

    Raises ValueError, in one line, if they cannot be read.
    """
    path = local_path(name)
    if name.lower().endswith(".npz"):
        arrays, parts = _read_npz(name, path, wanted.scratch), ("", "test_")
        given = [_make_split(arrays, part, name, wanted.scratch) for part in parts if f"{part}image" in arrays]
        splits, notes = fit_splits(given, wanted)
    else:
        splits, notes = _read_folder(name, path, wanted, skip_unreadable)
    train, *others = splits
    for test in others:
        if test.image.shape[1:] != train.image.shape[1:]:
            raise ValueError(
                f"test_image in {name} has images of {test.image.shape[1:]}, but image has {train.image.shape[1:]}"
            )
    return [*split_off_test(*train, wanted.scratch)] if not others else splits, notes


def fit_splits(splits: list[Split], wanted: Preparation) -> tuple[list[Split], list[str]]:
    """Prepare splits whose images are arrays in the same way as files; also returns notes on what was done."""
    done: Counter = Counter()
    fitted = [split._replace(image=fit_array(split.image, wanted, done)) for split in splits]
    return fitted, [f"{count} {what}" for what, count in sorted(done.items())]


def read_images(
    path: str, wanted: Preparation, skip_unreadable: bool = False
) -> tuple[list[str], UInt8[np.ndarray, "n height width channel"], list[str]]:
    """Read images to use a model on: their names (positions or files), their pixels, and notes on what was done.

    `path` is an .npz with `image`, a folder, an image file, or several image files separated by commas.
    """
    if not path:
        raise ValueError("--input is empty: give a folder, an .npz, or image files")
    name = path.rstrip("/")
    if name.lower().endswith(".npz"):
        (split, *_), notes = fit_splits([_make_split(_read_npz(path, local_path(path)), "", path)], wanted)
        return [str(i) for i in range(len(split.label))], split.image, notes
    many = [path] if os.path.exists(local_path(path)) or "," not in path else [one for one in path.split(",") if one]
    files, folder, ignored = [local_path(one) for one in many], None, []
    if len(files) == 1 and (files[0].is_dir() or not files[0].exists() and not files[0].suffix):
        found = _find_images(path, files[0])
        files, folder, ignored = found.files, files[0], found.notes
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise ValueError(f"there is no file {', '.join(missing)}")
    kept, image, notes = read_files(files, path, wanted, skip_unreadable, "give one that can be read", TO_THE_MODEL)
    names = [str(files[i].relative_to(folder)) if folder else str(files[i]) for i in kept]
    return names, image, notes + ignored


def _read_npz(name, path, scratch=None):
    if not path.is_file():
        raise ValueError(f"there is no file {name}")
    try:
        with zipfile.ZipFile(path) as archive:
            check_size(name, sum(info.file_size for info in archive.infolist()), scratch)
            if scratch:
                members = archive.infolist()
                arrays = {member.filename.removesuffix(".npy"): unpack(archive, member, scratch) for member in members}
        if not scratch:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: np.asarray(archive[key]) for key in archive.files}
    except Exception as error:  # damage raises anything from zlib.error to TokenError
        if isinstance(error, TooLarge) or (scratch and isinstance(error, OSError)):  # such as a full disk
            raise
        raise ValueError(f"cannot read {name}: {error}") from error
    unknown = arrays.keys() - {"image", "label", "test_image", "test_label"}
    stray = "test_label" in arrays and "test_image" not in arrays
    if unknown or stray or "image" not in arrays:
        raise ValueError(
            f"{name} holds {', '.join(map(repr, arrays))}, but must hold image, and may hold label, or test_image and "
            "test_label"
        )
    return arrays


def _make_split(arrays, prefix, name, scratch=None):
    image = arrays[prefix + "image"]
    where = f"{prefix}image in {name}"
    if image.ndim not in (3, 4) or 0 in image.shape or image.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"{where} has shape {image.shape}, but must be [n, height, width] with 1 or 3 channels")
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating) or not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"{where} is {image.dtype}, but must be uint8, or float in [0, 1]")
        image = store((np.round(one * 255).astype(np.uint8) for one in image), image.shape, scratch)
    count = len(image)
    label = arrays.get(prefix + "label", np.full(count, -1))
    fits = label.shape == (count,) and np.issubdtype(label.dtype, np.integer)
    if not fits or label.min() < -1 or label.max() > LARGEST_LABEL:
        raise ValueError(
            f"{prefix}label in {name} must be {count} whole numbers from 0 to {LARGEST_LABEL}, or -1 where there is "
            "no label"
        )
    return Split(image.reshape(*image.shape[:3], -1), label.astype(np.int32))


class Found(NamedTuple):
    """The image files of a folder, and notes on what else it holds."""

    files: list[Path]
    label: list[int]  # -1 without classes
    classes: list[str]
    notes: list[str]


def _read_folder(name, folder, wanted, skip_unreadable):
    """The splits of a folder: one per subfolder that is named after a split, else a single one."""
    parts = _find_parts(name, folder)
    found = {part: _find_images(str(path), path) for part, path in parts.items()}
    label = [_number(one, found["train"].classes, parts[part]) for part, one in found.items()]
    files = [file for one in found.values() for file in one.files]
    kept, image, notes = read_files(files, name, wanted, skip_unreadable, LEAVE_OUT, RESIZE)
    notes += [note for one in found.values() for note in one.notes]
    part_of = np.repeat(np.arange(len(found)), [len(one.files) for one in found.values()])[kept]
    label = np.concatenate(label)[kept]
    whole = Split(image, label)
    splits = [whole]
    if len(found) > 1:
        splits = [take(whole, np.flatnonzero(part_of == i), wanted.scratch) for i in range(len(found))]
    for path, split in zip(parts.values(), splits):
        if not len(split.label):
            raise ValueError(f"{path} holds no image that can be read")
    if len(parts) > 1:
        notes.append(f"the splits {', '.join(found)} are the folders {', '.join(path.name for path in parts.values())}")
        notes += _ignored([path for path in sorted(folder.iterdir()) if path not in parts.values()])
    return splits, notes


def _number(found, classes, folder):
    """The labels of the found files, as positions in the training images' classes."""
    if odd := [name for name in found.classes if name not in classes] or (not found.classes and classes):
        raise ValueError(f"the training images and those in {folder} do not have the same classes: {some(odd)}")
    return np.array([label if label < 0 else classes.index(found.classes[label]) for label in found.label], np.int32)


def _find_parts(name, folder):
    """{split: folder}, "train" first: the subfolders named after splits, else the folder itself.

    Without a test folder, the validation folder is the test set.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {name}")
    subfolders = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    parts = {}
    for path in subfolders:
        if part := PARTS.get(path.name.lower()):
            if part in parts:
                raise ValueError(f"{name} has subfolders {parts[part].name} and {path.name}: keep one of them")
            parts[part] = path
    if "train" not in parts or len(parts) == 1:
        return {"train": folder}
    beside, *_ = _sort(folder)
    if others := [*beside, *(path for path in subfolders if path not in parts.values() and _sort(path)[0])]:
        raise ValueError(
            f"{name} has subfolders {some([*parts.values()])}, which are splits, beside {some(others)}: move the one "
            "or the other away"
        )
    if "test" not in parts:
        parts["test"] = parts.pop("validation")
    return {part: parts[part] for part in ("train", "test", "validation") if part in parts}


def _find_images(name, folder):
    """Find the image files in a folder, or in its subfolders, one per class."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {name}")
    beside, subfolders, ignored = _sort(folder)
    found = Found([*beside], [-1] * len(beside), [], [])
    empty, deeper = [], []
    for path in subfolders:
        own, below, others = _sort(path)
        if own and beside:
            raise ValueError(
                f"{name} holds images both beside its subfolders ({beside[0].name}) and in them: "
                "put all of them in subfolders, or none"
            )
        deeper, ignored = deeper + below, ignored + others
        if own:
            found.files.extend(own)
            found.label.extend([len(found.classes)] * len(own))
            found.classes.append(path.name)
        elif not below:
            empty.append(path)
    if not found.files:
        raise ValueError(f"{name} holds no {KINDS} files, neither directly nor in one subfolder per class")
    found.notes.extend(_ignored(ignored))
    if empty:
        found.notes.append(f"folders without images left out: {len(empty)} ({some(empty)})")
    if deeper:
        found.notes.append(f"folders inside subfolders left out: {len(deeper)} ({some(deeper)})")
    return found


def _sort(folder):
    """A folder's image files, its subfolders, and everything else, including hidden files and folders."""
    images, subfolders, others = [], [], []
    for path in sorted(folder.iterdir()):
        if path.name[0] == ".":
            others.append(path)
        elif path.is_dir():
            subfolders.append(path)
        else:
            (images if path.suffix.lower() in SUFFIXES + UNREADABLE else others).append(path)
    return images, subfolders, others


def _ignored(paths):
    return [f"{len(paths)} skipped, hidden or not images ({some(paths)})"] if paths else []
