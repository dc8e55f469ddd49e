"""`--mode=evaluate --full`: every number or its reason, continued after an interruption, and the verdict in words."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import run_job, small_job

import vae_jax
from vae_jax import commands, full_evaluation
from vae_jax.batch import Dataset, Split, mixed_order
from vae_jax.evaluation.verdict import verdict
from vae_jax.families import conditional, vae
from vae_jax.full_evaluation.picture import draw_evaluation
from vae_jax.full_evaluation.samples import generate, generated_numbers
from vae_jax.full_evaluation.subject import Subject
from vae_jax.pretrained import Pretrained
from vae_jax.run import session

QUICK = {"split": "test", "full": True, "samples": 12, "count": 40}


def train(path, changes):
    job, config = small_job({"epochs": 1} | changes)
    run_job(job, config, path)
    return str(path), config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), {})


@pytest.fixture(scope="module")
def found(run):
    return commands.evaluate(*run, "latest", **QUICK)


@pytest.fixture
def copied(run, found, tmp_path):
    """A copy of the evaluated run, for a test that writes to it."""
    return str(shutil.copytree(run[0], tmp_path / "copied")), run[1]


@pytest.mark.slow
def test_every_number_stands_beside_its_floor_or_its_error(run, found):
    for name in [
        "nll",
        "nll/standard_error",
        "nll/with_1_samples",
        "nll/with_10_samples",
        "effective_sample_size",
        "nll/sandwich_width",
        "active_units",
        "mutual_information",
        "mutual_information/most",
        "aggregate_kl",
        "total_correlation",
        "linear_probe_accuracy",
        "neighbour_accuracy",
        "precision",
        "recall",
        "density",
        "coverage",
        "precision/floor",
        "coverage/floor",
        "precision/collapsed",
        "precision/draws",
        "nearest_training_distance",
        "nearest_training_distance/rank_test",
    ]:
        assert np.isfinite(found[f"test/{name}"]), name
    assert found["test/frechet_distance"].startswith("left out: 360 real images are fewer than the 420")
    assert found["test/pareto_k"] == "left out: 12 samples are too few"
    assert found["test/nll/images"] == 40 and found["test/generated_images"] == 360
    assert found["test/nll"] < found["test/nll/with_1_samples"]
    assert found["test/coverage"] < 0.1  # after one epoch
    assert found["test/coverage/floor"] > 0.9
    assert found["test/nll/simulated_images_at_least"] < found["test/nll/simulated_images_at_most"]
    stored = json.loads(next(full_path(run[0]).glob("*.json")).read_text())
    assert stored == {name: found[name] for name in stored} and "test/nll" in stored
    pictures = sorted(path.name for path in full_path(run[0]).glob("*.png"))
    assert pictures == [f"evaluation-step5-test-samples12-count40{part}.png" for part in ("-pairs", "")]


def full_path(workdir):
    return Path(workdir) / "generated"


@pytest.mark.slow
def test_the_numbers_are_those_of_the_loaded_model(run, found):
    vae = vae_jax.load(run[0])
    test = session.build(run[1]).dataset.splits["test"]
    expected = -vae.log_likelihood(test.image[:40], samples=12)
    assert found["test/nll"] == pytest.approx(expected.mean(), rel=1e-6)
    assert found["test/nll/standard_error"] == pytest.approx(expected.std(ddof=1) / np.sqrt(40), rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_evaluation_continues_with_what_it_has(copied, found, monkeypatch):
    """Also on another number of devices, whose blocks hold other numbers of images. A finished one leaves no parts that a
    later call would take for its own.
    """
    folder = full_path(copied[0])
    assert not [*folder.glob("*.jsonl")]

    def kill(subject):
        raise KeyboardInterrupt

    monkeypatch.setattr(full_evaluation, "generated_numbers", kill)
    with pytest.raises(KeyboardInterrupt):
        commands.evaluate(*copied, "latest", **QUICK)
    file = next(folder.glob("*.jsonl"))
    whole = file.read_text()
    row = {name: values if name == "first" else values[:30] for name, values in json.loads(whole).items()}
    file.write_text(json.dumps(row) + "\n" + whole[:50])  # the process was killed while it wrote a line
    with pytest.raises(KeyboardInterrupt):
        commands.evaluate(*copied, "latest", **QUICK)
    first, second = map(json.loads, file.read_text().splitlines())
    assert first == row and len(second["nll"]) == 10
    np.testing.assert_allclose(row["nll"] + second["nll"], json.loads(whole)["nll"], rtol=1e-6)
    monkeypatch.setattr(full_evaluation, "generated_numbers", lambda subject: ({}, None))
    again = commands.evaluate(*copied, "latest", **QUICK)
    assert again["test/nll"] == pytest.approx(found["test/nll"], rel=1e-6) and not file.exists()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"samples": 0}, "--samples is 0, but must be from 1 to 1000000"),
        ({"samples": 10**11}, "--samples is 100000000000, but must be from 1 to 1000000"),
        ({"count": 361}, "--count is 361, but test has 360 images: give 1 to 360"),
        ({"count": 0}, "--count is 0, but test has 360 images: give 1 to 360"),
    ],
)
def test_bad_numbers_are_refused(run, changes, message):
    with pytest.raises(ValueError, match=message):
        commands.evaluate(*run, "latest", **QUICK | changes)


@pytest.mark.parametrize("latent_dim", [0, 1, 2])
def test_few_latents_are_drawn_too(latent_dim):
    planes = {f"PCA of {what}": (np.eye(3, 2), np.ones(2)) for what in ("means", "log-variances")}
    figure = draw_evaluation(
        {1: 3.0}, np.ones(latent_dim), np.ones(3), planes if latent_dim > 1 else {}, np.arange(3), "Title"
    )
    assert len([ax for ax in figure.axes if ax.axison]) == (5 if latent_dim > 1 else 3)


BLACK = Split(np.zeros((6, 4, 4, 1), np.uint8), np.arange(6, dtype=np.int32) % 3)


def subject_of(model, split=BLACK):
    """A subject with an untrained model."""
    config = {"seed": 0, "model": {}, "data": {"binarize": "none"}}
    pretrained = Pretrained({"config": config, "image_shape": split.image.shape[1:]}, {})
    vars(pretrained)["model"] = model
    return Subject(pretrained, Dataset({"test": split}, 3, True), "test")


def test_few_training_images_leave_the_distances_out():
    images = {
        name: Split(np.zeros((n, 28, 28, 1), np.uint8), np.zeros(n, np.int32))
        for name, n in (("train", 5), ("test", 6))
    }
    subject = subject_of(vae.make((28, 28, 1), latent_dim=2, network="mlp"), images["test"])
    subject = dataclasses.replace(subject, dataset=Dataset(images, 1, True))
    found, _ = generated_numbers(subject)
    assert found == {"frechet_distance": "left out: 5 neighbours need at least 6 images"}


def test_an_encoder_that_is_given_the_label_is_not_probed_for_it():
    codes = {name: np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32) for name in ("mean", "logvar", "z")}
    codes["kl"] = np.ones(6, np.float32)
    found = full_evaluation.latent_numbers(
        subject_of(conditional.make((4, 4, 1), 3, latent_dim=2, network="mlp")), codes
    )
    assert found["linear_probe_accuracy"] == "left out: the encoder is given the label" and "aggregate_kl" in found
    learned = conditional.make((4, 4, 1), 3, latent_dim=2, network="mlp", prior="learned")
    found = full_evaluation.latent_numbers(subject_of(learned), codes)
    assert found["aggregate_kl"] == "left out: each condition has its own prior"


def test_pixels_and_components_are_drawn_with_keys_of_their_own(monkeypatch):
    """The first number of a mixture's draw, and the first number of the pixel noise."""
    first = vae.make((4, 4, 1), latent_dim=1, network="mlp", hidden=(2,))
    prior = first.prior._replace(
        sample=lambda variables, key, count: jnp.tile(jax.random.uniform(jax.random.split(key)[0]), (count, 1))
    )
    p_x = first.likelihood._replace(
        mean=lambda variables, raw: raw, sample=lambda variables, key, raw: jnp.full(raw.shape, jax.random.uniform(key))
    )
    model = first._replace(
        prior=prior,
        likelihood=p_x,
        decode_raw=lambda variables, z: jnp.broadcast_to(z[:, :, None, None], (len(z), 4, 4, 1)),
    )
    means, draws = generate(subject_of(model), 256)
    assert abs(means[0, 0, 0, 0] - draws[0, 0, 0, 0]) > 1e-3


def test_a_damaged_line_of_an_earlier_evaluation_is_named(run, tmp_path):
    workdir = str(shutil.copytree(run[0], tmp_path / "copied"))
    folder = full_path(workdir)
    folder.mkdir(exist_ok=True)
    (folder / "evaluation-step5-test-samples3-count2.jsonl").write_text('{"first": 1, "nll": [2.0]}\n')
    with pytest.raises(OSError, match="line 1 of .*samples3-count2.jsonl is damaged: remove that line to continue"):
        commands.evaluate(workdir, run[1], "latest", **QUICK | {"samples": 3, "count": 2})


@pytest.mark.slow
def test_a_fitted_mixture_takes_the_place_of_the_prior(copied, found):
    """The likelihood, the samples and the KL are those under the mixture; the same draws of q serve both."""
    numbers = commands.evaluate(*copied, "latest", **QUICK, prior="gmm")
    assert numbers["test/aggregate_kl"] < found["test/aggregate_kl"]
    assert numbers["test/nll"] != found["test/nll"]
    assert numbers["test/mutual_information"] == pytest.approx(found["test/mutual_information"], rel=1e-5)
    assert numbers["test/bound, p(z) of the model"] == found["test/bound"] and "test/bound" not in numbers
    assert len([*full_path(copied[0]).glob("*-gmm.json")]) == 1


@pytest.mark.slow
def test_binary_images_and_the_training_split(tmp_path, monkeypatch):
    """Training images have no floor, which would be themselves; what has no meaning says why."""
    workdir, config = train(tmp_path, {"model.likelihood": "bernoulli", "data.binarize": "dynamic"})
    monkeypatch.setattr(full_evaluation.likelihood, "SIMULATED", 16)
    numbers = commands.evaluate(workdir, config, "latest", **QUICK | {"split": "train", "count": 16})
    assert numbers["train/nll/bits_per_dimension"] == pytest.approx(numbers["train/nll"] / 784 / np.log(2))
    assert numbers["train/linear_probe_accuracy"] == "left out: a probe is fitted to the training images"
    assert numbers["train/nearest_training_distance"].startswith("left out: the training images themselves")
    assert np.isfinite(numbers["train/coverage/draws"]) and not any(name.endswith("/floor") for name in numbers)
    assert np.isfinite(numbers["train/frechet_distance"])


@pytest.mark.slow
def test_an_unlabelled_image_has_no_condition(run):
    """An all-zero label would give numbers that mean nothing."""
    vae, dataset = vae_jax.load(run[0]), session.build(run[1]).dataset
    vars(vae)["model"] = vae.model._replace(condition_on="label")
    hidden = dataset.splits["test"]._replace(label=np.full(360, -1, np.int32))
    dataset = dataset._replace(splits=dataset.splits | {"test": hidden})
    with pytest.raises(ValueError, match="test has unlabelled images, but this model is conditioned on the label"):
        full_evaluation.evaluate_fully(vae, dataset, "test", 3, 3, Path(run[0]))


@pytest.mark.slow
def test_grey_pixels_have_no_bernoulli_likelihood(tmp_path):
    workdir, config = train(tmp_path, {"model.likelihood": "bernoulli"})
    subject = full_evaluation.Subject(vae_jax.load(workdir), session.build(config).dataset, "test")
    numbers = full_evaluation.likelihood_numbers(subject, 10, 10, tmp_path / "unused")
    assert numbers == {"nll": "left out: a Bernoulli is not a likelihood of grey pixels"}


BASELINES = {"collapsed model": 26.0, "best linear VAE": 22.0}


def numbers(**given):
    healthy = {"bound": 18.5, "loss": 18.5, "kl": 11.0, "kl_by_latent": [1.1] * 10, "active_units": 10}
    return {f"test/{name}": value for name, value in (healthy | given).items()}


@pytest.mark.parametrize(
    "given,state",
    [
        ({}, "healthy: the latents carry 11.0 nats"),
        (
            {"kl": 0.002, "kl_by_latent": [0.0002] * 10, "active_units": 0, "loss": 26.01},
            "collapsed: the latents carry 0.002 nats, and the loss is 26.01, compared with 26.00",
        ),
        ({"active_units": 0}, "collapsed: the latents carry 11 nats"),
        ({"kl_by_latent": [3.0] * 3 + [0.001] * 7}, "few latents used: 3 of 10 carry more than 0.01 nats"),
        ({"loss": 27.0}, "undertrained: the loss 27.00 is above 26.00"),
        ({"bound": 27.0}, "healthy"),  # at another beta than 1 the baselines are losses, not bounds
        ({"nearest_training_distance/closer_than_1_percent": 0.9}, "memorising: 90% of the generated images"),
        ({"nearest_training_distance/closer_than_1_percent": 0.01}, "healthy"),
        ({"nearest_training_distance/closer_than_1_percent": "left out: why"}, "healthy"),
    ],
)
def test_the_verdict_follows_from_the_numbers(given, state):
    said = verdict(numbers(**given), "test", BASELINES)
    assert said["verdict"].startswith(state)
    assert ("what to change" in said) == (not state.startswith("healthy"))


def test_a_model_that_learns_its_training_images_is_not_undertrained():
    """The images of a small test set vary more about the mean training image than the training images do."""
    trained = {"train/loss": 12.0, "train/bound": 12.0}
    said = verdict(numbers(loss=27.0, bound=27.0) | trained, "test", BASELINES)
    assert said["verdict"].endswith("but the bound on test is 15.00 nats above that of training")
    assert said["what to change"] == "use more images, or fewer epochs"


def test_a_bound_below_the_floor_is_impossible():
    said = verdict(numbers(bound=30.0), "test", {"collapsed model": 200.0, "floor: the entropy of the pixels": 45.5})
    assert said["verdict"] == "impossible: the bound 30.00 is below 45.50, the floor of the training images"
    assert verdict(numbers(bound=92.0), "test", {"floor: the entropy of the pixels": 45.5})["verdict"].startswith(
        "healthy"
    )


def test_latents_of_several_seeds_are_those_of_the_first():
    """Each seed uses three of ten latents; the mean over the seeds would make six of them."""
    seeds = {f"kl_by_latent/seed{i}": [0.0] * 3 * i + [3.0] * 3 + [0.0] * (7 - 3 * i) for i in range(2)}
    mean = np.mean([*seeds.values()], axis=0).tolist()
    said = verdict(numbers(kl_by_latent=mean, **seeds), "test", BASELINES)
    assert said["verdict"].startswith("few latents used: 3 of 10")
    assert said["latents"].startswith("3 of 10 carry 9.00 nats; most: z0 3.00")


def test_images_that_come_class_by_class_are_mixed():
    label = np.repeat(np.arange(3, dtype=np.int32), 20)
    assert set(label[mixed_order(label)[:12]]) == {0, 1, 2}
    np.testing.assert_array_equal(np.sort(mixed_order(label)), np.arange(60))
    hidden = np.where(np.arange(60) % 4, -1, label)  # few labels, still class by class
    assert set(label[mixed_order(hidden)[:12]]) == {0, 1, 2}
    shuffled = np.roll(label, 1)
    np.testing.assert_array_equal(mixed_order(shuffled), np.arange(60))
    image = np.arange(60, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    subject = subject_of(None, Split(image, label))
    np.testing.assert_array_equal(subject.first(12).image, np.round(255 * subject.batch(0, 12).image))
    np.testing.assert_array_equal(subject.batch(50, 20).index, mixed_order(label)[np.arange(50, 70) % 60])


def test_the_verdict_names_the_latents_and_the_gap_to_training():
    given = numbers(kl_by_latent=[0.001, 2.5, 0.5]) | {"train/bound": 15.0}
    said = verdict(given, "test", BASELINES)
    assert said["latents"] == "2 of 3 carry 3.00 nats; most: z1 2.50, z2 0.50; unused: z0"
    assert said["fit"] == "the bound is 18.50 on test and 15.00 in training, +3.50 nats"
    assert said["verdict"].endswith("but the bound on test is 3.50 nats above that of training")
