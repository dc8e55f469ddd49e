"""Several hosts: the real program as two processes with two devices each, on this machine."""

import io
import json
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from program import QUICK, ROOT
from small_run import rows_of

from vae_jax.run import directory as run_directory
from vae_jax.run import files, hosts
from vae_jax.run.directory import RunDirectory
from vae_jax.run.log import read_rows
from vae_jax.run.stored import steps

# The program, which in the end also writes this host's weights.
PROGRAM = """
import os, jax, numpy as np
from absl import app
from vae_jax import main
from vae_jax.run import session

def train_and_write(*arguments, original=session.train):
    state = original(*arguments)
    leaves = jax.tree.leaves(jax.device_get(state.params))
    np.savez(os.environ["PARAMS"], *leaves, step=state.step)
    return state

session.train = train_and_write
app.run(main.main, flags_parser=main.parse_flags)
"""
CONFIG = (
    "--config=configs/vae.py:smoke",
    "--config.optimizer.eps=1.0",  # with a small one, Adam amplifies rounding where gradients vanish
    "--config.epochs=3",
    "--config.batch_size=128",
    "--config.model.encoder_features=(4,)",
    "--config.model.decoder_features=(4,)",
    "--config.run.steps_per_call=1",
    "--config.run.save_every=10",
    "--config.run.compilation_cache=false",
)
STEPS = 33


@pytest.fixture(scope="module")
def start(forks):
    """Starts the program as one of the hosts."""

    def start(workdir, *arguments, devices, host=0):
        return forks(
            *("-c", PROGRAM, f"--workdir={workdir}", *arguments),
            XLA_FLAGS=f"--xla_force_host_platform_device_count={devices} {QUICK}",
            PARAMS=f"{workdir}-{host}.npz",
        )

    return start


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def start_pair(start):
    """Starts the program as both hosts; `second` are flags of the second one only."""

    def start_pair(workdir, *arguments, second=()):
        common = ["--num_processes=2", f"--coordinator={free_address()}", *arguments]
        common += ["--heartbeat_timeout=10", "--start_timeout=200"]
        return [
            start(workdir, *common, f"--process_id={host}", *more, devices=2, host=host)
            for host, more in [(0, ()), (1, second)]
        ]

    return start_pair


def wait_for_step(workdir, step, processes):
    path = workdir / "metrics.jsonl"

    def reached():
        assert all(process.poll() is None for process in processes)
        return path.exists() and path.read_text().count("train/loss") >= step

    processes[0].wait_for(reached)


def finish(*processes):
    for process in processes:
        process.ends()


def params(workdir, host):
    with np.load(f"{workdir}-{host}.npz") as saved:
        return dict(saved)


def assert_same(params, other, tolerance=0):
    assert params.keys() == other.keys()
    for name in params:
        np.testing.assert_allclose(params[name], other[name], rtol=0, atol=tolerance)


@pytest.mark.slow
def test_two_processes_run_out_of_patience_together(tmp_path, start_pair):
    """At this rate the bound soon gets worse: the first time ends the training, on both."""
    wild = ["--config.data.validation=100", "--config.patience=1", "--config.optimizer.learning_rate=5.0"]
    wild += ["--config.epochs=9"]
    finish(*start_pair(tmp_path / "run", *CONFIG, *wild))
    bounds = [row["validation/bound"] for row in read_rows(tmp_path / "run") if "validation/bound" in row]
    better = [bound < min(bounds[:epoch]) for epoch, bound in enumerate(bounds) if epoch]
    assert better == [True] * (len(bounds) - 2) + [False] and len(bounds) < 9
    assert params(tmp_path / "run", 0)["step"] == params(tmp_path / "run", 1)["step"] == 10 * len(bounds)
    pair = start_pair(tmp_path / "run", *CONFIG, *wild)
    finish(*pair)
    assert all("already finished" in process.stdout for process in pair)


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_continue_exactly(tmp_path, start, start_pair):
    whole, stopped, alone = (tmp_path / name for name in ("whole", "stopped", "alone"))
    finish(*start_pair(whole, *CONFIG))
    assert params(whole, 0)["step"] == STEPS
    assert_same(params(whole, 0), params(whole, 1))
    assert steps(whole / "checkpoints") == [33, 30]
    assert {path.name for path in whole.iterdir()} == {
        "checkpoints",
        "config.json",
        "figures",
        "lock",
        "metrics.jsonl",
        "summary.html",
        "summary.md",
    }
    finish(start(alone, *CONFIG, devices=4))
    assert_same(params(whole, 0), params(alone, 0), 1e-6)

    # Ctrl-C on one host, which becomes SIGTERM: both save and end after the same step.
    pair = start_pair(stopped, *CONFIG)
    wait_for_step(stopped, 5, pair)
    pair[1].send_signal(signal.SIGINT)
    for process in pair:
        assert "same command continues" in process.ends(143)
    assert params(stopped, 0)["step"] == params(stopped, 1)["step"] < STEPS
    assert steps(stopped / "checkpoints")[0] == params(stopped, 0)["step"]

    # SIGKILL to one host: the other ends soon, with an error.
    pair = start_pair(stopped, *CONFIG)
    wait_for_step(stopped, 15, pair)
    pair[1].kill()
    begin = time.time()
    assert pair[0].wait() != 0 and time.time() - begin < 60, pair[0].stderr
    assert steps(stopped / "checkpoints")[0] < STEPS

    finish(*start_pair(stopped, *CONFIG))
    assert_same(params(stopped, 0), params(whole, 0))
    expected = rows_of(whole)
    assert rows_of(stopped) == expected

    # An evaluation that the log has lost is computed again by both hosts.
    log = stopped / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert rows_of(stopped) == expected[:-1] and "test/loss" in expected[-1]
    finish(*start_pair(stopped, *CONFIG))
    assert rows_of(stopped) == expected


def test_hosts_that_differ_are_refused(tmp_path, start_pair):
    second = ["--config.batch_size=64", "--devices=1"]
    for process in start_pair(tmp_path / "run", *CONFIG, second=second):
        differ = "config field batch_size is 128 on host 0, 64 on host 1; --devices is 0 on host 0, 1 on host 1"
        assert differ in process.ends(1)
    assert not (tmp_path / "run").exists()


def test_the_source_is_every_byte_of_every_folder(tmp_path, monkeypatch):
    """Of a copy of the package, to whose subfolder one byte is added."""
    package = shutil.copytree(ROOT / "vae_jax", tmp_path / "vae_jax", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(hosts, "__file__", str(package / "run" / "hosts.py"))
    before = hosts.host_facts({}, 0)
    with open(package / "nn" / "layers.py", "a") as file:
        file.write("\n")
    after = hosts.host_facts({}, 0)
    assert [name for name in before | after if before.get(name) != after.get(name)] == ["the source of vae_jax"]


def test_an_error_on_one_host_ends_all(tmp_path, start_pair):
    """The primary host cannot write, and the other would wait for it."""
    (tmp_path / "run").write_text("")
    for process in start_pair(tmp_path / "run", *CONFIG):
        said = process.ends(1)
        assert f"vae_jax: host 0: cannot write to the work directory {tmp_path / 'run'}" in said
        assert "is a file, but must be a folder" in said


@pytest.mark.parametrize("host", [0, 1])
def test_a_missing_coordinator_is_reported_in_time(tmp_path, start, host):
    address = free_address()
    process = start(
        tmp_path / "run",
        CONFIG[0],
        "--coordinator=127.0.0.1:1" if host else f"--coordinator={address}",
        "--num_processes=2",
        f"--process_id={host}",
        "--start_timeout=1",
        devices=1,
    )
    stderr = process.refuses()
    assert "not all hosts met the coordinator at 127.0.0.1:" in stderr
    assert "within 1 s" in stderr


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
        (["--mode=sample", "--devices=1"], 2, "--devices has no effect with --mode"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, start, arguments, code, message):
    process = start(tmp_path / "run", CONFIG[0], *arguments, devices=2)
    assert message in process.refuses(code)
    assert not (tmp_path / "run").exists()


def test_a_remote_run_directory_is_written_here_and_copied(tmp_path, monkeypatch):
    """A folder stands in for gs://. A second start begins with the copy of the last save."""
    monkeypatch.setattr(run_directory, "is_remote", lambda path: True)
    remote = tmp_path / "remote"
    directory = RunDirectory(str(remote), {"epochs": 1}, "")
    assert {path.name for path in remote.iterdir()} == {"config.json"}
    assert directory.path != remote
    assert directory.rewind(0)
    directory.log({"step": 1, "epoch": 1.0, "train/loss": 2.0})
    directory.upload()
    directory.log({"step": 2, "epoch": 2.0, "train/loss": 1.0})
    (directory.path / "tensorboard").mkdir()
    (directory.path / "tensorboard" / "events").write_text("the last ones")
    directory.close()
    assert not directory.path.exists()
    assert (remote / "tensorboard" / "events").read_text() == "the last ones"
    assert [row["step"] for row in read_rows(remote)] == [1]

    settings = {"config": {"epochs": 1}, "saved": 0}
    monkeypatch.setattr(run_directory, "read_settings", lambda path: settings)
    directory = RunDirectory(str(remote), {"epochs": 1}, "")
    assert directory.rewind(1)
    assert [row["step"] for row in directory.history] == [1]

    def unavailable(path, content):
        raise RuntimeError("503\nand more")  # gcsfs raises more than OSErrors

    monkeypatch.setattr(type(directory.remote), "write_bytes", unavailable)
    with pytest.raises(
        OSError,
        match=r"cannot copy the run's files to .*remote \(RuntimeError: 503\): the same",
    ):
        directory.upload()
    directory.close()


def test_a_remote_run_directory_keeps_its_films_and_its_latest_step(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "is_remote", lambda path: True)
    remote = tmp_path / "remote"
    directory = RunDirectory(str(remote), {"epochs": 1}, "")
    for step in (3, 4):
        directory.mark_saved(step)
    assert json.loads((remote / "config.json").read_text())["saved"] == 4
    frames = remote / "figures" / "epochs"
    frames.mkdir(parents=True)
    (frames / "samples-00001.png").write_bytes(b"a frame")
    directory.close()
    monkeypatch.setattr(run_directory, "read_settings", lambda path: {"config": {"epochs": 1}, "saved": 4})
    directory = RunDirectory(str(remote), {"epochs": 1}, "")
    assert (directory.path / "figures" / "epochs" / "samples-00001.png").read_bytes() == b"a frame"
    directory.close()


@pytest.mark.parametrize(
    "error,message",
    [
        (ImportError("no gcsfs"), r"\(no gcsfs\): pip install -e '.\[gcs\]'"),
        (OSError("no network"), r"\(no network\)$"),
    ],
)
def test_an_unreachable_remote_directory_is_refused(monkeypatch, error, message):
    def fail(path):
        raise error

    monkeypatch.setattr(files.epath, "Path", fail)
    with pytest.raises(ValueError, match="cannot reach gs://no-such/run " + message):
        files.check_reachable("gs://no-such/run")


def test_a_signal_that_a_library_handles_stops_nothing(monkeypatch):
    """Otherwise the first Ctrl-C after it would count as the second one."""
    ended, terminal = [], io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(hosts.sys, "stderr", terminal)
    monkeypatch.setattr(hosts, "exit_now", lambda *reason: ended.append(reason))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep pytest's own handlers
    before = signal.set_wakeup_fd(-1)
    stop = hosts.Stop()
    signal.set_wakeup_fd(before)
    for number in (signal.SIGUSR1, signal.SIGINT):
        stop._writer.send(bytes([number]))
    while "stopping after these steps; Ctrl-C again ends at once" not in terminal.getvalue():
        time.sleep(0.01)
    assert stop.signal == signal.SIGINT and not ended


def test_on_several_hosts_sighup_and_ctrl_c_become_sigterm(monkeypatch):
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGHUP, signal.SIGINT)}
    sent = []
    try:
        monkeypatch.setattr(hosts.os, "kill", lambda process, number: sent.append(number))
        for number in before:
            hosts.StopOnAllHosts()
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sent == [signal.SIGTERM, signal.SIGTERM]
