"""The command line, `python -m vae_jax.main --config=configs/vae.py`: flags -> one call."""

import contextlib
import functools
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from vae_jax.run.output import survive_closed_streams
from vae_jax.run.presets import drop_repeated, expand

MODES = {  # mode -> the flags that it takes besides --config and --workdir
    "train": "devices distributed coordinator num_processes process_id start_timeout heartbeat_timeout",
    "evaluate": "checkpoint split full samples count prior input",
    "sample": "checkpoint count sample_seed prior labels input files",
    "reconstruct": "checkpoint split count input",
    "interpolate": "checkpoint split count images labels input",
    "traverse": "checkpoint split count images labels input all",
    "encode": "checkpoint split input tsne",
    "predict": "checkpoint input",
    "export": "checkpoint output formats",
}
MODE = """train: train, or continue an interrupted training. The others use a trained model and write to generated/ in the
run directory. evaluate: the metrics on a split; with --full every measurement of a VAE. sample: images from the prior.
reconstruct: images of a split and their reconstructions. interpolate: images between two. traverse: one latent moved at
a time. encode: the codes of images. predict: labels of --input. export: a folder for a model hub, not uploaded."""
CONFIG = """A preset (vae, conditional, sparse_labels, semisupervised, stacked, vaegan, classifier) or a file, and after a
colon its variant: vae:digits, configs/vae.py:digits. --config.FIELD=VALUE sets a field. Modes other than train need only --workdir."""
COUNTS = {"sample": 100, "reconstruct": 10, "interpolate": 11, "traverse": 11}
MOST = {"sample": 10_000, "reconstruct": 100, "interpolate": 100, "traverse": 100}  # largest --count in one picture
PRIOR = "For sample and evaluate --full: the model's prior, or gmm, ten Gaussians fitted to the training posteriors."
FULL = """For evaluate: also the likelihood by importance sampling, the information in the latents, and the distances of
generated images from real ones. --count=N estimates the likelihood of the first N images of the split, by default 1,000."""
INPUT = """Your own images, prepared like the training images: a folder, image files separated by commas, or an .npz
with `image`. For predict, for sample of a model that completes images, and in place of --split for evaluate,
reconstruct, interpolate, traverse and encode."""
HELP = ("--help", "-help", "--helpfull", "-h")

FLAGS = flags.FLAGS
string, integer, items, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_list, flags.DEFINE_bool
seed = functools.partial(integer, lower_bound=0, upper_bound=2**32 - 1)
seconds = functools.partial(integer, lower_bound=1)
TABLE = (  # kind, name, default, help
    (config_flags.DEFINE_config_file, "config", None, CONFIG),
    (
        string,
        "workdir",
        None,
        "The run directory. Default: runs/CONFIG-VARIANT. All modes but train also take mnist-vae, mnist-classifier.",
    ),
    (flags.DEFINE_enum, "mode", "train", [*MODES], MODE),
    (string, "checkpoint", "", "latest, best, or a step. Default: best with validation images, else latest."),
    (string, "split", "test", "train, test or validation."),
    (
        integer,
        "count",
        None,
        "Number of images; for interpolate and traverse, per row. Default: "
        + ", ".join(f"{count} for {mode}" for mode, count in COUNTS.items()),
    ),
    (switch, "full", False, FULL),
    (integer, "samples", 5000, "For --full: draws of z for each image's likelihood."),
    (seed, "sample_seed", 0, "Seed of --mode=sample."),
    (flags.DEFINE_enum, "prior", "model", ["model", "gmm"], PRIOR),
    (items, "images", None, "Positions in the split: two for interpolate (3,18), one for traverse."),
    (
        items,
        "labels",
        None,
        "Instead of --images: labels, each standing for its first image. For sample: the labels of a conditional model.",
    ),
    (string, "input", None, INPUT),
    (switch, "tsne", False, "For encode: also a map of the codes by t-SNE, coloured by label."),
    (switch, "files", False, "For sample: a PNG file for each image, instead of a grid."),
    (switch, "all", False, "For traverse: also the latents that are hardly used."),
    (string, "output", None, "For export: the folder. Default: generated/export-stepSTEP in the run directory."),
    (items, "formats", None, "For export: programs to add to the weights: jax (by jax.export), onnx, or both."),
    (integer, "devices", 0, "Devices that train on each host; 0: all of them."),
    (switch, "distributed", False, "Train on the hosts of a cluster: Cloud TPU, Slurm, Open MPI or Kubernetes (GKE)."),
    (string, "coordinator", None, "On other clusters: ADDRESS:PORT of host 0, with --num_processes and --process_id."),
    (integer, "num_processes", None, "Number of hosts."),
    (integer, "process_id", None, "Number of this host, from 0."),
    (seconds, "start_timeout", 300, "Seconds that the hosts wait for each other at the start."),
    (seconds, "heartbeat_timeout", 100, "Seconds of silence after which a host counts as lost and the others end."),
)
for define, *arguments in TABLE:
    define(*arguments)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}; --help lists the flags", 2)
    taken = MODES[FLAGS.mode].split()
    for name in sorted(" ".join(MODES.values()).split()):
        if FLAGS[name].present and name not in taken:
            fail(f"--{name} has no effect with --mode={FLAGS.mode}", 2)
    if FLAGS.config is None and (FLAGS.mode == "train" or not FLAGS.workdir):
        fail("--config is required, e.g. --config=vae:digits", 2)
    try:
        if FLAGS.config is not None and not hasattr(FLAGS.config, "to_dict"):
            fail("the config file's get_config must return an ml_collections.ConfigDict", 1)
        config = FLAGS.config and FLAGS.config.to_dict()
        workdir = FLAGS.workdir or default_workdir()
        if FLAGS.mode == "train":
            train(config, workdir)
        else:
            use(FLAGS.mode, config, workdir)
    except (ValueError, OSError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail("out of memory: another program may use the device; or take fewer images, or a smaller model", 1)


def train(config: dict, workdir: str) -> None:
    """Start or resume a training; one that fails or is stopped exits with an error code."""
    import jax

    from vae_jax.run import hosts, session
    from vae_jax.run.environment import check_jax
    from vae_jax.run.files import describe_error

    given = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if FLAGS.distributed or FLAGS.coordinator:
        hosts.connect(*given, FLAGS.start_timeout, FLAGS.heartbeat_timeout)
    elif given != (None, None, None):
        fail("--num_processes and --process_id need --coordinator=ADDRESS:PORT", 2)
    check_jax()
    several = jax.process_count() > 1
    try:
        outcome = session.run(config, workdir, FLAGS.devices, hosts.StopOnAllHosts if several else hosts.Stop)
    except FloatingPointError as error:
        fail(str(error), 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            hosts.exit_now("out of memory: try a smaller batch_size or model, with another --workdir", 1)
        if not several:
            raise
        hosts.exit_now(f"a host was lost ({describe_error(error)})", hosts.LOST)
    if outcome is None:
        print(f"already finished: {workdir.rstrip('/')}/summary.md")
    elif outcome.step < outcome.steps:
        saved = f"stopped and saved at step {outcome.step} of {outcome.steps}"
        fail(f"{saved}: the same command continues", 128 + outcome.signal)
    elif outcome.summary:
        print(f"done: {outcome.summary}")


def use(mode: str, config: dict | None, workdir: str) -> None:
    """Run a mode on a trained model and print its results. Raises ValueError or OSError for bad input."""
    from vae_jax import commands, weights
    from vae_jax.pretrained.loading import check_config, stored_config
    from vae_jax.run.config import fill_in
    from vae_jax.run.environment import check_jax
    from vae_jax.run.files import check_local

    check_jax()
    count = COUNTS.get(mode) if FLAGS.count is None else FLAGS.count
    if mode == "evaluate" and not FLAGS.full and any(FLAGS[name].present for name in ("count", "samples", "prior")):
        raise ValueError("--count, --samples and --prior of --mode=evaluate need --full")
    if mode in MOST and not 1 <= count <= MOST[mode] and not (FLAGS.files and count > 0):
        more = "more do not fit in one picture; use vae_jax.load for more"
        raise ValueError(f"--count is {count}, but must be 1 to {MOST[mode]:,}: {more}")
    check_local(workdir, f"--mode={mode}")
    if mode == "predict" and FLAGS.input is None:
        raise ValueError("--mode=predict needs --input=FOLDER, FILE,FILE or FILE.npz")
    if FLAGS.input is not None and FLAGS["split"].present:
        raise ValueError("--split and --input are both given: give one of them")
    chosen = {"images": integers("images"), "labels": integers("labels"), "own": FLAGS.input, "files": FLAGS.files}
    workdir = weights.resolve(workdir)
    stored = stored_config(workdir)
    if stored is None:
        boxed = ", ".join(weights.SHA256)
        raise ValueError(f"there is no run in {workdir}: train one, or name another with --workdir, such as {boxed}")
    config = (config or stored | {"run": {}}) | {"epochs": stored["epochs"]}  # `run` and `epochs` do not matter here
    check_config(workdir, stored, config)
    given = {"seed": FLAGS.sample_seed, "prior": FLAGS.prior, "full": FLAGS.full, "samples": FLAGS.samples}
    given |= {"output": FLAGS.output, "formats": FLAGS.formats, "tsne": FLAGS.tsne, "all_latents": FLAGS["all"].value}
    known = {"workdir": workdir, "config": config, "checkpoint": FLAGS.checkpoint, "split": FLAGS.split}
    result = fill_in(getattr(commands, mode), **known, **chosen, count=count, **given)
    lines = [f"{name} {show(value)}" for name, value in result.items()] if mode == "evaluate" else map(str, result)
    print("\n".join(lines), flush=True)
    error = getattr(sys.stdout, "error", None)
    if error and not isinstance(error, BrokenPipeError):  # whoever closed the pipe has read enough
        fail(f"cannot print the results ({error})", 1)


def show(value) -> str:
    """Format a number, nested lists of numbers, or a text in one line."""
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    return f"{value:.6g}"


def integers(flag: str) -> list[int] | None:
    """A flag's list of integers. Raises ValueError for anything else."""
    given = FLAGS[flag].value
    try:
        return given and [int(item) for item in given]
    except ValueError:
        raise ValueError(f"--{flag} is {','.join(given)}, but must be integers separated by commas") from None


def default_workdir() -> str:
    """runs/CONFIG-VARIANT, from the given --config."""
    path, _, variant = FLAGS["config"].config_filename.partition(":")
    return str(Path("runs") / f"{Path(path).stem}-{variant or 'default'}")


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and exit with `code`: 1 bad input, 2 bad usage, 128 + N stopped by signal N."""
    lines = message.strip().splitlines() or ["failed"]
    print(f"vae_jax: {lines[-1].strip()}", file=sys.stderr)
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; any error of absl or ml_collections becomes one line."""
    try:
        argv = drop_repeated(expand(argv))
        if any(argument in HELP for argument in argv[1:]):
            print_help(argv)
            sys.exit()
        argv = FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            fail(f"--{error.flagname} needs a config to change: give --config too", 2)
        fail(f"{error}; --help lists the flags", 2)
    except (flags.Error, OSError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:  # noqa: BLE001
        # ml_collections raises almost anything for an unknown field, and a config file may raise anything.
        with contextlib.suppress(Exception):
            check_field_names(argv)
        fail(f"{type(error).__name__}: {error}", 1)
    if FLAGS["verbosity"].using_default_value:
        FLAGS.verbosity = -2  # errors only: JAX and Orbax warn about what we report ourselves
    return argv


def print_help(argv: list[str]) -> None:
    """Print the flags and the fields of a config."""
    from vae_jax.run.config import flatten
    from vae_jax.run.session import describe

    def entry(name, text):
        print(f"  --{name}", textwrap.indent(textwrap.fill(text, 92), " " * 8), sep="\n")

    FLAGS([argument for argument in argv if argument not in HELP])
    print("python -m vae_jax.main --config=configs/vae.py [flags]\n\nFlags:")
    for _, name, *_ in TABLE:
        entry(name, FLAGS[name].help)
    print(f"\nFields of {'this' if FLAGS.config else 'a'} config:")
    values = flatten(FLAGS.config.to_dict()) if FLAGS.config else {}
    for field, text in describe(values.get("model.name", "")):
        if not values:
            entry(f"config.{field}", text)
        elif field in values:
            entry(f"config.{field}={values[field]}", text)


def check_field_names(argv: list[str]) -> None:
    """Fail for the first --config.FIELD that the config does not have."""
    from vae_jax.run.config import nearest

    overrides = [argument for argument in argv if argument.lstrip("-").startswith("config.")]
    sys.argv = [argument for argument in argv if argument not in overrides]  # ml_collections reads it
    FLAGS(sys.argv)
    for override in overrides:
        names = override.partition("=")[0].lstrip("-").split(".")[1:]
        section = FLAGS.config
        for depth, name in enumerate(names):
            is_section = hasattr(section, "keys")
            if not is_section or name not in section:
                hint = nearest(name, section) if is_section else f"{names[depth - 1]} is not a section"
                fail(f"unknown config field {'.'.join(names[: depth + 1])}: {hint}", 1)
            section = section[name]


def run() -> None:
    """Run the program."""
    survive_closed_streams()
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
