"""The program as a user starts it: the bundled digits end to end, and one clear line for every slip."""

import json
import os
import pty
import subprocess
import sys
import termios
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
    kept = {
        path.name: path.read_bytes() for path in workdir.rglob("*") if path.is_file()
    }
    assert set(kept) == {
        "config.json",
        "metrics.jsonl",
        "summary.md",
        "training.png",
        "reconstructions.png",
        "samples.png",
    }

    second = smoke(workdir)
    assert second.returncode == 1 and "is not empty" in second.stderr
    assert kept == {
        path.name: path.read_bytes() for path in workdir.rglob("*") if path.is_file()
    }

    other = smoke(
        tmp_path / "other",
        "--config.run.compilation_cache=false",
        "--config.run.chunk=1",
    )
    assert other.returncode == 0
    rows = [
        json.loads(line)
        for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1] == json.loads(kept["metrics.jsonl"].splitlines()[-1])


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


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        ([], 2, "Give a config"),
        (["--config=configs/vae.py:smoke", "extra"], 2, "unexpected argument 'extra'"),
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
            "cannot create the work directory /proc/none/run",
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


def test_help():
    result = start("--help")
    assert "--config" in result.stdout and "--workdir" in result.stdout
