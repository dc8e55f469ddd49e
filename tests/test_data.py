"""Data sets, splits, the order of examples, and bad data of every kind."""

import functools
import gzip
import http.server
import io
import math
import threading
import types

import numpy as np
import pytest
import small_mnist
import tensorflow_datasets as tfds
from PIL import Image

from vae_jax import batch, data
from vae_jax.data import named
from vae_jax.run import memory


def one_line(error):
    """Whether an exception's message is one line."""
    return "\n" not in str(error.value) and str(error.value)


def test_digits():
    digits = data.load("digits")
    train, test = digits.splits["train"], digits.splits["test"]
    assert train.image.shape == (1437, 28, 28, 1) and test.image.shape == (
        360,
        28,
        28,
        1,
    )
    assert train.image.dtype == np.uint8 and train.image.max() == 255
    assert digits.num_classes == 10 and digits.image_shape == (28, 28, 1)
    shares = [np.bincount(split.label) / len(split.label) for split in (train, test)]
    np.testing.assert_allclose(*shares, atol=0.003)  # stratified
    again, _ = named._digits("digits", "")
    np.testing.assert_array_equal(train.image, again.image)  # seeded


def test_mnist(mnist_dir):
    mnist = data.load(name="mnist", manual_dir=mnist_dir)
    train, test = mnist.splits["train"], mnist.splits["test"]
    assert train.image.shape == (60_000, 28, 28, 1) and test.image.shape == (
        10_000,
        28,
        28,
        1,
    )
    assert train.label[:5].tolist() == [5, 0, 4, 1, 9] and test.label[:5].tolist() == [
        7,
        2,
        1,
        0,
        4,
    ]


def test_validation_images_are_taken_out_of_training():
    original = data.load(name="digits").splits["train"]
    parts = data.load(name="digits", validation=137).splits
    assert len(parts["validation"].label) == 137 and len(parts["train"].label) == 1300
    images = np.concatenate([parts["train"].image, parts["validation"].image]).reshape(1437, -1)
    assert sorted(map(bytes, images)) == sorted(map(bytes, original.image))
    with pytest.raises(ValueError, match="data.validation is 1437, but must be from 0 to 1436"):
        data.load(name="digits", validation=1437)


def test_first_of_each_label():
    label = np.array([3, 1, 3, 0, 1])
    assert batch.first_of_each_label(label).tolist() == [3, 1, 0]
    assert batch.first_of_each_label(np.full(12, -1)).tolist() == list(range(10))
    assert batch.first_of_each_label(np.array([-1, 2, -1, 0, 2])).tolist() == [3, 1]


def test_order_is_a_function_of_seed_and_epoch():
    order = data.epoch_order(3, 1, np.zeros(100, np.int32), shuffle=True)
    np.testing.assert_array_equal(order, data.epoch_order(3, 1, np.zeros(100, np.int32), shuffle=True))
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    for seed, epoch in [(3, 2), (4, 1)]:
        assert (order != data.epoch_order(seed, epoch, np.zeros(100, np.int32), shuffle=True)).any()
    np.testing.assert_array_equal(data.epoch_order(3, 1, np.zeros(100, np.int32), shuffle=False), np.arange(100))


def test_read_idx():
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(named.read_idx(io.BytesIO(small_mnist.idx(array))), array)


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """A folder with four small files that TFDS takes for those of fashion_mnist."""
    small_mnist.write(tmp_path, train=6, test=3)
    infos = small_mnist.url_infos(tmp_path)
    monkeypatch.setattr(tfds.builder_cls("fashion_mnist"), "url_infos", infos)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def test_mnist_family_from_manual_dir(tiny_mnist):
    splits = data.load(name="fashion_mnist", manual_dir=str(tiny_mnist)).splits
    assert splits["train"].image.shape == (6, 28, 28, 1) and splits["test"].label.tolist() == [0, 1, 2]


def test_missing_file_and_wrong_checksum(tiny_mnist):
    path = tiny_mnist / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz has SHA-256") as error:
        data.load(name="fashion_mnist", manual_dir=str(tiny_mnist))
    assert one_line(error)
    path.unlink()
    with pytest.raises(ValueError, match="lacks t10k-labels-idx1-ubyte.gz"):
        data.load(name="fashion_mnist", manual_dir=str(tiny_mnist))


def test_no_network(tiny_mnist, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_mnist / "home"))
    with pytest.raises(OSError, match="cannot download fashion_mnist .*manual_dir.*:digits") as error:
        data.load(name="fashion_mnist")
    assert one_line(error)


def test_a_cache_is_never_relative_to_the_working_directory(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    with pytest.raises(OSError, match="here/vae_jax cannot hold .*: set XDG_CACHE_HOME to an absolute path"):
        data.load(name="fashion_mnist")


@pytest.fixture
def served_mnist(tiny_mnist, monkeypatch):
    """The same files, served on loopback and not downloaded yet."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=str(tiny_mnist))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    builder = tfds.builder_cls("fashion_mnist")
    address = f":{server.server_address[1]}/"
    infos = {url.replace(":9/", address): i for url, i in builder.url_infos.items()}
    monkeypatch.setattr(builder, "url_infos", infos)
    monkeypatch.setenv("HOME", str(tiny_mnist / "home"))
    yield server
    server.shutdown()
    server.server_close()


def test_download_is_checked_and_kept(served_mnist):
    first = data.load(name="fashion_mnist").splits["train"]
    assert first.image.shape == (6, 28, 28, 1)
    served_mnist.shutdown()  # the second load needs no server
    served_mnist.server_close()
    again = data.load(name="fashion_mnist").splits["train"]
    np.testing.assert_array_equal(first.image, again.image)


def test_a_download_with_a_wrong_checksum_is_refused_in_one_line(served_mnist, tiny_mnist):
    (tiny_mnist / "t10k-labels-idx1-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(OSError, match="downloading fashion_mnist failed") as error:
        data.load(name="fashion_mnist")
    assert one_line(error)


def test_a_silent_network_is_given_up_in_time(tiny_mnist, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_mnist / "home"))
    monkeypatch.setattr(named, "NETWORK_TIMEOUT", 0.01)
    answered = threading.Event()

    def silent(request, timeout):
        answered.wait()
        raise OSError

    monkeypatch.setattr(named.urllib.request, "urlopen", silent)
    with pytest.raises(OSError, match="no answer in 0.01 s"):
        data.load(name="fashion_mnist")
    answered.set()


@pytest.fixture
def prepared_cifar10(monkeypatch):
    """A prepared CIFAR-10, with 7 random images in each split."""
    pytest.importorskip("array_record")
    splits = {name: types.SimpleNamespace(num_examples=7) for name in ("train", "test")}
    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", splits)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "is_prepared", lambda self: True)
    with tfds.testing.mock_data(num_examples=7):
        yield splits


def test_other_tfds_data_sets(prepared_cifar10):
    dataset = data.load(name="cifar10")
    assert dataset.splits["train"].image.shape == dataset.splits["test"].image.shape == (7, 32, 32, 3)
    assert dataset.splits["train"].image.any() and 0 <= dataset.splits["train"].label.min()


def test_incomplete_tfds_data_set_is_refused(prepared_cifar10):
    prepared_cifar10["train"].num_examples = 60_000
    with pytest.raises(ValueError, match="cifar10 has 7 of its 60000 train images"):
        data.load(name="cifar10")


def test_tfds_data_set_without_one_image_size(prepared_cifar10):
    with pytest.raises(ValueError, match="imagenette is not an image classification data set"):
        data.load(name="imagenette")


@pytest.mark.parametrize(
    "name,near",
    [("mnits", "mnist"), ("cifar1", "cifar10"), ("fashion-mnist", "fashion_mnist")],
)
def test_unknown_data_set_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown data set '{name}': did you mean '{near}'") as error:
        data.load(name=name)
    assert one_line(error)


@pytest.mark.parametrize("name", ["huggingface:mnist", "mnist/a=b"])
def test_a_name_that_only_its_library_understands_is_unknown(name):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'") as error:
        data.load(name=name)
    assert one_line(error)


def test_an_error_of_many_lines_is_reported_in_one(monkeypatch):
    def fail(*arguments):
        raise AssertionError("no folder /x.\n\nPlease get the file.\n")

    monkeypatch.setattr(named, "_check_network", lambda *names: None)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(OSError, match="no folder /x. Please get the file.$") as error:
        data.load(name="cifar100")
    assert one_line(error)


def test_manual_dir_of_another_data_set(tmp_path):
    with pytest.raises(ValueError, match="only mnist, fashion_mnist, kmnist are read from there"):
        data.load(name="digits", manual_dir=str(tmp_path))


def save_images(folder, classes, size=(12, 8), mode="L", count=5):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name / f"{i}.png")


def test_folder_with_a_subfolder_per_class(tmp_path):
    save_images(tmp_path, ["cats", "dogs"])
    dataset = data.load(name=str(tmp_path))
    (tmp_path / "__MACOSX").mkdir()  # without images it is no class
    assert data.load(name=str(tmp_path)).num_classes == 2
    assert dataset.num_classes == 2 and dataset.image_shape == (8, 12, 1)
    assert len(dataset.splits["train"].label) == 8 and sorted(dataset.splits["test"].label) == [0, 1]
    train = dataset.splits["train"]
    stored = np.asarray(Image.open(tmp_path / "cats" / "0.png"))
    assert any((image[..., 0] == stored).all() for image in np.concatenate([train.image, dataset.splits["test"].image]))


def test_folder_without_classes_in_colour(tmp_path):
    save_images(tmp_path, ["."], mode="RGB")
    dataset = data.load(name=f"{tmp_path}/")
    assert dataset.num_classes == 0 and dataset.image_shape == (8, 12, 3)
    assert set(dataset.splits["train"].label) == {-1}


def test_bad_folders(tmp_path):
    for missing in (str(tmp_path / "nowhere"), "~nobody-has-this-name/photos"):
        with pytest.raises(ValueError, match="there is no folder"):
            data.load(name=missing)
    with pytest.raises(ValueError, match="holds no PNG, JPEG, WEBP, BMP or GIF files"):
        data.load(name=str(tmp_path))
    save_images(tmp_path, ["a"])
    save_images(tmp_path, ["b"], size=(9, 9))
    with pytest.raises(ValueError, match=r"b/0.png is 9x9, but .*a/0.png is 12x8: .*data.size=64") as error:
        data.load(name=str(tmp_path))
    assert one_line(error)
    save_images(tmp_path, ["b"])
    (tmp_path / "b" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*b/3.png") as error:
        data.load(name=str(tmp_path))
    assert one_line(error)


def test_folders_that_would_lose_images_are_refused(tmp_path):
    save_images(tmp_path, [".", ".thumbnails"])
    assert len(data.load(name=str(tmp_path)).splits["train"].label) == 4  # of 5
    save_images(tmp_path, ["a"])
    with pytest.raises(ValueError, match="both beside its subfolders .0.png. and in them"):
        data.load(name=str(tmp_path))


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png: it has more than 8 bits a channel"):
        data.load(name=str(tmp_path))


def test_npz(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", image=rng.random((10, 4, 4)), label=np.arange(10) % 2)
    dataset = data.load(name=str(tmp_path / "own.npz"))
    assert dataset.image_shape == (4, 4, 1) and len(dataset.splits["test"].label) == 2
    image = rng.integers(0, 256, (10, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "own.npz", image=image, test_image=image[:3])
    dataset = data.load(name=str(tmp_path / "own.npz"))
    np.testing.assert_array_equal(dataset.splits["test"].image, image[:3])
    assert dataset.num_classes == 0


IMAGE = np.zeros((4, 2, 2), np.uint8)


@pytest.mark.parametrize(
    "arrays,message",
    [
        ({"images": IMAGE}, "holds 'images', but must hold image"),
        ({"image": IMAGE[0]}, r"has shape \(2, 2\)"),
        ({"image": IMAGE.astype(np.int64)}, "is int64, but must be uint8"),
        (
            {"image": IMAGE + 1.5},
            r"is float64, but must be uint8, or float in \[0, 1\]",
        ),
        ({"image": IMAGE * np.nan}, "is float64"),
        ({"image": IMAGE, "label": np.zeros(3, int)}, "must be 4 whole numbers"),
        ({"image": IMAGE, "label": np.full(4, -2)}, "must be 4 whole numbers"),
        ({"image": IMAGE, "label": np.zeros(4)}, "must be 4 whole numbers"),
        (
            {"image": IMAGE, "test_image": np.zeros((4, 3, 2), np.uint8)},
            "test_image .* has images of",
        ),
        (
            {"image": np.array([None, 1], dtype=object)},
            "cannot read .*own.npz: .*allow_pickle",
        ),
        ({"image": IMAGE, "label": np.full(4, 2**33)}, "must be 4 whole numbers"),
        (
            {"image": IMAGE, "test_label": np.zeros(4, int)},
            "holds 'image', 'test_label', but",
        ),
        ({"image": np.uint8(3)}, r"has shape \(\)"),
        ({"image": IMAGE[:1]}, "too few"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        data.load(name=str(tmp_path / "own.npz"))
    assert one_line(error)


def test_unreadable_npz(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        data.load(name=str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_bytes(b"no zip file")
    with pytest.raises(ValueError, match="cannot read .*text.npz"):
        data.load(name=str(tmp_path / "text.npz"))


@pytest.mark.parametrize("limit,room", [("max", math.inf), ("1000", 1000 - 700 + 300), ("500", 100)])
def test_the_memory_limit_of_a_container_counts(tmp_path, monkeypatch, limit, room):
    """Also one of a group above the process's own."""
    (tmp_path / "job" / "task").mkdir(parents=True)
    for name, text in {"max": limit, "current": "700", "stat": "anon 400\ninactive_file 300"}.items():
        (tmp_path / "job" / f"memory.{name}").write_text(f"{text}\n")
    (tmp_path / "own").write_text("1:cpu:/\n0::/job/task\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.cgroup_room() == room
    assert memory.available()[0] <= room
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    assert memory.cgroup_room() == math.inf


def test_what_is_not_kept_on_disk_is_refused_with_its_size_if_memory_cannot_hold_it(tmp_path, monkeypatch):
    """Images for a mode, and a data set that is scaled; test_feed.py has those that are kept."""
    save_images(tmp_path, ["a"])
    free = types.SimpleNamespace(available=1000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)
    message = r"need 0\.1 GiB of memory, but this machine has 0\.1 GiB free"
    with pytest.raises(ValueError, match=message):
        data.read_images(str(tmp_path), data.Preparation())
    with pytest.raises(ValueError, match=message):
        data.load(name="digits", size=32)
