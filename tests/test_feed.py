"""Sets larger than memory: mapped from a file that is checked, sent to the device call by call, and not one bit
different.
"""

import errno
import os
import shutil
import time
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from small_run import assert_same_state, rows_of, run_job, stop_after

from configs import vae
from vae_jax import data
from vae_jax.data import cache
from vae_jax.run import feed, memory, session
from vae_jax.run.devices import Devices
from vae_jax.run.feed import ask_for, make_feed
from vae_jax.steps import make_run_steps

IMAGES = 4000  # of 8x8: 250 KiB


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The path of images of a few colours, so that a network can learn something."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 8, 8), np.uint8)[rng.integers(0, 5, IMAGES)] // 2 + rng.integers(
        0, 99, (IMAGES, 8, 8), np.uint8
    )
    path = tmp_path_factory.mktemp("images") / "own.npz"
    np.savez_compressed(path, image=image, label=rng.integers(0, 5, IMAGES))
    return path


@pytest.fixture
def cap(monkeypatch, tmp_path):
    """`cap(nbytes)` leaves so little memory on host and devices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def cap(nbytes):
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=nbytes))

    return cap


def make_job(path, **changes):
    """One epoch of 50 steps in calls of 7, the last of them of one step, with a tiny network."""
    config = vae.get_config("smoke").to_dict() | {"epochs": 1, "batch_size": 64} | changes
    config["data"]["name"] = str(path)
    config["model"] |= {"network": "mlp", "hidden": (8,), "latent_dim": 2}
    config["optimizer"] |= {"ema_decay": 0.9}
    config["run"] |= {"steps_per_call": 7}
    return session.build(config)._replace(figures=lambda *_: {}), config


def test_a_set_twice_as_large_as_memory_trains_to_the_same_bits(images, tmp_path, cap, capsys):
    """It is mapped on the host and sent to the device; the run is stopped in the middle of the epoch and continued."""
    job, config = make_job(images)
    state, _ = run_job(job, config, tmp_path / "resident")
    assert "they stay on the host" not in capsys.readouterr().err
    cap(IMAGES * 64 // 2)
    job, config = make_job(images)
    assert "own.npz does not fit into memory: its images are decoded into" in capsys.readouterr().err
    image = job.dataset.splits["train"].image
    assert isinstance(image, np.memmap) and image.nbytes == 0.8 * IMAGES * 64
    stopped, _ = run_job(job, config, tmp_path / "streamed", stop_after(3))
    assert int(stopped.step) == 21
    streamed, _ = run_job(*make_job(images), tmp_path / "streamed")
    message = "the training images take 0.1 GiB, and this machine has 0.1 GiB free: they stay on the host, which sends"
    err = capsys.readouterr().err
    assert err.count(message) == 2 and "decoded" not in err
    assert_same_state(streamed, state)
    assert rows_of(tmp_path / "streamed") == rows_of(tmp_path / "resident")


@pytest.mark.slow
@pytest.mark.parametrize("small", ["device", "host"])
def test_a_small_device_or_a_small_host_alone_changes_no_bit(images, tmp_path, cap, monkeypatch, capsys, small):
    """A set in memory is streamed to a small device; one in files stays on a device that is large enough."""
    job, config = make_job(images)
    state, _ = run_job(job, config, tmp_path / "resident")
    if small == "host":
        cap(IMAGES * 64 // 2)
        job, config = make_job(images)
        monkeypatch.undo()
    else:
        monkeypatch.setattr(feed, "stays_on", lambda device, nbytes: False)
        job, config = make_job(images)
    assert isinstance(job.dataset.splits["train"].image, np.memmap) == (small == "host")
    other, _ = run_job(job, config, tmp_path / "other")
    assert ("they stay on the host" in capsys.readouterr().err) == (small == "device")
    assert_same_state(other, state)
    assert rows_of(tmp_path / "other") == rows_of(tmp_path / "resident")


@pytest.mark.parametrize("count,seeds", [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_a_call_sees_the_same_examples_either_way(images, cap, count, seeds):
    """A step that only notes, by index, when it got which image and label; a call begins in the middle of the second
    epoch.
    """
    devices = Devices(count)
    job, _ = make_job(images, seeds=seeds)
    size = len(job.dataset.splits["train"].label)

    def train_step(seen, batch):
        step = seen["step"]
        found = {
            "image": batch.image.sum(axis=(1, 2, 3)),
            "label": batch.label + 1.0,
            "step": jnp.full(batch.label.shape, step),
        }
        added = {name: jnp.zeros(size).at[batch.index].add(values) for name, values in found.items()}
        added = added if devices.axis_name is None else jax.lax.psum(added, devices.axis_name)
        return {"step": step + 1, **{f"{name}s": seen[f"{name}s"] + values for name, values in added.items()}}, {}

    run_steps = make_run_steps(train_step, job.batch_size, job.steps_per_call, devices.count)
    run_steps = devices.compile(job.map_seeds(run_steps, 2))

    def notes():
        lines: list = []
        feed = make_feed(job, devices, lines.append)
        shape = () if seeds == 1 else (seeds,)
        seen = {"step": jnp.ones(shape)} | {name: jnp.zeros((*shape, size)) for name in ("images", "labels", "steps")}
        for call in [(1, 0, 7), (1, 49, 1), (2, 14, 7)]:
            seen, _ = run_steps(seen, *feed(*call))
        return jax.device_get(seen), lines

    resident, lines = notes()
    assert lines == [] and np.all((resident["labels"] > 0).sum(axis=-1) > 13 * 64)
    cap(size * 64)
    streamed, lines = notes()
    assert len(lines) == 1
    jax.tree.map(np.testing.assert_array_equal, streamed, resident)


def test_the_disk_is_asked_for_the_rows_of_a_call(tmp_path, monkeypatch):
    path, asked = tmp_path / "image.npy", []
    np.save(path, IMAGE)
    image = np.load(path, mmap_mode="r")

    def posix_fadvise(file, start, size, advice):
        asked.append(os.pread(file, size, start))

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    ask_for(image, np.array([7, 0, 98]))
    assert asked == [IMAGE[row].tobytes() for row in (7, 0, 98)]
    ask_for(IMAGE, np.array([7]))
    assert len(asked) == 3
    os.unlink(image.filename)  # it stays mapped
    ask_for(image, np.array([7]))
    assert (image[7] == IMAGE[7]).all()


SMALL = 2000  # bytes: what memory holds while these sets are read


def arrays_of(dataset):
    return {(name, kind): array for name, split in dataset.splits.items() for kind, array in split._asdict().items()}


def same_data(dataset, other):
    assert dataset.notes == other.notes and dataset.num_classes == other.num_classes
    found, expected = arrays_of(dataset), arrays_of(other)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])
        assert isinstance(array, np.memmap) == ("image" in name)


def write_files(folder, count=40):
    """Images in two classes, a third of them coloured, the second file damaged."""
    rng = np.random.default_rng(1)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 10) if i % 3 else (9, 10, 3), np.uint8)).save(path)
    (folder / "a" / "02.png").write_bytes((folder / "a" / "02.png").read_bytes()[:60])


SETS = {
    "a folder": (write_files, {"skip_unreadable": True}),
    "scaled, with validation": (write_files, {"skip_unreadable": True, "size": 8, "colour": "grey", "validation": 5}),
    "splits": (lambda path: [write_files(path / "train"), write_files(path / "test", 20)], {"skip_unreadable": True}),
    "bytes": (lambda path: np.savez(path, image=IMAGE, label=np.arange(99) % 3), {}),
    "floats, columns first": (
        lambda path: np.savez_compressed(path, image=np.asfortranarray(IMAGE / 255)),
        {"size": 10},
    ),
    "a test set": (lambda path: np.savez(path, image=IMAGE, test_image=IMAGE[:9]), {"validation": 7}),
}
IMAGE = np.random.default_rng(2).integers(0, 256, (99, 8, 9), np.uint8)


@pytest.mark.parametrize("kind", SETS)
def test_images_in_files_are_those_that_memory_would_hold(tmp_path, cap, kind):
    write, fields = SETS[kind]
    path = tmp_path / ("own.npz" if kind in ("bytes", "floats, columns first", "a test set") else "photos")
    write(path)
    expected = data.load(name=str(path), **fields)
    cap(SMALL)
    same_data(data.load(name=str(path), **fields), expected)
    (folder,) = (path for path in (tmp_path / "cache" / "vae_jax" / "images").iterdir() if path.is_dir())
    assert {path.stem for path in folder.iterdir()} == {"cache", *(f"{a}-{b}" for a, b in arrays_of(expected))}


@pytest.fixture
def kept(tmp_path, cap):
    """A data set in files, its source, and the folder of the files."""
    source = tmp_path / "photos"
    write_files(source)
    (source / "b").rename(tmp_path / "elsewhere")
    (source / "b").symlink_to(tmp_path / "elsewhere")
    cap(SMALL)
    dataset = data.load(name=f"{source}/", skip_unreadable=True)
    (folder,) = (path for path in (tmp_path / "cache" / "vae_jax" / "images").iterdir() if path.is_dir())
    return dataset, source, folder


def flip(path):
    """Change one bit in the middle of a file; its size and time stay."""
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_files_are_written_once_and_again_where_they_or_their_source_have_changed(kept, capsys):
    dataset, source, folder = kept
    written = (folder / "cache.json").stat().st_mtime_ns
    expected = {name: np.array(array) for name, array in arrays_of(dataset).items()}

    def load_again(said):
        nonlocal written
        capsys.readouterr()
        again = data.load(name=f"{source}/", skip_unreadable=True)
        assert said in capsys.readouterr().err if said else not capsys.readouterr().err
        before, written = written, (folder / "cache.json").stat().st_mtime_ns
        assert (before != written) == bool(said)
        return arrays_of(again)

    load_again("")
    for name in ("train-image.npy", "test-label.npy", "cache.json"):
        flip(folder / name)
        for name, array in load_again("photos is damaged in the cache: its images are decoded into").items():
            np.testing.assert_array_equal(array, expected[name])
    other = data.load(name=f"{source}/", skip_unreadable=True, validation=3)  # has files of its own
    assert len(other.splits["validation"].label) == 3
    load_again("")
    shutil.rmtree(next(path for path in folder.parent.iterdir() if path.is_dir() and path != folder))
    Image.fromarray(np.zeros((9, 10), np.uint8)).save(source / "b" / "01.png")
    found = load_again("photos has changed: its images are decoded into")
    assert sum(np.sum(array != expected[name]) for name, array in found.items() if "image" in name) > 200
    (folder.with_name(f"{folder.name}.tmp") / "left").mkdir(parents=True)  # by a process that was killed
    flip(folder / "train-image.npy")
    load_again("is damaged")
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_of_two_that_start_at_once_one_decodes_and_the_other_waits(tmp_path, cap, monkeypatch):
    """Threads stand in for processes, since each opens the lock file by itself."""
    np.savez(tmp_path / "own.npz", image=IMAGE)
    expected = data.load(name=str(tmp_path / "own.npz"))
    written = []

    def write(*arguments, original=cache.write):
        written.append(arguments)
        time.sleep(0.2)
        original(*arguments)

    monkeypatch.setattr(cache, "write", write)
    cap(SMALL)
    with ThreadPoolExecutor(2) as pool:
        for dataset in pool.map(data.load, [str(tmp_path / "own.npz")] * 2):
            same_data(dataset, expected)
    assert len(written) == 1


@pytest.mark.parametrize("problem", ["a full disk", "a disk that fills up", "a folder that is a file", "a bad image"])
def test_files_that_cannot_be_written_are_reported_in_one_line_and_leave_nothing(tmp_path, cap, monkeypatch, problem):
    source, root = tmp_path / "photos", tmp_path / "cache" / "vae_jax" / "images"
    write_files(source)
    cap(SMALL)
    message = (
        "photos, and they cannot be kept in .*: set XDG_CACHE_HOME to another folder, or use fewer or smaller images"
    )
    if problem == "a full disk":
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=9000))
        message = r"photos, and decoding them takes 0\.1 GiB on the disk of .*, which has 0\.1 GiB free: set XDG_CACHE"
    if problem == "a disk that fills up":

        def save(path, array):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(cache.np, "save", save)
    if problem == "a folder that is a file":
        root.parent.mkdir(parents=True)
        root.write_text("")
    if problem == "a bad image":
        message = "cannot read the image .*02.png"
    with pytest.raises((ValueError, OSError), match=message) as error:
        data.load(name=f"{source}/", skip_unreadable=problem != "a bad image")
    assert "\n" not in str(error.value)
    assert root.is_file() or not [path for path in root.iterdir() if path.is_dir()]


def test_data_sets_of_tensorflow_datasets_are_kept_too(tmp_path, cap, monkeypatch):
    pytest.importorskip("array_record")
    splits = {name: types.SimpleNamespace(num_examples=7) for name in ("train", "validation", "test")}
    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", splits)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "is_prepared", lambda self: True)
    with tfds.testing.mock_data(num_examples=7):
        expected = data.load(name="binarized_mnist", size=12)
        cap(SMALL)
        same_data(data.load(name="binarized_mnist", size=12), expected)
    assert (tmp_path / "cache" / "vae_jax" / "images").is_dir()
