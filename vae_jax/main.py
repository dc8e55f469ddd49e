"""Train a model: `python -m vae_jax.main --config=configs/vae.py`. Flags -> one call."""

import shlex
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/ and, after a colon, its variant: configs/vae.py:digits. Set fields by --config.FIELD=VALUE.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run directory. Default: runs/CONFIG-VARIANT."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}; --help lists the flags", 2)
    if _CONFIG.value is None:
        fail("which model? Give a config, say --config=configs/vae.py:digits", 2)
    try:
        config = _CONFIG.value.to_dict()
    except OSError as error:  # a file that is not there shows itself only here
        fail(str(error), 1)
    command = shlex.join(["python", "-m", "vae_jax.main", *sys.argv[1:]])
    try:
        run(config, _WORKDIR.value or default_workdir(), command)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def run(config: dict, workdir: str, command: str) -> None:
    """Build the job, train it, leave the run directory."""
    from vae_jax.build import build
    from vae_jax.rundir import Progress, RunDirectory, check_unused
    from vae_jax.train import train

    try:
        check_unused(workdir)
        job = build(config)
        directory = RunDirectory(workdir, config, job.run.tensorboard)
    except (ValueError, OSError) as error:
        fail(str(error), 1)
    if job.run.compilation_cache:
        enable_compilation_cache()
    progress = Progress(job.epochs * job.steps_per_epoch * job.batch_size, job.epochs)
    try:
        _, numbers = train(job, directory, progress)
    except (FloatingPointError, OSError) as error:
        fail(str(error), 1)
    finally:
        progress.close()
        directory.close()
    directory.write_summary(job.title, command, numbers)
    print(f"done: {directory.path / 'summary.md'}")


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
        argv = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        fail(f"{error}; --help lists the flags", 2)
    except (flags.Error, OSError) as error:
        fail(str(error), 1)
    except (AttributeError, KeyError, TypeError):  # ml_collections, for unknown fields
        check_field_names(argv)
        raise
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = -1  # warnings: at absl's default JAX tells of backends
    return argv


def check_field_names(argv: list[str]) -> None:
    """Fail for the first --config.FIELD that the config does not have."""
    from vae_jax.build import nearest

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
