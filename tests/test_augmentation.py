"""The study of generated training data: its halves and arms, its findings, and that no result is computed twice."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import PATIENCE

from experiments import arms, vaegan_augmentation
from experiments import augmentation_report as report
from experiments.arms import ARMS
from experiments.augmentation import compute_once, open_study
from experiments.trainer import Trainer
from vae_jax.batch import Dataset, Split

SETTINGS = {"data": "digits", "percentages": [20.0, 100.0], "seeds": 3, "steps": 3, "batch_size": 128}


def labels(size=1000):
    return np.random.default_rng(0).integers(0, 10, size)


def test_halves_are_stratified_and_disjoint():
    label = labels()
    a, b = arms.halves(Split(np.arange(1000), label))
    assert len(a.label) == len(b.label) == 500 and sorted([*a.image, *b.image]) == list(range(1000))
    assert (label[a.image] == a.label).all() and (label[b.image] == b.label).all()
    counts = [np.bincount(half.label, minlength=10) for half in (a, b)]
    assert np.abs(counts[0] - counts[1]).max() <= 2


def test_every_prefix_of_the_order_is_stratified():
    label = labels()
    order = arms.stratified_order(label, (0, 2))
    assert sorted(order) == list(range(1000))
    share = np.bincount(label) / len(label)
    for count in (50, 200, 700):
        found = np.bincount(label[order[:count]], minlength=10)
        assert np.abs(found - share * count).max() <= 1.5
    assert (order == arms.stratified_order(label, (0, 2))).all()
    assert (order != arms.stratified_order(label, (1, 2))).any()


def test_arms_read_the_rows_they_name():
    parts = ("real", "generated from A", "originals of A", "generated from B", "drawn from A")
    pool = arms.Pool(None, None, {part: 100 * i for i, part in enumerate(parts)})
    real, sources = np.array([3, 5]), np.array([7, 8])
    rows = {name: arms.training_rows(arm, pool, real, sources).tolist() for name, arm in ARMS.items()}
    assert rows["a"] == rows["c"] == [3, 5] and rows["b"] == [3, 5, 3, 5]
    assert rows["d"] == [3, 5, 107, 108] and rows["e"] == [3, 5, 207, 208]
    assert rows["f"] == rows["g"] == [3, 5, 303, 305]
    assert rows["h"] == [3, 5, 407, 408] and rows["i"] == rows["e"]
    # The real images are repeated if there are more of the others.
    rows = arms.training_rows(ARMS["h"], pool, real, np.array([7, 8, 9]))
    assert rows.tolist() == [3, 5, 3, 407, 408, 409]
    assert [name for name, arm in ARMS.items() if arm.augmented] == ["c", *"ghi"]
    assert [name for name, arm in ARMS.items() if arm.generated] == [*"dfgh"]
    assert [name for name, arm in ARMS.items() if arm.pseudo_labelled] == [*"hi"]


def test_only_labels_of_the_part_are_replaced():
    prediction = np.array([[5, 6], [7, 8]])
    label = arms.replace_labels(np.array([0, 1, 2, 3]), slice(1, 3), prediction)
    assert label.tolist() == [[0, 5, 6, 3], [0, 7, 8, 3]]


def test_reading_order_repeats_permutations():
    order = arms.reading_order(np.array([4, 9, 11]), 8, (0, 1))
    assert sorted(order[:3]) == sorted(order[3:6]) == [4, 9, 11]
    assert len(order) == 8 and order.dtype == np.int32


@pytest.mark.parametrize(
    "given,message",
    [
        (["0"], r"--percentages has 0, but must lie in \(0, 100\]"),
        (["101"], "must lie in"),
        (["nan"], "must lie in"),
        (["many"], "--percentages is 'many', but must be numbers"),
        ([], "--percentages is '', but must be numbers"),
        (["0.5"], "has 0.5, which leaves 4 images of half B for 10 classes: give at least 1.4"),
    ],
)
def test_bad_percentages(given, message):
    with pytest.raises(ValueError, match=message):
        arms.check_percentages(given, 719, 10)


def test_default_percentages_leave_ten_images_per_class():
    assert arms.check_percentages(None, 719, 10) == [20.0, 50.0, 100.0]
    assert arms.check_percentages(None, 30_000, 10) == [1.0, 5.0, 20.0, 50.0, 100.0]
    assert arms.check_percentages(["2", "100"], 719, 10) == [2.0, 100.0]


def test_results_are_stored_and_never_computed_again(tmp_path):
    path = tmp_path / "s"
    study = open_study(path, SETTINGS)
    assert compute_once(study, "x", lambda p: {"accuracy": [p]}, p=0.5)["accuracy"] == [0.5]
    with pytest.raises(OSError, match="another process is working in"):
        open_study(path, SETTINGS)
    study.close()
    with open(path / "results.jsonl", "a") as file:
        file.write('{"stage": "torn')
    again = open_study(path, SETTINGS)
    assert compute_once(again, "x", pytest.fail, p=0.5)["accuracy"] == [0.5]
    compute_once(again, "x", lambda p: {"accuracy": [p]}, p=0.7)
    again.close()
    rows = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["stage", "p", "accuracy", "seconds"]] * 2
    assert [row["p"] for row in rows] == [0.5, 0.7]


def test_a_study_with_damaged_results_is_named_and_can_be_opened_once_restored(tmp_path):
    open_study(tmp_path, SETTINGS).close()
    (tmp_path / "results.jsonl").write_text("damaged\n")
    with pytest.raises(OSError, match="line 1 of .*results.jsonl"):
        open_study(tmp_path, SETTINGS)
    (tmp_path / "results.jsonl").write_text("")
    open_study(tmp_path, SETTINGS).close()


def test_a_study_is_refused_a_directory_that_is_not_its_own(tmp_path):
    open_study(tmp_path / "s", SETTINGS).close()
    with pytest.raises(OSError, match=r"another study \(seeds is 3 there, 4 here\): name another with --workdir"):
        open_study(tmp_path / "s", SETTINGS | {"seeds": 4})
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "settings.tmp").touch()  # left behind by a study killed in its first moment
    open_study(tmp_path / "killed", SETTINGS).close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(OSError, match="is not empty and holds no study"):
        open_study(tmp_path / "other", SETTINGS)


def rows_with(differences):
    """Results in which arm f beats the other arms, which are all equal, by these points for each seed."""
    return [
        {
            "stage": "arm",
            "percentage": percentage,
            "arm": name,
            "accuracy": [0.9 + (d / 100 if name == "f" else 0) + seed / 1000 for seed, d in enumerate(by_seed)],
        }
        for percentage, by_seed in zip(SETTINGS["percentages"], differences)
        for name in ARMS
    ]


def test_findings_follow_the_intervals():
    sentences = report.findings(rows_with([(1.0, 1.1, 0.9), (-1.0, 1.0, 0.0)]), SETTINGS)
    assert sentences[0].endswith(
        "(f-b): better at 20 % (+1.00 ± 0.25); no significant difference at 100 % (+0.00 ± 2.48)."
    )
    assert "(f-c): worse at 20 %" in report.findings(rows_with([(-1.0, -1.1, -0.9)] * 2), SETTINGS)[1]


def test_the_arms_with_a_vaegan_differ_by_their_images_alone():
    pool = arms.Pool(
        None, None, {"real": 0, "drawn from A": 100, "drawn by a VAE/GAN from A": 200, "originals of A": 300}
    )
    compared, sources = vaegan_augmentation.COMPARED, np.array([7, 8])
    rows = {name: arms.training_rows(arm, pool, np.array([3]), sources).tolist() for name, arm in compared.items()}
    assert rows == {"c": [3], "h": [3, 3, 107, 108], "j": [3, 3, 207, 208], "i": [3, 3, 307, 308]}
    found = [
        {"stage": "arm", "percentage": 1.0, "arm": name, "accuracy": [0.8 + points / 100, 0.9 + points / 100]}
        for name, points in {"c": 0, "h": 1, "j": 3, "i": 2}.items()
    ]
    _, pairs = report.accuracy_tables(found, [1.0], compared, vaegan_augmentation.PAIRS)
    assert {row[0]: row[2] for row in pairs[1:]} == {
        "h-c": "+1.00 ± 0.00",
        "j-c": "+3.00 ± 0.00",
        "j-h": "+2.00 ± 0.00",
        "j-i": "+1.00 ± 0.00",
    }


def test_the_figure_names_its_arms():
    figure = report.draw_arms(rows_with([(1.0, 1.1, 0.9), (-1.0, 1.0, 0.0)]), SETTINGS)
    above, below = (part.axes for part in figure.subfigs)
    assert len(above) == len(below) == len(SETTINGS["percentages"])
    names = [label.get_text().split(":")[0] for label in (*above[0].get_yticklabels(), *below[0].get_yticklabels())]
    assert names == [*ARMS, *arms.PAIRS]
    assert report.GENERATED != report.REAL
    for axes in above:
        colors = {name: bars.lines[0].get_color() for name, bars in zip(ARMS, axes.containers)}
        assert colors == {name: report.GENERATED if name in "dfgh" else report.REAL for name in ARMS}


def test_noise_is_chosen_by_the_mean_over_seeds():
    tried = [
        {"stage": "choice", "share": 0.5, "scale": 0.25, "accuracy": [0.9, 0.5]},
        {"stage": "choice", "share": 1.0, "scale": 0.5, "accuracy": [0.8, 0.8]},
    ]
    assert report.chosen_noise(tried) == (1.0, 0.5)
    assert report.chosen_noise([]) == (0.5, 0.25)


@pytest.mark.parametrize("percentages,percentage", [([1.0, 100.0], 20.0), ([50.0, 100.0], 50.0)])
def test_the_conditions_tell_how_the_noise_was_chosen(percentages, percentage):
    tried = [{"stage": "choice", "share": 1.0, "scale": 0.5, "accuracy": [0.8]}]
    settings = SETTINGS | {"percentages": percentages}
    text = report.conditions(tried, settings)
    chosen = f"the best of those tried: arm f trained on {percentage:g} % of half B"
    assert f"standard deviation 0.5 in 100 % of the latents, {chosen}" in text
    assert "those tried" not in report.conditions([], settings)


def test_copies_of_an_image_are_shifted_independently():
    """Each place in each batch has noise of its own."""
    images = Split(np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, np.int32))
    trainer = Trainer(Dataset({"train": images}, 10, True), {"seeds": 1, "steps": 3, "batch_size": 4})
    seen = []

    def objective(variables, batch, keys, train, step, axis_name=None):
        jax.debug.callback(lambda image, index: seen.append((image, index)), batch.image, batch.index)
        loss = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(variables["params"]))
        return {"loss": jnp.full(4, loss)}, {name: of for name, of in variables.items() if name != "params"}

    image = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((28, 28, 1), np.uint8)
    order = np.array([2, 2, 1, 3] * 3, np.int32)
    trainer._make_program(objective)(trainer._keys[0], order, images.label, image)
    jax.effects_barrier()
    assert sorted(np.concatenate([index for _, index in seen])) == list(range(12))
    assert all((255 * batch[:, 0, 0, 0]).round().tolist() == [2, 2, 1, 3] for batch, _ in seen)


@pytest.mark.slow
def test_the_real_study(tmp_path, forks):
    """From nothing to its summary on the bundled digits; a second start computes nothing."""
    study = [
        *("-m", "experiments.augmentation"),
        "--data=digits",
        f"--workdir={tmp_path / 's'}",
        "--classifier=configs/classifier.py:smoke",
        "--seeds=2",
        "--percentages=20",
        "--vae=configs/vae.py:smoke",
        "--steps=3",
    ]
    process = forks(*study)
    process.wait(5 * PATIENCE)
    assert process.ends() == ""
    first = process.stdout
    assert first.count("stage arm") == len(ARMS)
    assert "Does generated training data help? digits" in first
    assert {path.name for path in (tmp_path / "s" / "figures").iterdir()} == {"arms.png", "noise.png"}
    process = forks(*study)
    assert process.ends() == ""
    assert "stage" not in process.stdout and "Does generated training data help? digits" in process.stdout
    complaint = forks(*study[:-1], "--steps=4").ends(1)
    assert complaint.startswith("augmentation: ") and "steps is 3 there, 4 here" in complaint
