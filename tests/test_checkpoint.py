"""Checkpoints: a restored state equals the saved one, damage is reported, the latest and the best are kept."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vae_jax.run import checkpoint
from vae_jax.run.checkpoint import Checkpoints, restore_variables, select
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
    """Save a checkpoint of each step with the value of its metric, None where it was not evaluated."""
    checkpoints = Checkpoints(folder, {"config": {"seed": 1}}, keep, best)
    name, _ = best or LOSS
    for step, value in values.items():
        metrics = {} if value is None else {name: value, "test/loss": 0.0}
        checkpoints.save(step, make_state(step), metrics)
    checkpoints.close()


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def numbers(state):
    """The state with its root key as integers, which NumPy can compare."""
    return state.replace(key=jax.random.key_data(state.key))


def restore(folder, like=None, keep=9, best=LOSS):
    """The state that training would continue from, and the lines reported."""
    lines = []
    checkpoints = Checkpoints(folder, {"config": {"seed": 1}}, keep, best)
    like = jax.eval_shape(make_state) if like is None else like
    try:
        return checkpoints.restore(like, lines.append), lines
    finally:
        checkpoints.close()


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_restored_state_is_the_saved_one(tmp_path, ema_decay):
    state = make_state(3, ema_decay)
    checkpoints = Checkpoints(tmp_path, {"config": {"seed": 1}}, keep=1)
    checkpoints.save(3, state, {})
    checkpoints.close()
    like = jax.eval_shape(lambda: make_state(0, ema_decay))
    restored, lines = restore(tmp_path, like)
    assert lines == []
    assert_same(numbers(restored), numbers(state))
    variables = restore_variables(tmp_path, 3, jax.eval_shape(lambda: state.eval_variables))
    assert_same(variables, state.eval_variables)
    assert checkpoint.read_metadata(tmp_path, 3)["config"] == {"seed": 1}


def test_the_latest_and_the_best_are_kept_though_the_metric_worsens(tmp_path):
    write(tmp_path, {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0, 5: None})
    assert checkpoint.steps(tmp_path) == [5, 4, 2]
    write(tmp_path, {6: 3.5, 7: 8.0})  # after a restart
    assert checkpoint.steps(tmp_path) == [7, 6, 2]
    write(tmp_path, {8: 2.0, 9: 7.0})
    assert checkpoint.steps(tmp_path) == [9, 8]
    assert select(tmp_path) == select(tmp_path, "best") == 8
    assert select(tmp_path, "latest") == select(tmp_path, "9") == 9


@pytest.mark.parametrize("name", ["validation/accuracy", "validation/loss", "validation/x"])
def test_the_better_direction_is_the_given_one_whatever_the_name(tmp_path, name):
    values = {1: 0.5, 2: 0.9, 3: 0.2, 4: 0.7, 5: 0.6}
    for better, expected in [("higher", 2), ("lower", 3)]:
        folder = tmp_path / better
        write(folder, values, best=(name, better))
        assert checkpoint.steps(folder) == [5, 4, expected] and select(folder) == expected
        write(folder, {6: 0.55}, best=(name, better))  # after a restart
        assert checkpoint.steps(folder) == [6, 5, expected] and select(folder) == expected


@pytest.mark.parametrize(
    "best,value,better,worse", [(LOSS, 3.0, 2.9, 3.1), (ACCURACY, 0.8, 0.9, 0.7), (LOSS, -3.0, -3.1, 3.0)]
)
def test_only_a_better_value_is_the_best(tmp_path, best, value, better, worse):
    write(tmp_path, {1: value}, best=best)
    checkpoints = Checkpoints(tmp_path, {"config": {"seed": 1}}, 2, best)
    assert checkpoints.best == 1
    assert checkpoints.is_best({best[0]: better})
    assert not checkpoints.is_best({best[0]: value})  # of equal ones the first
    assert not checkpoints.is_best({best[0]: worse})
    assert not checkpoints.is_best({"test/loss": -9.0}) and not checkpoints.is_best({})
    checkpoints.close()


def test_without_a_best_one_the_latest_counts(tmp_path):
    write(tmp_path, {1: 5.0, 2: 1.0, 3: 4.0}, best=None)
    assert checkpoint.steps(tmp_path) == [3, 2] and select(tmp_path) == 3
    with pytest.raises(ValueError, match="that takes an epoch with validation images"):
        select(tmp_path, "best")
    with pytest.raises(ValueError, match="'1' .* give latest, best, or one of 3, 2"):
        select(tmp_path, "1")


def test_a_step_is_a_number_or_its_digits(tmp_path):
    write(tmp_path, {1: None, 2: None})
    assert select(tmp_path, 1) == select(tmp_path, "1") == 1


def test_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        assert checkpoint.steps(folder) == []
        with pytest.raises(ValueError, match="there is no checkpoint in"):
            select(folder)
    assert not (tmp_path / "none").exists()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


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
            if name.name == "sha256.json" and damage is Path.unlink:
                assert lines == []  # only the check is lost
                assert_same(numbers(state), numbers(make_state(2)))
            else:
                (line,) = lines
                assert re.match("checkpoint 2 is damaged: .*[^\n]*$", line)
                assert_same(numbers(state), numbers(make_state(1)))
                assert (tmp_path / "damaged" / "damaged-2-1").is_dir()
        shutil.rmtree(tmp_path / "damaged")


def test_damage_without_the_list_of_files_is_reported_too(tmp_path):
    write(tmp_path, {1: None, 2: None})
    (tmp_path / "2" / "sha256.json").unlink()
    (tmp_path / "2" / "state" / "_METADATA").write_text("")
    state, (line,) = restore(tmp_path)
    assert line.startswith("checkpoint 2 cannot be read (")
    assert_same(numbers(state), numbers(make_state(1)))


def test_nothing_starts_from_scratch_where_all_are_damaged(tmp_path):
    assert restore(tmp_path / "none") == (None, [])
    write(tmp_path, {1: None, 2: None})
    for step in (1, 2):
        truncate(tmp_path / str(step) / "metadata" / "metadata")
    with pytest.raises(OSError, match="no checkpoint in .* can be read: move them away"):
        restore(tmp_path)
    assert checkpoint.steps(tmp_path) == [2, 1]


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
        checkpoints.close()
        assert checkpoint.steps(tmp_path) == [5, 4, 3]
        assert (tmp_path / f"damaged-5-{attempt}").is_dir()
    state, lines = restore(tmp_path)
    assert lines == []
    assert_same(numbers(state), numbers(make_state(5)))


def test_of_equal_metrics_the_first_is_the_best_after_a_restart_too(tmp_path):
    write(tmp_path, {1: 3.0, 2: 3.0}, keep=1)
    assert select(tmp_path) == 1
    write(tmp_path, {3: 3.0, 4: 5.0}, keep=1)
    assert select(tmp_path) == 1 and checkpoint.steps(tmp_path) == [4, 1]


def test_a_damaged_best_checkpoint_is_made_again(tmp_path):
    write(tmp_path, {1: 5.0, 2: 3.0})
    truncate(tmp_path / "2" / "metadata" / "metadata")
    checkpoints = Checkpoints(tmp_path, {"config": {"seed": 1}}, 2, LOSS)
    checkpoints.restore(jax.eval_shape(make_state), lambda line: None)
    assert checkpoints.best == 1 and checkpoints.is_best({"validation/loss": 3.0})
    checkpoints.close()


def test_other_data_are_refused(tmp_path):
    write(tmp_path, {1: None})
    checkpoints = Checkpoints(tmp_path, {"data": {"train": 5}}, 1)
    path = tmp_path / "1" / "metadata" / "metadata"
    metadata = json.loads(path.read_text()) | {"data": {"train": 4}}
    (tmp_path / "1" / "sha256.json").unlink()
    path.write_text(json.dumps(metadata))
    with pytest.raises(OSError, match="data is not what it was when checkpoint 1 was"):
        checkpoints.restore(jax.eval_shape(make_state), print)
    checkpoints.close()


def test_a_folder_on_gs_stays_there(tmp_path, monkeypatch):
    folder = "gs://bucket/run/checkpoints"
    assert str(checkpoint.absolute(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert str(checkpoint.absolute("run")) == str(tmp_path / "run")
    checkpoints = Checkpoints(tmp_path, {}, 1)
    checkpoints._folder = checkpoint.absolute(folder)
    checkpoints._check_room(10)  # there is no disk to ask
    checkpoints.close()


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
        checkpoint.read_metadata(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert checkpoint.latest_metadata(tmp_path) is None
    with pytest.raises(OSError, match="no checkpoint in .* can be read: move them away"):
        restore(tmp_path)
    assert checkpoint.steps(tmp_path) == [2, 1]  # not renamed as if they were damaged
