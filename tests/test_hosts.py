"""Several hosts: the real program as two processes of two devices each, on this machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vae_jax.run import directory as run_directory
from vae_jax.run import files
from vae_jax.run.checkpoint import steps
from vae_jax.run.directory import RunDirectory

ROOT = Path(__file__).parents[1]
# The program itself, which at the end also writes down what this host has.
PROGRAM = """
import os, jax, numpy as np
from absl import app
from vae_jax import main
from vae_jax.run import loop

def noted(*arguments, original=loop.train):
    state = original(*arguments)
    leaves = jax.tree.leaves(jax.device_get(state.params))
    np.savez(os.environ["PARAMS"], *leaves, step=state.step)
    return state

loop.train = noted
app.run(main.main, flags_parser=main.parse_flags)
"""
CONFIG = (
    "--config=configs/vae.py:smoke",
    "--config.optimizer.eps=1.0",  # Adam makes much of rounding where gradients vanish
    "--config.epochs=6",
    "--config.batch_size=128",
    "--config.model.encoder_features=(4,)",
    "--config.model.decoder_features=(4,)",
    "--config.run.chunk=1",
    "--config.run.save_every=10",
    "--config.run.compilation_cache=false",
)
STEPS = 66


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the program, as one of the hosts; what is still running at the end is killed."""
    cache, started = tmp_path_factory.mktemp("cache"), []

    def start(workdir, *arguments, devices, host=0, source=ROOT):
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "PARAMS": str(workdir) + f"-{host}.npz",
            "PYTHONPATH": str(source),
        }
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, f"--workdir={workdir}", *arguments],
            cwd=source,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def start_pair(start):
    def start_pair(workdir, *arguments, second=(), second_source=ROOT):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        common = ["--num_processes=2", f"--coordinator={address}", *arguments]
        common += ["--heartbeat_timeout=10", "--start_timeout=200"]
        return [
            start(
                workdir,
                *common,
                f"--process_id={i}",
                *more,
                devices=2,
                host=i,
                source=source,
            )
            for i, (more, source) in enumerate([((), ROOT), (second, second_source)])
        ]

    return start_pair


def wait_for_step(workdir, step, processes):
    rows = workdir / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("train/loss") >= step):
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def finish(*processes):
    results = [(process.communicate(timeout=300)[1], process) for process in processes]
    for stderr, process in results:
        assert process.returncode == 0, stderr


def params(workdir, host):
    with np.load(f"{workdir}-{host}.npz") as saved:
        return dict(saved)


def assert_same(params, other, tolerance=0):
    assert params.keys() == other.keys()
    for name in params:
        np.testing.assert_allclose(params[name], other[name], rtol=0, atol=tolerance)


def test_two_processes_train_as_one_does_and_continue_exactly(
    tmp_path, start, start_pair
):
    whole, stopped, alone = (tmp_path / name for name in ("whole", "stopped", "alone"))
    finish(*start_pair(whole, *CONFIG))
    assert params(whole, 0)["step"] == STEPS
    assert_same(params(whole, 0), params(whole, 1))
    assert steps(whole / "checkpoints") == [66, 60]
    assert {path.name for path in whole.iterdir()} == {
        "checkpoints",
        "config.json",
        "figures",
        "lock",
        "metrics.jsonl",
        "summary.md",
    }
    finish(start(alone, *CONFIG, devices=4))
    assert_same(params(whole, 0), params(alone, 0), 1e-6)

    # Ctrl-C on one, which is passed on as SIGTERM: both save and end after the same step.
    pair = start_pair(stopped, *CONFIG)
    wait_for_step(stopped, 5, pair)
    pair[1].send_signal(signal.SIGINT)
    for process in pair:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 143 and "same command continues" in stderr, stderr
    assert params(stopped, 0)["step"] == params(stopped, 1)["step"] < STEPS
    assert steps(stopped / "checkpoints")[0] == params(stopped, 0)["step"]

    # SIGKILL to one: the other ends soon, and not as if all were well.
    pair = start_pair(stopped, *CONFIG)
    wait_for_step(stopped, 25, pair)
    pair[1].kill()
    begin = time.time()
    _, stderr = pair[0].communicate(timeout=200)
    assert pair[0].returncode not in (0, None) and time.time() - begin < 40, stderr
    assert steps(stopped / "checkpoints")[0] < STEPS

    finish(*start_pair(stopped, *CONFIG))
    assert_same(params(stopped, 0), params(whole, 0))
    rows, expected = (
        [
            json.loads(line) | {"seconds": 0}
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]
        for path in (stopped, whole)
    )
    assert rows == expected


def test_hosts_that_differ_are_refused(tmp_path, start_pair):
    second = ["--config.batch_size=64", "--devices=1"]
    for process in start_pair(tmp_path / "run", *CONFIG, second=second):
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 1
        assert (
            "config field batch_size is 128 on host 0, 64 on host 1; --devices is 0 on host 0, 1 on host 1"
            in stderr
        )
    assert not (tmp_path / "run").exists()


def test_a_host_whose_source_differs_by_one_byte_is_refused(tmp_path, start_pair):
    """Also in a subfolder of the package."""
    for folder in ("vae_jax", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / "other" / folder)
    with open(tmp_path / "other" / "vae_jax" / "nn" / "layers.py", "a") as file:
        file.write("\n")
    pair = start_pair(tmp_path / "run", *CONFIG, second_source=tmp_path / "other")
    for process in pair:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 1
        assert "the source of vae_jax is " in stderr, stderr
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_on_one_host_ends_all(tmp_path, start_pair):
    """The first one cannot write there, and the second one would wait for it."""
    (tmp_path / "run").write_text("")
    for process in start_pair(tmp_path / "run", *CONFIG):
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 1
        assert "vae_jax: host 0: the work directory" in stderr, stderr


@pytest.mark.parametrize("host", [0, 1])
def test_a_coordinator_that_is_not_there_is_told_in_time(tmp_path, start, host):
    process = start(
        tmp_path / "run",
        CONFIG[0],
        "--coordinator=127.0.0.1:1" if host else "--coordinator=127.0.0.1:45123",
        "--num_processes=2",
        f"--process_id={host}",
        "--start_timeout=3",
        devices=1,
    )
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1 and stderr.count("\n") == 1
    assert "not all hosts met the coordinator at 127.0.0.1:" in stderr
    assert "within 3 s" in stderr


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        (["--distributed"], 1, "give --coordinator=ADDRESS:PORT, --num_processes and"),
        (["--num_processes=2"], 2, "need --coordinator=ADDRESS:PORT"),
        (
            ["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            1,
            "process_id < num_processes",
        ),
        (["--devices=3"], 1, "--devices is 3, but there are 2: give 1 to 2"),
        (["--config.batch_size=33"], 1, "batch_size 33 is not divisible by 2 devices"),
        (["--mode=sample", "--devices=1"], 2, "--devices has no meaning with --mode"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, start, arguments, code, message):
    process = start(tmp_path / "run", CONFIG[0], *arguments, devices=2)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == code and stderr.count("\n") == 1, stderr
    assert stderr.startswith("vae_jax: ") and message in stderr
    assert not (tmp_path / "run").exists()


def test_a_remote_run_directory_is_written_here_and_copied(tmp_path, monkeypatch):
    """A folder stands for one on gs://. What was copied at the last save is what a second start begins with."""
    monkeypatch.setattr(run_directory, "is_remote", lambda path: True)
    remote = tmp_path / "remote"
    directory = RunDirectory(str(remote), {"epochs": 1}, "", tensorboard=True)
    assert {path.name for path in remote.iterdir()} == {"config.json"}
    assert directory.path != remote
    directory.rewind(0, pytest.fail)
    directory.log({"step": 1, "epoch": 1.0, "train/loss": 2.0})
    directory.upload()
    directory.log({"step": 2, "epoch": 2.0, "train/loss": 1.0})
    directory.close()
    assert not directory.path.exists()
    (board,) = (remote / "tensorboard").iterdir()
    assert b"train/loss" in board.read_bytes()
    assert [row["step"] for row in run_directory.read_rows(remote)] == [1]

    monkeypatch.setattr(run_directory, "read_config", lambda path: {"epochs": 1})
    directory = RunDirectory(str(remote), {"epochs": 1}, "")
    directory.rewind(1, pytest.fail)
    assert [row["step"] for row in directory.history] == [1]

    def unavailable(path, content):
        raise RuntimeError("503\nand more")  # gcsfs raises what is no OSError

    monkeypatch.setattr(type(directory.remote), "write_bytes", unavailable)
    with pytest.raises(
        OSError,
        match=r"cannot copy the run's files to .*remote \(RuntimeError: 503\): the same",
    ):
        directory.upload()
    directory.close()


@pytest.mark.parametrize(
    "error,told",
    [
        (ImportError("no gcsfs"), r"\(no gcsfs\): pip install -e '.\[gcs\]'"),
        (OSError("no network"), r"\(no network\)$"),
    ],
)
def test_a_remote_directory_that_cannot_be_reached_is_told(monkeypatch, error, told):
    def fail(path):
        raise error

    monkeypatch.setattr(files.epath, "Path", fail)
    with pytest.raises(ValueError, match="cannot reach gs://no-such/run " + told):
        files.check_reachable("gs://no-such/run")
