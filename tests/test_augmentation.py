"""The study of generated training data: its halves and arms, what it says, and that nothing finished is done again."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments import augmentation
from experiments.augmentation import ARMS, Study

SETTINGS = {"data": "digits", "percentages": [20.0, 100.0], "seeds": 3}


def labels(size=1000):
    return np.random.default_rng(0).integers(0, 10, size)


def test_halves_are_stratified_and_share_nothing():
    label = labels()
    a, b = augmentation.halves(label)
    assert len(a) == len(b) == 500 and not set(a) & set(b)
    counts = [np.bincount(label[half], minlength=10) for half in (a, b)]
    assert np.abs(counts[0] - counts[1]).max() <= 2


def test_every_beginning_of_the_order_is_stratified():
    label = labels()
    order = augmentation.stratified_order(label, (0, 2))
    assert sorted(order) == list(range(1000))
    share = np.bincount(label) / len(label)
    for count in (50, 200, 700):
        found = np.bincount(label[order[:count]], minlength=10)
        assert np.abs(found - share * count).max() <= 1.5
    assert (order == augmentation.stratified_order(label, (0, 2))).all()
    assert (order != augmentation.stratified_order(label, (1, 2))).any()


def test_arms_read_what_they_say():
    pool = augmentation.Pool(
        None,
        None,
        {
            "real": 0,
            "generated from A": 100,
            "originals of A": 200,
            "generated from B": 300,
            "drawn from A": 400,
        },
    )
    real, sources = np.array([3, 5]), np.array([7, 8])
    rows = {
        name: augmentation.training_rows(arm, pool, real, sources).tolist()
        for name, arm in ARMS.items()
    }
    assert rows["a"] == rows["c"] == [3, 5] and rows["b"] == [3, 5, 3, 5]
    assert rows["d"] == [3, 5, 107, 108] and rows["e"] == [3, 5, 207, 208]
    assert rows["f"] == rows["g"] == [3, 5, 303, 305]
    assert rows["h"] == [3, 5, 407, 408] and rows["i"] == rows["e"]
    # Where there are more of the others, the real ones are repeated.
    sources = np.array([7, 8, 9])
    rows = augmentation.training_rows(ARMS["h"], pool, real, sources)
    assert rows.tolist() == [3, 5, 3, 407, 408, 409]
    assert [name for name, arm in ARMS.items() if arm.augmented] == ["c", *"ghi"]


def test_taught_labels_are_the_predictions_and_no_others():
    prediction = np.array([[5, 6], [7, 8]])
    label = augmentation.taught_labels(np.array([0, 1, 2, 3]), slice(1, 3), prediction)
    assert label.tolist() == [[0, 5, 6, 3], [0, 7, 8, 3]]


def test_reading_order_repeats_whole_rounds():
    rows = np.array([4, 9, 11])
    order = augmentation.reading_order(rows, 8, (0, 1))
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
        (
            ["0.5"],
            "0.5 % of half B are 4 images, fewer than the 10 classes: give at least 1.4",
        ),
    ],
)
def test_bad_percentages(given, message):
    with pytest.raises(ValueError, match=message):
        augmentation.check_percentages(given, 719, 10)


def test_default_percentages_leave_ten_images_a_class():
    assert augmentation.check_percentages(None, 719, 10) == [20.0, 50.0, 100.0]
    assert augmentation.check_percentages(None, 30_000, 10) == [
        1.0,
        5.0,
        20.0,
        50.0,
        100.0,
    ]
    assert augmentation.check_percentages(["2", "100"], 719, 10) == [2.0, 100.0]


def test_results_are_kept_and_never_computed_again(tmp_path):
    study = Study(str(tmp_path / "s"), SETTINGS)
    assert study.result({"stage": "x"}, lambda: {"accuracy": [0.5]})["accuracy"] == [
        0.5
    ]
    with pytest.raises(OSError, match="another process is at work"):
        Study(str(tmp_path / "s"), SETTINGS)
    study.close()
    with open(tmp_path / "s" / "results.jsonl", "a") as file:
        file.write('{"stage": "torn')
    again = Study(str(tmp_path / "s"), SETTINGS)
    assert again.result({"stage": "x"}, pytest.fail)["accuracy"] == [0.5]
    again.result({"stage": "y"}, lambda: {"accuracy": [0.7]})
    again.close()
    lines = (tmp_path / "s" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["x", "y"]
    with pytest.raises(
        OSError,
        match=r"another study \(seeds is 3 there, 4 here\): name another with --workdir",
    ):
        Study(str(tmp_path / "s"), SETTINGS | {"seeds": 4})
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "settings.tmp").touch()  # all that it had written when it was killed
    Study(str(begun), SETTINGS).close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(OSError, match="is not empty and holds no study"):
        Study(str(tmp_path / "other"), SETTINGS)


def rows_with(differences):
    """Results in which arm f beats all others by the given points, and the others are alike."""
    return [
        {
            "stage": "arm",
            "percentage": p,
            "arm": name,
            "accuracy": [
                0.9 + (d / 100 if name == "f" else 0) + seed / 1000
                for d, seed in zip(by_seed, range(3))
            ],
        }
        for p, by_seed in zip(SETTINGS["percentages"], differences)
        for name in ARMS
    ]


def test_findings_say_what_the_intervals_say():
    sentences = augmentation.findings(
        rows_with([(1.0, 1.1, 0.9), (-1.0, 1.0, 0.0)]), SETTINGS
    )
    assert (
        "(f-b): they help at 20 % (+1.00 ± 0.25); they show no difference at 100 % (+0.00 ± 2.48)"
        in sentences[0]
    )
    assert (
        "they hurt"
        in augmentation.findings(rows_with([(-1.0, -1.1, -0.9)] * 2), SETTINGS)[1]
    )


def test_noise_is_chosen_by_the_mean_of_the_seeds():
    tried = [
        {"stage": "choice", "share": 0.5, "scale": 0.25, "accuracy": [0.9, 0.5]},
        {"stage": "choice", "share": 1.0, "scale": 0.5, "accuracy": [0.8, 0.8]},
    ]
    assert augmentation.chosen(tried) == (1.0, 0.5)
    assert augmentation.chosen([]) == (0.5, 0.25)


@pytest.mark.parametrize(
    "percentages,percentage", [([1.0, 100.0], 20.0), ([50.0, 100.0], 50.0)]
)
def test_the_choice_is_told_as_it_was_made(percentages, percentage):
    tried = [{"stage": "choice", "share": 1.0, "scale": 0.5, "accuracy": [0.8]}]
    settings = SETTINGS | {"percentages": percentages, "steps": 3, "batch_size": 128}
    told = augmentation.conditions(tried, settings)
    assert f"noise 0.5 in 100 % of the latents, chosen at {percentage:g} %" in told
    assert "chosen" not in augmentation.conditions([], settings)


def test_the_real_study(tmp_path):
    """From nothing to its summary on the bundled digits; a second start does nothing again."""
    env = os.environ | {"XLA_FLAGS": ""}  # one device

    def run(command, check=True):
        return subprocess.run(
            command, check=check, capture_output=True, text=True, env=env
        )

    study = [
        *(sys.executable, "-m", "experiments.augmentation"),
        "--data=digits",
        f"--workdir={tmp_path / 's'}",
        "--classifier=configs/classifier.py:smoke",
        "--seeds=2",
        "--steps=3",
        "--percentages=20",
        "--vae=configs/vae.py:smoke",
    ]
    first = run(study).stdout
    assert (
        first.count("stage arm") == len(ARMS)
        and "Does generated training data help? digits" in first
    )
    assert {path.name for path in (tmp_path / "s" / "figures").iterdir()} == {
        "arms.png",
        "noise.png",
    }
    second = run(study).stdout
    assert (
        "stage" not in second and "Does generated training data help? digits" in second
    )
    bad = run([*study[:-1], "--steps=4"], check=False)
    assert (
        bad.returncode == 1
        and bad.stderr.splitlines()[-1].startswith("augmentation: ")
        and "steps is 3 there, 4 here" in bad.stderr
    )
