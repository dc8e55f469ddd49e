"""Files of a small data set that TensorFlow Datasets takes for those of the MNIST family."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


def idx(array: np.ndarray) -> bytes:
    """An idx file of unsigned bytes."""
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write(folder: Path, train: int, test: int) -> None:
    """Write the four files with so many white images, labelled 0, 1, 2, ..."""
    for part, count in [("train", train), ("t10k", test)]:
        for kind, array in [
            ("images-idx3", np.ones((count, 28, 28), np.uint8)),
            ("labels-idx1", np.arange(count, dtype=np.uint8) % 10),
        ]:
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))


def url_infos(folder: Path) -> dict:
    """What TensorFlow Datasets records of the files in a folder, as if they came from this machine's port 9."""
    infos = {}
    for path in folder.glob("*.gz"):
        content = path.read_bytes()
        info = tfds.core.download.checksums.UrlInfo(len(content), hashlib.sha256(content).hexdigest(), path.name)
        infos[f"http://127.0.0.1:9/{path.name}"] = info
    return infos
