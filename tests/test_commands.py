"""The modes on a trained model: the logged numbers, and the arrays behind each picture."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image
from small_run import run_job, small_job

import vae_jax
from configs import classifier
from vae_jax import commands
from vae_jax.commands import examples
from vae_jax.run import session


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    job, config = small_job({"data.validation": 100})
    _, directory = run_job(job, config, path)
    return str(path), config, directory.history, job.dataset.splits


def arrays(paths):
    picture, archive, *film = paths
    assert all(path.suffix == ".webp" for path in film)
    assert picture.suffix == ".png" and picture.stat().st_size > 1000
    assert not list(picture.parent.glob("*.tmp"))
    with np.load(archive, allow_pickle=False) as file:
        return dict(file)


def test_evaluate_repeats_the_logged_numbers(run):
    path, config, history, _ = run
    logged = history[-1]
    for split in ("test", "validation"):
        found = commands.evaluate(path, config, "latest", split)
        expected = {name: v for name, v in logged.items() if name.startswith(split)}
        assert {name: found[name] for name in found if "/" in name and " " not in name} == expected
        assert found["step"] == 10 and found["collapsed model"] > found["best linear VAE"] > 0
    found = commands.evaluate(path, config, "latest", "train")
    assert found["train/loss"] > 0 and len(found["train/kl_by_latent"]) == 20


def test_evaluate_needs_no_metrics_and_knows_home(run, tmp_path, monkeypatch):
    path, config, history, _ = run
    copy = shutil.copytree(path, tmp_path / "moved")
    (copy / "metrics.jsonl").unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    found = commands.evaluate("~/moved", config, "latest", "test")
    assert found["test/loss"] == history[-1]["test/loss"]


def test_file_names_stay_short(run, tmp_path):
    path, config, _, _ = run
    assert examples.shortened("3-5") == "3-5" and len(examples.shortened("-".join(["3"] * 130))) == 8
    image = tmp_path / f"{'a' * 200}.npz"
    np.savez(image, image=np.zeros((2, 28, 28), np.uint8))
    paths = commands.interpolate(path, config, "", "test", 3, None, None, str(image))
    assert f"-{'a' * 40}-" in paths[0].name and f"-{'a' * 41}" not in paths[0].name


def test_other_data_are_refused(run, monkeypatch):
    path, config, _, _ = run
    for module in (session, examples):
        monkeypatch.setattr(module, "fingerprint", lambda dataset: {"train": 3})
    for use in (
        lambda: commands.evaluate(path, config, "", "test"),
        lambda: commands.traverse(path, config, "", "test", 3, None, None),
    ):
        with pytest.raises(ValueError, match="the data are not those that the model"):
            use()


def test_evaluate_takes_own_images_as_one_more_split(run, tmp_path):
    """The test images as files have the test images' numbers; those that need labels are left out."""
    path, config, history, splits = run
    np.savez(tmp_path / "mine.npz", image=splits["test"].image)
    found = commands.evaluate(path, config, "latest", "test", own=str(tmp_path / "mine.npz"))
    own = {name.partition("/")[2]: v for name, v in found.items() if name.startswith("mine-")}
    expected = {name: history[-1][f"test/{name}"] for name in ("loss", "kl", "bound", "active_units", "kl_by_latent")}
    assert own.items() >= expected.items()
    assert not any(name.startswith(("test/", "input/")) for name in found)
    assert "what was done to the images" not in found
    found = commands.evaluate(path, config, "latest", "test", own=folder_of_two(tmp_path))
    assert found["what was done to the images"].endswith("1 skipped, hidden or not images (note.txt)")


def folder_of_two(tmp_path):
    """The path of a folder with two images and a text."""
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / f"{name}.png")
    (folder / "note.txt").write_text("x")
    return str(folder)


@pytest.mark.slow
def test_evaluate_repeats_the_numbers_of_each_seed(tmp_path):
    job, config = small_job({"seeds": 2})
    _, directory = run_job(job, config, tmp_path)
    found = commands.evaluate(str(tmp_path), config, "", "test")
    logged = directory.history[-1]
    expected = {name: v for name, v in logged.items() if name.startswith("test")}
    assert found.items() >= expected.items()


def test_sample(run, tmp_path):
    path, config, _, _ = run
    found = arrays(commands.sample(path, config, "latest", 7, 3))
    np.testing.assert_array_equal(found["image"], vae_jax.load(path, "latest").sample(7, 3))
    with pytest.raises(ValueError, match="--labels and --input do not go with --prior=gmm"):
        commands.sample(path, config, "latest", 7, 3, "gmm", labels=[3])
    with pytest.raises(ValueError, match="--input\\) is given, but this model does not complete images"):
        commands.sample(path, config, "latest", 7, 3, own=folder_of_two(tmp_path))


@pytest.mark.slow
def test_sample_from_a_mixture_that_is_fitted_after_training(run):
    """Its bound is better than that under the model's prior, whose sampled KL has the mean of the closed one."""
    path, config, history, _ = run
    *paths, gmm, model = commands.sample(path, config, "latest", 7, 3, "gmm")
    found = arrays(paths)
    assert found["image"].shape == (7, 28, 28, 1) and "-gmm" in paths[0].name
    assert (found["image"] != vae_jax.load(path, "latest").sample(7, 3)).any()
    assert all(line.endswith(" nats (-log of a density on [0, 1])") for line in (gmm, model))
    under = [float(line.partition(": ")[2].split()[0]) - 784 * 0.5 * np.log(2 * np.pi) for line in (gmm, model)]
    assert under[0] < under[1] == pytest.approx(history[-1]["test/bound"], rel=0.01)


def test_reconstruct(run):
    path, config, _, splits = run
    found = arrays(commands.reconstruct(path, config, "latest", "validation", 12))
    np.testing.assert_array_equal(found["image"], splits["validation"].image[:12])
    np.testing.assert_array_equal(found["label"], splits["validation"].label[:12])
    expected = vae_jax.load(path, "latest").reconstruct(found["image"])
    np.testing.assert_array_equal(found["reconstruction"], expected)


def test_interpolate_begins_and_ends_at_the_reconstructions(run):
    path, config, _, splits = run
    found = arrays(commands.interpolate(path, config, "latest", "test", 5, None, [3, 8]))
    label = splits["test"].label
    assert label[found["index"]].tolist() == [3, 8]
    assert 3 not in label[: found["index"][0]]  # the first one
    ends = vae_jax.load(path, "latest").reconstruct(splits["test"].image[found["index"]])
    np.testing.assert_allclose(found["image"][[0, -1]], ends, atol=1e-5)
    assert found["image"].shape[0] == 5


def test_traverse_moves_one_latent_at_a_time_in_the_order_of_their_kl(run):
    path, config, history, splits = run
    found = arrays(commands.traverse(path, config, "latest", "test", 3, [4], None, all_latents=True))
    assert found["image"].shape == (20, 3, 28, 28, 1)
    assert np.all(np.diff(found["kl"]) <= 0) and sorted(found["latent"]) == [*range(20)]
    assert found["kl"].sum() == pytest.approx(history[-1]["test/kl"], rel=1e-4)
    vae = vae_jax.load(path, "latest")
    z = vae.encode(splits["test"].image[4:5])[0]
    z[0, found["latent"][2]] = found["value"][0] = -3.0
    np.testing.assert_allclose(found["image"][2, 0], vae.decode(z)[0], atol=1e-5)


def test_traverse_leaves_out_latents_that_carry_nothing(run, monkeypatch):
    """With the third largest KL as the limit, three latents are shown; if all are below it, all are shown."""
    path, config, _, splits = run
    everything = commands.traverse(path, config, "latest", "test", 3, [4], None, all_latents=True)
    kl = arrays(everything)["kl"]
    monkeypatch.setitem(commands.USED, "nats", float(kl[2]))
    draw, drawn = commands.figures.image_rows, []
    monkeypatch.setattr(commands.figures, "image_rows", lambda *given: drawn.append(given) or draw(*given))
    some = commands.traverse(path, config, "latest", "test", 3, [4], None)
    np.testing.assert_array_equal(arrays(some[:3])["kl"], kl[:3])
    assert some[-1] == f"left out: 17 of 20 latents, below {float(kl[2])} nats; --all shows them"
    assert everything[0].stem == f"{some[0].stem}-all" and len(everything) == 3
    mean = vae_jax.load(path, "latest").encode(splits["test"].image[4:5])[0][0]
    own = (mean[arrays(some[:3])["latent"]] + 3) / 3  # columns stand for -3, 0 and 3; beyond them there is no mark
    np.testing.assert_allclose(drawn[0][-1], np.where((own >= 0) & (own <= 2), own, np.nan), atol=1e-5)
    monkeypatch.setitem(commands.USED, "nats", 1e9)
    assert len(arrays(commands.traverse(path, config, "latest", "test", 3, [4], None))["kl"]) == 20


def choose(run, count=1, images=None, labels=None):
    return commands.choose_images(run[3]["test"], "test", count, images, labels)


def test_without_a_choice_the_first_images_are_taken(run):
    assert choose(run, 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="no image 360 in test: it has 0 to 359"):
        choose(run, 361)


@pytest.mark.parametrize(
    "act,message",
    [
        (
            lambda run: choose(run, 2, images=[1]),
            "--images has 1 entries, but this mode takes 2",
        ),
        (
            lambda run: choose(run, 1, labels=[1, 2]),
            "--labels has 2 entries, but this mode takes 1",
        ),
        (
            lambda run: choose(run, 1, images=[1], labels=[2]),
            "--images and --labels are both given: give one of them",
        ),
        (
            lambda run: choose(run, images=[360]),
            "no image 360 in test: it has 0 to 359",
        ),
        (lambda run: choose(run, images=[-1]), "no image -1 in test"),
        (
            lambda run: choose(run, labels=[12]),
            "no image labelled 12 in test: it has 0, 1,",
        ),
        (lambda run: choose(run, labels=[-1]), "no image labelled -1"),
        (
            lambda run: commands.reconstruct(*run[:2], "", "tset", 1),
            "no split 'tset': this run has train, test, validation",
        ),
        (
            lambda run: commands.reconstruct(*run[:2], "", "test", 361),
            "--count is 361, but test has 360 images",
        ),
        (lambda run: commands.sample(*run[:2], "9", 3, 0), "no checkpoint '9'"),
    ],
)
def test_bad_choices(run, act, message):
    with pytest.raises(ValueError, match=message) as error:
        act(run)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A run of the classifier, and ten test images as files."""
    path = tmp_path_factory.mktemp("classifier")
    config = classifier.get_config("smoke").to_dict()
    job = session.build(config)
    _, directory = run_job(job._replace(figures=lambda *_: {}), config, path)
    image = job.dataset.splits["test"].image[:10]
    for i, pixels in enumerate(image[..., 0]):
        (path / "photos" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / "photos" / str(i % 2) / f"{i}.png")
    np.savez(path / "photos.npz", image=image)
    return path, image, directory.history[-1]


def read_csv(paths):
    path, *_ = paths
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_predict(classified):
    path, image, _ = classified
    label, probability = vae_jax.load(str(path)).predict(image)
    np.testing.assert_allclose(probability, vae_jax.load(str(path)).probabilities(image).max(1))
    rows = read_csv(commands.predict(str(path), "", str(path / "photos.npz")))
    assert [row["file"] for row in rows] == [str(i) for i in range(10)]
    assert [int(row["label"]) for row in rows] == label.tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], probability, atol=1e-6)


def test_predict_a_folder_and_never_overwrite_other_predictions(classified):
    path, image, _ = classified
    label, _ = vae_jax.load(str(path)).predict(image)
    name = str(path / "photos")
    (path / "generated").mkdir(exist_ok=True)
    for old in (path / "generated").glob("*.csv"):
        old.unlink()
    for _ in range(2):  # the same predictions may be written again
        rows = read_csv(commands.predict(str(path), "", name))
    assert {row["file"]: int(row["label"]) for row in rows} == {f"{i % 2}/{i}.png": label[i] for i in range(10)}
    assert commands.predict(str(path), "", name + ".npz") != commands.predict(str(path), "", name)


def test_evaluate_a_classifier(classified):
    path, _, logged = classified
    config = classifier.get_config("smoke").to_dict()
    found = commands.evaluate(str(path), config, "", "test")
    expected = {name: v for name, v in logged.items() if name.startswith("test")}
    assert found.items() >= expected.items()
    assert expected.keys() >= {"test/loss", "test/accuracy", "test/calibration_error"}
    assert 0 <= found["test/calibration_error"] <= 1


def test_images_of_another_size_are_not_predicted(classified, tmp_path):
    """test_own.py has the other images that cannot be read."""
    np.savez(tmp_path / "large.npz", image=np.zeros((2, 32, 32), np.uint8))
    message = (
        "large.npz does not fit the model: images of 32x32, but it takes 28x28, and it was trained without data.size"
    )
    with pytest.raises(ValueError, match=message) as error:
        commands.predict(str(classified[0]), "", str(tmp_path / "large.npz"))
    assert "\n" not in str(error.value)


def test_a_mode_names_what_the_model_lacks(classified, run, tmp_path):
    """A mode asks for what it needs, not for the name of a family."""
    path, config = str(classified[0]), classifier.get_config("smoke").to_dict()
    for act, message in [
        (lambda: commands.sample(path, {}, "", 3, 0), "classifier has no decoder"),
        (lambda: commands.reconstruct(path, config, "", "test", 1), "classifier has no encoder"),
        (lambda: commands.evaluate(path, config, "", "test", full=True), "classifier has no encoder"),
        (lambda: commands.interpolate(path, config, "", "test", 3, None, None), "classifier has no encoder"),
        (lambda: commands.traverse(path, config, "", "test", 3, None, None), "classifier has no encoder"),
        (lambda: commands.predict(run[0], "", str(tmp_path)), "vae has no classes"),
    ]:
        with pytest.raises(ValueError, match=f"this mode does not fit the run in .*: .*{message}") as error:
            act()
        assert "\n" not in str(error.value)
