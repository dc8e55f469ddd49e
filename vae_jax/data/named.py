"""Data sets that have a name: the bundled digits, the MNIST family, TensorFlow Datasets."""

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
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vae_jax.batch import Split
from vae_jax.data.own import _check_size, _split_off_test
from vae_jax.run.files import local_path

LARGEST_RANK = 4
NETWORK_TIMEOUT = 8  # seconds


def _digits(name, manual_dir):
    """scikit-learn's 1,797 digits of 8x8 in 0..16, enlarged to 24x24 and centred in 28x28."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC) for image in small]
    image = np.pad(np.stack([np.asarray(image) for image in large]), ((0, 0), (2, 2), (2, 2)))
    return _split_off_test(image[..., None], digits.target.astype(np.int32))


def _mnist_family(name, manual_dir):
    """The four canonical .gz files, checked against the SHA-256 that TensorFlow Datasets records."""
    import tensorflow_datasets as tfds

    url_infos = tfds.builder_cls(name).url_infos
    infos = {info.filename: (url, info) for url, info in url_infos.items()}
    folder = local_path(manual_dir) if manual_dir else Path.home() / ".cache" / "vae_jax" / "data" / name
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
            raise OSError(f"downloading {name} failed ({type(error).__name__}): {_way_out(name)}") from error
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
        raise OSError(f"cannot download {name} ({getattr(error, 'reason', error)}): {_way_out(name)}") from error


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
        near = difflib.get_close_matches(name, [*DATASETS, *tfds.list_builders(with_community_datasets=False)], n=1)
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
        raise ValueError(f"{name} is not an image classification data set with images of one size")
    (image_key, label_key), shape = keys, features[keys[0]].shape
    if not builder.is_prepared():
        _check_network(name, next(iter(builder.url_infos), "https://www.tensorflow.org"))
        try:
            builder.download_and_prepare()
        except ImportError as error:
            raise ValueError(f"preparing {name} needs {error.name}: pip install -e '.[tfds]'") from error
        except Exception as error:  # TFDS passes on what its layers raise
            told = " ".join(str(error).split())
            raise OSError(f"preparing {name} failed: {told}") from error
    splits = builder.info.splits
    # Some have labels on their validation images only.
    test = next((part for part in ("test", "validation") if part in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{name} has the splits {', '.join(splits)}, but train and test are needed")

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


MNIST_FAMILY = ("mnist", "fashion_mnist", "kmnist")
DATASETS: dict[str, Callable] = {"digits": _digits} | dict.fromkeys(MNIST_FAMILY, _mnist_family)
