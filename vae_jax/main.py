"""The command line, `python -m vae_jax.main --config=configs/vae.py`: flags -> one call."""

import contextlib
import os
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

MODES = {  # and the flags that each takes beside config and workdir
    "train": (
        "devices",
        "distributed",
        "coordinator",
        "num_processes",
        "process_id",
        "start_timeout",
        "heartbeat_timeout",
    ),
    "evaluate": ("checkpoint", "split"),
    "sample": ("checkpoint", "count", "sample_seed"),
    "reconstruct": ("checkpoint", "split", "count"),
    "interpolate": ("checkpoint", "split", "count", "images", "labels"),
    "traverse": ("checkpoint", "split", "count", "images", "labels"),
    "predict": ("checkpoint", "input"),
}
HELP = ("--help", "-help", "--helpfull", "-h")
INDENT = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}
COUNTS = {"sample": 100, "reconstruct": 10, "interpolate": 11, "traverse": 11}

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file in configs/ and, after a colon, its variant: configs/vae.py:digits. --config.FIELD=VALUE sets a field. "
    "Modes other than train need only --workdir.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory. Default: runs/CONFIG-VARIANT.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(MODES),
    "train: train, or continue an interrupted training. The others use a trained model. evaluate: its metrics on a "
    "split. sample: images from the prior. reconstruct: images of a split beside their reconstructions. interpolate: "
    "images between two. traverse: one latent moved at a time. predict: labels of the images in --input. They write to "
    "generated/ in the run directory.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "The one to use: latest, best, or a step. Default: the best where validation images are held out, else the latest.",
)
_SPLIT = flags.DEFINE_string("split", "test", "train, test or validation.")
_COUNT = flags.DEFINE_integer(
    "count",
    None,
    "Number of images; for interpolate and traverse, of images in a row. Default: "
    + ", ".join(f"{count} for {mode}" for mode, count in COUNTS.items()),
)
_SAMPLE_SEED = flags.DEFINE_integer("sample_seed", 0, "Seed of --mode=sample.", lower_bound=0, upper_bound=2**32 - 1)
_IMAGES = flags.DEFINE_list(
    "images",
    None,
    "Positions in the split: two for interpolate (3,18), one for traverse.",
)
_LABELS = flags.DEFINE_list(
    "labels",
    None,
    "Instead of --images: labels; the first image of each is taken.",
)
_INPUT = flags.DEFINE_string("input", None, "For predict: the path of an .npz with `image`, or of a folder.")

_DEVICES = flags.DEFINE_integer("devices", 0, "Devices that train on each host; 0: all of them.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Train on several hosts that the cluster names: Cloud TPU, Slurm, Open MPI or Kubernetes (GKE).",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Elsewhere: ADDRESS:PORT of host 0, with --num_processes and --process_id.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of hosts.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this host, from 0.")
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout",
    300,
    "Seconds that the hosts wait for each other at the start.",
    lower_bound=1,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds of silence after which a host counts as lost and the others end.",
    lower_bound=1,
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}; --help lists the flags", 2)
    mode = _MODE.value
    for name in sorted({name for used in MODES.values() for name in used}):
        if flags.FLAGS[name].present and name not in MODES[mode]:
            fail(f"--{name} has no meaning with --mode={mode}", 2)
    if _CONFIG.value is None and (mode == "train" or not _WORKDIR.value):
        fail("--config is required, e.g. --config=configs/vae.py:digits", 2)
    try:
        config = _CONFIG.value and _CONFIG.value.to_dict()
        workdir = _WORKDIR.value or default_workdir()
        if mode == "train":
            train(config, workdir)
        else:
            use(mode, config, workdir)
    except (ValueError, OSError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def train(config: dict, workdir: str) -> None:
    """Train, or continue, and end with the program's exit code."""
    join_hosts()  # before anything touches a device
    import jax

    from vae_jax.run import hosts, session

    several = jax.process_count() > 1
    make_stop = hosts.StopOnAllHosts if several else hosts.Stop
    try:
        outcome = session.run(config, workdir, _DEVICES.value, make_stop)
    except FloatingPointError as error:
        fail(str(error), 1)
    except jax.errors.JaxRuntimeError as error:
        if not several:
            raise
        print(f"vae_jax: a host was lost ({error})".splitlines()[0], file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # a normal exit would wait for the lost host
    if outcome is None:
        print(f"finished already: {Path(workdir) / 'summary.md'}")
    elif outcome.step < outcome.steps:
        fail(
            f"stopped and saved at step {outcome.step} of {outcome.steps}: the same command continues",
            128 + outcome.signal,
        )
    elif outcome.summary:
        print(f"done: {outcome.summary}")


def join_hosts() -> None:
    """Connect to the other hosts, if the flags name any."""
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not (_DISTRIBUTED.value or _COORDINATOR.value):
        if given != (None, None, None):
            fail("--num_processes and --process_id need --coordinator=ADDRESS:PORT", 2)
        return
    from vae_jax.run.hosts import connect

    try:
        connect(*given, _START_TIMEOUT.value, _HEARTBEAT_TIMEOUT.value)
    except RuntimeError as error:
        fail(str(error), 1)


def use(mode: str, config: dict | None, workdir: str) -> None:
    """Do with a trained model what the mode says. Raises ValueError or OSError for bad input."""
    from vae_jax import commands
    from vae_jax.run.directory import read_config
    from vae_jax.run.files import is_remote
    from vae_jax.run.session import check_same_config

    checkpoint, split = _CHECKPOINT.value, _SPLIT.value
    count = COUNTS.get(mode) if _COUNT.value is None else _COUNT.value
    if count is not None and count < 1:
        raise ValueError(f"--count is {count}, but must be at least 1")
    if is_remote(workdir):
        raise ValueError(
            f"--mode={mode} takes a run on this machine: copy {workdir} here (gcloud storage cp -r) and name the copy"
        )
    chosen = integers("images"), integers("labels")
    stored = read_config(workdir)
    if stored is None:
        raise ValueError(f"there is no run in {workdir}: train one, or name another with --workdir")
    config = (config or stored) | {"epochs": stored["epochs"]}
    check_same_config(workdir, stored, config)
    match mode:
        case "evaluate":
            metrics = commands.evaluate(workdir, config, checkpoint, split)
            print("\n".join(f"{name} {show(v)}" for name, v in metrics.items()))
            return
        case "predict":
            if _INPUT.value is None:
                raise ValueError("--mode=predict needs --input=FOLDER or FILE.npz")
            paths = commands.predict(workdir, checkpoint, _INPUT.value)
        case "sample":
            paths = commands.sample(workdir, checkpoint, count, _SAMPLE_SEED.value)
        case "reconstruct":
            paths = commands.reconstruct(workdir, config, checkpoint, split, count)
        case _:
            command = getattr(commands, mode)  # interpolate, traverse
            paths = command(workdir, config, checkpoint, split, count, *chosen)
    print("\n".join(map(str, paths)))


def show(value) -> str:
    """A number, or nested lists of numbers, in one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    return f"{value:.6g}"


def integers(flag: str) -> list[int] | None:
    """A flag's list of integers. Raises ValueError for anything else."""
    given = flags.FLAGS[flag].value
    try:
        return given and [int(item) for item in given]
    except ValueError:
        raise ValueError(f"--{flag} is {','.join(given)}, but must be integers separated by commas") from None


def default_workdir() -> str:
    """runs/CONFIG-VARIANT, from the given --config."""
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    return str(Path("runs") / f"{Path(path).stem}-{variant or 'default'}")


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and exit: 1 for bad input, 2 for bad usage."""
    line = message.strip().splitlines()[-1].strip() if message.strip() else "failed"
    print(f"vae_jax: {line}", file=sys.stderr)
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; what absl and ml_collections raise becomes one line."""
    try:
        if any(argument in HELP for argument in argv[1:]):
            print_help(argv)
            sys.exit()
        argv = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            fail(f"--{error.flagname} needs a config to change: give --config too", 2)
        fail(f"{error}; --help lists the flags", 2)
    except (flags.Error, OSError) as error:
        fail(str(error), 1)
    except Exception as error:  # noqa: BLE001
        # ml_collections reports an unknown field as almost anything, and a config file may raise anything.
        with contextlib.suppress(Exception):
            check_field_names(argv)
        fail(f"{type(error).__name__}: {error}", 1)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = -2  # errors: JAX and Orbax warn of what we report
    return argv


def print_help(argv: list[str]) -> None:
    """Print the flags and the fields of a config."""
    from vae_jax.run.config import flatten
    from vae_jax.run.session import describe

    flags.FLAGS([argument for argument in argv if argument not in HELP])
    values = flatten(_CONFIG.value.to_dict()) if _CONFIG.value else None

    print("python -m vae_jax.main --config=configs/vae.py [flags]\n\nFlags:")
    for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__]):
        print(f"  --{flag.name}", textwrap.fill(flag.help, 100, **INDENT), sep="\n")
    print(f"\nFields of {_CONFIG.value and 'this' or 'a'} config:")
    for field, text in describe():
        if values is None or field in values:
            value = "" if values is None else f"={values[field]}"
            print(
                f"  --config.{field}{value}",
                textwrap.fill(text, 100, **INDENT),
                sep="\n",
            )


def check_field_names(argv: list[str]) -> None:
    """Fail for the first --config.FIELD that the config does not have."""
    from vae_jax.run.config import nearest

    overrides = [a for a in argv if a.lstrip("-").startswith("config.")]
    # ml_collections reads sys.argv itself.
    sys.argv = [a for a in argv if a not in overrides]
    flags.FLAGS(sys.argv)
    for override in overrides:
        path = override.partition("=")[0].lstrip("-").split(".")
        section = _CONFIG.value
        for depth in range(1, len(path)):
            field = ".".join(path[1 : depth + 1])
            if not hasattr(section, "keys"):
                hint = f"{path[depth - 1]} is not a section"
                fail(f"unknown config field {field}: {hint}", 1)
            if path[depth] not in section:
                hint = nearest(path[depth], section)
                fail(f"unknown config field {field}: {hint}", 1)
            section = section[path[depth]]


def run() -> None:
    """The program."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
