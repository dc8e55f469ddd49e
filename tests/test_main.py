"""The program as a user starts it: the bundled digits end to end, and one clear line for every mistake."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from program import ROOT, environment, fresh

from vae_jax.main import show

MAIN = ("-m", "vae_jax.main")
SMOKE = (*MAIN, "--config=configs/vae.py:smoke")
SMALL = (*SMOKE, "--config.model.encoder_features=4,4", "--config.model.decoder_features=4,4")


def last_row(workdir):
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


def files_of(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The run directory of a finished training, and the process that trained it."""
    workdir = tmp_path_factory.mktemp("digits") / "deep" / "run"
    process = fresh(*SMOKE, f"--workdir={workdir}")
    process.wait()
    return workdir, process


def test_digits_end_to_end(digits):
    workdir, process = digits
    assert process.ends() == ""
    assert "epoch 1/1" in process.stdout and str(workdir / "summary.md") in process.stdout
    assert {path.name for path in files_of(workdir) if "checkpoints" not in path.parts} == {
        "config.json",
        "lock",
        "metrics.jsonl",
        "summary.md",
        "summary.html",
        "training.png",
        "reconstructions.png",
        "samples.png",
        "codes.png",
        "manifold.png",
        "reconstructions.webp",
        "samples.webp",
        "reconstructions-00001.png",
        "samples-00001.png",
    }


def test_a_finished_run_is_left_as_it_is(digits, forks):
    workdir, _ = digits
    before = files_of(workdir)
    again = forks(*SMOKE, f"--workdir={workdir}")
    assert again.ends() == "" and "already finished: " in again.stdout
    changes = "--config.model.latent_dim=3", "--config.batch_size=100"
    stderr = forks(*SMOKE, *changes, f"--workdir={workdir}").refuses()
    assert "batch_size is 512 there, 100 here; model.latent_dim is 20" in stderr
    assert files_of(workdir) == before


@pytest.mark.slow
def test_neither_cache_nor_steps_per_call_change_the_numbers(digits, tmp_path):
    options = "--config.run.compilation_cache=false", "--config.run.steps_per_call=1"
    assert fresh(*SMOKE, *options, f"--workdir={tmp_path}").ends() == ""
    assert last_row(tmp_path) | {"seconds": 0} == last_row(digits[0]) | {"seconds": 0}


def test_modes_need_only_the_run_directory(digits, forks):
    """The stored section `run` does not matter either: here it has a field that no longer exists."""
    workdir, _ = digits
    file = workdir / "config.json"
    stored = file.read_text()
    config = json.loads(stored)
    file.write_text(json.dumps(config | {"run": config["run"] | {"tensorboard": True}}))
    evaluated = fresh(*MAIN, "--mode=evaluate", f"--workdir={workdir}")
    assert evaluated.ends() == ""
    file.write_text(stored)
    assert f"test/loss {last_row(workdir)['test/loss']:.6g}\n" in evaluated.stdout
    sampled = forks(*MAIN, "--mode=sample", "--count=3", f"--workdir={workdir}")
    assert sampled.ends() == ""
    picture, arrays = map(Path, sampled.stdout.split())
    assert picture.exists() and arrays.exists()


def test_a_stopped_program_saves_and_continues(tmp_path, forks):
    command = [*SMALL, "--config.epochs=4", "--config.batch_size=64"]
    command += ["--config.run.steps_per_call=1", f"--workdir={tmp_path}"]
    process = fresh(*command)
    rows = tmp_path / "metrics.jsonl"
    process.wait_for(lambda: rows.exists() and rows.read_text())
    process.send_signal(signal.SIGINT)
    assert "of 88: the same command continues" in process.refuses(130)
    assert forks(*command).ends() == ""
    steps = [json.loads(row) for row in rows.read_text().splitlines()]
    steps = [row["step"] for row in steps if "train/loss" in row]
    assert steps == [*range(1, 89)]


@pytest.mark.slow
def test_a_bar_on_a_terminal(tmp_path):
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    process = subprocess.Popen(
        [sys.executable, *SMALL, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=writer,
    )
    os.close(writer)
    shown = b""
    try:
        while part := os.read(reader, 4096):
            shown += part
    except OSError:  # the other side was closed
        pass
    os.close(reader)
    assert process.wait() == 0
    doing = b"compiling", b"evaluating epoch 1", b"the last measurements", b"the figures of epoch 1"
    for part in (b"epoch 1/1", b"loss", b"images/s", b"100%", *doing):
        assert part in shown


@pytest.mark.slow
def test_own_images_of_another_size(tmp_path, forks):
    path, workdir = tmp_path / "own.npz", tmp_path / "run"
    command = [*SMALL, f"--config.data.name={path}", "--config.batch_size=16", f"--workdir={workdir}"]
    np.savez(path, image=np.random.default_rng(0).random((40, 32, 32, 3)))
    assert forks(*command).ends() == ""
    assert (workdir / "figures" / "reconstructions.png").exists()
    before = (workdir / "config.json").read_text()
    np.savez(path, image=np.zeros((40, 32, 32, 3)))
    for more in [(), ("--config.epochs=2",)]:
        assert "data is not what it was" in forks(*command, *more).refuses()
        assert (workdir / "config.json").read_text() == before


# Arguments after --config=configs/vae.py:smoke, and what stderr says.
BAD_FIELDS = [
    ("--config.epoch=3", "unknown config field epoch: did you mean epochs?"),
    ("--config.model.latnt_dim=3", "model.latnt_dim: did you mean latent_dim?"),
    ("--config.modle.latent_dim=3", "unknown config field modle: did you mean model?"),
    ("--config.epochs=many", "invalid literal for int() with base 10: 'many'"),
    ("--config.seed.x=1", "seed is not a section"),
    ("--config.batch_size=-1", "batch_size is -1, but must be at least 0"),
    ("--config.data.name=digit", "did you mean 'digits'"),
    ("--workdir=/proc/none/run", "cannot write to the work directory /proc/none/run"),
]
BAD_COMMAND_LINES = [
    ([], 2, "--config is required"),
    (["--config=configs/vae.py:smoke", "extra"], 2, "unexpected argument 'extra'"),
    (["--mode=smaple", "--config=configs/vae.py"], 1, "should be one of <train|"),
    (["--mode=sample"], 1, "there is no run in "),
    (["--mode=sample", "--count=0"], 1, "--count is 0, but must be 1 to 10,000"),
    (["--mode=sample", "--split=test"], 2, "--split has no effect with --mode=sample"),
    (["--mode=sample", "--workdir="], 2, "--config is required"),
    (["--config.epochs=3"], 2, "--config.epochs needs a config to change"),
    (["--mode=traverse", "--images=1,a"], 1, "--images is 1,a, but must be integers"),
    (["--mode=traverse", "--labels=1,a"], 1, "--labels is 1,a, but must be integers"),
    (["--confg=configs/vae.py"], 2, "Unknown command line flag 'confg'"),
    (["--config=configs/none.py"], 1, "No such file or directory: 'configs/none.py'"),
    (["--config=configs/none.py", "--config.epochs=3"], 1, "No such file or directory: 'configs/none.py'"),
    (["--config=configs/vae.py:none"], 1, "no variant 'none' of the vae config: give one of default, "),
    (["--help", "--config=configs/none.py"], 1, "No such file or directory"),
    (["--help", "--confg"], 2, "Unknown command line flag 'confg'"),
    (["--config=configs/vae.py", "--config.data.manual_dir=/nowhere"], 1, "/nowhere lacks"),
    *((["--config=configs/vae.py:smoke", field], 1, message) for field, message in BAD_FIELDS),
]


@pytest.mark.parametrize("arguments,code,message", BAD_COMMAND_LINES)
def test_bad_input_is_refused_in_one_line(tmp_path, forks, arguments, code, message):
    if not any(argument.startswith("--workdir") for argument in arguments):
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}"]
    assert message in forks(*MAIN, *arguments).refuses(code)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags,message",
    [("--mode=smaple", "should be one of <train|"), ("--mode=sample --workdir=nowhere", "there is no run in nowhere")],
)
def test_a_fresh_process_refuses_as_a_fork_does(flags, message):
    """Before most imports, and after some of them."""
    assert message in fresh(*MAIN, *flags.split()).refuses(1)


def test_a_large_step_is_printed_whole():
    assert show(9_774_400) == "9774400" and show([1, 0.123456789]) == "[1, 0.123457]"


def test_help_lists_flags_and_config_fields(forks):
    process = forks(*MAIN, "--help")
    assert process.ends() == ""
    for line in ("  --workdir\n", "  --mode\n", "  --config.model.latent_dim\n"):
        assert line in process.stdout


def test_the_package_is_the_program(forks):
    """`python -m vae_jax` and `python -m vae_jax.main` are one."""
    helps = [forks("-m", module, "--help") for module in ("vae_jax", "vae_jax.main")]
    assert [process.ends() for process in helps] == ["", ""]
    assert helps[0].stdout == helps[1].stdout
