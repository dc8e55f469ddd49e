"""Several runs side by side: only what differs, the last numbers, the curves; what is no run is named."""

import json

import numpy as np
import pytest

from configs import classifier, vae
from experiments import compare
from vae_jax.run.directory import FORMAT


def write_run(folder, config, losses, epochs=3, **more):
    """A run directory as training writes it, with a test loss for each epoch."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, "saved": 0, **config, "epochs": epochs}))
    with open(folder / "metrics.jsonl", "w") as file:
        for epoch, loss in enumerate(losses, start=1):
            row = {"step": epoch, "epoch": float(epoch), "seconds": 60.0 * epoch}
            file.write(json.dumps(row | {"train/loss": loss + 1}) + "\n")
            file.write(json.dumps(row | {"test/loss": loss, "test/kl": 2.0, "test/active_units": 3, **more}) + "\n")
    return str(folder)


def small(**changes):
    config = vae.get_config("digits").to_dict()
    config["data"]["manual_dir"] = str(changes)  # decides no number
    for field, value in changes.items():
        section, _, name = field.partition("__")
        (config[section] if name else config)[name or section] = value
    return config


@pytest.fixture
def runs(tmp_path):
    paths = [
        write_run(tmp_path / "a", small(), [9.0, 8.0, 7.5]),
        write_run(tmp_path / "b", small(model__latent_dim=5, seed=1), [9.5, 8.5], **{"test/loss/interval": 0.25}),
    ]
    return compare.read_runs(paths)


def test_only_what_differs_is_shown(runs):
    assert compare.differing(runs) == ["seed", "model.latent_dim"]
    assert compare.table(runs) == [
        ["run", "seed", "model.latent_dim", "trained", "test/loss", "test/kl", "minutes"],
        ["a", "0", "20", "3 epochs", "7.5", "2", "3.0"],
        ["b", "1", "5", "2 of 3 epochs", "8.5 ± 0.25", "2", "2.0"],
    ]
    assert compare.caveat(runs) == ""


def test_a_run_with_patience_may_have_ended_early(tmp_path):
    path = write_run(tmp_path / "a", small(patience=2), [9.0, 8.0])
    assert compare.table(compare.read_runs([path]))[1][1] == "2 of at most 3 epochs"


def test_losses_with_another_weight_of_the_kl_are_no_match(tmp_path, runs):
    other = write_run(tmp_path / "c", small(objective__beta=0.02), [3.0])
    assert "differ in objective.beta" in compare.caveat([runs[0], *compare.read_runs([other])])


def test_fields_and_metrics_that_one_family_lacks(tmp_path, runs):
    other = write_run(tmp_path / "c", classifier.get_config("digits").to_dict(), [0.5], **{"test/accuracy": 0.9})
    both = [runs[0], *compare.read_runs([other])]
    fields = compare.differing(both)
    assert "model.name" in fields and "model.latent_dim" not in fields and "model.features" not in fields
    heading, first, second = compare.table(both)
    row = dict(zip(heading, second))
    assert row["test/accuracy"] == "0.9" and row["model.name"] == "classifier"
    assert dict(zip(heading, first))["test/accuracy"] == ""
    assert "differ in model.name, so their losses may measure different things" in compare.caveat(both)


def test_numbers_of_two_kinds_share_no_column(tmp_path, runs):
    """A density and a mass; a learned scale changes what a loss omits, but not its kind."""
    masses = small(model__likelihood="bernoulli", data__binarize="dynamic")
    both = [runs[0], *compare.read_runs([write_run(tmp_path / "c", masses, [90.0])])]
    heading, *_ = compare.table(both)
    assert "test/kl" in heading and "test/loss" not in heading
    kinds = "density on [0, 1], mass on {0, 1}"
    assert (
        compare.caveat(both)
        == f"The runs measure different things ({kinds}), so loss, reconstruction, bound are left out."
    )
    assert len(compare.draw(both).axes) == 1
    learned = small(model__likelihood="gaussian", model__learn_scale=True)
    both = [runs[0], *compare.read_runs([write_run(tmp_path / "d", learned, [-90.0])])]
    assert "test/loss" in compare.table(both)[0] and "model.learn_scale" in compare.caveat(both)


def test_a_run_of_an_older_version_lacks_fields(tmp_path, runs):
    old = small()
    del old["data"]["labelled"]
    assert compare.differing([runs[0], *compare.read_runs([write_run(tmp_path / "old", old, [1.0])])]) == []


def test_a_config_may_name_no_model(tmp_path):
    config = small()
    del config["model"]["name"]
    runs = compare.read_runs([write_run(tmp_path / "run", config, [1.0])])
    assert [*compare.metrics_of(runs)] == ["loss"]


def test_curves_are_overlaid(runs):
    figure = compare.draw(runs)
    loss, kl = figure.axes
    lines = {line.get_label(): line for line in loss.lines if not line.get_label().startswith("_")}
    np.testing.assert_array_equal(lines["a"].get_ydata(), [9.0, 8.0, 7.5])
    np.testing.assert_array_equal(lines["b"].get_xdata(), [1.0, 2.0])
    assert len(loss.lines) == len(kl.lines) == 4 and loss.get_ylabel() == "nats"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_run_in_its_first_epoch_has_a_curve(tmp_path):
    path = write_run(tmp_path / "new", small(), [])
    (tmp_path / "new" / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "epoch": 0.1, "seconds": 1.0, "train/loss": 3.0}) + "\n"
    )
    runs = compare.read_runs([path])
    assert compare.table(runs)[1] == ["new", "0.1 of 3 epochs", "", "0.0"]
    compare.draw(runs)


def test_folders_of_one_name_are_told_apart(tmp_path):
    paths = [write_run(tmp_path / parent / "run", small(), [1.0]) for parent in ("x", "y")]
    assert [run.name for run in compare.read_runs(paths)] == ["x/run", "y/run"]


def test_what_is_no_run_is_named(tmp_path, runs, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "file").touch()
    write_run(tmp_path / "fresh", small(), [])
    damaged = write_run(tmp_path / "damaged", small(), [1.0])
    (tmp_path / "damaged" / "metrics.jsonl").write_text("{}\n")
    names = ("photos", "file", "fresh", "nowhere", "a")
    assert len(compare.read_runs([str(tmp_path / name) for name in names] + [damaged])) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and lines[0] == "compare: left out: 1 files that are not folders"
    for line, what in zip(lines[1:], ("photos is not empty", "fresh has no numbers", "no run in", "line 1 of")):
        assert what in line
    with pytest.raises(ValueError, match="gs://bucket/run"):
        compare.read_runs(["gs://bucket/run"])
    with pytest.raises(ValueError, match="none of these folders is a run"):
        compare.read_runs([str(tmp_path / "photos")])


def test_as_a_program(tmp_path, runs, forks):
    arguments = ("-m", "experiments.compare", "a", "b")
    process = forks(*arguments, cwd=tmp_path)
    assert process.ends() == "" and "| a | 0 | 20 | 3 epochs | 7.5 | 2 | 3.0 |" in process.stdout
    assert {path.name for path in (tmp_path / "comparison").iterdir()} == {"summary.md", "curves.png"}
    (tmp_path / "comparison" / "curves.tmp").touch()  # left by a killed process
    forks(*arguments, cwd=tmp_path).ends()
    before = (tmp_path / "a" / "config.json").read_bytes()
    assert "a holds something other than a comparison" in forks(*arguments, "--output=a", cwd=tmp_path).ends(1)
    assert (tmp_path / "a" / "config.json").read_bytes() == before
    assert "no runs are given" in forks(*arguments[:2], cwd=tmp_path).ends(1)
