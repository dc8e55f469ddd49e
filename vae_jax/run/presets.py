"""The config files that come with the package, found by path and never imported: configs/ in a clone, presets/ in a
wheel; and the command lines that name a config and its fields.
"""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace

from vae_jax.run.config import nearest

PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """The folder that contains them."""
    installed = PACKAGE / "presets"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
    """The names of the presets, such as "vae"."""
    return sorted(path.stem for path in folder().glob("*.py"))


def load_preset(name: str) -> SimpleNamespace:
    """Run a preset's file and return what it defines."""
    return SimpleNamespace(**runpy.run_path(str(folder() / f"{name}.py")))


def expand(argv: list[str]) -> list[str]:
    """Replace the name of a preset in the command line by its path: `--config=vae:digits` works in any folder.

    Raises FileNotFoundError for a name that is neither a preset nor a file.
    """
    expanded = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config") and equals:
            expanded[i] = f"{flag}={path_of(value)}"
        elif i and argv[i - 1] in ("--config", "-config"):
            expanded[i] = path_of(argument)
    return expanded


def path_of(value: str) -> str:
    """Replace the name of a preset in a value of --config by its path; anything else is returned as it is."""
    name, colon, variant = value.partition(":")
    if not name or name.endswith(".py") or os.path.basename(name) != name or os.path.isfile(name):
        return value
    if name not in names():
        raise FileNotFoundError(f"there is no config {name}: give a file, or a preset; {nearest(name, names())}")
    return f"{folder() / name}.py{colon}{variant}"


def drop_repeated(argv: list[str]) -> list[str]:
    """Keep only the last of several --config.FIELD=VALUE of one field: ml_collections would concatenate tuples."""
    fields = [argument.partition("=")[0].lstrip("-") for argument in argv]
    last = {field: i for i, field in enumerate(fields) if field.startswith("config.") and "=" in argv[i]}
    return [argument for i, argument in enumerate(argv) if last.get(fields[i], i) == i]
