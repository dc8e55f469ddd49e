"""A user's own images: an .npz, or a folder of PNG and JPEG files."""

import math
import warnings
import zipfile

import numpy as np
from jaxtyping import Int, UInt8

from vae_jax.batch import Split
from vae_jax.run.files import local_path
from vae_jax.run.memory import check_memory

SPLIT_SEED = 0  # a split belongs to the data set and is the same for every run's seed
TEST_SHARE = 0.2  # of images that come without a test set
LARGEST_LABEL = 65_535
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
IMAGE_FORMATS = ("PNG", "JPEG")  # for some others Pillow starts external programs


def take(split: Split, positions: Int[np.ndarray, " n"]) -> Split:
    """The examples of a split at these positions."""
    return Split(split.image[positions], split.label[positions])


def split_off_test(image: UInt8[np.ndarray, "n h w c"], label: Int[np.ndarray, " n"]) -> tuple[Split, Split]:
    """Training and test split, stratified by label, or random where labels are missing or too rare for that."""
    from sklearn.model_selection import train_test_split

    size = math.ceil(TEST_SHARE * len(label))
    if not 0 < size < len(label):
        raise ValueError(f"{len(label)} images are too few to split off a fifth for testing: give at least 2")
    _, counts = np.unique(label, return_counts=True)
    stratify = label if counts.min() >= 2 and len(counts) <= min(size, len(label) - size) else None
    positions = np.arange(len(label))
    parts = train_test_split(positions, test_size=size, stratify=stratify, random_state=SPLIT_SEED)
    train, test = (take(Split(image, label), np.sort(part)) for part in parts)
    return train, test


def check_size(what: str, nbytes: int) -> None:
    """Raise ValueError if memory cannot hold three copies: as read, as split, and on the device."""
    way_out = "data sets are held in memory, so take fewer or smaller images"
    check_memory(f"three copies of {what}", 3 * nbytes, way_out)


def load_own(name: str, manual_dir: str) -> tuple[Split, Split]:
    """Training and test split of a user's own images. Raises ValueError, in one line, if they cannot be read."""
    _, train, test = _read(name)
    if test is None:
        return split_off_test(*train)
    if test.image.shape[1:] != train.image.shape[1:]:
        raise ValueError(
            f"test_image in {name} has images of {test.image.shape[1:]}, but image has {train.image.shape[1:]}"
        )
    return train, test


def read_images(path: str) -> tuple[list[str], UInt8[np.ndarray, "n h w channel"]]:
    """All images that `load_own` would read, except test images, and a name for each: its position, or its file."""
    names, split, _ = _read(path)
    return names, split.image


def _read(name):
    """Names and Split of the images in an .npz or a folder, and the Split of its test images or None."""
    path = local_path(name)
    if name.lower().endswith(".npz"):
        arrays = _read_npz(name, path)
        split = _make_split(arrays, "", name)
        test = _make_split(arrays, "test_", name) if "test_image" in arrays else None
        return [str(i) for i in range(len(split.label))], split, test
    files, label = _find_images(name, path)
    names = [str(file.relative_to(path)) for file in files]
    return names, Split(_stack_images(name, files), label), None


def _read_npz(name, path):
    if not path.is_file():
        raise ValueError(f"there is no file {name}")
    try:
        with zipfile.ZipFile(path) as archive:
            check_size(name, sum(info.file_size for info in archive.infolist()))
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: np.asarray(archive[key]) for key in archive.files}
    except Exception as error:  # damage raises anything from zlib.error to TokenError
        raise ValueError(f"cannot read {name}: {error}") from error
    unknown = arrays.keys() - {"image", "label", "test_image", "test_label"}
    stray = "test_label" in arrays and "test_image" not in arrays
    if unknown or stray or "image" not in arrays:
        raise ValueError(
            f"{name} holds {', '.join(map(repr, arrays))}, but must hold image, and may hold label, or test_image and test_label"
        )
    return arrays


def _make_split(arrays, prefix, name):
    image = arrays[prefix + "image"]
    where = f"{prefix}image in {name}"
    if image.ndim not in (3, 4) or 0 in image.shape or image.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"{where} has shape {image.shape}, but must be [n, height, width] with 1 or 3 channels")
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating) or not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"{where} is {image.dtype}, but must be uint8, or float in [0, 1]")
        image = np.round(image * 255).astype(np.uint8)
    count = len(image)
    label = arrays.get(prefix + "label", np.full(count, -1))
    fits = label.shape == (count,) and np.issubdtype(label.dtype, np.integer)
    if not fits or label.min() < -1 or label.max() > LARGEST_LABEL:
        raise ValueError(
            f"{prefix}label in {name} must be {count} whole numbers from 0 to {LARGEST_LABEL}, or -1 where there is no label"
        )
    return Split(image.reshape(*image.shape[:3], -1), label.astype(np.int32))


def _find_images(name, folder):
    """The image files in a folder or in its subfolders, one subfolder a class, and their labels, -1 without subfolders."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {name}")
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if {"train", "test"} <= {path.name.lower() for path in subfolders}:
        raise ValueError(
            f"{name} has subfolders train and test, but subfolders are classes: name one of them, or give an .npz with test_image"
        )
    classes = [files for path in subfolders if (files := _image_files(path))]
    files = _image_files(folder)
    if files and classes:
        raise ValueError(
            f"{name} holds images both beside its subfolders ({files[0].name}) and in them: give each a subfolder, or none"
        )
    labelled = [(file, -1) for file in files] + [(file, i) for i, own in enumerate(classes) for file in own]
    if not labelled:
        raise ValueError(f"{name} holds no PNG or JPEG files, neither itself nor in one subfolder a class")
    files, label = zip(*labelled)
    return files, np.array(label, np.int32)


def _image_files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")


def _stack_images(name, files):
    first = _read_image(files[0])
    check_size(name, len(files) * first.size)
    image = np.empty((len(files), *first.shape), np.uint8)
    for i, path in enumerate(files):
        pixels = _read_image(path)
        if pixels.shape != first.shape:
            raise ValueError(
                f"{path} is {_describe(pixels)}, but {files[0]} is {_describe(first)}: bring all images to one size and colour"
            )
        image[i] = pixels
    return image


def _describe(pixels):
    return f"{pixels.shape[1]}x{pixels.shape[0]} {'grey' if pixels.shape[2] == 1 else 'colour'}"


def _read_image(path):
    from PIL import Image, ImageOps

    if not path.is_file():  # reading a pipe would block
        raise ValueError(f"cannot read the image {path}: it is no file")
    try:
        with warnings.catch_warnings():
            # Pillow's limit, against images that are small only while compressed.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=IMAGE_FORMATS)
        with image:
            mode = image.mode
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray(upright.convert("L" if mode in ("1", "L", "LA") else "RGB"))
    except Exception as error:  # damage raises anything from OSError to SyntaxError
        raise ValueError(f"cannot read the image {path}: {error}") from error
    if mode[0] in "IF":
        raise ValueError(f"the image {path} has more than 8 bits a channel: convert it to 8")
    return pixels.reshape(*pixels.shape[:2], -1)
