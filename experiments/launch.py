"""The main program as a part of a study: the same command that a person would type."""

import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from vae_jax.run.directory import read_config, read_rows


@contextlib.contextmanager
def in_one_line(program: str) -> Iterator[None]:
    """What goes wrong, told in one line of that program, which then exits."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        print(f"{program}: interrupted: the same command continues", file=sys.stderr)
        sys.exit(130)


def make_command(config: str, workdir: str, fields: dict, manual_dir: str = "") -> list:
    """`python -m vae_jax.main` for a config in which `fields`, {"model.latent_dim": 10, ...}, are set."""
    if manual_dir:
        fields = fields | {"data.manual_dir": manual_dir}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    program = ["python", "-m", "vae_jax.main"]
    return [*program, f"--config={config}", f"--workdir={workdir}", *overrides]


def config_for(model: str, data_name: str) -> str:
    """The config of a model for a data set: the variant of the data set's name where there is one."""
    variant = ":digits" if data_name == "digits" else ""
    return f"configs/{model}.py{variant}"


def shown(command: list) -> str:
    """The command for people. Left out is where files lie that others would download: it changes no number."""
    places = ("--config.data.manual_dir=", "--manual_dir=")
    return shlex.join(part for part in command if not part.startswith(places))


def run(command: list) -> None:
    """Run a command made by `make_command` to its end; if it fails or is stopped, exit as it does.

    Ctrl-C reaches it through the terminal, SIGTERM is passed on: it saves, and this process waits for that.
    """
    print(f"\n$ {shown(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command[1:]])
    handlers = {
        signal.SIGINT: signal.SIG_IGN,
        signal.SIGTERM: lambda number, frame: process.send_signal(number),
    }
    before = {
        number: signal.signal(number, handler) for number, handler in handlers.items()
    }
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code < 0:  # of a process that did not end by itself: as a shell tells it
        killer = signal.Signals(-code).name
        print(f"ended by {killer}: the same command continues", file=sys.stderr)
        code = 128 - code
    if code:
        sys.exit(code)


def last_test(run: Path) -> dict:
    """The last evaluation of a run. Raises ValueError if the run is missing or not finished."""
    config = read_config(str(run))
    rows = [row for row in read_rows(run) if "test/loss" in row] if config else []
    if not rows or rows[-1]["epoch"] < config["epochs"]:
        raise ValueError(f"{run} is missing or not finished: run its part first")
    return rows[-1]
