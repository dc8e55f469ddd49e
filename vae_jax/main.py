"""Train a model, or use one: `python -m vae_jax.main --config=configs/vae.py`. Flags -> one call."""

import contextlib
import functools
import hashlib
import os
import shlex
import signal
import socket
import sys
import textwrap
import threading
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
    "interpolate": ("checkpoint", "split", "count", "images", "digits"),
    "traverse": ("checkpoint", "split", "count", "images", "digits"),
    "predict": ("checkpoint", "input"),
}
HELP = ("--help", "-help", "--helpfull", "-h")
INDENT = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}
COUNTS = {"sample": 100, "reconstruct": 10, "interpolate": 11, "traverse": 11}

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/ and, after a colon, its variant: configs/vae.py:digits. Set fields by --config.FIELD=VALUE. "
    "The other modes need none with --workdir.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run directory. Default: runs/CONFIG-VARIANT."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(MODES),
    "train: train, or continue an interrupted training. The others use a trained model: evaluate: its metrics on a "
    "split. sample: images from the prior. reconstruct: images of a split beside their reconstructions. interpolate: "
    "between two images. traverse: move each latent alone. predict: labels of the images in --input. What they make goes "
    "to generated/ in the run directory.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "Which one to use: latest, best, or a step. Default: the best where validation images are held out, else the latest.",
)
_SPLIT = flags.DEFINE_string("split", "test", "train, test or validation.")
_COUNT = flags.DEFINE_integer(
    "count",
    None,
    "How many images; for interpolate and traverse how many in a row. Default: "
    + ", ".join(f"{count} for {mode}" for mode, count in COUNTS.items()),
)
_SAMPLE_SEED = flags.DEFINE_integer(
    "sample_seed", 0, "Seed of --mode=sample.", lower_bound=0, upper_bound=2**32 - 1
)
_IMAGES = flags.DEFINE_list(
    "images",
    None,
    "Positions in the split: two for interpolate (3,18), one for traverse.",
)
_DIGITS = flags.DEFINE_list(
    "digits",
    None,
    "Instead of --images: labels, of each of which the first image is taken.",
)
_INPUT = flags.DEFINE_string(
    "input", None, "For predict: the path of an .npz with `image`, or of a folder."
)

_DEVICES = flags.DEFINE_integer(
    "devices", 0, "How many devices train, of each host's; 0: all of them."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This command was started on several hosts, which find each other: on Cloud TPU, Slurm, Open MPI or Kubernetes (GKE).",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Elsewhere: ADDRESS:PORT of the first host, the same on all, with --num_processes and --process_id.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many hosts.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which host this is, from 0.")
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout",
    300,
    "Seconds that hosts wait for each other at the start.",
    lower_bound=1,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds of silence after which a host is lost, and the others end.",
    lower_bound=1,
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}; --help lists the flags", 2)
    for name in sorted({name for used in MODES.values() for name in used}):
        if flags.FLAGS[name].present and name not in MODES[_MODE.value]:
            fail(f"--{name} has no meaning with --mode={_MODE.value}", 2)
    if _CONFIG.value is None and (_MODE.value == "train" or not _WORKDIR.value):
        fail("which model? Give a config, say --config=configs/vae.py:digits", 2)
    try:
        config = _CONFIG.value and _CONFIG.value.to_dict()
    except OSError as error:  # a file that is not there shows itself only here
        fail(str(error), 1)
    workdir = _WORKDIR.value or default_workdir()
    if _DISTRIBUTED.value or _COORDINATOR.value:
        join_hosts()
    elif _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
        fail("--num_processes and --process_id need --coordinator=ADDRESS:PORT", 2)
    try:
        if _MODE.value == "train":
            train(config, workdir)
        else:
            use(_MODE.value, config, workdir)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def train(config: dict, workdir: str) -> None:
    """Train, or continue, and leave the run directory."""
    import jax
    from etils import epath

    from vae_jax.run import hosts
    from vae_jax.run.checkpoint import Checkpoints, check_same_data, latest_whole
    from vae_jax.run.devices import Devices
    from vae_jax.run.directory import RunDirectory, read_config
    from vae_jax.run.files import check_reachable
    from vae_jax.run.loop import train
    from vae_jax.run.progress import Progress
    from vae_jax.run.session import build

    several = jax.process_count() > 1
    directory = checkpoints = progress = hosts.Silent()
    try:
        hosts.check_alike(facts(config))
        with hosts.together():
            devices = Devices(_DEVICES.value)
            check_reachable(workdir)
            check = functools.partial(check_same, workdir)
            if devices.first and (stored := read_config(workdir)) is not None:
                check(stored, config)
            job = build(config)
            devices.check_divide(job.batch_size)
            folder = epath.Path(workdir).expanduser() / "checkpoints"
            latest = latest_whole(folder) if devices.first else None
            if latest is not None:
                check_same_data(latest, job.about)
            finished = latest is not None and latest["step"] >= job.steps
        if hosts.gather(finished)[0]:
            print(f"finished already: {folder.parent / 'summary.md'}")
            return
        hosts.check_alike({"data": job.about["data"]})
        with hosts.together():
            if devices.first:
                command = shlex.join(["python", "-m", "vae_jax.main", *sys.argv[1:]])
                board = job.run.tensorboard
                directory = RunDirectory(workdir, config, command, board, check)
                checkpoints = Checkpoints(folder, job.about, job.run.keep, job.best)
    except (ValueError, OSError) as error:
        fail(str(error), 1)
    if job.run.compilation_cache:
        enable_compilation_cache()
    if devices.first:
        progress = Progress(job.steps * job.batch_size * job.seeds, job.epochs)
    stop = hosts.StopTogether() if several else Stop()
    try:
        state = train(job, directory, checkpoints, progress, stop, devices)
        # A host that left while the first one still saves would end it.
        hosts.gather("done")
    except (FloatingPointError, OSError) as error:
        reason = getattr(error, "strerror", None)  # of what the system refuses
        way_out = f"cannot go on in the work directory {workdir} ({reason}): the same command continues once it can be written to"
        fail(way_out if reason else str(error), 1)
    except jax.errors.JaxRuntimeError as error:
        if not several:
            raise
        print(f"vae_jax: a host was lost ({error})".splitlines()[0], file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # leaving properly would wait for the lost one
    finally:
        progress.close()
        checkpoints.close()
        directory.close()
    step = int(state.step.max())
    if step < job.steps:
        fail(
            f"stopped and saved at step {step} of {job.steps}: the same command continues",
            128 + stop.signal,
        )
    if devices.first:
        print(f"done: {(directory.remote or directory.path) / 'summary.md'}")


def join_hosts() -> None:
    """Meet the other hosts, before anything touches a device."""
    from vae_jax.run.hosts import connect

    try:
        connect(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            _START_TIMEOUT.value,
            _HEARTBEAT_TIMEOUT.value,
        )
    except (ValueError, RuntimeError) as error:
        fail(str(error), 1)


def facts(config: dict) -> dict:
    """In what all hosts must agree: the config, the versions, the package's source, the devices."""
    import jax

    from vae_jax.run.config import flatten
    from vae_jax.run.directory import versions

    source = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    device = jax.local_devices()[0].device_kind
    return (
        {f"config field {name}": value for name, value in flatten(config).items()}
        | versions()
        | {
            "config field data.manual_dir": "",  # which may differ
            "the source of vae_jax": source.hexdigest()[:12],
            "--devices": _DEVICES.value,
            "a host's devices": f"{jax.local_device_count()} of {device}",
        }
    )


class Stop:
    """Whether someone asked to stop, by SIGTERM or Ctrl-C; a second Ctrl-C ends the program at once.

    A thread hears of the signals: Python's own handlers wait until a compiled program has returned.
    """

    signal = 0

    def __init__(self):
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        signal.set_wakeup_fd(self._told.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while True:
            (number,) = self._heard.recv(1)
            if self.signal and number == signal.SIGINT:
                print("vae_jax: interrupted", file=sys.stderr, flush=True)
                os._exit(128 + number)  # as safe as SIGKILL: no file is half there
            self.signal = number

    def __call__(self) -> bool:
        return bool(self.signal)


def use(mode: str, config: dict | None, workdir: str) -> None:
    """Do with a trained model what the mode says."""
    from vae_jax import commands
    from vae_jax.run.directory import read_config
    from vae_jax.run.files import is_remote

    count, checkpoint, split = _COUNT.value, _CHECKPOINT.value, _SPLIT.value
    count = COUNTS.get(mode) if count is None else count
    try:
        if count is not None and count < 1:
            raise ValueError(f"--count is {count}, but must be at least 1")
        if is_remote(workdir):
            raise ValueError(
                f"--mode={mode} takes a run on this machine: copy {workdir} here (gcloud storage cp -r) and name the copy"
            )
        chosen = numbers("images"), numbers("digits")
        stored = read_config(workdir)
        if stored is None:
            raise ValueError(
                f"there is no run in {workdir}: train one, or name another with --workdir"
            )
        config = (config or stored) | {"epochs": stored["epochs"]}
        check_same(workdir, stored, config)
        match mode:
            case "evaluate":
                metrics = commands.evaluate(workdir, config, checkpoint, split)
                print(
                    "\n".join(f"{name} {value:.6g}" for name, value in metrics.items())
                )
                return
            case "predict":
                if _INPUT.value is None:
                    raise ValueError("--mode=predict needs --input=FOLDER or FILE.npz")
                paths = commands.predict(workdir, checkpoint, _INPUT.value)
            case "sample":
                paths = commands.sample(workdir, checkpoint, count, _SAMPLE_SEED.value)
            case "reconstruct":
                paths = commands.reconstruct(workdir, config, checkpoint, split, count)
            case "interpolate":
                paths = commands.interpolate(
                    workdir, config, checkpoint, split, count, *chosen
                )
            case "traverse":
                paths = commands.traverse(
                    workdir, config, checkpoint, split, count, *chosen
                )
    except (ValueError, OSError) as error:
        fail(str(error), 1)
    print("\n".join(map(str, paths)))


def numbers(flag: str) -> list[int] | None:
    """A flag's list of whole numbers. Raises ValueError for anything else."""
    given = flags.FLAGS[flag].value
    try:
        return given and [int(item) for item in given]
    except ValueError:
        raise ValueError(
            f"--{flag} is {','.join(given)}, but must be whole numbers with commas between"
        ) from None


def check_same(workdir: str, stored: dict, config: dict) -> None:
    """Raise ValueError if the run in the work directory has another config, naming the fields that differ."""
    from vae_jax.run.config import changes

    if changed := changes(stored, config):
        raise ValueError(
            f"the work directory {workdir} holds another run ({'; '.join(changed)}): name another with --workdir"
        )


def default_workdir() -> str:
    """runs/CONFIG-VARIANT, after the --config that was given."""
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    return str(Path("runs") / f"{Path(path).stem}-{variant or 'default'}")


def enable_compilation_cache() -> None:
    """Keep compiled programs in a folder of the user's, unless JAX was told of another one."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update(
            "jax_compilation_cache_dir", str(Path.home() / ".cache" / "vae_jax" / "xla")
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and the exit code: 1 for bad input, 2 for bad usage."""
    line = message.strip().splitlines()[-1].strip() if message.strip() else "failed"
    print(f"vae_jax: {line}", file=sys.stderr)
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """What absl and ml_collections raise for flags and config fields, as one line."""
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
        # ml_collections shows unknown fields as almost anything, and a config file may raise what it likes.
        with contextlib.suppress(Exception):
            check_field_names(argv)
        fail(f"{type(error).__name__}: {error}", 1)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = (
            -2
        )  # errors: JAX tells of backends, and Orbax of damage that we tell
    return argv


def print_help(argv: list[str]) -> None:
    """The flags, and the fields of a config."""
    from vae_jax.run.config import flatten
    from vae_jax.run.session import describe

    flags.FLAGS([argument for argument in argv if argument not in HELP])
    values = flatten(_CONFIG.value.to_dict()) if _CONFIG.value else None

    print("python -m vae_jax.main --config=configs/vae.py [flags]\n\nFlags:")
    for flag in flags.FLAGS.flags_by_module_dict()[sys.argv[0]]:
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
                hint = f"{path[depth - 1]} is no section"
                fail(f"unknown config field {field}: {hint}", 1)
            if path[depth] not in section:
                hint = nearest(path[depth], section)
                fail(f"unknown config field {field}: {hint}", 1)
            section = section[path[depth]]


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
