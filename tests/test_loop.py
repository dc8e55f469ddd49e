"""The loop: neither chunks nor stops change the numbers; bad numbers end it; what it leaves in the run directory."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import run_job, small_job

from configs import classifier
from vae_jax import batch, data
from vae_jax.run import session
from vae_jax.run.checkpoint import Checkpoints, select, steps
from vae_jax.run.directory import RunDirectory, read_config
from vae_jax.run.loop import make_run_chunk
from vae_jax.run.progress import Progress


def read_rows(path):
    return list(map(json.loads, (path / "metrics.jsonl").read_text().splitlines()))


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same_state(state, other):
    state, other = (
        each.replace(key=jax.random.key_data(each.key)) for each in (state, other)
    )
    jax.tree.map(np.testing.assert_array_equal, state, other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    job, config = small_job(drawn=True)
    return *run_job(job, config, tmp_path_factory.mktemp("run")), config


def test_chunks_do_not_change_the_numbers(finished, tmp_path):
    state, _, _ = finished
    job, config = small_job(chunk=2)
    other, directory = run_job(job, config, tmp_path)
    assert_same_state(state, other)
    rows = [row["step"] for row in directory.history if "train/loss" in row]
    assert rows == [2, 4, 5, 7, 9, 10]


def test_the_run_directory(finished):
    _, directory, config = finished
    stored = json.loads((directory.path / "config.json").read_text())
    assert stored == json.loads(json.dumps(config))
    rows = read_rows(directory.path)
    assert rows == directory.history
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2]
    names, place = {"loss", "reconstruction", "kl"}, {"step", "epoch", "seconds"}
    trained = {"train/grad_norm", *map("train/{}".format, names)}
    assert set(rows[0]) == place | trained
    assert set(rows[1]) == place | set(map("test/{}".format, names))
    figures = {path.name for path in (directory.path / "figures").iterdir()}
    assert figures == {"training.png", "reconstructions.png", "samples.png"}
    assert steps(directory.path / "checkpoints") == [10]
    summary = (directory.path / "summary.md").read_text()
    for part in (
        f"| test/loss | {rows[-1]['test/loss']:.4g} |",
        "| collapsed model |",
        "`python -m vae_jax.main`",
        "![samples](figures/samples.png)",
        "jax ",
    ):
        assert part in summary


def test_training_lowers_the_loss(finished):
    losses = [row["test/loss"] for row in finished[1].history if "test/loss" in row]
    assert losses[1] < losses[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not stopped."""
    return run_job(*small_job(chunk=2), tmp_path_factory.mktemp("whole"))


def stop_after(chunks):
    """A `stop` that is asked once a chunk, and answers yes from the given one on."""
    return itertools.chain([False] * (chunks - 1), itertools.repeat(True)).__next__


@pytest.mark.parametrize("stops", [(1, 3), (2, 1, 2)])
def test_a_stopped_run_continues_bit_for_bit(whole, tmp_path, stops):
    """Chunks end at the steps 2, 4, 5, 7, 9, 10: in the middle of an epoch, and at its end."""
    whole, expected = whole
    job, config = small_job(chunk=2)
    for chunks in stops:
        state, _ = run_job(job, config, tmp_path / "parts", stop_after(chunks))
        assert int(state.step) < 10
        assert steps(tmp_path / "parts" / "checkpoints")[0] == int(state.step)
    state, directory = run_job(job, config, tmp_path / "parts")
    assert_same_state(state, whole)
    assert without_time(read_rows(directory.path)) == without_time(expected.history)
    seconds = [row["seconds"] for row in directory.history]
    assert seconds == sorted(seconds)


def test_a_restore_without_the_optimizer_state_would_be_noticed(
    whole, tmp_path, monkeypatch
):
    whole, _ = whole
    job, config = small_job(chunk=2)
    run_job(job, config, tmp_path / "parts", stop_after(2))
    restore = Checkpoints.restore

    def broken(*arguments):
        state = restore(*arguments)
        return state.replace(opt_state=jax.tree.map(np.zeros_like, state.opt_state))

    monkeypatch.setattr(Checkpoints, "restore", broken)
    state, _ = run_job(job, config, tmp_path / "parts")
    with pytest.raises(AssertionError):
        assert_same_state(state, whole)


def test_rows_after_the_checkpoint_and_a_torn_one_are_dropped(tmp_path):
    job, config = small_job(chunk=2)
    run_job(job, config, tmp_path, stop_after(2))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "epoch": 1.0, "seconds": 9, "train/loss": 1.0}\n{"ste')
    _, directory = run_job(job, config, tmp_path)
    rows = [row["step"] for row in read_rows(tmp_path)]
    assert rows == [2, 4, 5, 5, 7, 9, 10, 10] and directory.history == read_rows(
        tmp_path
    )


def test_a_damaged_row_is_told(tmp_path):
    job, config = small_job(chunk=2)
    run_job(job, config, tmp_path, stop_after(2))
    file = tmp_path / "metrics.jsonl"
    file.write_text("x" + file.read_text())
    with pytest.raises(OSError, match="line 1 of .*metrics.jsonl is damaged"):
        run_job(job, config, tmp_path)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path, capsys):
    job, config = small_job(chunk=2, save_every=2)
    whole, _ = run_job(job, config, tmp_path)
    file = tmp_path / "checkpoints" / "10" / "about" / "metadata"
    file.write_bytes(b"")
    state, _ = run_job(job, config, tmp_path)
    assert_same_state(state, whole)
    assert "checkpoint 10 is damaged" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "damaged-10-1").is_dir()
    for step in steps(tmp_path / "checkpoints"):
        (tmp_path / "checkpoints" / str(step) / "about" / "metadata").write_bytes(b"")
    with pytest.raises(OSError, match="no checkpoint in .* can be read"):
        run_job(job, config, tmp_path)


def test_more_epochs(finished, tmp_path):
    """Under a constant rate a run of two epochs and one more equals a run of three."""
    job, config = small_job({"epochs": 3})
    whole, expected = run_job(job, config, tmp_path / "whole")
    run_job(*small_job(), tmp_path / "parts")
    state, directory = run_job(job, config, tmp_path / "parts")
    assert_same_state(state, whole)
    assert without_time(directory.history) == without_time(expected.history)


def test_a_classifier_learns_the_digits(tmp_path):
    """The same loop; what it leaves in the run directory."""
    config = classifier.get_config("digits").to_dict() | {"epochs": 2}
    _, directory = run_job(session.build(config), config, tmp_path)
    tested = [row for row in directory.history if "test/loss" in row]
    assert tested[1]["test/loss"] < tested[0]["test/loss"]
    assert tested[1]["test/accuracy"] > 0.9 and "test/prediction" not in tested[1]
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"training.png", "confusion.png", "mistakes.png"}


def test_validation_images_mark_the_best_checkpoint(tmp_path):
    _, config = small_job()
    config["data"]["validation"] = 100
    config["optimizer"]["learning_rate"] = (
        0.3  # so that the loss does not fall steadily
    )
    config |= {"epochs": 6, "batch_size": 400}
    config["run"] |= {"keep": 1}
    _, directory = run_job(session.build(config), config, tmp_path)
    losses = {
        row["step"]: row["validation/loss"]
        for row in directory.history
        if "validation/loss" in row
    }
    best = min(losses, key=losses.get)
    assert select(tmp_path / "checkpoints", "best") == best
    assert set(steps(tmp_path / "checkpoints")) == {best, max(losses)}
    summary = (tmp_path / "summary.md").read_text()
    assert f"| best step, used by default | {best} |" in summary
    assert f"| at the best step: validation/loss | {losses[best]:.4g} |" in summary


def test_several_seeds_equal_each_alone(tmp_path):
    job, config = small_job({"seeds": 2, "seed": 5}, chunk=2)
    job = job._replace(report=lambda *_: (dict, {"yardstick": 3.0}))
    run_job(job, config, tmp_path / "both", stop_after(3))
    state, directory = run_job(job, config, tmp_path / "both")
    for i in range(2):
        alone_job, alone_config = small_job({"seed": 5 + i}, chunk=5)
        alone, other = run_job(alone_job, alone_config, tmp_path / str(i))
        one_of_them = jax.tree.map(lambda leaf: leaf[i], state.published)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, one_of_them, alone.published)
        row, alone_row = directory.history[-1], other.history[-1]
        assert row[f"test/loss/seed{5 + i}"] == pytest.approx(
            alone_row["test/loss"], rel=1e-5
        )
    losses = [row[f"test/loss/seed{seed}"] for seed in (5, 6)]
    assert row["test/loss"] == pytest.approx(np.mean(losses))
    half = 12.7062 * np.std(losses, ddof=1) / np.sqrt(2)  # Student's t, 1 degree
    assert row["test/loss/interval"] == pytest.approx(half, rel=1e-4)
    summary = (directory.path / "summary.md").read_text()
    assert "±" in summary and "| yardstick | 3 |" in summary


def test_a_profile_is_written(tmp_path):
    job, config = small_job(chunk=2, profile=True)
    run_job(job, config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.trace.json.gz"))


@pytest.mark.parametrize("bad_step", [1, 3, 7])
def test_a_number_that_is_not_finite_stops_with_its_step_and_name(tmp_path, bad_step):
    job, config = small_job(chunk=2)

    def objective(variables, batch, keys, train, step, axis_name=None):
        metrics, model_state = job.objective(variables, batch, keys, train, step)
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

    split = batch.Split(
        np.zeros((23, 2, 2, 1), np.uint8), np.arange(23, dtype=np.int32)
    )
    order = data.epoch_order(0, 1, 23, shuffle=True)
    run_chunk = jax.jit(make_run_chunk(train_step, batch_size=5, chunk=3))
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


def test_a_directory_that_is_no_run_or_is_in_use_is_refused(tmp_path):
    assert read_config(str(tmp_path / "none")) is None
    (tmp_path / "run").mkdir()
    assert read_config(str(tmp_path / "run")) is None
    config = small_job()[1]
    directory = RunDirectory(str(tmp_path / "run"), config, "")
    assert read_config(str(tmp_path / "run"))["model"]["latent_dim"] == 20
    with pytest.raises(OSError, match="another process is training in"):
        RunDirectory(str(tmp_path / "run"), {}, "")
    directory.close()
    RunDirectory(str(tmp_path / "run"), config, "").close()

    def check(stored, config):
        raise ValueError("another run")

    with pytest.raises(ValueError, match="another run"):
        RunDirectory(str(tmp_path / "run"), config, "", check=check)
    with pytest.raises(OSError, match="is not empty and has no config.json of a run"):
        read_config(str(tmp_path))
    lost = json.dumps(config | {"epochs": None})
    for text in ("{", "{}", "[1]", "[" * 100_000, lost):
        (tmp_path / "run" / "config.json").write_text(text)
        with pytest.raises(OSError, match="has no config.json of a run"):
            RunDirectory(str(tmp_path / "run"), {}, "")
        assert (tmp_path / "run" / "config.json").read_text() == text
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            OSError, match="work directory .* name another with --workdir"
        ) as error:
            RunDirectory(str(path), {}, "")
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
