"""The loop: chunks do not change the numbers; bad numbers stop it; what it leaves in the run directory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import classifier, vae
from vae_jax import build, data
from vae_jax.rundir import Progress, RunDirectory
from vae_jax.train import make_run_chunk, train


def small_job(**run):
    """Two epochs of five steps of a small VAE on the bundled digits."""
    config = vae.get_config("smoke").to_dict()
    config |= {"epochs": 2, "batch_size": 256}
    config["model"] |= {"encoder_features": (4, 4), "decoder_features": (4, 4)}
    config["run"] |= run
    return build.build(config), config


def read_rows(path):
    return list(map(json.loads, (path / "metrics.jsonl").read_text().splitlines()))


def run_job(job, config, path):
    directory = RunDirectory(str(path), config)
    state, numbers = train(job, directory, Progress(1, job.epochs))
    return state, numbers, directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    job, config = small_job()
    return *run_job(job, config, tmp_path_factory.mktemp("run")), config


def test_chunks_do_not_change_the_numbers(finished, tmp_path):
    state, numbers, _, _ = finished
    job, config = small_job(chunk=2, figures_every=1)
    other, other_numbers, directory = run_job(job, config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state.params, other.params)
    assert numbers == pytest.approx(other_numbers, rel=1e-6)
    steps = [row["step"] for row in directory.history if "train/loss" in row]
    assert steps == [2, 4, 5, 7, 9, 10]


def test_the_run_directory(finished):
    _, numbers, directory, config = finished
    stored = json.loads((directory.path / "config.json").read_text())
    assert stored == json.loads(json.dumps(config))
    rows = read_rows(directory.path)
    assert rows == directory.history
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2]
    names = {"loss", "reconstruction", "kl"}
    assert set(rows[0]) == {
        "step",
        "epoch",
        "train/grad_norm",
        *map("train/{}".format, names),
    }
    assert set(rows[1]) == {"step", "epoch", *map("test/{}".format, names)}
    assert numbers["test/loss"] == rows[-1]["test/loss"]
    figures = {path.name for path in (directory.path / "figures").iterdir()}
    assert figures == {"training.png", "reconstructions.png", "samples.png"}
    directory.write_summary("VAE on digits", "python -m vae_jax.main", numbers)
    summary = (directory.path / "summary.md").read_text()
    for part in (
        "| test/loss |",
        "`python -m vae_jax.main`",
        "![samples](figures/samples.png)",
        "jax ",
    ):
        assert part in summary


def test_training_lowers_the_loss(finished):
    losses = [row["test/loss"] for row in finished[2].history if "test/loss" in row]
    assert losses[1] < losses[0]


def test_a_classifier_learns_the_digits(tmp_path):
    """The same loop; what it leaves in the run directory."""
    config = classifier.get_config("digits").to_dict() | {"epochs": 2}
    _, numbers, directory = run_job(build.build(config), config, tmp_path)
    losses = [row["test/loss"] for row in directory.history if "test/loss" in row]
    assert losses[1] < losses[0]
    assert numbers["test/accuracy"] > 0.9 and "test/prediction" not in numbers
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"training.png", "confusion.png", "mistakes.png"}


def test_validation_images_are_evaluated_too(tmp_path):
    _, config = small_job()
    config["data"]["validation"] = 100
    job = build.build(config)
    _, numbers, _ = run_job(job, config, tmp_path)
    assert {"validation/loss", "test/loss"} < set(numbers)


@pytest.mark.parametrize("bad_step", [1, 3, 7])
def test_a_number_that_is_not_finite_stops_with_its_step_and_name(tmp_path, bad_step):
    job, config = small_job(chunk=2)

    def objective(variables, batch, keys, train, axis_name=None):
        metrics, model_state = job.objective(variables, batch, keys, train)
        # The gradient's noise differs at each step; find out which one this is from the first key.
        is_bad = jnp.any(jax.random.key_data(keys)[0] == bad_data) & train
        return metrics | {
            "loss": jnp.where(is_bad, jnp.inf, metrics["loss"])
        }, model_state

    order = data.epoch_order(job.seed, 1 + (bad_step - 1) // 5, 1437, True)
    first = order[(bad_step - 1) % 5 * 256]
    key = jax.random.fold_in(
        jax.random.fold_in(jax.random.key(job.seed), bad_step - 1), first
    )
    bad_data = jax.random.key_data(key)
    with pytest.raises(
        FloatingPointError, match=rf"train/\w+ is (inf|nan) at step {bad_step}:"
    ):
        run_job(job._replace(objective=objective), config, tmp_path)
    rows = read_rows(tmp_path)
    assert all(row["step"] < bad_step for row in rows)


def test_an_epoch_takes_each_example_once():
    """A step that only notes which examples it gets."""

    def train_step(state, batch):
        rows = batch.index
        return state.at[rows].add(1), {"first": rows[0], "label": batch.label[0]}

    split = data.Split(np.zeros((23, 2, 2, 1), np.uint8), np.arange(23, dtype=np.int32))
    order = data.epoch_order(0, 1, 23, shuffle=True)
    run_chunk = make_run_chunk(train_step, batch_size=5, chunk=3)
    seen = jnp.zeros(23, jnp.int32)
    for first, count in [(0, 3), (3, 1)]:
        seen, history = run_chunk(
            seen, jnp.asarray(order), first, count, *map(jnp.asarray, split)
        )
        np.testing.assert_array_equal(
            history["first"][:count], order[5 * first :: 5][:count]
        )
        np.testing.assert_array_equal(history["first"], history["label"])
    assert run_chunk._cache_size() == 1  # another count is not another program
    np.testing.assert_array_equal(np.flatnonzero(seen), np.sort(order[:20]))
    assert seen.max() == 1


def test_a_used_directory_is_refused(tmp_path):
    RunDirectory(str(tmp_path / "run"), {})
    with pytest.raises(OSError, match="is not empty: name another with --workdir"):
        RunDirectory(str(tmp_path / "run"), {})
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            OSError, match="work directory .* name another with --workdir"
        ) as error:
            RunDirectory(str(path), {})
        assert "\n" not in str(error.value)


def test_progress_without_a_terminal_prints_lines(capsys):
    progress = Progress(images=100, epochs=2)
    progress.update(50, 1, 20.0)
    progress.epoch_done(1, {"train/loss": 20.0, "train/kl": 1.0, "test/loss": 21.0})
    progress.close()
    out = capsys.readouterr().out
    assert (
        out.startswith("epoch 1/2  train/loss 20.000  test/loss 21.000  ")
        and out.count("\n") == 1
    )
