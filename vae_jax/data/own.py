"""A person's own images: an .npz, or a folder of PNG and JPEG files."""

import math
import warnings
import zipfile

import numpy as np
from jaxtyping import UInt8

from vae_jax.batch import Split
from vae_jax.run.files import local_path
from vae_jax.run.memory import check_memory

SPLIT_SEED = 0  # splits are part of a data set: the same whatever a run's seed
TEST_SHARE = 0.2  # of images that come without a test set
LARGEST_LABEL = 65_535
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
IMAGE_FORMATS = ("PNG", "JPEG")  # for others Pillow would start other programs


def _take(split, positions):
    return Split(split.image[positions], split.label[positions])


def _split_off_test(image, label):
    """Split stratified and seeded; at random where labels are missing or too rare to stratify."""
    from sklearn.model_selection import train_test_split

    size = math.ceil(TEST_SHARE * len(label))
    if not 0 < size < len(label):
        raise ValueError(f"{len(label)} images are too few to split off a fifth for testing: give at least 2")
    _, counts = np.unique(label, return_counts=True)
    fits = counts.min() >= 2 and len(counts) <= min(size, len(label) - size)
    stratify = label if fits else None
    positions = np.arange(len(label))
    train, test = train_test_split(positions, test_size=size, stratify=stratify, random_state=SPLIT_SEED)
    split = Split(image, label)
    return _take(split, np.sort(train)), _take(split, np.sort(test))


def _check_size(name, nbytes):
    """Refuse what memory cannot hold three times: as read, as split, and on the device."""
    way_out = "data sets are held in memory, so take fewer or smaller images"
    check_memory(f"three copies of {name}", 3 * nbytes, way_out)


def read_images(path: str) -> tuple[list[str], UInt8[np.ndarray, "n h w channel"]]:
    """All images of an .npz or a folder as `load` takes them, and a name for each: its position, or its file.

    Raises ValueError, in one line, for whatever cannot be read.
    """
    if path.lower().endswith(".npz"):
        image = _read_npz(path)[""].image
        return [str(i) for i in range(len(image))], image
    files, image, _ = _read_folder(path)
    folder = local_path(path)
    return [str(file.relative_to(folder)) for file in files], image


def _npz(name, manual_dir):
    splits = _read_npz(name)
    if "test_" not in splits:
        return _split_off_test(*splits[""])
    train, test = splits[""], splits["test_"]
    if test.image.shape[1:] != train.image.shape[1:]:
        raise ValueError(
            f"test_image in {name} has images of {test.image.shape[1:]}, but image has {train.image.shape[1:]}"
        )
    return train, test


def _read_npz(name):
    """{prefix: Split}, the prefixes being "" and, where there is one, "test_"."""
    path = local_path(name)
    if not path.is_file():
        raise ValueError(f"there is no file {name}")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_size(name, sum(info.file_size for info in archive.infolist()))
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: np.asarray(archive[key]) for key in archive.files}
    except Exception as error:  # damage shows as anything from zlib.error to TokenError
        raise ValueError(f"cannot read {name}: {error}") from error
    unknown = set(arrays) - {"image", "label", "test_image", "test_label"}
    stray = "test_label" in arrays and "test_image" not in arrays
    if unknown or stray or "image" not in arrays:
        raise ValueError(
            f"{name} holds {', '.join(map(repr, arrays))}, but must hold image, and may hold label, or test_image and test_label"
        )

    def split(prefix):
        image = arrays[prefix + "image"]
        if image.ndim not in (3, 4) or 0 in image.shape or image.shape[3:] not in ((), (1,), (3,)):
            raise ValueError(
                f"{prefix}image in {name} has shape {image.shape}, but must be [n, height, width] with 1 or 3 channels"
            )
        if image.dtype != np.uint8:
            if not np.issubdtype(image.dtype, np.floating) or not (image.min() >= 0 and image.max() <= 1):
                raise ValueError(f"{prefix}image in {name} is {image.dtype}, but must be uint8, or float in [0, 1]")
            image = np.round(image * 255).astype(np.uint8)
        label = arrays.get(prefix + "label", np.full(len(image), -1))
        if (
            label.shape != image.shape[:1]
            or not np.issubdtype(label.dtype, np.integer)
            or not (label.min() >= -1 and label.max() <= LARGEST_LABEL)
        ):
            raise ValueError(
                f"{prefix}label in {name} must be {len(image)} whole numbers from 0 to {LARGEST_LABEL}, or -1 where there is no label"
            )
        return Split(image.reshape(*image.shape[:3], -1), label.astype(np.int32))

    prefixes = ("", "test_") if "test_image" in arrays else ("",)
    return {prefix: split(prefix) for prefix in prefixes}


def _folder(name, manual_dir):
    _, image, label = _read_folder(name)
    return _split_off_test(image, label)


def _read_folder(name):
    """Files, images and labels of the images in a folder, or in its subfolders."""
    folder = local_path(name)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {name}")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if {"train", "test"} <= {path.name.lower() for path in classes}:
        raise ValueError(
            f"{name} has subfolders train and test, but subfolders are classes: name one of them, or give an .npz with test_image"
        )
    labelled = [found for path in classes if (found := _image_files(path))]
    files = [(path, -1) for path in _image_files(folder)]
    if files and labelled:
        raise ValueError(
            f"{name} holds images both beside its subfolders ({files[0][0].name}) and in them: give each a subfolder, or none"
        )
    files += [(path, label) for label, found in enumerate(labelled) for path in found]
    if not files:
        raise ValueError(f"{name} holds no PNG or JPEG files, neither itself nor in one subfolder a class")
    first = _read_image(files[0][0])
    _check_size(name, len(files) * first.size)
    image = np.empty((len(files), *first.shape), np.uint8)
    for i, (path, _) in enumerate(files):
        pixels = _read_image(path)
        if pixels.shape != first.shape:
            raise ValueError(
                f"{path} is {_describe(pixels)}, but {files[0][0]} is {_describe(first)}: bring all images to one size and colour"
            )
        image[i] = pixels
    files, label = zip(*files)
    return files, image, np.array(label, np.int32)


def _describe(pixels):
    return f"{pixels.shape[1]}x{pixels.shape[0]} {'grey' if pixels.shape[2] == 1 else 'colour'}"


def _image_files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")


def _read_image(path):
    from PIL import Image, ImageOps

    if not path.is_file():  # a pipe would be waited for
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
    except Exception as error:  # damage shows as anything from OSError to SyntaxError
        raise ValueError(f"cannot read the image {path}: {error}") from error
    if mode[0] in "IF":
        raise ValueError(f"the image {path} has more than 8 bits a channel: convert it to 8")
    return pixels.reshape(*pixels.shape[:2], -1)
