"""Run experiments as programs, and the training commands that they consist of."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags, logging

from vae_jax.run.directory import read_config
from vae_jax.run.files import is_remote, write_atomically
from vae_jax.run.log import read_rows

PROGRAM = ("python", "-m", "vae_jax")
LOCAL_FLAGS = ("--config.data.manual_dir=", "--manual_dir=")  # change no number


def start(program: str, main: Callable[..., None], takes_arguments: bool = False) -> None:
    """Run an experiment's `main()` under absl: errors print one line, Ctrl-C exits with code 130.

    With `takes_arguments`, `main` receives the list of positional arguments; otherwise there must be none.
    """

    # An experiment shares the device's memory with its trainings, and with PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def run(argv):
        if len(argv) > 1 and not takes_arguments:
            raise app.UsageError(f"unexpected argument {argv[1]!r}")
        logging.set_verbosity(logging.WARNING)
        try:
            main(argv[1:]) if takes_arguments else main()
        except (ValueError, OSError) as error:
            sys.exit(f"{program}: {error}")
        except KeyboardInterrupt:
            print(f"{program}: interrupted; the same command resumes", file=sys.stderr)
            sys.exit(130)

    app.run(run)


def define_data_flags(workdir: str) -> None:
    """Define the flags --workdir, --data and --manual_dir of an experiment on a data set."""
    define_workdir(workdir)
    flags.DEFINE_string("data", "mnist", "As --config.data.name of vae_jax.")
    flags.DEFINE_string("manual_dir", "", "As --config.data.manual_dir.")


def define_workdir(workdir: str) -> None:
    """Define the flag --workdir, which must be a local folder."""
    flags.DEFINE_string("workdir", workdir, "The folder of the runs.")
    flags.register_validator("workdir", lambda path: not is_remote(path), "an experiment writes to a local folder")


def make_command(config: str, workdir: Path, fields: dict, manual_dir: str = "") -> list[str]:
    """The main program's command for a config and its overrides, such as {"model.latent_dim": 10}."""
    if manual_dir:
        fields = fields | {"data.manual_dir": manual_dir}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [*PROGRAM, f"--config={config}", f"--workdir={workdir}", *overrides]


def config_for(model: str, data_name: str) -> str:
    """The config of a model for a data set: its variant digits for the digits, else its default."""
    variant = ":digits" if data_name == "digits" else ""
    return f"configs/{model}.py{variant}"


def shell_line(command: list[str]) -> str:
    """The command as typed in a shell, without the folders of local data files."""
    return shlex.join(part for part in command if not part.startswith(LOCAL_FLAGS))


def train_command(config: str, workdir: Path, fields: dict, manual_dir: str = "") -> list[str]:
    """`make_command` for a run of a study, without the likelihood at its end: a study computes its own."""
    return make_command(config, workdir, {"run.likelihood_samples": 0} | fields, manual_dir)


def train(config: str, workdir: Path, fields: dict, manual_dir: str = "") -> None:
    """Train a run of a study, as `train_command` says."""
    run(train_command(config, workdir, fields, manual_dir))


def run(command: list[str]) -> None:
    """Run a command to its end; if it fails, or a signal came, exit with the code that a shell would report.

    SIGTERM and SIGHUP are passed on to the command, which saves and exits; Ctrl-C reaches it through the terminal.
    """
    print(f"\n$ {shell_line(command)}", flush=True)
    process, received = None, []  # a signal may arrive before the command has started

    def note(number, frame):
        received.append(number)

    def pass_on(number, frame):
        received.append(number)
        if process is not None:
            process.send_signal(number)

    passed = {
        number: pass_on for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN
    }
    with _handlers(passed):
        process = subprocess.Popen([sys.executable, *command[1:]])
        for number in received[:1]:
            process.send_signal(number)
        with _handlers({signal.SIGINT: note}):
            code = process.wait()
    if code < 0:
        killer = signal.Signals(-code).name
        print(f"killed by {killer}; the same command resumes", file=sys.stderr)
        code = 128 - code
    if code or received:  # a command that was at its end when the signal came has finished
        sys.exit(code or 128 + received[0])


@contextlib.contextmanager
def _handlers(handlers: dict) -> Iterator[None]:
    """Replace the handlers of signals inside the block."""
    before = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_summary(folder: Path, title: str, *parts: str) -> None:
    """Write a title and parts in Markdown to summary.md, and print them."""
    text = "\n\n".join([f"# {title}", *parts]) + "\n"
    write_atomically(folder / "summary.md", text)
    print(text)


def last_test(run: Path) -> dict[str, float]:
    """The last evaluation of a run. Raises ValueError if the run is missing or unfinished."""
    config = read_config(str(run))
    rows = [row for row in read_rows(run) if "test/loss" in row] if config else []
    if not rows or rows[-1]["epoch"] < config["epochs"]:
        raise ValueError(f"{run} is missing or unfinished: run its part first")
    return rows[-1]
