"""Named data sets and a person's own images -> uint8 arrays in memory; splits; the order of the examples."""

import difflib
import gzip
import hashlib
import http.client
import io
import math
import os
import queue
import threading
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from jaxtyping import Int, UInt8

SPLIT_SEED = 0  # splits are part of a data set: the same whatever a run's seed
TEST_SHARE = 0.2  # of images that come without a test set
LARGEST_LABEL = 65_535
LARGEST_RANK = 4
NETWORK_TIMEOUT = 8  # seconds
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
IMAGE_FORMATS = ("PNG", "JPEG")  # for others Pillow would start other programs


class Split(NamedTuple):
    image: UInt8[np.ndarray, "n height width channel"]
    label: Int[np.ndarray, " n"]  # int32, -1 = unlabelled


class Dataset(NamedTuple):
    """A data set in memory. `splits` has "train", "test" and, where images are held out, "validation"."""

    splits: dict[str, Split]
    num_classes: int  # 0 = unlabelled
    shuffle: bool

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.splits["train"].image.shape[1:]


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
        raise ValueError(
            f"data.manual_dir is {manual_dir!r}, but only {', '.join(MNIST_FAMILY)} are read from there"
        )
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


def epoch_order(
    seed: int, epoch: int, size: int, shuffle: bool
) -> Int[np.ndarray, " size"]:
    """The order of the `size` training examples in an epoch: a pure function of (seed, epoch)."""
    if not shuffle:
        return np.arange(size, dtype=np.int32)
    return np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)


def local_path(path: str) -> Path:
    """A path on this machine, with ~ and ~user for homes; `Path.expanduser` fails where there is no such user."""
    return Path(os.path.expanduser(path))


def reason(error: Exception) -> str:
    """The kind of an error and what it says, in one short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def first_of_each_label(label: Int[np.ndarray, " n"]) -> Int[np.ndarray, " shown"]:
    """Positions of the first example of each label, at most ten; where all are unlabelled, of the first ten."""
    if label.max() < 0:
        return np.arange(min(10, len(label)))
    return np.unique(label, return_index=True)[1][:10]


def _take(split, positions):
    return Split(split.image[positions], split.label[positions])


def _split_off_test(image, label):
    """Split stratified and seeded; at random where labels are missing or too rare to stratify."""
    from sklearn.model_selection import train_test_split

    size = math.ceil(TEST_SHARE * len(label))
    if not 0 < size < len(label):
        raise ValueError(
            f"{len(label)} images are too few to split off a fifth for testing: give at least 2"
        )
    _, counts = np.unique(label, return_counts=True)
    fits = counts.min() >= 2 and len(counts) <= min(size, len(label) - size)
    stratify = label if fits else None
    positions = np.arange(len(label))
    train, test = train_test_split(
        positions, test_size=size, stratify=stratify, random_state=SPLIT_SEED
    )
    split = Split(image, label)
    return _take(split, np.sort(train)), _take(split, np.sort(test))


def _check_size(name, nbytes):
    """Refuse what memory cannot hold three times: as read, as split, and on the device."""
    free = psutil.virtual_memory().available
    if 3 * nbytes > free:
        raise ValueError(
            f"{name} takes {nbytes / 2**30:.1f} GiB, and loading it three times that, but {free / 2**30:.1f} GiB are free: "
            "data sets are held in memory, so take fewer or smaller images"
        )


def _digits(name, manual_dir):
    """scikit-learn's 1,797 digits of 8x8 in 0..16, enlarged to 24x24 and centred in 28x28."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    large = [
        Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC)
        for image in small
    ]
    image = np.pad(
        np.stack([np.asarray(image) for image in large]), ((0, 0), (2, 2), (2, 2))
    )
    return _split_off_test(image[..., None], digits.target.astype(np.int32))


def _mnist_family(name, manual_dir):
    """The four canonical .gz files, checked against the SHA-256 that TensorFlow Datasets records."""
    import tensorflow_datasets as tfds

    url_infos = tfds.builder_cls(name).url_infos
    infos = {info.filename: (url, info) for url, info in url_infos.items()}
    folder = (
        local_path(manual_dir)
        if manual_dir
        else Path.home() / ".cache" / "vae_jax" / "data" / name
    )
    missing = [filename for filename in infos if not (folder / filename).is_file()]
    if missing and manual_dir:
        raise ValueError(
            f"data.manual_dir {manual_dir} lacks {', '.join(missing)}: put the four original files of {name} there"
        )
    if missing:
        _check_network(name, infos[missing[0]][0])
        urls = {filename: infos[filename][0] for filename in missing}
        manager = tfds.download.DownloadManager(
            download_dir=folder,
            url_infos=url_infos,
            dataset_name=name,
            force_checksums_validation=True,
        )
        try:
            paths = manager.download(urls)
        except Exception as error:  # TFDS passes on what its layers raise
            raise OSError(
                f"downloading {name} failed ({type(error).__name__}): {_way_out(name)}"
            ) from error
        for filename, path in paths.items():
            os.replace(path, folder / filename)

    def read(filename):
        path, info = folder / filename, infos[filename][1]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != info.checksum:
            raise ValueError(
                f"{path} has SHA-256 {digest[:12]}..., but {name} has {info.checksum[:12]}...: replace or remove it"
            )
        with gzip.open(path) as file:
            return read_idx(file)

    return tuple(
        Split(
            read(f"{part}-images-idx3-ubyte.gz")[..., None],
            read(f"{part}-labels-idx1-ubyte.gz").astype(np.int32),
        )
        for part in ("train", "t10k")
    )


def read_idx(file: io.BufferedIOBase) -> UInt8[np.ndarray, "..."]:
    """The array in an idx file of unsigned bytes: magic 0 0 8 rank, big-endian sizes, then the values.

    Reads one byte more than the sizes say at most, so that no compressed file takes more memory than it declares.
    Raises ValueError for sizes that memory cannot hold, and for whatever is no idx file.
    """
    try:
        magic = file.read(4)
        rank = magic[3] if len(magic) == 4 and magic[:3] == b"\0\0\x08" else 0
        sizes = np.frombuffer(file.read(4 * rank), ">u4").astype(int)
        count = math.prod(sizes.tolist())
        if 1 <= rank == len(sizes) <= LARGEST_RANK:
            _check_size("an idx file", count)
            values = file.read(count + 1)
            if len(values) == count:
                return np.frombuffer(values, np.uint8).reshape(sizes)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"not an idx file of unsigned bytes: {error}") from error
    raise ValueError("not an idx file of unsigned bytes: wrong magic number or length")


def _check_network(name, url):
    """Fail in seconds where TFDS would retry for minutes, and where a name server is silent."""
    answer = queue.SimpleQueue()

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT).close()
            answer.put(None)
        except urllib.error.HTTPError:
            answer.put(None)  # a host that refuses this request is there
        except (OSError, http.client.HTTPException) as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answer.get(timeout=NETWORK_TIMEOUT)
    except queue.Empty:
        error = TimeoutError(f"no answer in {NETWORK_TIMEOUT} s")
    if error is not None:
        raise OSError(
            f"cannot download {name} ({getattr(error, 'reason', error)}): {_way_out(name)}"
        ) from error


def _way_out(name):
    if name in MNIST_FAMILY:
        files = "put its four original files into a folder and give --config.data.manual_dir"
    else:
        files = "prepare it where there is a network"
    return f"{files}, or train on the bundled digits, --config=configs/vae.py:digits"


def _tfds(name, manual_dir):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, file_format="array_record")
    except (ValueError, AssertionError):  # an unknown name, or version
        near = difflib.get_close_matches(
            name, [*DATASETS, *tfds.list_builders(with_community_datasets=False)], n=1
        )
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown data set {name!r}: {hint}Give {', '.join(DATASETS)}, a name of TensorFlow Datasets, or the path of an .npz file or, with a slash in it, of a folder"
        ) from None
    features, keys = builder.info.features, builder.info.supervised_keys
    if (
        not keys
        or not hasattr(features[keys[1]], "num_classes")
        or features[keys[0]].np_dtype != np.uint8
        or len(features[keys[0]].shape) != 3
        or None in features[keys[0]].shape
    ):
        raise ValueError(
            f"{name} is not an image classification data set with images of one size"
        )
    (image_key, label_key), shape = keys, features[keys[0]].shape
    if not builder.is_prepared():
        _check_network(
            name, next(iter(builder.url_infos), "https://www.tensorflow.org")
        )
        try:
            builder.download_and_prepare()
        except ImportError as error:
            raise ValueError(
                f"preparing {name} needs {error.name}: pip install -e '.[tfds]'"
            ) from error
        except Exception as error:  # TFDS passes on what its layers raise
            told = " ".join(str(error).split())
            raise OSError(f"preparing {name} failed: {told}") from error
    splits = builder.info.splits
    # Some have labels on their validation images only.
    test = next((part for part in ("test", "validation") if part in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(
            f"{name} has the splits {', '.join(splits)}, but train and test are needed"
        )

    def read(part):
        count = splits[part].num_examples
        _check_size(name, count * math.prod(shape))
        image, label = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
        source = builder.as_data_source(part)
        if len(source) != count:
            raise ValueError(
                f"{name} has {len(source)} of its {count} {part} images on disk: remove {builder.data_path} to prepare it again"
            )
        for i, example in enumerate(source):
            image[i], label[i] = example[image_key], example[label_key]
        return Split(image, label)

    return read("train"), read(test)


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
        if (
            image.ndim not in (3, 4)
            or 0 in image.shape
            or image.shape[3:] not in ((), (1,), (3,))
        ):
            raise ValueError(
                f"{prefix}image in {name} has shape {image.shape}, but must be [n, height, width] with 1 or 3 channels"
            )
        if image.dtype != np.uint8:
            if not np.issubdtype(image.dtype, np.floating) or not (
                image.min() >= 0 and image.max() <= 1
            ):
                raise ValueError(
                    f"{prefix}image in {name} is {image.dtype}, but must be uint8, or float in [0, 1]"
                )
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
    classes = sorted(
        path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."
    )
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
        raise ValueError(
            f"{name} holds no PNG or JPEG files, neither itself nor in one subfolder a class"
        )
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
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."
    )


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
            pixels = np.asarray(
                upright.convert("L" if mode in ("1", "L", "LA") else "RGB")
            )
    except Exception as error:  # damage shows as anything from OSError to SyntaxError
        raise ValueError(f"cannot read the image {path}: {error}") from error
    if mode[0] in "IF":
        raise ValueError(
            f"the image {path} has more than 8 bits a channel: convert it to 8"
        )
    return pixels.reshape(*pixels.shape[:2], -1)


MNIST_FAMILY = ("mnist", "fashion_mnist", "kmnist")
DATASETS: dict[str, Callable] = {"digits": _digits} | dict.fromkeys(
    MNIST_FAMILY, _mnist_family
)
