"""The program as a user starts it: the bundled digits end to end, and one clear line for every slip."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def start(*arguments, **environment):
    command = [sys.executable, "-m", "vae_jax.main", *arguments]
    env = {
        name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
    } | environment
    return subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def smoke(workdir, *more):
    return start("--config=configs/vae.py:smoke", f"--workdir={workdir}", *more)


def test_digits_end_to_end_and_again(tmp_path):
    workdir = tmp_path / "deep" / "run"
    first = smoke(workdir)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert "epoch 1/1" in first.stdout and str(workdir / "summary.md") in first.stdout
    kept = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert {path.name for path in kept if "checkpoints" not in path.parts} == {
        "config.json",
        "lock",
        "metrics.jsonl",
        "summary.md",
        "training.png",
        "reconstructions.png",
        "samples.png",
    }

    second = smoke(workdir)
    assert second.returncode == 0 and "finished already: " in second.stdout
    changed = smoke(workdir, "--config.model.latent_dim=3", "--config.batch_size=100")
    assert changed.returncode == 1 and changed.stderr.count("\n") == 1
    assert "batch_size is 512 there, 100 here; model.latent_dim is 20" in changed.stderr
    for path, content in kept.items():
        assert path.read_bytes() == content

    other = smoke(
        tmp_path / "other",
        "--config.run.compilation_cache=false",
        "--config.run.chunk=1",
    )
    assert other.returncode == 0
    last, other_last = (
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        for folder in (workdir, tmp_path / "other")
    )
    assert last | {"seconds": 0} == other_last | {"seconds": 0}

    # The modes need nothing but the directory.
    evaluated = start("--mode=evaluate", f"--workdir={workdir}")
    assert f"test/loss {last['test/loss']:.6g}\n" in evaluated.stdout, evaluated.stderr
    sampled = start("--mode=sample", "--count=3", f"--workdir={workdir}")
    (picture, arrays) = map(Path, sampled.stdout.split())
    assert picture.exists() and arrays.exists() and sampled.stderr == ""
    longer = smoke(workdir, "--config.epochs=2")
    assert longer.returncode == 0 and "epoch 2/2" in longer.stdout


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_program_saves_and_continues(tmp_path, number, code):
    arguments = ["--config.epochs=4", "--config.batch_size=64"]
    command = [sys.executable, "-m", "vae_jax.main", "--config=configs/vae.py:smoke"]
    command += [*arguments, f"--workdir={tmp_path}", "--config.run.chunk=1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    rows = tmp_path / "metrics.jsonl"
    while not (rows.exists() and rows.read_text()) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert "of 88: the same command continues" in stderr and stderr.count("\n") == 1
    result = subprocess.run(command, check=False, cwd=ROOT, timeout=300)
    assert result.returncode == 0
    steps = [json.loads(row) for row in rows.read_text().splitlines()]
    steps = [row["step"] for row in steps if "train/loss" in row]
    assert steps == [*range(1, 89)]


def test_a_bar_on_a_terminal(tmp_path):
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    command = [
        sys.executable,
        "-m",
        "vae_jax.main",
        "--config=configs/vae.py:smoke",
        f"--workdir={tmp_path / 'run'}",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=writer
    )
    os.close(writer)
    shown = b""
    try:
        while part := os.read(reader, 4096):
            shown += part
    except OSError:  # the other side was closed
        pass
    assert process.wait() == 0
    assert (
        b"epoch 1/1" in shown
        and b"loss" in shown
        and b"images/s" in shown
        and b"100%" in shown
    )


def test_own_images_of_another_size(tmp_path):
    import numpy as np

    np.savez(
        tmp_path / "own.npz", image=np.random.default_rng(0).random((40, 32, 32, 3))
    )
    result = smoke(
        tmp_path / "run",
        f"--config.data.name={tmp_path / 'own.npz'}",
        "--config.batch_size=16",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "figures" / "reconstructions.png").exists()
    before = (tmp_path / "run" / "config.json").read_text()
    np.savez(tmp_path / "own.npz", image=np.zeros((40, 32, 32, 3)))
    for more in [(), ("--config.epochs=2",)]:
        changed = smoke(
            tmp_path / "run",
            f"--config.data.name={tmp_path / 'own.npz'}",
            "--config.batch_size=16",
            *more,
        )
        assert changed.returncode == 1 and "data is not what it was" in changed.stderr
        assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        ([], 2, "Give a config"),
        (["--config=configs/vae.py:smoke", "extra"], 2, "unexpected argument 'extra'"),
        (["--mode=smaple", "--config=configs/vae.py"], 1, "should be one of <train|"),
        (["--mode=sample"], 1, "there is no run in "),
        (["--mode=sample", "--count=0"], 1, "--count is 0, but must be at least 1"),
        (
            ["--mode=sample", "--split=test"],
            2,
            "--split has no meaning with --mode=sample",
        ),
        (["--mode=sample", "--workdir="], 2, "Give a config"),
        (["--config.epochs=3"], 2, "--config.epochs needs a config to change"),
        (["--mode=traverse", "--images=1,a"], 1, "--images is 1,a, but must be whole"),
        (["--confg=configs/vae.py"], 2, "Unknown command line flag 'confg'"),
        (
            ["--config=configs/none.py"],
            1,
            "No such file or directory: 'configs/none.py'",
        ),
        (
            ["--config=configs/none.py", "--config.epochs=3"],
            1,
            "No such file or directory: 'configs/none.py'",
        ),
        (["--config=configs/vae.py:none"], 1, "no variant 'none': there are default, "),
        (["--help", "--config=configs/none.py"], 1, "No such file or directory"),
        (["--help", "--confg"], 2, "Unknown command line flag 'confg'"),
        (
            ["--config=configs/vae.py:smoke", "--config.epoch=3"],
            1,
            "unknown config field epoch: did you mean epochs?",
        ),
        (
            ["--config=configs/vae.py:smoke", "--config.model.latnt_dim=3"],
            1,
            "model.latnt_dim: did you mean latent_dim?",
        ),
        (
            ["--config=configs/vae.py:smoke", "--config.modle.latent_dim=3"],
            1,
            "unknown config field modle: did you mean model?",
        ),
        (
            ["--config=configs/vae.py:smoke", "--config.epochs=many"],
            1,
            "invalid literal for int() with base 10: 'many'",
        ),
        (
            ["--config=configs/vae.py:smoke", "--config.seed.x=1"],
            1,
            "seed is no section",
        ),
        (
            ["--config=configs/vae.py:smoke", "--config.batch_size=0"],
            1,
            "batch_size is 0, but must be at least 1",
        ),
        (
            ["--config=configs/vae.py:smoke", "--config.data.name=digit"],
            1,
            "did you mean 'digits'",
        ),
        (
            ["--config=configs/vae.py", "--config.data.manual_dir=/nowhere"],
            1,
            "/nowhere lacks",
        ),
        (
            ["--config=configs/vae.py:smoke", "--config.optimizer.learning_rate=1e30"],
            1,
            "at step",
        ),
        (
            ["--config=configs/vae.py:smoke", "--workdir=/proc/none/run"],
            1,
            "cannot write to the work directory /proc/none/run",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, arguments, code, message):
    workdir = (
        []
        if any(a.startswith("--workdir") for a in arguments)
        else [f"--workdir={tmp_path / 'run'}"]
    )
    result = start(*arguments, *workdir)
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("vae_jax: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "at step" in message or not (tmp_path / "run").exists()


def test_help_lists_flags_and_config_fields():
    result = start("--help")
    assert result.returncode == 0 and result.stderr == ""
    for line in ("  --workdir\n", "  --mode\n", "  --config.model.latent_dim\n"):
        assert line in result.stdout
