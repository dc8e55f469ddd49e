"""`run.log_to`: the metrics and figures of a run for TensorBoard, Weights & Biases or Trackio."""

import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vae_jax.run.config import nearest
from vae_jax.run.directory import LOGS, RunDirectory
from vae_jax.run.files import describe_error, write_atomically

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
ID = "log_id"  # file in the run directory with the id by which a tracker recognises a resumed run


class TensorBoard:
    """Event files in the run directory; entries that an interrupted process logged after its checkpoint are purged."""

    def __init__(self, module: Any, directory: RunDirectory, step: int):
        self._writer = module.SummaryWriter(str(directory.path / LOGS), purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        from PIL import Image

        for name, path in pictures.items():
            self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """A run of W&B or Trackio, which share one interface. A resumed run continues it: W&B by id, Trackio by name."""

    def __init__(self, module: Any, directory: RunDirectory, step: int):
        name, key = (directory.remote or directory.path.resolve()).name, run_id(directory)
        own = {"name": f"{name}-{key}"}
        if module.__name__ == "wandb":
            own = {"name": name, "id": key, "dir": str(directory.path)}
        project = os.environ.get(f"{module.__name__.upper()}_PROJECT", "vae_jax")
        self._module = module
        self._run = module.init(project=project, config=dict(directory.config), resume="allow", **own)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        self._run.log({name: self._module.Image(str(path)) for name, path in pictures.items()}, step=step)

    def flush(self) -> None: ...  # it sends in the background

    def close(self) -> None:
        self._run.finish()


class Loggers:
    """All loggers of a run that starts or continues from `step`.

    One that fails is reported once through `note` and dropped: no logger ends a training.
    """

    def __init__(self, log_to: str, directory: RunDirectory, step: int, note: Callable[[str], None]):
        self._note, self._open = note, {}
        for name, module in import_loggers(log_to).items():
            kind = TensorBoard if name == "tensorboard" else Tracker
            self._try(name, lambda: self._open.update({name: kind(module, directory, step)}))  # noqa: B023

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row of metrics.jsonl; lists are left out."""
        numbers = {name: value for name, value in row.items() if "/" in name and not isinstance(value, list)}
        self._each(lambda logger: logger.log(row["step"], numbers))

    def show(self, step: int, folder: Path) -> None:
        """Log the figures in a folder."""
        pictures = {f"figures/{path.stem}": path for path in sorted(folder.glob("*.png"))}
        self._each(lambda logger: logger.show(step, pictures))

    def flush(self) -> None:
        """Write what has been logged, before a checkpoint after which it will not be logged again."""
        self._each(lambda logger: logger.flush())

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _each(self, action):
        for name, logger in [*self._open.items()]:
            self._try(name, lambda: action(logger))  # noqa: B023

    def _try(self, name, action):
        try:
            action()
        except Exception as error:  # noqa: BLE001
            self._open.pop(name, None)
            self._note(f"{name} cannot be logged to ({describe_error(error)}): the training goes on without it")


def import_loggers(log_to: str) -> dict[str, Any]:
    """{name: module} of the loggers named in `run.log_to`, separated by commas.

    Raises ValueError for an unknown name, and for a logger whose package is not installed.
    """
    modules = {}
    for name in filter(None, (part.strip() for part in log_to.split(","))):
        if name not in PACKAGES:
            raise ValueError(f"unknown logger {name!r} in run.log_to: {nearest(name, PACKAGES)}")
        try:
            modules[name] = importlib.import_module(PACKAGES[name])
        except ImportError:
            package = f"{PACKAGES[name]}, which is not installed: pip install {PACKAGES[name]}"
            raise ValueError(f"{name} in run.log_to needs {package}") from None
        if getattr(modules[name], "__file__", None) is None:  # W&B leaves a folder of this name where it was run
            package = PACKAGES[name]
            raise ValueError(
                f"{name} in run.log_to needs its package, not the folder {package} here: pip install {package}"
            )
    return modules


def run_id(directory: RunDirectory) -> str:
    """An id of eight characters that stays with the run directory, drawn at the first call."""
    file = (directory.remote or directory.path) / ID
    if not file.exists():
        file = directory.path / ID
        write_atomically(file, secrets.token_hex(4))
    return file.read_text().strip()
