"""Checkpoints: what is restored is what was saved, or the damage is told; the latest and the best are kept."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vae_jax import checkpoint
from vae_jax.checkpoint import Checkpoints, restore_states, restore_variables, select
from vae_jax.steps import init_state

OPTIMIZER = optax.adam(optax.cosine_decay_schedule(1.0, 10))


def make_state(step=0, average=0.0):
    params = {
        "a": {"kernel": jnp.arange(600.0).reshape(20, 30) + step},
        "b": -jnp.ones(3),
    }
    variables = {"params": params, "batch_stats": {"mean": jnp.full(4, step + 0.5)}}
    state = init_state(variables, OPTIMIZER, jax.random.key(7), average)
    return state.replace(step=jnp.int32(step))


def write(folder, losses, keep=2, best="validation/loss"):
    checkpoints = Checkpoints(folder, {"config": {"seed": 1}}, keep, best)
    for step, loss in losses.items():
        metrics = (
            {} if loss is None else {best or "validation/loss": loss, "test/loss": 0.0}
        )
        checkpoints.save(step, make_state(step), metrics)
    checkpoints.close()


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def plain(state):
    return state.replace(key=jax.random.key_data(state.key))


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_what_is_restored_is_what_was_saved(tmp_path, average):
    state = make_state(3, average)
    checkpoints = Checkpoints(tmp_path, {"config": {"seed": 1}}, keep=1)
    checkpoints.save(3, state, {})
    checkpoints.close()
    like = jax.eval_shape(lambda: make_state(0, average))
    (restored,) = restore_states(tmp_path, like)
    assert_same(plain(restored), plain(state))
    variables = restore_variables(tmp_path, 3, jax.eval_shape(lambda: state.published))
    assert_same(variables, state.published)
    assert checkpoint.read_about(tmp_path, 3)["config"] == {"seed": 1}


def test_the_latest_and_the_best_are_kept_though_the_metric_worsens(tmp_path):
    write(tmp_path, {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0, 5: None})
    assert checkpoint.steps(tmp_path) == [5, 4, 2]
    write(tmp_path, {6: 3.5, 7: 8.0})  # after a restart
    assert checkpoint.steps(tmp_path) == [7, 6, 2]
    write(tmp_path, {8: 2.0, 9: 7.0})
    assert checkpoint.steps(tmp_path) == [9, 8]
    assert select(tmp_path) == select(tmp_path, "best") == 8
    assert select(tmp_path, "latest") == select(tmp_path, "9") == 9


def test_the_highest_accuracy_is_the_best(tmp_path):
    write(tmp_path, {1: 0.5, 2: 0.9, 3: 0.8, 4: 0.7}, best="validation/accuracy")
    assert checkpoint.steps(tmp_path) == [4, 3, 2] and select(tmp_path) == 2


def test_without_a_best_one_the_latest_counts(tmp_path):
    write(tmp_path, {1: 5.0, 2: 1.0, 3: 4.0}, best=None)
    assert checkpoint.steps(tmp_path) == [3, 2] and select(tmp_path) == 3
    with pytest.raises(ValueError, match="that takes validation images"):
        select(tmp_path, "best")
    with pytest.raises(ValueError, match="'1' .* give latest, best, or one of 3, 2"):
        select(tmp_path, "1")


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


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damage_to_any_file_is_told_and_the_one_before_is_offered(tmp_path, damage):
    write(tmp_path, {1: None, 2: None})
    like = jax.eval_shape(make_state)
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        whole = path.read_bytes()
        if not whole and damage is not Path.unlink:
            continue
        damage(path)
        latest, before = restore_states(tmp_path, like)
        if path.name == "sha256.json" and damage is Path.unlink:  # costs the check only
            assert_same(plain(latest), plain(make_state(2)))
        else:
            assert re.match("checkpoint 2 is damaged: .*[^\n]*$", str(latest))
        assert_same(plain(before), plain(make_state(1)))
        path.write_bytes(whole)


def test_damage_without_the_list_of_files_is_told_too(tmp_path):
    write(tmp_path, {1: None})
    (tmp_path / "1" / "sha256.json").unlink()
    (tmp_path / "1" / "state" / "_METADATA").write_text("")
    (latest,) = restore_states(tmp_path, jax.eval_shape(make_state))
    assert str(latest).startswith("checkpoint 1 cannot be read (")


def test_a_damaged_checkpoint_stays_when_its_step_is_saved_again(tmp_path):
    write(tmp_path, {1: None, 2: None})
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    write(tmp_path, {2: None, 3: None})
    assert checkpoint.steps(tmp_path) == [3, 2]
    assert (tmp_path / "damaged-2").is_dir()
    _latest, before = restore_states(tmp_path, jax.eval_shape(make_state))
    assert_same(plain(before), plain(make_state(2)))


def test_another_model_does_not_fit(tmp_path):
    write(tmp_path, {1: None})
    like = jax.eval_shape(lambda: {"params": {"a": jnp.ones(3)}})
    with pytest.raises(ValueError, match="checkpoint 1 cannot be read"):
        restore_variables(tmp_path, 1, like)
