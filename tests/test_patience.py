"""`patience`: a training ends once the validation metric has not improved for so many epochs, and such an end is a
regular one.
"""

import re
import sys
from unittest.mock import Mock

import jax.numpy as jnp
import pytest
from small_run import assert_same_state, run_job, small_job, stop_after, without_time
from test_loggers import FakeTracker

from configs import vae
from vae_jax.families import Probes
from vae_jax.run import session
from vae_jax.run.config import changes
from vae_jax.run.job import Job
from vae_jax.run.log import read_rows
from vae_jax.run.loop import Loop
from vae_jax.run.stored import select, steps

EPOCHS, PATIENCE, CALLS = 9, 2, 2  # in all, without improvement, in an epoch
BOUNDS = [
    4.0,
    5.0,
    3.0,
    3.0,
    3.5,
    1.0,
]  # of the validation images; a tie is no improvement, so the fifth epoch is the last
LAST, BEST = 5, 3
FINAL = Probes(
    lambda variables, batch, keys: {"one": jnp.ones_like(batch.weight)}, lambda arrays, split: {"final": 0.5}
)
EVALUATE = Loop.evaluate


def evaluate(loop, variables, key):
    """The evaluation with bounds that are given; the log says which epoch it is."""
    tested, arrays = EVALUATE(loop, variables, key)
    epoch = sum("test/loss" in row for row in loop.directory.history)
    return tested | {"validation/bound": BOUNDS[epoch]}, arrays


@pytest.fixture(scope="module", autouse=True)
def given_bounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "evaluate", evaluate)
        yield patch


def patient_job(epochs=EPOCHS, **run):
    """A small dense network, which compiles fast."""
    config = vae.get_config("smoke").to_dict() | {"epochs": epochs, "batch_size": 400, "patience": PATIENCE}
    config["data"] |= {"validation": 100}
    config["model"] |= {"network": "mlp", "hidden": (4,), "latent_dim": 2}
    config["run"] |= {"steps_per_call": 2, **run}
    job = session.build(config)
    return job._replace(figures=lambda *_: {}, final_probes=FINAL, baselines=dict), config


@pytest.fixture(scope="module")
def ended(tmp_path_factory, given_bounds):
    """A training that ran out of patience, whose tracker has no network."""
    given_bounds.setitem(sys.modules, "wandb", FakeTracker("wandb", "log"))
    return run_job(*patient_job(log_to="wandb"), tmp_path_factory.mktemp("patience"))


def test_it_ends_after_so_many_epochs_without_improvement(ended):
    state, directory = ended
    found = [row["validation/bound"] for row in directory.history if "validation/bound" in row]
    assert found == BOUNDS[:LAST] and int(state.step) == 3 * LAST
    kept = {step: select(directory.path / "checkpoints", step) for step in steps(directory.path / "checkpoints")}
    assert {step: metadata["stopped_early"] for step, metadata in kept.items()} == {3 * LAST: True, 3 * BEST: False}
    assert kept[3 * LAST]["best"]["step"] == 3 * BEST


def test_an_early_end_runs_the_final_probes_and_is_reported(ended):
    summary = (ended[1].path / "summary.md").read_text()
    stopped = "validation/bound has not improved for 2 epochs, since epoch 3"
    for part in ("| test/final | 0.5 |", f"| stopped early | {stopped} |", "| epochs | 5 |", "| best step | 9 |"):
        assert part in summary


@pytest.mark.parametrize(
    "stops", [(CALLS * BEST, 1, 1), *(pytest.param((CALLS * LAST - i,), marks=pytest.mark.slow) for i in (1, 0))]
)
def test_an_interrupted_training_ends_at_the_same_epoch_with_the_same_bits(ended, tmp_path, capsys, stops):
    """Stopped at the end of the best epoch, amid the next one and at its end; amid the last epoch; and at its very end."""
    expected, whole = ended
    job, config = patient_job(log_to="wandb")
    for calls in stops:
        run_job(job, config, tmp_path, stop_after(calls))
    state, directory = run_job(job, config, tmp_path)
    assert_same_state(state, expected)
    assert without_time(read_rows(tmp_path)) == without_time(whole.history) == without_time(directory.history)
    told = capsys.readouterr().err
    assert told.count("the training ends after epoch 5: validation/bound has not improved for 2 epochs") == 1
    assert told.count("wandb cannot be logged to") >= len(stops)


def test_it_counts_as_finished_and_a_damaged_older_checkpoint_does_not_restart_it(ended, capsys):
    state, directory = ended
    path, before, config = directory.path, read_rows(directory.path), patient_job()[1]
    assert session.run(config, str(path), 1, stop_after(1)) is None
    (path / "checkpoints" / str(3 * BEST) / "metadata" / "metadata").write_bytes(b"")
    outcome = session.run(config, str(path), 1, lambda: Mock(return_value=False, signal=0))
    assert outcome.step == outcome.steps == int(state.step)
    assert f"checkpoint {3 * BEST} is damaged" in capsys.readouterr().err
    assert read_rows(path) == before


def test_a_run_from_before_there_was_patience_can_be_continued():
    config = vae.get_config("smoke").to_dict()
    before = {name: value for name, value in config.items() if name != "patience"}
    assert changes(before, config) == [] == changes(config, before)
    assert changes(before, config | {"patience": 3}) == ["patience is 0 there, 3 here"]


@pytest.mark.slow
def test_more_epochs_do_not_continue_a_training_without_patience(ended, tmp_path):
    """Patience ran out in the very last epoch: with more epochs the training ends there too."""
    run_job(*patient_job(epochs=LAST), tmp_path)
    state, directory = run_job(*patient_job(), tmp_path)
    assert_same_state(state, ended[0])
    assert without_time(directory.history) == without_time(ended[1].history)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"patience": -1}, "patience is -1, but must be at least 0"),
        ({"patience": 3}, "patience is 3, which needs validation images: give data.validation, or leave patience at 0"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_job(changes)


@pytest.mark.slow
def test_last_measurements_that_fail_are_reported_and_the_training_ends(tmp_path, capsys, monkeypatch):
    """Otherwise each start would repeat the last epoch and fail again."""

    def fail(*_):
        raise TypeError("this prior has no density")

    monkeypatch.setattr(Job, "evaluate_finally", fail)
    _, config = patient_job(epochs=1)
    outcome = session.run(config, str(tmp_path / "run"), 1, lambda: Mock(return_value=False, signal=0))
    assert outcome.step == outcome.steps and (tmp_path / "run" / "summary.md").exists()
    assert "the last measurements could not be made (TypeError: this prior has no density)" in capsys.readouterr().err
    assert session.run(config, str(tmp_path / "run"), 1, lambda: Mock(return_value=False, signal=0)) is None
