"""Checkpoints: a restored state equals the saved one, damage is reported, the latest and the best are kept."""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from small_run import empty, flip_a_bit, truncate

from vae_jax.run import checkpoint, stored
from vae_jax.run.checkpoint import Checkpoints, restore_variables
from vae_jax.run.stored import select
from vae_jax.steps import init_state

OPTIMIZER = optax.adam(optax.cosine_decay_schedule(1.0, 10))
LOSS = ("validation/loss", "lower")
ACCURACY = ("validation/accuracy", "higher")


def make_state(step=0, ema_decay=0.0):
    params = {
        "a": {"kernel": jnp.arange(600.0).reshape(20, 30) + step},
        "b": -jnp.ones(3),
    }
    variables = {"params": params, "batch_stats": {"mean": jnp.full(4, step + 0.5)}}
    state = init_state(variables, OPTIMIZER, jax.random.key(7), ema_decay)
    return state.replace(step=jnp.int32(step))


def write(folder, values, keep=2, best=LOSS):
    """Resume, then save a checkpoint for each {step: value of the metric}; None: the step was not evaluated."""
    checkpoints = Checkpoints(folder, {"config": {"seed": 1}}, keep, best)
    checkpoints.restore(jax.eval_shape(make_state), pytest.fail)
    name, _ = best or LOSS
    for step, value in values.items():
        metrics = {} if value is None else {name: value, "test/loss": 0.0}
        checkpoints.save(step, make_state(step), metrics)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def numbers(state):
    """The state with its root key as integers, which NumPy can compare."""
    return state.replace(key=jax.random.key_data(state.key))


def chosen(folder, which=""):
    return select(folder, which)["step"]


def restore(folder, like=None, keep=9, best=LOSS):
    """The state that training would continue from, and the lines reported."""
    lines = []
    checkpoints = Checkpoints(folder, {"config": {"seed": 1}}, keep, best)
    return checkpoints.restore(jax.eval_shape(make_state) if like is None else like, lines.append), lines


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_restored_state_is_the_saved_one(tmp_path, ema_decay):
    state = make_state(3, ema_decay)
    checkpoints = Checkpoints(tmp_path, {"config": {"seed": 1}}, keep=1)
    checkpoints.save(3, state, {})
    like = jax.eval_shape(lambda: make_state(0, ema_decay))
    restored, lines = restore(tmp_path, like)
    assert lines == []
    assert_same(numbers(restored), numbers(state))
    variables = restore_variables(tmp_path, 3, jax.eval_shape(lambda: state.eval_variables))
    assert_same(variables, state.eval_variables)
    assert stored.read_metadata(tmp_path, 3)["config"] == {"seed": 1}


def test_the_latest_and_the_best_are_kept_though_the_metric_worsens(tmp_path):
    write(tmp_path, {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0, 5: None})
    assert stored.steps(tmp_path) == [5, 4, 2]
    write(tmp_path, {6: 3.5, 7: 8.0})  # after a restart
    assert stored.steps(tmp_path) == [7, 6, 2]
    write(tmp_path, {8: 2.0, 9: 7.0})
    assert stored.steps(tmp_path) == [9, 8]
    assert chosen(tmp_path) == chosen(tmp_path, "best") == 8
    assert chosen(tmp_path, "latest") == chosen(tmp_path, "9") == 9


@pytest.mark.parametrize("name", ["validation/accuracy", "validation/loss", "validation/x"])
def test_the_better_direction_is_the_given_one_whatever_the_name(tmp_path, name):
    values = {1: 0.5, 2: 0.9, 3: 0.2, 4: 0.7, 5: 0.6}
    for better, expected in [("higher", 2), ("lower", 3)]:
        folder = tmp_path / better
        write(folder, values, best=(name, better))
        assert stored.steps(folder) == [5, 4, expected] and chosen(folder) == expected
        write(folder, {6: 0.55}, best=(name, better))  # after a restart
        assert stored.steps(folder) == [6, 5, expected] and chosen(folder) == expected


@pytest.mark.parametrize(
    "best,value,better,worse", [(LOSS, 3.0, 2.9, 3.1), (ACCURACY, 0.8, 0.9, 0.7), (LOSS, -3.0, -3.1, 3.0)]
)
def test_only_a_better_value_is_the_best(tmp_path, best, value, better, worse):
    write(tmp_path, {1: value}, best=best)
    checkpoints = Checkpoints(tmp_path, {"config": {"seed": 1}}, 2, best)
    checkpoints.restore(jax.eval_shape(make_state), pytest.fail)
    assert checkpoints.best["step"] == 1
    assert checkpoints.is_best({best[0]: better})
    assert not checkpoints.is_best({best[0]: value})  # of equal ones the first
    assert not checkpoints.is_best({best[0]: worse})
    assert not checkpoints.is_best({"test/loss": -9.0}) and not checkpoints.is_best({})


def test_without_a_best_one_the_latest_counts(tmp_path):
    write(tmp_path, {1: 5.0, 2: 1.0, 3: 4.0}, best=None)
    assert stored.steps(tmp_path) == [3, 2] and chosen(tmp_path) == 3
    with pytest.raises(ValueError, match="that takes an epoch with validation images"):
        select(tmp_path, "best")
    with pytest.raises(ValueError, match="'1' .* give latest, best, or one of 3, 2"):
        select(tmp_path, "1")


def test_a_step_is_a_number_or_its_digits(tmp_path):
    write(tmp_path, {1: None, 2: None})
    assert chosen(tmp_path, 1) == chosen(tmp_path, "1") == 1


def test_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        assert stored.steps(folder) == []
        with pytest.raises(ValueError, match="there is no checkpoint in"):
            select(folder)
    assert not (tmp_path / "none").exists()


def make_unreadable(path):
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, Path.unlink, make_unreadable])
def test_damage_to_any_file_is_reported_and_the_one_before_is_used(tmp_path, tally, damage):
    write(tmp_path / "good", {1: None, 2: None})
    names = [
        path.relative_to(tmp_path / "good")
        for path in (tmp_path / "good" / "2").rglob("*")
        if path.is_file() and (path.stat().st_size or damage is Path.unlink)
    ]
    assert len(names) > 10
    for name in names:
        shutil.copytree(tmp_path / "good", tmp_path / "damaged")
        damage(tmp_path / "damaged" / name)
        with tally("corruptions"):
            state, lines = restore(tmp_path / "damaged")
            (line,) = lines
            assert re.match("checkpoint 2 is damaged: .*; renamed damaged-2-1$", line)
            assert_same(numbers(state), numbers(make_state(1)))
            assert (tmp_path / "damaged" / "damaged-2-1").is_dir()
        shutil.rmtree(tmp_path / "damaged")


@pytest.mark.parametrize("content", ["{}", "5", "[]", "null", '"text"', "[" * 9999])
def test_a_list_of_files_that_lists_nothing_is_damage(tmp_path, content):
    write(tmp_path, {1: None, 2: None})
    (tmp_path / "2" / "sha256.json").write_text(content)
    state, (line,) = restore(tmp_path)
    assert line.startswith("checkpoint 2 is damaged: ")
    assert_same(numbers(state), numbers(make_state(1)))


def test_a_file_that_was_added_is_damage(tmp_path):
    write(tmp_path, {1: None})
    (tmp_path / "1" / "state" / "more").write_text("")
    with pytest.raises(ValueError, match="checkpoint 1 is damaged: .*state/more"):
        select(tmp_path)


def test_swapped_and_renamed_folders_are_reported(tmp_path):
    write(tmp_path, {1: None, 2: None, 3: None}, keep=3)
    for source, target in [("3", "x"), ("2", "3"), ("x", "2")]:
        (tmp_path / source).rename(tmp_path / target)
    with pytest.raises(ValueError, match="checkpoint 3 is damaged: .*this is checkpoint 2: rename its folder"):
        select(tmp_path, "3")
    state, lines = restore(tmp_path)
    assert [line.split(" is damaged")[0] for line in lines] == ["checkpoint 3", "checkpoint 2"]
    assert_same(numbers(state), numbers(make_state(1)))
    assert restore(tmp_path)[1] == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    write(tmp_path, {1: None, 2: None})
    for name in ("3.tmp", "3.tmp.orbax-checkpoint-tmp", "0.deleted.tmp"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    assert stored.steps(tmp_path) == [2, 1]
    write(tmp_path, {3: None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints(tmp_path, monkeypatch):
    """Each call by which a save changes the disk raises in turn; every folder named after a step is then complete."""
    write(tmp_path / "good", {1: None, 2: None}, keep=1)
    moments = [
        (checkpoint, "digests"),
        (Checkpoints, "_delete"),
        (epath.Path, "rename"),
        (epath.Path, "rmtree"),
        (epath.Path, "write_text"),
    ]
    for i, (owner, name) in enumerate(moments):
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / str(i)))
        checkpoints = Checkpoints(folder, {"config": {"seed": 1}}, 1)
        checkpoints.restore(jax.eval_shape(make_state), pytest.fail)
        with monkeypatch.context() as patch:
            patch.setattr(type(checkpoints._folder) if owner is epath.Path else owner, name, stop)
            with pytest.raises((KeyboardInterrupt, OSError)):
                checkpoints.save(3, make_state(3), {})
        found = stored.steps(folder)
        assert found in ([2], [3, 2], [3])
        state, lines = restore(folder)
        assert lines == []
        assert_same(numbers(state), numbers(make_state(found[0])))


def stop(*arguments, **options):
    raise KeyboardInterrupt


def test_nothing_starts_from_scratch_where_all_are_damaged(tmp_path):
    assert restore(tmp_path / "none") == (None, [])
    write(tmp_path, {1: None, 2: None})
    for step in (1, 2):
        truncate(tmp_path / str(step) / "metadata" / "metadata")
    with pytest.raises(OSError, match="no checkpoint in .* can be read .*: move the whole run directory away"):
        restore(tmp_path)
    assert stored.steps(tmp_path) == [2, 1]


def test_training_continues_after_a_damaged_checkpoint(tmp_path):
    """Also at steps below it, and when the same step is damaged twice."""
    write(tmp_path, {3: None, 5: None}, keep=9)
    for attempt in (1, 2):
        truncate(tmp_path / "5" / "metadata" / "metadata")
        checkpoints = Checkpoints(tmp_path, {"config": {"seed": 1}}, 9)
        checkpoints.restore(jax.eval_shape(make_state), lambda line: None)
        if attempt == 1:
            checkpoints.save(4, make_state(4), {})
        checkpoints.save(5, make_state(5), {})
        assert stored.steps(tmp_path) == [5, 4, 3]
        assert (tmp_path / f"damaged-5-{attempt}").is_dir()
    state, lines = restore(tmp_path)
    assert lines == []
    assert_same(numbers(state), numbers(make_state(5)))


def test_of_equal_metrics_the_first_is_the_best_after_a_restart_too(tmp_path):
    write(tmp_path, {1: 3.0, 2: 3.0}, keep=1)
    assert chosen(tmp_path) == 1
    write(tmp_path, {3: 3.0, 4: 5.0}, keep=1)
    assert chosen(tmp_path) == 1 and stored.steps(tmp_path) == [4, 1]


@pytest.mark.parametrize("name", ["state/_METADATA", "metadata/metadata", "sha256.json", ""])
def test_a_damaged_best_checkpoint_stays_the_best_and_is_never_deleted(tmp_path, name):
    """Damage does not change which checkpoint is the best; for "" its folder is moved away."""
    write(tmp_path, {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0})
    damaged = tmp_path / "2"
    if name:
        flip_a_bit(damaged / name)
    else:
        damaged.rename(tmp_path / "elsewhere")
    for which in ("", "best"):
        with pytest.raises(ValueError, match="checkpoint 2 is damaged|best checkpoint, of step 2, is lost"):
            select(tmp_path, which)
    lines = []
    checkpoints = Checkpoints(tmp_path, {"config": {"seed": 1}}, 2, LOSS)
    checkpoints.restore(jax.eval_shape(make_state), lines.append)
    assert "the best checkpoint, of step 2, is lost" in lines[-1]
    for step, value in {5: 3.5, 6: 3.0, 7: 9.0}.items():
        checkpoints.save(step, make_state(step), {"validation/loss": value})
        assert checkpoints.best == {"step": 2, "cost": 3.0}
    with pytest.raises(ValueError, match="the best checkpoint, of step 2, is lost"):
        select(tmp_path)
    assert chosen(tmp_path, "latest") == 7
    assert (tmp_path / ("damaged-2-1" if name else "elsewhere")).is_dir()
    checkpoints.save(8, make_state(8), {"validation/loss": 2.0})
    assert chosen(tmp_path) == 8


def test_the_best_one_is_made_again_where_training_repeats_its_step(tmp_path):
    write(tmp_path, {1: 5.0, 2: 3.0})
    flip_a_bit(tmp_path / "2" / "metadata" / "metadata")
    checkpoints = Checkpoints(tmp_path, {"config": {"seed": 1}}, 2, LOSS)
    checkpoints.restore(jax.eval_shape(make_state), lambda line: None)
    assert checkpoints.best["step"] == 1 and checkpoints.is_best({"validation/loss": 3.0})


def test_another_environment_is_reported(tmp_path):
    changed = "the environment has changed since checkpoint 2 (CPU cores was 2, is 1): from here on"
    for cores, expected in [("2", []), ("2", []), ("1", [changed])]:
        checkpoints = Checkpoints(tmp_path, {"environment": {"jax": "9", "CPU cores": cores}}, 1)
        lines = []
        checkpoints.restore(jax.eval_shape(make_state), lines.append)
        assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
        if not expected:
            step = (stored.steps(tmp_path) or [0])[0] + 1
            checkpoints.save(step, make_state(step), {})


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write(tmp_path, {1: None, 2: None})

    def refuse(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stored, "_sha256", refuse)
    for read in (select, restore):
        with pytest.raises(OSError, match=r"checkpoint 2 cannot be read: .* \(Permission denied\)"):
            read(tmp_path)
    assert stored.steps(tmp_path) == [2, 1]


def test_other_data_are_refused(tmp_path):
    Checkpoints(tmp_path, {"data": {"train": 4}}, 1).save(1, make_state(1), {})
    checkpoints = Checkpoints(tmp_path, {"data": {"train": 5}}, 1)
    with pytest.raises(OSError, match="data is not what it was when checkpoint 1 was"):
        checkpoints.restore(jax.eval_shape(make_state), print)


def test_a_folder_on_gs_stays_there(tmp_path, monkeypatch):
    folder = "gs://bucket/run/checkpoints"
    assert str(stored.absolute(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert str(stored.absolute("run")) == str(tmp_path / "run")
    checkpoints = Checkpoints(tmp_path, {}, 1)
    checkpoints._folder = stored.absolute(folder)
    checkpoints._check_room(10)  # there is no disk to ask


def test_another_model_does_not_fit(tmp_path):
    write(tmp_path, {1: None})
    like = jax.eval_shape(lambda: {"params": {"a": jnp.ones(3)}})
    with pytest.raises(ValueError, match="checkpoint 1 cannot be read"):
        restore_variables(tmp_path, 1, like)
    like = jax.eval_shape(lambda: make_state().variables)
    like["params"]["b"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    with pytest.raises(ValueError, match=r"is of another model: params/b is \(3,\) there, \(5,\) here"):
        restore_variables(tmp_path, 1, like)


def make_old(folder, step):
    """The checkpoint as commit af11a1a wrote it, with `about` in place of `metadata`; undamaged."""
    path = folder / str(step)
    (path / "metadata").rename(path / "about")
    digests = path / "sha256.json"
    digests.write_text(digests.read_text().replace('"metadata/', '"about/'))


def test_checkpoints_of_the_old_format_are_refused_and_stay(tmp_path):
    write(tmp_path, {1: 2.0, 2: 3.0})
    for step in (1, 2):
        make_old(tmp_path, step)
    message = "checkpoint 2 in .* was written by an earlier format of vae_jax, which commit af11a1a reads"
    with pytest.raises(ValueError, match=message) as error:
        stored.read_metadata(tmp_path, 2)
    assert "\n" not in str(error.value)
    kept, damaged = stored.survey(tmp_path)
    assert not kept and [*damaged] == [2, 1]
    with pytest.raises(OSError, match="no checkpoint in .* can be read .*: move the whole run directory away"):
        restore(tmp_path)
    assert stored.steps(tmp_path) == [2, 1]  # not renamed as if they were damaged
