"""The loop: neither the steps in a call nor stops change the numbers; bad numbers end it; what it writes."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import assert_same_state, run_job, small_job, stop_after, without_time

from configs import classifier
from vae_jax import batch, data
from vae_jax.run import session
from vae_jax.run.checkpoint import Checkpoints
from vae_jax.run.directory import RunDirectory, read_config
from vae_jax.run.files import read_json_lines
from vae_jax.run.log import OwnedDirectory
from vae_jax.run.progress import Progress
from vae_jax.run.stored import select, steps
from vae_jax.steps import make_run_steps


def read_rows(path):
    return list(map(json.loads, (path / "metrics.jsonl").read_text().splitlines()))


def test_the_steps_in_a_call_do_not_change_the_numbers(small, tmp_path):
    job, config = small_job(steps_per_call=2)
    other, directory = run_job(job, config, tmp_path)
    assert_same_state(small[0], other)
    rows = [row["step"] for row in directory.history if "train/loss" in row]
    assert rows == [2, 4, 5, 7, 9, 10]


def test_the_run_directory(small):
    _, directory, _, config = small
    stored = json.loads((directory.path / "config.json").read_text())
    assert stored == {"format": 3, "saved": 10} | json.loads(json.dumps(config))
    rows = read_rows(directory.path)
    assert rows == directory.history
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2]
    names, place = {"loss", "reconstruction", "kl", "bound"}, {"step", "epoch", "seconds"}
    trained = {"train/grad_norm", *map("train/{}".format, names)}
    assert set(rows[0]) == place | trained
    assert set(rows[1]) == place | set(map("test/{}".format, names | {"active_units", "kl_by_latent"}))
    figures = {path.name for path in (directory.path / "figures").iterdir()}
    drawn = {f"{name}.png" for name in ("training", "reconstructions", "samples", "codes", "manifold")}
    assert figures == drawn | {"reconstructions.webp", "samples.webp", "epochs"}
    epochs = {path.name for path in (directory.path / "figures" / "epochs").iterdir()}
    assert epochs == {f"{name}-0000{epoch}.png" for name in ("reconstructions", "samples") for epoch in (1, 2)}
    assert steps(directory.path / "checkpoints") == [10]
    summary = (directory.path / "summary.md").read_text()
    for part in (
        f"| test/loss | {rows[-1]['test/loss']:.4g} |",
        "| collapsed model |",
        "`python -m vae_jax.main`",
        "![samples](figures/samples.png)",
        "jax ",
        "- images: 1,437 train, 360 test",
        "| decoder tconv4 | 3x3x4x1 | 28x28x1 | 37 |",
    ):
        assert part in summary
    page = (directory.path / "summary.html").read_text()
    assert page.count('src="data:image/png;base64,') == 5 and not re.search(r'(src|href)="(?!data:)', page)


def test_training_lowers_the_loss(small):
    losses = [row["test/loss"] for row in small[1].history if "test/loss" in row]
    assert losses[1] < losses[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_job(*small_job(steps_per_call=2), tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("stops", [(1, 3), (2, 1, 2)])
def test_a_stopped_run_continues_bit_for_bit(uninterrupted, tmp_path, stops):
    """Calls end at the steps 2, 4, 5, 7, 9, 10: in the middle of an epoch, and at its end."""
    expected_state, expected = uninterrupted
    job, config = small_job(steps_per_call=2)
    for calls in stops:
        state, _ = run_job(job, config, tmp_path / "parts", stop_after(calls))
        assert int(state.step) < 10
        assert steps(tmp_path / "parts" / "checkpoints")[0] == int(state.step)
    state, directory = run_job(job, config, tmp_path / "parts")
    assert_same_state(state, expected_state)
    assert without_time(read_rows(directory.path)) == without_time(expected.history)
    seconds = [row["seconds"] for row in directory.history]
    assert seconds == sorted(seconds)


def test_a_restore_without_the_optimizer_state_is_noticed(uninterrupted, tmp_path, monkeypatch):
    """The control of the test above: it can fail."""
    expected_state, _ = uninterrupted
    job, config = small_job(steps_per_call=2)
    run_job(job, config, tmp_path / "parts", stop_after(2))
    restore = Checkpoints.restore

    def broken(*arguments):
        state = restore(*arguments)
        return state.replace(opt_state=jax.tree.map(np.zeros_like, state.opt_state))

    monkeypatch.setattr(Checkpoints, "restore", broken)
    state, _ = run_job(job, config, tmp_path / "parts")
    with pytest.raises(AssertionError):
        assert_same_state(state, expected_state)


def test_rows_after_the_checkpoint_and_an_incomplete_one_are_dropped(tmp_path):
    job, config = small_job(steps_per_call=2)
    run_job(job, config, tmp_path, stop_after(2))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "epoch": 1.0, "seconds": 9, "train/loss": 1.0}\n{"ste')
    _, directory = run_job(job, config, tmp_path)
    rows = [row["step"] for row in read_rows(tmp_path)]
    assert rows == [2, 4, 5, 5, 7, 9, 10, 10] and directory.history == read_rows(tmp_path)


@pytest.mark.slow
def test_more_epochs(tmp_path):
    """Under a constant rate a run of two epochs and one more equals a run of three."""
    job, config = small_job({"epochs": 3})
    expected_state, expected = run_job(job, config, tmp_path / "three")
    run_job(*small_job(), tmp_path / "parts")
    state, directory = run_job(job, config, tmp_path / "parts")
    assert_same_state(state, expected_state)
    assert without_time(directory.history) == without_time(expected.history)


@pytest.mark.slow
def test_a_classifier_learns_the_digits(tmp_path):
    """The same loop; the highest accuracy marks the best checkpoint."""
    config = classifier.get_config("digits").to_dict() | {"epochs": 2}
    config["data"]["validation"] = 100
    config["run"] |= {"keep": 1}
    _, directory = run_job(session.build(config), config, tmp_path)
    tested = [row for row in directory.history if "test/loss" in row]
    assert tested[1]["test/loss"] < tested[0]["test/loss"]
    assert tested[1]["test/accuracy"] > 0.9 and "test/prediction" not in tested[1]
    assert 0 <= tested[1]["test/calibration_error"] < 0.5
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"training.png", "confusion.png", "mistakes.png"}
    check_best(tmp_path, directory, "validation/accuracy", max)


@pytest.mark.slow
def test_validation_images_mark_the_best_checkpoint(tmp_path):
    """The lowest bound, by default: at this rate it does not fall steadily."""
    changes = {"epochs": 6, "batch_size": 400, "data.validation": 100, "optimizer.learning_rate": 0.3}
    _, directory = run_job(*small_job(changes, keep=1), tmp_path)
    check_best(tmp_path, directory, "validation/bound", min)


def check_best(path, directory, metric, most):
    """The first epoch with the best value is kept, besides the last one, and the summary names it."""
    values = {row["step"]: row[metric] for row in directory.history if metric in row}
    best, last = most(values, key=values.get), max(values)
    assert min(values.values()) < max(values.values())  # or any epoch would do
    assert select(path / "checkpoints", "best")["step"] == select(path / "checkpoints")["step"] == best
    assert set(steps(path / "checkpoints")) == {best, last}
    summary = (path / "summary.md").read_text()
    assert f"| best step | {best} |" in summary
    assert f"| at the best step: {metric} | {values[best]:.4g} |" in summary


@pytest.mark.slow
def test_several_seeds_equal_each_alone(tmp_path):
    job, config = small_job({"seeds": 2, "seed": 5}, steps_per_call=2)
    job = job._replace(baselines=lambda: {"a baseline": 3.0})
    run_job(job, config, tmp_path / "both", stop_after(3))
    state, directory = run_job(job, config, tmp_path / "both")
    for i in range(2):
        alone_job, alone_config = small_job({"seed": 5 + i}, steps_per_call=5)
        alone, other = run_job(alone_job, alone_config, tmp_path / str(i))
        one_of_them = jax.tree.map(lambda leaf: leaf[i], state.eval_variables)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, one_of_them, alone.eval_variables)
        row, alone_row = directory.history[-1], other.history[-1]
        assert row[f"test/loss/seed{5 + i}"] == pytest.approx(alone_row["test/loss"], rel=1e-5)
    losses = [row[f"test/loss/seed{seed}"] for seed in (5, 6)]
    assert row["test/loss"] == pytest.approx(np.mean(losses))
    half = 12.7062 * np.std(losses, ddof=1) / np.sqrt(2)  # Student's t, 1 degree
    assert row["test/loss/interval"] == pytest.approx(half, rel=1e-4)
    summary = (directory.path / "summary.md").read_text()
    assert "±" in summary and "| a baseline | 3 |" in summary


@pytest.mark.slow
def test_a_profile_is_written(tmp_path):
    job, config = small_job(steps_per_call=2, profile=True)
    run_job(job, config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.trace.json.gz"))


@pytest.mark.parametrize("bad_step", [7, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3))])
def test_a_number_that_is_not_finite_stops_with_its_step_and_name(tmp_path, bad_step):
    job, config = small_job(steps_per_call=2)

    def objective(variables, batch, keys, train, step, axis_name=None):
        metrics, model_state = job.objective(variables, batch, keys, train, step)
        loss = metrics["loss"]
        if train:  # steps count from 1 in logs, from 0 in the objective
            loss = jnp.where(step == bad_step - 1, jnp.inf, loss)
        return metrics | {"loss": loss}, model_state

    with pytest.raises(FloatingPointError, match=rf"train/\w+ is (inf|nan) at step {bad_step}:"):
        run_job(job._replace(objective=objective), config, tmp_path)
    rows = read_rows(tmp_path)
    assert all(row["step"] < bad_step for row in rows)


def test_a_metric_counts_with_its_own_weight_and_is_left_out_where_that_is_zero(tmp_path):
    """Its value is the step's number and its weight twice that, but 0 in the last call and in half of each batch."""
    job, config = small_job({"epochs": 1}, steps_per_call=2)

    def objective(variables, batch, keys, train, step, axis_name=None):
        metrics, model_state = job.objective(variables, batch, keys, train, step)
        if step is None:
            marked = batch.label.astype(jnp.float32), (batch.label < 3).astype(jnp.float32)
        else:
            number = jnp.broadcast_to(step + 1.0, batch.weight.shape)
            marked = number, jnp.where((batch.index % 2 == 0) & (step < 4), 2 * number, 0)
        return metrics | {"marked": marked}, model_state

    order = job.order(1)
    even = [np.sum(order[start : start + 256] % 2 == 0) for start in range(0, 5 * 256, 256)]
    _, directory = run_job(job._replace(objective=objective), config, tmp_path)
    first, second, last, tested = directory.history
    for row, numbers in [(first, (1, 2)), (second, (3, 4))]:
        total = sum(2 * number**2 * even[number - 1] for number in numbers)
        weight = sum(2 * number * even[number - 1] for number in numbers)
        assert row["train/marked"] == pytest.approx(total / weight, rel=1e-6)
    assert "train/marked" not in last and "train/loss" in last
    label = job.dataset.splits["test"].label
    assert tested["test/marked"] == pytest.approx(label[label < 3].mean(), rel=1e-6)
    assert "| test/marked |" in (tmp_path / "summary.md").read_text()


def test_an_epoch_takes_each_example_once():
    """A step that only notes which examples it gets."""

    def train_step(state, batch):
        rows = batch.index
        return state.at[rows].add(1), {"first": rows[0], "label": batch.label[0]}

    split = batch.Split(np.zeros((23, 2, 2, 1), np.uint8), np.arange(23, dtype=np.int32))
    order = data.epoch_order(0, 1, np.zeros(23, np.int32), shuffle=True)
    run_steps = jax.jit(make_run_steps(train_step, batch_size=5, max_steps=3))
    seen = jnp.zeros(23, jnp.int32)
    for first, count in [(0, 3), (3, 1)]:
        seen, history = run_steps(seen, jnp.asarray(order), first, count, *map(jnp.asarray, split))
        np.testing.assert_array_equal(history["first"][:count], order[5 * first :: 5][:count])
        np.testing.assert_array_equal(history["first"], history["label"])
    assert run_steps._cache_size() == 1  # another count is not another program
    np.testing.assert_array_equal(np.flatnonzero(seen), np.sort(order[:20]))
    assert seen.max() == 1


def test_a_batch_may_have_more_examples_than_the_data():
    def train_step(state, batch):
        return state.at[batch.index].add(1), {"first": batch.label[0] * batch.weight[0]}

    image, label = jnp.zeros((3, 2, 2, 1), jnp.uint8), jnp.arange(3)
    seen, _ = make_run_steps(train_step, 5, 1)(jnp.zeros(3), jnp.arange(5) % 3, 0, 1, image, label)
    assert seen.tolist() == [2, 2, 1]


def test_shares_of_a_batch_are_disjoint_and_make_up_the_batch():
    def train_step(state, batch):
        return state.at[batch.index].add(1), {"first": batch.index[0]}

    split = batch.Split(np.zeros((13, 2, 2, 1), np.uint8), np.arange(13, dtype=np.int32))
    order = data.epoch_order(0, 1, np.zeros(13, np.int32), shuffle=True)
    run_steps = make_run_steps(train_step, batch_size=6, max_steps=2, shards=3)
    for shard in range(3):
        seen = jnp.zeros(13, jnp.int32)
        seen, _ = run_steps(seen, jnp.asarray(order), 0, 2, *map(jnp.asarray, split), shard)
        expected = np.concatenate([order[2 * shard :][:2], order[6 + 2 * shard :][:2]])
        np.testing.assert_array_equal(np.flatnonzero(seen), np.sort(expected))


def test_a_directory_that_holds_something_else_or_is_in_use_is_refused(tmp_path):
    assert read_config(str(tmp_path / "none")) is None
    (tmp_path / "run").mkdir()
    assert read_config(str(tmp_path / "run")) is None
    config = small_job()[1]
    directory = RunDirectory(str(tmp_path / "run"), config, "")
    assert read_config(str(tmp_path / "run")) == json.loads(json.dumps(config))
    with pytest.raises(OSError, match="another process is working in .*: wait for it, or name another"):
        RunDirectory(str(tmp_path / "run"), {}, "")
    directory.close()
    RunDirectory(str(tmp_path / "run"), config, "").close()
    with pytest.raises(ValueError, match=r"holds another run \(seed is 0 there, 77 here\): name another with"):
        RunDirectory(str(tmp_path / "run"), config | {"seed": 77}, "")
    with pytest.raises(OSError, match="is not empty and has no config.json of a run"):
        read_config(str(tmp_path))
    for text in ("{", "{}", "[1]", "[" * 100_000):
        check_refused(tmp_path / "run", text, "has no config.json of a run")
    for lost in ({"epochs": None}, {"seed": "0"}, {"best": 1}, {"data": []}):
        text = json.dumps({"format": 3} | config | lost)
        check_refused(tmp_path / "run", text, "config.json is damaged: restore it, or name another with --workdir")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"{tmp_path}/file.*: name another with --workdir") as error:
            RunDirectory(str(path), {}, "")
        assert "\n" not in str(error.value)


def check_refused(path, text, message):
    """A config.json of this text is refused in one line, and stays as it is."""
    (path / "config.json").write_text(text)
    with pytest.raises(OSError, match=message) as error:
        RunDirectory(str(path), {}, "")
    assert "\n" not in str(error.value)
    assert (path / "config.json").read_text() == text


@pytest.mark.parametrize("number", [{}, {"format": 1}, {"format": 2}, {"format": 4}, {"format": "3"}])
def test_a_run_of_another_format_is_refused(tmp_path, number):
    """One without a number is of the format that came before numbers, which commit af11a1a reads."""
    config = small_job()[1]
    RunDirectory(str(tmp_path), config, "").close()
    message = "af11a1a reads" if number.get("format", 1) == 1 else "has format .*, but this version of vae_jax reads 3"
    message = "config.json is damaged" if number == {"format": "3"} else message
    check_refused(tmp_path, json.dumps(number | config), message)
    with pytest.raises(OSError, match="name another with --workdir"):
        session.run(config, str(tmp_path), 0, lambda: None)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "figures", "lock"}


def test_an_old_run_is_refused_whatever_else_its_config_says(tmp_path):
    """Its fields have other names: they are not reported as damage."""
    sections = {name: {"name": "x"} for name in ("data", "model", "objective", "optimizer")}
    old = sections | {"run": {"best": "loss", "chunk": 20}, "epochs": 1, "seed": 0, "seeds": 1}
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(OSError, match="written by an earlier format of vae_jax, which commit af11a1a reads"):
        read_config(str(tmp_path))


def test_an_owned_directory_keeps_rows(tmp_path):
    path = tmp_path / "deep" / "study"
    directory = OwnedDirectory(path, "rows.jsonl")
    assert directory.rows == [] and not (path / "rows.jsonl").exists()
    for number in range(3):
        directory.append({"number": number})
    assert read_json_lines(path / "rows.jsonl") == directory.rows == [{"number": n} for n in range(3)]
    directory.keep(directory.rows[:1])
    directory.append({"number": 7})
    assert read_json_lines(path / "rows.jsonl") == directory.rows == [{"number": 0}, {"number": 7}]
    assert not list(path.glob("*.tmp"))
    directory.close()


def test_a_lost_lock_stops_the_one_that_lost_it(tmp_path):
    first = OwnedDirectory(tmp_path, "rows.jsonl")
    first.append({"number": 1})
    (tmp_path / "lock").unlink()
    with pytest.raises(OSError, match="the file lock in .* was deleted or replaced") as error:
        first.append({"number": 2})
    assert "\n" not in str(error.value)
    second = OwnedDirectory(tmp_path, "rows.jsonl")
    second.append({"number": 3})
    for write in (lambda: first.append({"number": 2}), lambda: first.keep([])):
        with pytest.raises(OSError, match="the file lock in"):
            write()
    assert [row["number"] for row in read_json_lines(tmp_path / "rows.jsonl")] == [1, 3]
    for directory in (first, second):
        directory.close()


def test_progress_without_a_terminal_prints_lines(capsys):
    progress = Progress(images=100, epochs=2)
    progress.update(50, 1, 20.0)
    progress.epoch_done(1, {"train/loss": 20.0, "train/kl": 1.0, "test/loss": 21.0})
    progress.close()
    out = capsys.readouterr().out
    assert out.startswith("epoch 1/2  train/loss 20.000  test/loss 21.000  ") and out.count("\n") == 1
