"""Named data sets: the bundled digits, the MNIST family, TensorFlow Datasets."""

import difflib
import fcntl
import gzip
import hashlib
import http.client
import io
import math
import os
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vae_jax.batch import Split
from vae_jax.data.cache import store
from vae_jax.data.images import check_size
from vae_jax.data.own import split_off_test
from vae_jax.run.files import cache_folder, local_path

NETWORK_TIMEOUT = 8  # seconds


def _digits(name, manual_dir):
    """scikit-learn's 1,797 digits of 8x8 in 0..16, enlarged to 24x24 and centred in 28x28."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC) for image in small]
    image = np.pad(np.stack([np.asarray(image) for image in large]), ((0, 0), (2, 2), (2, 2)))
    return split_off_test(image[..., None], digits.target.astype(np.int32))


def _mnist_family(name, manual_dir):
    """Read the four original .gz files, checked against the SHA-256 that TensorFlow Datasets records."""
    import tensorflow_datasets as tfds

    url_infos = tfds.builder_cls(name).url_infos
    folder = local_path(manual_dir) if manual_dir else cache_folder() / "data" / name

    def missing():
        return {info.filename: url for url, info in url_infos.items() if not (folder / info.filename).is_file()}

    if manual_dir and missing():
        raise ValueError(
            f"data.manual_dir {manual_dir} lacks {', '.join(missing())}: put the four original files of {name} there"
        )
    if missing():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may have downloaded them meanwhile
            if urls := missing():
                _download(name, urls, folder, url_infos)
    checksums = {info.filename: info.checksum for info in url_infos.values()}

    def read(filename):
        path = folder / filename
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != checksums[filename]:
            expected = f"{name} has {checksums[filename][:12]}..."
            raise ValueError(f"{path} has SHA-256 {digest[:12]}..., but {expected}: replace or remove it")
        with gzip.open(path) as file:
            return read_idx(file)

    def read_split(part):
        image, label = read(f"{part}-images-idx3-ubyte.gz"), read(f"{part}-labels-idx1-ubyte.gz")
        return Split(image[..., None], label.astype(np.int32))

    return read_split("train"), read_split("t10k")


def _download(name, urls, folder, url_infos):
    """Download {filename: url} into a folder; TFDS checks their SHA-256."""
    import tensorflow_datasets as tfds

    _check_network(name, next(iter(urls.values())))
    manager = tfds.download.DownloadManager(
        download_dir=folder, url_infos=url_infos, dataset_name=name, force_checksums_validation=True
    )
    try:
        paths = manager.download(urls)
    except Exception as error:  # TFDS passes on whatever its layers raise
        raise OSError(f"downloading {name} failed ({type(error).__name__}): {_way_out(name)}") from error
    for filename, path in paths.items():
        os.replace(path, folder / filename)


def read_idx(file: io.BufferedIOBase) -> UInt8[np.ndarray, "..."]:
    """The array in an idx file of unsigned bytes: magic 0 0 8, rank, big-endian sizes, values.

    Raises ValueError for anything else, and for an array that does not fit into memory.
    """
    try:
        *magic, rank = file.read(4)
        sizes = np.frombuffer(file.read(4 * rank), ">u4", count=rank).tolist()
        check_size("the array", math.prod(sizes))
        values = np.frombuffer(file.read(math.prod(sizes) + 1), np.uint8)  # one byte more, to detect a longer file
        if magic != [0, 0, 8]:
            raise ValueError(f"it begins with {magic}")
        return values.reshape(sizes)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"not an idx file of unsigned bytes: {error}") from error


def _check_network(name, url):
    """Raise OSError within seconds if `url` cannot be reached.

    TFDS would retry for minutes, and no timeout covers a silent name server.
    """
    problems: list[Exception] = [TimeoutError(f"no answer in {NETWORK_TIMEOUT} s")]

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT).close()
            problems.pop()
        except urllib.error.HTTPError:  # the host answers
            problems.pop()
        except (OSError, http.client.HTTPException) as error:
            problems[0] = error

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_TIMEOUT)
    for error in problems:
        raise OSError(f"cannot download {name} ({getattr(error, 'reason', error)}): {_way_out(name)}") from error


def _way_out(name):
    files = "prepare it where there is a network"
    if name in MNIST_FAMILY:
        files = "put its four original files into a folder and give --config.data.manual_dir"
    return f"{files}, or train on the bundled digits, --config=vae:digits"


def find_tfds(name: str) -> Any:
    """Find and prepare an image classification data set of TensorFlow Datasets; returns its builder.

    Raises ValueError for an unknown or unsuitable data set, and OSError if it cannot be prepared.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, file_format="array_record")
    except Exception:  # noqa: BLE001 - an unknown name or version, or a malformed one, raises anything
        near = difflib.get_close_matches(name, [*DATASETS, *tfds.list_builders(with_community_datasets=False)], n=1)
        near = [f"./{name}"] if Path(name).is_dir() else near
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown data set {name!r}: {hint}Give {', '.join(DATASETS)}, a name of TensorFlow Datasets, or the path "
            "of an .npz file or, with a slash in it, of a folder"
        ) from None
    _check_suits(builder)
    if not builder.is_prepared():
        _prepare(builder)
    return builder


def load_tfds(builder: Any, scratch: Path | None = None) -> list[Split]:
    """Load training, test and, if any, validation split from TensorFlow Datasets; `scratch` as in `store`."""
    name, splits = builder.name, builder.info.splits
    # Some have only validation images besides the training images: these become the test set.
    test = next((part for part in ("test", "validation") if part in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{name} has the splits {', '.join(splits)}, but train and test are needed")
    own = ["validation"] if test == "test" and "validation" in splits else []
    return [_read_tfds(builder, part, scratch) for part in ("train", test, *own)]


def _check_suits(builder):
    """Raise ValueError unless the examples are uint8 images of one size, with or without labels."""
    features, (image_key, label_key) = builder.info.features, _keys(builder)
    if image_key in features and (label_key is None or hasattr(features[label_key], "num_classes")):
        image = features[image_key]
        if image.np_dtype == np.uint8 and len(image.shape) == 3 and None not in image.shape:
            return
    raise ValueError(f"{builder.name} is not an image classification data set with images of one size")


def _keys(builder):
    """The feature names of image and label; the label is None if there are only images, as in binarized_mnist."""
    return builder.info.supervised_keys or ("image", None)


def _prepare(builder):
    _check_network(builder.name, next(iter(builder.url_infos), "https://www.tensorflow.org"))
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise ValueError(f"preparing {builder.name} needs {error.name}: pip install -e '.[tfds]'") from error
    except Exception as error:  # TFDS passes on whatever its layers raise
        raise OSError(f"preparing {builder.name} failed: {' '.join(str(error).split())}") from error


def _read_tfds(builder, part, scratch):
    image_key, label_key = _keys(builder)
    shape, count = builder.info.features[image_key].shape, builder.info.splits[part].num_examples
    check_size(builder.name, count * math.prod(shape), scratch)
    source = builder.as_data_source(part)
    if len(source) != count:
        raise ValueError(
            f"{builder.name} has {len(source)} of its {count} {part} images on disk: remove {builder.data_path} to "
            "prepare it again"
        )
    label, is_01 = np.full(count, -1, np.int32), builder.name == "binarized_mnist"

    def rows():
        for i, example in enumerate(source):
            if label_key is not None:
                label[i] = example[label_key]
            pixels = example[image_key]
            yield np.where(pixels > 0, 255, 0) if is_01 else pixels

    return Split(store(rows(), (count, *shape), scratch), label)


MNIST_FAMILY = ("mnist", "fashion_mnist", "kmnist")
DATASETS: dict[str, Callable] = {"digits": _digits} | dict.fromkeys(MNIST_FAMILY, _mnist_family)
