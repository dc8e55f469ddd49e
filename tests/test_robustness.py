"""Nothing is lost: a program that is killed, stopped, starved or damaged ends with the bits of an uninterrupted one."""

import hashlib
import json
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_mnist
from program import QUICK, USUAL
from small_run import flip_a_bit, truncate, without_time

from vae_jax.run import stored

PER_EPOCH, EPOCHS = 10, 12
STEPS = PER_EPOCH * EPOCHS
# Weights, their moving average and validation images; a tiny network, and a row of metrics.jsonl for each step.
FLAGS = (
    "--config=configs/vae.py:smoke",
    "--config.batch_size=128",
    "--config.data.validation=137",
    "--config.model.encoder_features=4,4",
    "--config.model.decoder_features=4,4",
    "--config.optimizer.ema_decay=0.9",
    "--config.best=kl",
    "--config.run.steps_per_call=1",
    "--config.run.figures_every=100",
)


@pytest.fixture(scope="module")
def program(forks):
    """Starts a training in a work directory, compiled as for a user, perhaps with a fault from faulty.py."""

    def program(workdir, *flags, fault=(), epochs=EPOCHS, compiled=USUAL):
        start = ["tests/faulty.py", *map(str, fault)] if fault else ["-m", "vae_jax.main"]
        return forks(*start, *FLAGS, f"--config.epochs={epochs}", *flags, f"--workdir={workdir}", XLA_FLAGS=compiled)

    return program


def rows(workdir):
    """The complete rows of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return list(map(json.loads, lines))


def saves(workdir):
    """The steps of the checkpoints, the latest first."""
    return stored.steps(workdir / "checkpoints")


def half_saves(workdir):
    return list((workdir / "checkpoints").glob("*tmp*"))


def wait_for_rows(workdir, count, process):
    """Wait for `count` rows after the latest checkpoint; a resumed run first repeats those that it has lost."""
    before = (saves(workdir) or [0])[0]
    process.wait_for(lambda: len(rows(workdir)) >= count)
    process.wait_for(lambda: rows(workdir)[-1]["step"] >= before + count)


def state_of(workdir, step):
    """The whole training state in a checkpoint, {name: array}."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = checkpointer.restore(workdir / "checkpoints" / str(step), args=args)
    leaves = jax.tree_util.tree_leaves_with_path(state["state"])
    return {jax.tree_util.keystr(place): np.asarray(leaf) for place, leaf in leaves}


def digest(workdir, step=STEPS):
    total = hashlib.sha256()
    for name, leaf in sorted(state_of(workdir, step).items()):
        total.update(f"{name} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return total.hexdigest()


def assert_nothing_is_lost(workdir):
    """Every checkpoint is readable and finite, and the best one is kept along with the latest."""
    found = saves(workdir)
    for step in found:
        assert stored.read_metadata(workdir / "checkpoints", step)["step"] == step
        for leaf in state_of(workdir, step).values():
            assert np.isfinite(leaf).all()
    divergence = {
        row["step"]: row["validation/kl"] for row in rows(workdir) if "validation/kl" in row and row["step"] <= found[0]
    }
    if divergence:
        best = min(divergence, key=divergence.get)
        assert stored.select(workdir / "checkpoints", "best")["step"] == best


def assert_same_end(workdir, reference):
    """The same bits as the reference run, and each row once."""
    assert digest(workdir) == digest(reference)
    assert without_time(rows(workdir)) == without_time(rows(reference))
    assert_nothing_is_lost(workdir)
    assert saves(workdir)[-1] == saves(reference)[-1] == stored.select(workdir / "checkpoints")["step"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, program):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("reference")
    assert program(workdir).ends() == ""
    latest, best = saves(workdir)
    assert latest == STEPS and best < STEPS - PER_EPOCH  # the divergence falls at first, then rises
    assert digest(workdir, latest) != digest(workdir, best)
    return workdir


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param({"start": 1, "training": 1, "save": 2}, id="4 times"),
        pytest.param({"start": 4, "training": 8, "save": 12}, id="24 times", marks=pytest.mark.slow),
    ],
)
def test_killed(reference, tmp_path, program, tally, moments):
    """SIGKILL during the start, the training and a save; one kill also leaves a torn row."""
    chance = random.Random(6)
    moments = [moment for moment, times in moments.items() for _ in range(times)]
    chance.shuffle(moments)
    in_a_save = 0
    with tally("interruptions", len(moments)):
        for moment in moments:
            process = program(tmp_path, "--config.run.save_every=2")
            if moment == "start":
                time.sleep(chance.uniform(0, 2))
            elif moment == "training":
                wait_for_rows(tmp_path, chance.randint(2, 5), process)
                time.sleep(chance.uniform(0, 0.2))
            else:
                wait_for_rows(tmp_path, chance.randint(1, 3), process)
                process.wait_for(lambda: half_saves(tmp_path))
                time.sleep(chance.uniform(0, 0.03))
            process.kill()
            assert process.wait() == -signal.SIGKILL
            in_a_save += bool(half_saves(tmp_path))
        while not in_a_save:  # on a busy machine the saves were quicker
            process = program(tmp_path, "--config.run.save_every=1")
            process.wait_for(lambda: half_saves(tmp_path))
            process.kill()
            in_a_save += bool(half_saves(tmp_path))
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 999, "epo')
        assert program(tmp_path).ends() == ""
        assert_same_end(tmp_path, reference)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, program):
    """A run with at least three checkpoints, stopped by SIGTERM after another process tried to use its directory."""
    workdir = tmp_path_factory.mktemp("interrupted")
    flags = ["--config.run.save_every=5", "--config.run.keep=4"]
    process = program(workdir, *flags, epochs=5)  # the tests ask for twelve
    process.wait_for(lambda: len(saves(workdir)) > 1)

    # A stopped process still owns its directory.
    process.send_signal(signal.SIGSTOP)
    before = sorted(workdir.rglob("*"))
    assert f"another process is working in {workdir}" in program(workdir, epochs=5).refuses()
    assert sorted(workdir.rglob("*")) == before
    process.send_signal(signal.SIGCONT)

    process.send_signal(signal.SIGTERM)
    stderr = process.refuses(128 + signal.SIGTERM)
    saved = saves(workdir)[0]
    assert f"saved at step {saved} of 50: the same command continues" in stderr
    assert len([row for row in rows(workdir) if "train/loss" in row]) == saved
    assert_nothing_is_lost(workdir)
    return workdir


def copy(workdir, to):
    return Path(shutil.copytree(workdir, to / "run"))


def test_interrupted_in_every_other_way(reference, interrupted, program, tmp_path, tally):
    """After SIGTERM: Ctrl-C, a full disk, an exception, NaN in loss, gradients and weights; then to the end."""
    workdir = copy(interrupted, tmp_path)
    with tally("interruptions", 7):
        begun = saves(workdir)[0]
        process = program(workdir, "--config.run.save_every=3")
        process.wait_for(lambda: saves(workdir)[0] > begun)
        process.send_signal(signal.SIGINT)
        stderr = process.refuses(128 + signal.SIGINT)
        saved = saves(workdir)[0]
        assert f"saved at step {saved} of {STEPS}: the same command" in stderr

        # More epochs and other intervals are allowed, and recorded.
        for config in (
            json.loads((workdir / "config.json").read_text()),
            stored.read_metadata(workdir / "checkpoints", saved)["config"],
        ):
            assert (config["epochs"], config["run"]["save_every"]) == (EPOCHS, 3)

        process = program(workdir, "--config.run.save_every=2")
        process.wait_for(lambda: saves(workdir)[0] > saved)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        full = f"cannot continue in the work directory {workdir} (File too large)"
        assert full in process.refuses()
        assert_nothing_is_lost(workdir)

        for fault, where in [
            ("raises", "RuntimeError: put in by faulty.py"),
            ("loss", "train/loss is nan at step {}: try a lower"),
            ("grad_norm", "train/grad_norm is nan at step {}: try a lower"),
            ("weights", "is not finite at step {}: try a lower"),
        ]:
            bad = saves(workdir)[0] + 4
            bad += bad % PER_EPOCH == 0  # an epoch's end would evaluate first
            process = program(workdir, "--config.run.save_every=1", fault=(fault, bad))
            assert where.format(bad) in (process.ends(1) if fault == "raises" else process.refuses())
            assert saves(workdir)[0] == bad - 1
            assert_nothing_is_lost(workdir)

        # At an epoch's end these weights would be evaluated and become the best.
        bad = (saves(workdir)[0] // PER_EPOCH + 1) * PER_EPOCH
        stderr = program(workdir, fault=("weights", bad)).refuses()
        assert "test/" in stderr and f"is nan at step {bad}" in stderr
        assert_nothing_is_lost(workdir)

        assert program(workdir).ends() == ""
        assert_same_end(workdir, reference)


@pytest.mark.slow
def test_files_that_were_moved_are_recorded(program, tmp_path):
    """`data.manual_dir` may change when a run continues; its data may not."""
    original, moved, workdir = tmp_path / "original", tmp_path / "moved", tmp_path / "run"
    original.mkdir()
    small_mnist.write(original, train=1300, test=100)
    moved.symlink_to(original)
    for epochs, folder in [(1, original), (2, moved)]:
        flags = "--config.data.name=mnist", f"--config.data.manual_dir={folder}"
        assert program(workdir, *flags, fault=("small_mnist_in", folder), epochs=epochs, compiled=QUICK).ends() == ""
        for config in (
            json.loads((workdir / "config.json").read_text()),
            stored.read_metadata(workdir / "checkpoints", 9 * epochs)["config"],
        ):
            assert config["data"]["manual_dir"] == str(folder)
    assert_nothing_is_lost(workdir)


def test_a_second_ctrl_c_ends_a_long_call_at_once(program, tmp_path, tally):
    """Python's own handlers would wait for the compiled program, and would merge the two signals."""
    with tally("interruptions"):
        process = program(tmp_path, "--config.run.save_every=1", fault=("slow", 3), compiled=QUICK)
        process.wait_for(lambda: process.stdout == "waiting\n")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.refuses(130) == "vae_jax: interrupted\n"
        assert saves(tmp_path) == [2, 1]
        assert_nothing_is_lost(tmp_path)


def file_size(path):
    return path.stat().st_size if path.is_file() else 0


def damaged_and_used(workdir, steps, reference, program):
    """Continue a run with damaged checkpoints at `steps`: each is reported and renamed, and the run ends as it should."""
    folder = workdir / "checkpoints"
    lines = program(workdir).ends().splitlines()
    assert all(line.endswith(f"renamed damaged-{step}-1") for line, step in zip(lines, steps, strict=True))
    assert [line.split(" is damaged: ")[0] for line in lines] == [f"vae_jax: checkpoint {step}" for step in steps]
    assert_same_end(workdir, reference)
    assert {path.name for path in folder.glob("damaged-*")} == {f"damaged-{step}-1" for step in steps}


def test_damaged_checkpoints(reference, interrupted, program, tmp_path, tally):
    """The newest of three is an empty folder, the next has a flipped bit: the third continues. Then all are damaged."""
    workdir = copy(interrupted, tmp_path)
    folder = workdir / "checkpoints"
    newest, second, *_ = saves(workdir)
    with tally("corruptions", 2):
        shutil.rmtree(folder / str(newest))
        (folder / str(newest)).mkdir()
        flip_a_bit(max((folder / str(second) / "state").rglob("*"), key=file_size))
        damaged_and_used(workdir, (newest, second), reference, program)
    with tally("corruptions", 2):
        for step in saves(workdir):
            truncate(folder / str(step) / "_CHECKPOINT_METADATA")
        before = sorted(folder.rglob("*"))
        *_, last = program(workdir).ends(1).splitlines()
        assert f"no checkpoint in {folder} can be read (checkpoint" in last
        assert sorted(folder.rglob("*")) == before
