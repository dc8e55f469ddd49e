"""Train a model: `python -m vae_jax.main --config=configs/vae.py`. Flags -> one call."""

import shlex
import sys
from pathlib import Path

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
    try:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; --help lists the flags", 2)
        if _CONFIG.value is None:
            fail(
                "which model? Give a config, for example --config=configs/vae.py:digits",
                2,
            )
        command = shlex.join(["python", "-m", "vae_jax.main", *sys.argv[1:]])
        run(_CONFIG.value.to_dict(), _WORKDIR.value or default_workdir(), command)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def run(config: dict, workdir: str, command: str) -> None:
    """Build the job, train it, leave the run directory."""
    from vae_jax.build import build
    from vae_jax.rundir import Progress, RunDirectory
    from vae_jax.train import train

    job = build(config)
    if job.run.compilation_cache:
        enable_compilation_cache()
    directory = RunDirectory(workdir, config, job.run.tensorboard)
    size = len(job.dataset.splits["train"].label)
    progress = Progress(
        job.epochs * (size // job.batch_size) * job.batch_size, job.epochs
    )
    try:
        _, numbers = train(job, directory, progress)
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


def fail(message: str, code: int) -> None:
    """One line on stderr, and the exit code: 1 for bad input, 2 for bad usage."""
    print(f"vae_jax: {message.strip().splitlines()[-1].strip()}", file=sys.stderr)
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """What absl and ml_collections raise for flags and config fields, as one line."""
    try:
        argv = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        fail(f"{error}; --help lists the flags", 2)
    except (
        AttributeError
    ) as error:  # ml_collections: a quoted message, the nearest name in its second line
        fail(
            "unknown config field "
            + str(error).replace("\\n", ": ").replace("\\", "").replace("'", ""),
            1,
        )
    except (TypeError, KeyError):
        fail("a --config flag names a field inside of one that is not a section", 1)
    except (flags.Error, ValueError, OSError) as error:
        fail(str(error), 1)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = (
            -1
        )  # warnings: at absl's own default JAX tells which backends it lacks
    return argv


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
