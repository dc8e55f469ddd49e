"""Nothing is lost: the program, killed, stopped, starved and damaged, ends with the bits with which it would have ended."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vae_jax.run import checkpoint

ROOT = Path(__file__).parents[1]
PER_EPOCH, EPOCHS = 10, 12
STEPS = PER_EPOCH * EPOCHS
BEST = 30  # the divergence falls at first, then rises
# Parameters, averages and validation images; as small as can be, and a row of metrics.jsonl a step.
FLAGS = [
    "--config=configs/vae.py:smoke",
    "--config.batch_size=128",
    "--config.data.validation=137",
    "--config.model.encoder_features=4,4",
    "--config.model.decoder_features=4,4",
    "--config.optimizer.average=0.9",
    "--config.best=kl",
    "--config.run.chunk=1",
    "--config.run.figures_every=100",
]
PATIENCE = 120  # seconds in which a program ends that has nothing more to do


def program(workdir, *flags, fault=(), epochs=EPOCHS):
    """Start the program, or the program with a fault in it."""
    environment = {name: value for name, value in os.environ.items()}
    del environment["XLA_FLAGS"]  # the eight devices of the tests
    environment["PYTHONPATH"] = str(ROOT)
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    start = ["tests/faulty.py", *map(str, fault)] if fault else ["-m", "vae_jax.main"]
    command = [sys.executable, *start, *FLAGS, f"--config.epochs={epochs}", *flags]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(process, code):
    """What a program told on stderr that ends by itself, and with this code."""
    try:
        _, told = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == code, told
    return told


def tells_one_line(process, code=1):
    told = ends(process, code)
    assert told.startswith("vae_jax: ") and told.count("\n") == 1, told
    return told


def wait_for(condition, process):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.001)


def rows(workdir):
    """The whole rows of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return list(map(json.loads, lines))


def wait_for_rows(workdir, count, process):
    """Wait until there are so many more than there were, those after the last checkpoint being made again."""
    before = saves(workdir)[:1] or [0]
    wait_for(lambda: len(rows(workdir)) >= count, process)
    wait_for(lambda: rows(workdir)[-1]["step"] >= before[0] + count, process)


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def saves(workdir):
    """The steps of the checkpoints, the latest first."""
    return checkpoint.steps(workdir / "checkpoints")


def half_saves(workdir):
    return list((workdir / "checkpoints").glob("*tmp*"))


def state_of(workdir, step):
    """All that a checkpoint holds of the training: {name: array}."""
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
    """Whatever happened: every checkpoint is whole and finite, and the best one is there beside the latest."""
    found = saves(workdir)
    for step in found:
        assert checkpoint.read_about(workdir / "checkpoints", step)["step"] == step
        for leaf in state_of(workdir, step).values():
            assert np.isfinite(leaf).all()
    divergence = {
        row["step"]: row["validation/kl"]
        for row in rows(workdir)
        if "validation/kl" in row and row["step"] <= found[0]
    }
    if divergence:
        best = min(divergence, key=divergence.get)
        assert checkpoint.select(workdir / "checkpoints", "best") == best


def assert_same_end(workdir, reference):
    """The same bits, and each row once."""
    assert digest(workdir) == digest(reference)
    assert without_time(rows(workdir)) == without_time(rows(reference))
    assert_nothing_is_lost(workdir)
    assert saves(workdir)[-1] == BEST == checkpoint.select(workdir / "checkpoints")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("reference")
    assert ends(program(workdir), 0) == ""
    assert saves(workdir) == [STEPS, BEST]  # best: not one of the latest
    return workdir


def test_killed_ten_times(reference, tmp_path, tally):
    """SIGKILL while it starts, while it trains, and in the middle of a save; once it leaves a torn row as well."""
    chance = random.Random(6)
    in_a_save = 0
    moments = ["start"] * 2 + ["training"] * 4 + ["save"] * 4
    chance.shuffle(moments)
    with tally("interruptions", len(moments)):
        for moment in moments:
            process = program(tmp_path, "--config.run.save_every=2")
            if moment == "start":
                time.sleep(chance.uniform(0, 4))
            else:
                wait_for_rows(tmp_path, chance.randint(2, 5), process)
            if moment == "training":
                time.sleep(chance.uniform(0, 0.2))
            if moment == "save":
                wait_for(lambda: half_saves(tmp_path), process)
                time.sleep(chance.uniform(0, 0.03))
            process.kill()
            assert process.wait() == -signal.SIGKILL
            process.communicate()
            in_a_save += bool(half_saves(tmp_path))
        assert in_a_save >= 1
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 999, "epo')
        assert ends(program(tmp_path), 0) == ""
        assert_same_end(tmp_path, reference)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run with three checkpoints or more, that was stopped by SIGTERM; meanwhile another process wanted its directory."""
    workdir = tmp_path_factory.mktemp("interrupted")
    # Five epochs are asked for at first, twelve later.
    flags = ["--config.run.save_every=5", "--config.run.keep=4"]
    process = program(workdir, *flags, epochs=5)
    wait_for(lambda: len(saves(workdir)) > 1, process)

    # A process that is there keeps others away, though it does nothing for the moment.
    process.send_signal(signal.SIGSTOP)
    kept = sorted(workdir.rglob("*"))
    told = tells_one_line(program(workdir, epochs=5))
    assert f"another process is training in the work directory {workdir}" in told
    assert sorted(workdir.rglob("*")) == kept
    process.send_signal(signal.SIGCONT)

    process.send_signal(signal.SIGTERM)
    told = tells_one_line(process, 128 + signal.SIGTERM)
    assert (
        f"saved at step {saves(workdir)[0]} of 50: the same command continues" in told
    )
    assert (
        len([row for row in rows(workdir) if "train/loss" in row]) == saves(workdir)[0]
    )
    assert_nothing_is_lost(workdir)
    return workdir


def copy(workdir, to):
    return Path(shutil.copytree(workdir, to / "run"))


def test_interrupted_in_every_other_way(reference, interrupted, tmp_path, tally):
    """One run, after SIGTERM: Ctrl-C, a full disk, an exception, NaN in loss, gradients and parameters; and to the end."""
    workdir = copy(interrupted, tmp_path)
    with tally("interruptions", 7):
        begun = saves(workdir)[0]
        process = program(workdir, "--config.run.save_every=3")
        wait_for(lambda: saves(workdir)[0] > begun, process)
        process.send_signal(signal.SIGINT)
        told = tells_one_line(process, 128 + signal.SIGINT)
        saved = saves(workdir)[0]
        assert f"saved at step {saved} of {STEPS}: the same command" in told

        # More epochs, and other intervals, were allowed. They are recorded.
        for config in (
            json.loads((workdir / "config.json").read_text()),
            checkpoint.read_about(workdir / "checkpoints", saved)["config"],
        ):
            assert (config["epochs"], config["run"]["save_every"]) == (EPOCHS, 3)

        process = program(workdir, "--config.run.save_every=2")
        wait_for(lambda: saves(workdir)[0] > saved, process)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        told = tells_one_line(process)
        assert f"cannot go on in the work directory {workdir} (File too large)" in told
        assert_nothing_is_lost(workdir)

        for fault, where in [
            ("raises", "RuntimeError: put in by faulty.py"),
            ("loss", "train/loss is nan at step {}: try a lower"),
            ("grad_norm", "train/grad_norm is nan at step {}: try a lower"),
            ("params", "is not finite at step {}: try a lower"),
        ]:
            bad = saves(workdir)[0] + 4
            bad += bad % PER_EPOCH == 0  # there it would be evaluated first
            faulty = program(workdir, "--config.run.save_every=1", fault=(fault, bad))
            told = ends(faulty, 1)
            assert where.format(bad) in told
            assert fault == "raises" or told.count("\n") == 1
            assert saves(workdir)[0] == bad - 1
            assert_nothing_is_lost(workdir)

        # At an epoch's end what is not finite would be evaluated, and be the best.
        bad = (saves(workdir)[0] // PER_EPOCH + 1) * PER_EPOCH
        told = tells_one_line(program(workdir, fault=("params", bad)))
        assert "test/" in told and f"is nan at step {bad}" in told
        assert_nothing_is_lost(workdir)

        assert ends(program(workdir), 0) == ""
        assert_same_end(workdir, reference)


def test_files_that_were_moved_are_recorded(mnist_dir, tmp_path):
    """`data.manual_dir` may be another one when a run continues; its data may not."""
    moved, workdir = tmp_path / "moved", tmp_path / "run"
    moved.symlink_to(mnist_dir)
    flags = ["--config.data.name=mnist", "--config.batch_size=6000"]
    for epochs, folder in [(1, mnist_dir), (2, moved)]:
        from_there = f"--config.data.manual_dir={folder}"
        assert ends(program(workdir, *flags, from_there, epochs=epochs), 0) == ""
        for config in (
            json.loads((workdir / "config.json").read_text()),
            checkpoint.read_about(workdir / "checkpoints", 9 * epochs)["config"],
        ):
            assert config["data"]["manual_dir"] == str(folder)
    assert_nothing_is_lost(workdir)


def test_a_broken_restore_would_be_noticed(reference, interrupted, tmp_path):
    workdir = copy(interrupted, tmp_path)
    assert ends(program(workdir, fault=("without_optimizer", 0)), 0) == ""
    assert saves(workdir)[0] == STEPS
    with pytest.raises(AssertionError):
        assert_same_end(workdir, reference)


def test_a_second_ctrl_c_ends_a_long_chunk_at_once(tmp_path, tally):
    """Python's own handlers would not be asked before the compiled program is back, and know of one signal only."""
    with tally("interruptions"):
        process = program(tmp_path, "--config.run.save_every=1", fault=("slow", 3))
        assert process.stdout.readline() == "waiting\n", process.communicate()
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert tells_one_line(process, 130) == "vae_jax: interrupted\n"
        assert saves(tmp_path) == [2, 1]
        assert_nothing_is_lost(tmp_path)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def file_size(path):
    return path.stat().st_size if path.is_file() else 0


def test_damaged_checkpoints(reference, interrupted, tmp_path, tally):
    """Of three the newest is an empty folder, and a bit is flipped in the next: the third continues. Then none is whole."""
    workdir = copy(interrupted, tmp_path)
    folder = workdir / "checkpoints"
    newest, next_one, *_ = saves(workdir)
    with tally("corruptions", 2):
        shutil.rmtree(folder / str(newest))
        (folder / str(newest)).mkdir()
        flip_a_bit(max((folder / str(next_one) / "state").rglob("*"), key=file_size))
        told = ends(program(workdir), 0).splitlines()
        assert [line.split(" is damaged: ")[0] for line in told] == [
            f"vae_jax: checkpoint {step}" for step in (newest, next_one)
        ]
        assert_same_end(workdir, reference)
        kept = {path.name for path in folder.glob("damaged-*")}
        assert kept == {f"damaged-{step}-1" for step in (newest, next_one)}
    with tally("corruptions", 2):
        for step in saves(workdir):
            truncate(folder / str(step) / "_CHECKPOINT_METADATA")
        kept = sorted(folder.rglob("*"))
        *_, told = ends(program(workdir), 1).splitlines()
        assert f"no checkpoint in {folder} can be read: move them away" in told
        assert sorted(folder.rglob("*")) == kept
