"""A user's own images: any size, colour and format; splits; batch size and network that fit; modes; large images."""

import csv
import json
import types
from pathlib import Path

import jax
import numpy as np
import photos
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from small_run import run_job

import vae_jax
from configs import vae
from vae_jax import batch, commands, data, families
from vae_jax.batch import Dataset, Split, mean_image
from vae_jax.commands import examples
from vae_jax.data.images import SMALLEST
from vae_jax.evaluation import baselines
from vae_jax.evaluation.baselines import covariance_eigenvalues, linear_vae_baselines, mean_square_distance
from vae_jax.evaluation.verdict import verdict
from vae_jax.nn.networks import fitting_features
from vae_jax.pretrained import Pretrained
from vae_jax.run import session
from vae_jax.run.config import changes
from vae_jax.run.directory import check_same_config
from vae_jax.run.job import check_data


def load(folder, **fields):
    """The data set, and all its images in the order of their pixels."""
    dataset = data.load(name=f"{folder}/", **fields)
    return dataset, np.concatenate([split.image for split in dataset.splits.values()])


def refused(message, **fields):
    with pytest.raises(ValueError, match=message) as error:
        data.load(**fields)
    assert "\n" not in str(error.value)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def test_photos_of_mixed_sizes_formats_and_marks_become_one_array(tmp_path):
    photos.write(tmp_path)
    dataset, image = load(tmp_path, size=64)
    assert image.shape == (30, 64, 64, 3) and dataset.image_shape == (64, 64, 3)
    assert dataset.notes == ("4 made colour", "30 scaled and cropped to 64x64", "4 turned upright as the camera says")
    grey, image = load(tmp_path, size=16, colour="grey")
    assert image.shape == (30, 16, 16, 1) and "26 made grey" in grey.notes
    refused(
        r"photo001.png is 147x214, but .*photo000.jpg is 107x95: .* which --config.data.size=64 does",
        name=f"{tmp_path}/",
    )
    with pytest.raises(ValueError, match="is 107x95: resize all images to the size that the model takes"):
        data.read_images(str(tmp_path), data.Preparation(0, "grey"))


def test_the_centre_is_kept(tmp_path):
    """An 8x16 image loses four columns on either side; a 16x16 image is averaged."""
    wide = np.arange(128, dtype=np.uint8).reshape(8, 16)
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", np.full((16, 16), 7))
    _, image = load(tmp_path, size=8)
    found = sorted(image[..., 0], key=np.ptp)
    np.testing.assert_array_equal(found[0], 7)
    np.testing.assert_array_equal(found[1], wide[:, 4:12])


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    upright = np.zeros((8, 12), np.uint8)
    upright[:4, :4] = 255  # the bright corner is at the upper left
    exif = Image.Exif()
    exif[photos.ORIENTATION] = 6
    for name in ("a.png", "b.webp", "c.jpg"):
        options = {"lossless": True} if name == "b.webp" else {"quality": 100} if name == "c.jpg" else {}
        save(tmp_path / name, np.rot90(upright), exif=exif, **options)
    dataset, image = load(tmp_path)
    assert dataset.notes == ("3 turned upright as the camera says",)
    assert image.shape[-1] == 1  # WEBP stores grey with three channels
    for one in image:
        np.testing.assert_allclose(one.mean(axis=-1), upright, atol=3)


def test_a_grey_palette_is_grey(tmp_path):
    """As optimisers of PNG files write it."""
    grey = np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1))
    for i in range(10):
        Image.fromarray(grey).convert("P").save(tmp_path / f"{i}.png")
    _, image = load(tmp_path)
    assert image.shape == (10, 8, 8, 1) and (image[..., 0] == grey).all()


def test_a_part_of_a_file_name_fits_into_it(tmp_path):
    name = 60 * "\u624b" + ".png"
    save(tmp_path / name, np.zeros((28, 28)))
    model = Pretrained({"image_shape": [28, 28, 1], "config": {"data": {}}}, {})
    assert len(examples.read_own(model, str(tmp_path / name)).file.encode()) <= examples.LONGEST + 9


def test_every_format_gives_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 10, 3), np.uint8)
    options = {"png": {}, "bmp": {}, "webp": {"lossless": True}}
    for kind, more in options.items():
        save(tmp_path / f"a.{kind}", pixels, **more)
    _, image = load(tmp_path)
    assert len(image) == 3 and (image == pixels).all()


def test_of_an_animation_the_first_frame_is_taken_and_said(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200, 90)]
    for kind in ("gif", "webp"):
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    dataset, image = load(tmp_path)
    assert np.abs(image.astype(int) - 10).max() <= 1
    assert "2 reduced to the first frame" in dataset.notes


def test_transparent_pixels_are_white_and_opaque_ones_stay(tmp_path):
    pixels = np.full((8, 8, 4), 50, np.uint8)
    pixels[:4, :, 3] = 0
    pixels[4:, :, 3] = 255
    save(tmp_path / "a.png", pixels)
    pixels[..., 3] = 255
    save(tmp_path / "b.png", pixels)
    dataset, image = load(tmp_path)
    dark, mixed = sorted(image, key=np.mean)
    assert (dark == 50).all() and (mixed[:4] == 255).all() and (mixed[4:] == 50).all()
    assert dataset.notes == ("1 laid on white",)


@pytest.mark.parametrize("size", [(1600, 1200), (240, 200)])
def test_a_large_jpeg_is_decoded_in_part_and_looks_the_same(tmp_path, size):
    photo = next(photos.pieces(1)).resize(size)
    photo.save(tmp_path / "a.jpg", quality=95)
    photo.save(tmp_path / "b.png")
    _, image = load(tmp_path, size=32)
    assert np.abs(image[0].astype(int) - image[1]).mean() < 2


def test_arrays_are_prepared_as_files_are(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 20, 12, 3), np.uint8)
    np.savez(tmp_path / "own.npz", image=image, test_image=image[:2])
    for i, pixels in enumerate(image):
        save(tmp_path / "files" / f"{i}.png", pixels)
    from_array = data.load(name=str(tmp_path / "own.npz"), size=10, colour="grey")
    _, from_files = load(tmp_path / "files", size=10, colour="grey")
    assert {bytes(one) for one in from_files} == {bytes(one) for one in from_array.splits["train"].image}
    np.testing.assert_array_equal(from_array.splits["test"].image, from_array.splits["train"].image[:2])
    assert from_array.notes == ("8 made grey", "8 scaled and cropped to 10x10")
    assert data.load(name="digits", size=32).image_shape == (32, 32, 1)


def test_nothing_is_skipped_silently(tmp_path):
    for name in ("cats", "dogs"):
        for i in range(4):
            save(tmp_path / name / f"{i}.png", np.full((8, 8), i))
    save(tmp_path / "cats" / "old" / "0.png", np.zeros((8, 8)))
    save(tmp_path / "2023" / "january" / "0.png", np.zeros((8, 8)))
    (tmp_path / "2023" / "plan.txt").write_text("x")
    (tmp_path / "birds").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "dogs" / ".DS_Store").write_text("x")
    dataset, _ = load(tmp_path)
    assert dataset.num_classes == 2
    assert dataset.notes == (
        "3 skipped, hidden or not images (notes.txt, plan.txt, .DS_Store)",
        "folders without images left out: 1 (birds)",
        "folders inside subfolders left out: 2 (january, old)",
    )


def test_unreadable_files_are_named_counted_and_refused_or_left_out(tmp_path):
    photos.write(tmp_path, 8)
    (tmp_path / "photo100.heic").write_bytes(b"x")
    (tmp_path / "photo101.jpg").write_bytes((tmp_path / "photo000.jpg").read_bytes()[:300])
    name = f"{tmp_path}/"
    message = (
        r"cannot read the image .*photo100.heic: heic is not supported, but PNG.*; nor can 1 more of 10 be read: "
        r"photo101.jpg: .*skip_unreadable=true"
    )
    refused(message, name=name, size=16)
    dataset, image = load(tmp_path, size=16, skip_unreadable=True)
    left_out = "2 of 10 left out as unreadable (photo100.heic, photo101.jpg)"
    assert len(image) == 8 and dataset.notes[-1] == left_out
    (tmp_path / "a.heic").write_bytes(b"x")
    names, pixels, _ = data.read_images(name, data.Preparation(16), skip_unreadable=True)
    assert [Path(file).stem for file in names] == [f"photo{i:03}" for i in range(8)] and len(pixels) == 8
    (tmp_path / "a.heic").unlink()
    for path in tmp_path.glob("photo00*"):
        path.unlink()
    refused("cannot read the image .*photo100.heic", name=name, size=16, skip_unreadable=True)
    for other in ("digits", "own.npz"):
        refused(f"skip_unreadable is true, but {other} is not a folder", name=other, skip_unreadable=True)


@pytest.mark.parametrize("size", [1, SMALLEST - 1, -5])
def test_sizes_below_8_are_refused(size):
    refused(f"data.size is {size}, but must be 0, for images of one size, or at least 8", name="digits", size=size)


def test_bad_fields_of_own_images(tmp_path, monkeypatch):
    refused("data.colour is 'gray', but must be one of auto, grey, colour", name="digits", colour="gray")
    refused("data.name is empty: give your images", name="")
    photos.write(tmp_path / "photos", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    message = "memory cannot hold .*photos, and decoding them takes .* GiB on the disk of .* GiB free: set"
    refused(message, name=f"{tmp_path}/photos/", size=2**31)
    with pytest.raises(ValueError, match="need .* GiB of memory, but this machine has"):
        data.read_images(f"{tmp_path}/photos/", data.Preparation(2**31))
    monkeypatch.chdir(tmp_path)
    refused("unknown data set 'photos': did you mean './photos'", name="photos", size=8)
    refused("there is no folder phots", name="phots/", size=8)


def fill(folder, counts, value=0):
    """Images of different pixels: {class: how many}."""
    for name, count in counts.items():
        for i in range(count):
            save(folder / name / f"{i}.png", np.full((8, 8), value + i))


def test_a_folder_of_splits_gives_each(tmp_path):
    fill(tmp_path / "Train", {"a": 3, "b": 2, "c": 1})
    fill(tmp_path / "test", {"a": 1, "c": 2}, 100)
    fill(tmp_path / "val", {"b": 2}, 200)
    (tmp_path / "readme.txt").write_text("x")
    dataset, _ = load(tmp_path)
    labels = {name: split.label.tolist() for name, split in dataset.splits.items()}
    assert labels == {"train": [0, 0, 0, 1, 1, 2], "test": [0, 2, 2], "validation": [1, 1]}
    assert dataset.splits["validation"].image[:, 0, 0, 0].tolist() == [200, 201]
    assert dataset.notes == (
        "the splits train, test, validation are the folders Train, test, val",
        "1 skipped, hidden or not images (readme.txt)",
    )
    refused("data.validation is 2, but .* has validation images of its own", name=f"{tmp_path}/", validation=2)
    fill(tmp_path / "valid", {"b": 1})
    refused("has subfolders val and valid: keep one of them", name=f"{tmp_path}/")


def test_without_a_test_split_validation_is_it(tmp_path):
    fill(tmp_path, {"train": 5, "validation": 2})
    dataset, _ = load(tmp_path)
    assert {name: len(split.label) for name, split in dataset.splits.items()} == {"train": 5, "test": 2}
    assert dataset.num_classes == 0 and "train, test are the folders train, validation" in dataset.notes[0]


def test_splits_that_do_not_go_together_are_refused(tmp_path):
    fill(tmp_path / "x", {"train": 3, "test": 2, "cats": 1})
    refused("x/ has subfolders test, train, which are splits, beside cats", name=f"{tmp_path}/x/")
    fill(tmp_path / "v", {".": 1, "train": 3, "test": 2})
    refused("v/ has subfolders test, train, which are splits, beside 0.png", name=f"{tmp_path}/v/")
    fill(tmp_path / "y" / "train", {"a": 2})
    fill(tmp_path / "y" / "test", {"a": 1, "b": 1})
    refused("those in .*y/test do not have the same classes: b", name=f"{tmp_path}/y/")
    fill(tmp_path / "z" / "train", {"a": 2})
    fill(tmp_path / "z", {"test": 2})
    refused("those in .*z/test do not have the same classes", name=f"{tmp_path}/z/")
    fill(tmp_path / "w", {"train": 2, "dogs": 2})  # two classes, since there is no other split
    assert load(tmp_path / "w")[0].num_classes == 2


def test_the_validation_images_of_tensorflow_datasets_are_used(monkeypatch):
    pytest.importorskip("array_record")
    splits = {name: types.SimpleNamespace(num_examples=7) for name in ("train", "validation", "test")}
    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", splits)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "is_prepared", lambda self: True)
    with tfds.testing.mock_data(num_examples=7):
        assert [*data.load(name="binarized_mnist").splits] == ["train", "test", "validation"]
        del splits["test"]
        assert [*data.load(name="binarized_mnist").splits] == ["train", "test"]


@pytest.mark.parametrize("count,batch", [(1, 1), (3, 1), (8, 2), (24, 6), (255, 63), (256, 64), (10_000, 64)])
def test_the_batch_fits_the_images(count, batch):
    image = np.zeros((count, 8, 8, 1), np.uint8)
    dataset = Dataset({"train": Split(image, np.zeros(count, np.int32))}, 1, True)
    assert check_data(families.vae, dataset, batch_size=0, patience=0) == batch


@pytest.mark.parametrize(
    "shape,features",
    [
        ((28, 28, 1), (32, 64)),
        ((32, 32, 3), (32, 64)),
        ((64, 64, 3), (32, 64, 128)),
        ((112, 128, 3), (32, 64, 128, 256)),
        ((256, 256, 3), (32, 64, 128, 256, 512)),
        ((96, 100, 1), (32, 64)),
        ((8, 12, 1), (32,)),
        ((45, 45, 1), (32,)),
    ],
)
def test_the_network_fits_the_images(shape, features):
    assert fitting_features(shape) == features
    if all(size % 2 ** len(features) == 0 for size in shape[:2]):
        model = families.vae.make(shape, latent_dim=3)
        variables = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.eval_shape(model.decode_raw, variables, np.zeros((2, 3), np.float32)).shape == (2, *shape)
        assert variables["params"]["decoder"]["tconv1"]["kernel"].shape[-1] == features[-1]


@pytest.mark.parametrize("family", ["vae", "conditional", "sparse_labels"])
def test_the_default_network_of_28x28_keeps_its_bits(family):
    sizes = {} if family == "vae" else {"num_classes": 3}
    networks = [{}, {"encoder_features": (32, 64), "decoder_features": (64, 32)}]
    models = [families.FAMILIES[family].make((28, 28, 1), **sizes, **fields) for fields in networks]
    empty, named = (jax.jit(model.init)(jax.random.key(7)) for model in models)
    assert jax.tree.structure(empty) == jax.tree.structure(named)
    jax.tree.map(np.testing.assert_array_equal, empty, named)


@pytest.fixture
def spectra(monkeypatch):
    """`spectra(image, limit, largest)`: the eigenvalues where matrices have at most `limit` rows."""

    def compute(image, limit, largest=None):
        monkeypatch.setattr(baselines, "LARGEST_MATRIX", limit)
        return covariance_eigenvalues(image, largest)

    return compute


def test_the_gram_matrix_has_the_eigenvalues_of_the_covariance(spectra):
    image = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    pixels, gram = spectra(image, 4096), spectra(image, 100)
    assert gram.shape == pixels.shape == (192,)
    np.testing.assert_allclose(gram, pixels, atol=1e-5)
    variance = np.var(image / 255, axis=0).sum()
    assert gram.sum() == pytest.approx(variance, rel=1e-5)
    assert mean_square_distance(image, mean_image(image).astype(np.float32)) == pytest.approx(variance, rel=1e-5)


def test_leading_eigenvalues_of_many_large_images(spectra, monkeypatch):
    """Four known directions, then noise; the rest of the variance is exact, and so are the baselines of so many
    latents.
    """
    monkeypatch.setattr(batch, "CHUNK", 70)
    rng = np.random.default_rng(1)
    codes = rng.standard_normal((200, 4)) * [40, 25, 12, 8]
    flat = 128 + codes @ np.linalg.qr(rng.standard_normal((192, 4)))[0].T * 4 + rng.standard_normal((200, 192))
    image = flat.clip(0, 255).astype(np.uint8).reshape(200, 8, 8, 3)
    exact, few = spectra(image, 4096), spectra(image, 100, 4)
    np.testing.assert_allclose(few[:4], exact[:4], rtol=1e-4)
    assert few.sum() == pytest.approx(exact.sum(), rel=1e-6) and np.all(np.diff(few) <= 0)
    for scale in (1.0, 0.1, None):
        monkeypatch.setattr(baselines, "LARGEST_MATRIX", 4096)
        expected = linear_vae_baselines(image, 4, 1.0, scale)
        monkeypatch.setattr(baselines, "LARGEST_MATRIX", 100)
        assert linear_vae_baselines(image, 4, 1.0, scale) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_explained_variance_is_0_for_the_mean_image_and_1_without_error(scale):
    """Half the squared error over scale^2 is the reconstruction term."""
    model = families.vae.make((8, 8, 1), likelihood="gaussian", scale=scale)
    image = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
    variance = mean_square_distance(image, mean_image(image).astype(np.float32))
    for share in (0.0, 0.25, 1.0):
        reconstruction = (1 - share) * variance / (2 * scale**2)
        numbers = {"test/bound": 3.0, "test/reconstruction": reconstruction}
        said = families.vae.ledger(model, numbers, "test", 64, False, variance, likelihood="gaussian", scale=scale)
        assert said["test/explained variance"] == pytest.approx(share)
    assert mean_square_distance(image, np.zeros((8, 8, 1), np.float32)) == pytest.approx(
        np.mean(np.sum((image / 255) ** 2, axis=(1, 2, 3))), rel=1e-5
    )


@pytest.mark.parametrize("likelihood", ["gaussian", "optimal_gaussian"])
def test_the_squared_error_under_a_learned_scale(likelihood):
    """The reconstruction is error / (2 s^2) + D ln s. Of several seeds only the mean scale is known, which is not enough."""
    model = families.vae.make(
        (8, 8, 1), latent_dim=2, network="mlp", likelihood=likelihood, learn_scale=likelihood == "gaussian"
    )
    error, s = 3.0, 0.2
    numbers = {"test/reconstruction": error / (2 * s**2) + 64 * np.log(s), "test/bound": 1.0, "test/scale": s}
    said = families.vae.ledger(model, numbers, "test", 64, False, 12.0, likelihood=likelihood)
    assert said["test/squared error of an image"] == pytest.approx(error)
    assert said["test/explained variance"] == pytest.approx(1 - error / 12)
    several = families.vae.ledger(
        model, numbers | {"test/scale/interval": 0.1}, "test", 64, False, likelihood=likelihood
    )
    assert "test/squared error of an image" not in several


def test_the_verdict_says_what_is_explained():
    numbers = {
        "test/kl": 5.0,
        "test/bound": 20.5,
        "test/loss": 20.5,
        "test/explained variance": 0.618,
        "train/bound": 10.0,
    }
    said = verdict(numbers, "test", {"collapsed model": 30.0, "best linear VAE": 22.25})
    assert said["explained"] == (
        "62% of the variance of the test images (the mean training image explains 0%); the loss is 20.50 there, and on "
        "the training images: collapsed model 30.00, best linear VAE 22.25"
    )
    assert said["what to change"] == "use more images, or fewer epochs"
    assert "explained" not in verdict(numbers | {"test/explained variance": None}, "test", {})


def own_config(folder, **fields):
    config = vae.get_config("own").to_dict() | {"epochs": 2}
    config["data"] |= {"name": f"{folder}/", "size": 16}
    config["model"] |= {"latent_dim": 3, "encoder_features": (4, 4)}
    config["run"] |= {"likelihood_samples": 0}
    return config | fields


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 20 photos, and their files."""
    folder = tmp_path_factory.mktemp("own")
    files = photos.write(folder / "photos", 20)
    job = session.build(own_config(folder / "photos"))
    config = job.metadata["config"]
    run_job(job._replace(figures=lambda *_: {}), config, folder / "run")
    return folder / "run", config, files


def test_the_batch_size_is_stored_as_it_was_chosen(run):
    path, config, files = run
    stored = json.loads((path / "config.json").read_text())
    assert stored["batch_size"] == config["batch_size"] == 4  # of 16 training images
    again = own_config(files[0].parent)
    assert again["batch_size"] == 0 and changes(stored, {**stored, **again, "model": stored["model"]}) == []
    check_same_config(str(path), stored, {**stored, "batch_size": 0})
    assert changes(stored, {**stored, "batch_size": 5}) == ["batch_size is 4 there, 5 here"]
    summary = (path / "summary.md").read_text()
    assert "| what was done to the images | " in summary and "20 scaled and cropped to 16x16" in summary
    assert "| explained | " in summary and "| best linear VAE | " in summary


def arrays(paths):
    with np.load(next(path for path in paths if str(path).endswith(".npz")), allow_pickle=False) as file:
        return dict(file)


def test_modes_take_files_prepared_as_in_training(run):
    path, config, files = run
    two, model = f"{files[0]},{files[3]}", vae_jax.load(str(path))  # the first is turned, the second grey
    seen = arrays(commands.encode(str(path), config, "", "test", two))
    trained = data.load(name=f"{files[0].parent}/", size=16)
    pixels = {bytes(one) for split in trained.splits.values() for one in split.image}
    found = commands.reconstruct(str(path), config, "", "test", 10, two)
    shown = arrays(found)
    assert {bytes(one) for one in shown["image"]} <= pixels and len(shown["image"]) == 2
    assert found[-1].endswith("1 made colour; 2 scaled and cropped to 16x16; 1 turned upright as the camera says")
    np.testing.assert_array_equal(shown["reconstruction"], model.reconstruct(shown["image"]))
    mean, logvar = model.encode(shown["image"])
    np.testing.assert_array_equal(seen["mean"], mean)
    np.testing.assert_array_equal(seen["logvar"], logvar)
    grey = arrays(commands.encode(str(path), config, "", "test", str(files[3])))
    np.testing.assert_allclose(grey["mean"][0], mean[1], atol=1e-5)
    between = arrays(commands.interpolate(str(path), config, "", "test", 5, None, None, two))
    np.testing.assert_allclose(between["image"][[0, -1]], shown["reconstruction"], atol=1e-5)
    moved = arrays(commands.traverse(str(path), config, "", "test", 3, [1], None, two))
    assert moved["image"].shape == (3, 3, 16, 16, 3)
    every = commands.reconstruct(str(path), config, "", "test", 7, str(files[0].parent))
    assert len(arrays(every)["image"]) == 7 and every[-1] == "the first 7 of 20 images: --count chooses how many"


def test_encode_writes_a_table_of_codes(run):
    path, config, files = run
    for own, names in [(str(files[0].parent), [file.name for file in files]), (None, ["0", "1", "2", "3"])]:
        archive, table, *more = commands.encode(str(path), config, "", "test", own, tsne=own is not None)
        assert [file.name for file in more[:1]] == ([f"{archive.stem}-tsne.png"] if own else [])
        found = arrays([archive])
        assert found["name"].tolist() == names and found["mean"].shape == found["logvar"].shape == (len(names), 3)
        with open(table, encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file)]
        assert [row["file"] for row in rows] == names
        for what in ("mean", "logvar"):
            numbers = [[float(row[f"{what}{i}"]) for i in range(3)] for row in rows]
            np.testing.assert_allclose(numbers, found[what], rtol=1e-6)


def test_sample_as_files(run):
    path, config, _ = run
    folder, count = commands.sample(str(path), config, "", 3, 5, files=True)
    assert [file.name for file in sorted(folder.iterdir())] == [
        "00000.png",
        "00001.png",
        "00002.png",
    ] and count == "3 files"
    expected = vae_jax.load(str(path)).sample(3, 5)
    for file, image in zip(sorted(folder.iterdir()), expected):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.round(image * 255).astype(np.uint8))


def test_bad_input(run, tmp_path):
    path, config, files = run
    (tmp_path / "a.png").write_bytes(b"x")
    for own, message in [
        (f"{files[0]},{tmp_path}/none.png", "there is no file .*none.png"),
        (f"{tmp_path}/a.png", "cannot read the image .*a.png: cannot identify .*: give one that can be read"),
        (f"{tmp_path}/none", "there is no folder .*none"),
        (str(files[0]), "no image 1 in photo000.jpg: it has 0 to 0"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            commands.interpolate(str(path), config, "", "test", 5, None, None, own)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no image labelled 3 in photos: it is unlabelled"):
        commands.traverse(str(path), config, "", "test", 5, None, [3], str(files[0].parent))


def test_a_model_of_labels_takes_no_images_without_them(monkeypatch):
    vae = Pretrained({}, {})
    vars(vae)["model"] = types.SimpleNamespace(condition_on="label", decode_raw=True)
    monkeypatch.setattr(examples, "load_able", lambda *_, **needed: vae)
    with pytest.raises(ValueError, match="--input gives images without labels, but this model is conditioned on them"):
        examples.load_examples("run", {}, "", "test", "a.png")


@pytest.mark.slow
def test_one_command_trains_on_photos_and_the_modes_take_two(tmp_path, forks):
    files = photos.write(tmp_path / "photos", 12)
    small = "--config.epochs=1", "--config.data.size=16", "--config.run.likelihood_samples=0"
    train = ("-m", "vae_jax", "--config=configs/vae.py:own", f"--config.data.name={tmp_path}/photos/", *small)
    workdir = f"--workdir={tmp_path}/run"
    said = forks(*train, workdir, drawn=True).ends()
    assert (
        said.startswith(f"vae_jax: the images of {tmp_path}/photos/: 2 made colour; 12 scaled")
        and said.count("\n") == 1
    )
    assert len(list((tmp_path / "run" / "figures").glob("*.png"))) == 5
    again = forks(*train, workdir)
    assert again.ends() == "" and "already finished" in again.stdout
    assert "batch_size is 2 there, 3 here" in forks(*train, "--config.batch_size=3", workdir).refuses()
    two = f"--input={files[0]},{files[1]}"
    for mode in ("reconstruct", "interpolate", "encode"):
        process = forks("-m", "vae_jax", f"--mode={mode}", two, workdir)
        assert process.ends() == "" and process.stdout.count("generated") == 2
    both = forks("-m", "vae_jax", "--mode=encode", two, "--split=test", workdir)
    assert "--split and --input are both given" in both.refuses()
