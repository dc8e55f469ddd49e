"""The run directory: config.json, metrics.jsonl, checkpoints/, figures/, summary.md."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from vae_jax.run.files import (
    describe_error,
    is_remote,
    json_line,
    local_path,
    read_json_lines,
    save_figure,
    write_atomically,
)

FORMAT = 2
OLD_FORMAT = "was written by an earlier format of vae_jax, which commit af11a1a reads"
SECTIONS = dict.fromkeys(("data", "model", "objective", "optimizer", "run"), dict)
FIELDS = SECTIONS | dict.fromkeys(("epochs", "seed", "seeds"), int) | {"best": str}
LEFTOVERS = {"lock", "config.tmp"}  # of a run that was killed in its first moment
LARGEST = 1e300  # in metrics.jsonl; this refuses NaN and infinity too
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def read_config(path: str) -> dict | None:
    """The config of the run in a directory; None if the directory is missing or empty.

    Raises FileExistsError if it holds something else, or a run of another format.
    """
    folder = epath.Path(path).expanduser()
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} <= LEFTOVERS:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not SECTIONS.keys() <= config.keys():
        raise FileExistsError(
            f"the work directory {path} is not empty and has no config.json of a run: name another with --workdir"
        )
    if config.pop("format", 1) != FORMAT:
        raise FileExistsError(f"the run in {path} {OLD_FORMAT}: name another with --workdir")
    if not all(isinstance(config.get(name), kind) for name, kind in FIELDS.items()):
        raise FileExistsError(f"{path}/config.json is damaged: restore it, or name another with --workdir")
    return config


class OwnedDirectory:
    """A directory that one process owns at a time, with the settings it was begun with and a log of JSON lines.

    Args:
        settings: written to `settings_file`.
        check: `check(stored)` is called with the settings that the directory already has, and raises if they do not fit.

    Raises OSError if another process owns it, or it cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping,
        settings_file: str,
        log_file: str,
        read_settings: Callable[[], dict | None],
        check: Callable[[dict], None],
    ):
        self.path = path
        self._log = path / log_file
        self.rows: list[dict] = []
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            self._lock = undo.enter_context(open(path / "lock", "w"))
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OSError(
                    f"another process is working in {path}: wait for it, or name another with --workdir"
                ) from error
            if (stored := read_settings()) is not None:
                check(stored)
            text = json.dumps(settings, indent=2) + "\n"
            write_atomically(path / settings_file, text)
            undo.pop_all()

    def keep(self, rows: list[dict]) -> None:
        """Rewrite the log to hold exactly these rows."""
        self.rows = rows
        write_atomically(self._log, "".join(map(json_line, rows)))

    def append(self, row: dict) -> None:
        """Append a row to the log."""
        self.rows.append(row)
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(json_line(row))

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


class RunDirectory:
    """Creates `path`, or opens the run that it holds, and writes into it.

    If `path` is on gs://, files are written into a temporary folder, `self.path`, and `upload` copies them; nothing then
    keeps a second process from writing there.

    Raises OSError if that fails or another process is writing there, and what `check(stored, config)` raises for the
    config of a run that is already there.
    """

    def __init__(
        self,
        path: str,
        config: Mapping,
        command: str,
        tensorboard: bool = False,
        check: Callable[[dict, Mapping], None] = lambda stored, config: None,
    ):
        self.remote = epath.Path(path) if is_remote(path) else None
        local = tempfile.mkdtemp(prefix="vae_jax-") if self.remote else path
        self.path = local_path(local)
        self.command = command
        self._open_board = _tensorboard() if tensorboard else None
        self._board = None
        with _errors_name_the_way_out(path):
            self._owned = OwnedDirectory(
                self.path,
                {"format": FORMAT, **config},
                "config.json",
                "metrics.jsonl",
                lambda: read_config(path),
                lambda stored: check(stored, config),
            )
            (self.path / "figures").mkdir(exist_ok=True)
            if self.remote and (rows := self.remote / "metrics.jsonl").exists():
                text = rows.read_text(encoding="utf-8")
                write_atomically(self.path / rows.name, text)
        self.upload()

    @property
    def history(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        return self._owned.rows

    @property
    def summary(self):
        """The path of summary.md."""
        return (self.remote or self.path) / "summary.md"

    def rewind(self, step: int, note: Callable[[str], None]) -> None:
        """Drop the rows after `step`, from which training continues, and an incomplete last one.

        `note` reports missing rows up to `step`. Raises OSError, naming the line, for a damaged row.
        """
        rows = [row for row in read_rows(self.path) if row["step"] <= step]
        last = rows[-1]["step"] if rows else 0
        if last < step:
            note(f"metrics.jsonl has lost its rows after step {last}, up to {step}")
        self._owned.keep(rows)
        self._opened = time.time()
        self._before = rows[-1]["seconds"] if rows else 0.0
        if self._open_board:
            folder = str(self.path / "tensorboard")
            self._board = self._open_board(folder, purge_step=step + 1)

    def log(self, row: dict) -> None:
        """Append a row: `step`, `epoch` and flat metric names such as `train/loss`; the seconds of training are added."""
        seconds = round(self._before + time.time() - self._opened, 2)
        row = {"step": row["step"], "epoch": row["epoch"], "seconds": seconds} | row
        self._owned.append(row)
        if self._board:
            for name, value in row.items():
                if "/" in name and not isinstance(value, list):
                    self._board.add_scalar(name, value, row["step"])

    def save_figures(self, figures: Mapping[str, Callable]) -> None:
        """Draw each figure and write it to figures/NAME.png."""
        for name, draw in figures.items():
            save_figure(draw(), self.path / "figures" / f"{name}.png")

    def write_summary(self, title: str, numbers: Mapping[str, Any]) -> None:
        """Write summary.md: what was trained, its numbers, how to repeat it, the figures."""
        lines = [f"# {title}", "", "| number | value |", "|---|---|"]
        for name, value in numbers.items():
            if name.endswith("/interval") or np.ndim(value) > 1:
                continue
            text = _describe(value)
            if f"{name}/interval" in numbers and not np.ndim(value):
                text += f" ± {numbers[f'{name}/interval']:.2g} (95 %)"
            lines.append(f"| {name} | {text} |")
        lines += ["", *(f"- {name}: {fact}" for name, fact in self._facts()), ""]
        lines += [f"![{path.stem}](figures/{path.name})\n" for path in sorted((self.path / "figures").glob("*.png"))]
        write_atomically(self.path / "summary.md", "\n".join(lines))

    def _facts(self) -> list[tuple[str, str]]:
        minutes, seconds = divmod(round(self.history[-1]["seconds"]), 60)
        device = jax.devices()[0]
        precision = jax.config.jax_default_matmul_precision or "default"
        return [
            ("command", f"`{self.command}`"),
            ("time", f"{minutes} min {seconds} s"),
            (
                "device",
                f"{device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores, {platform.platform()}",
            ),
            ("versions", ", ".join(map(" ".join, versions().items()))),
            ("matmul precision", precision),
        ]

    def upload(self, part: str = "") -> None:
        """Copy every file, or those of the folder `part`, to a remote `path`, so that they belong to one moment there.

        Raises OSError if they cannot be copied.
        """
        if self.remote is None:
            return
        try:
            for file in (self.path / part).rglob("*"):
                if file.is_file() and file.name != "lock":
                    target = self.remote / file.relative_to(self.path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
        except Exception as error:  # gcsfs, credentials and network raise many kinds
            raise OSError(
                f"cannot copy the run's files to {self.remote} ({describe_error(error)}): the same command continues once it can be written to"
            ) from error

    def close(self) -> None:
        """Release the lock, and remove a temporary folder."""
        if self._board:
            self._board.close()  # this writes the last of what was logged
            with contextlib.suppress(OSError):
                self.upload("tensorboard")
        self._owned.close()
        if self.remote:
            shutil.rmtree(self.path)


@contextlib.contextmanager
def _errors_name_the_way_out(path: str):
    """Errors of the system about a work directory, in one line."""
    another = "name another with --workdir"
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # ours, which already names it
            raise
        if isinstance(error, FileExistsError):
            raise OSError(f"the work directory {path} is a file: {another}") from error
        raise OSError(f"cannot write to the work directory {path} ({error.strerror}): {another}") from error


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    return {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def read_rows(path: Path) -> list[dict]:
    """The rows of metrics.jsonl in a run directory, as `read_json_lines` gives them."""
    return read_json_lines(path / "metrics.jsonl", _check_row)


def _check_row(row, before):
    """Raise ValueError unless its values are finite numbers, and its step is not before that of the previous row."""
    if not {"step", "epoch", "seconds"} <= row.keys():
        raise ValueError("not a row of a run")
    if not all(map(_is_numbers, row.values())):
        raise ValueError("not numbers")
    if type(row["step"]) is not int or row["step"] < before.get("step", 0):
        raise ValueError("not in order")


def _is_numbers(value):
    """Whether a value is a finite number, or nested lists of them."""
    if isinstance(value, list):
        return all(map(_is_numbers, value))
    return type(value) in (int, float) and abs(value) < LARGEST


def _describe(value):
    if isinstance(value, list):
        return ", ".join(f"{entry:.3g}" for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _tensorboard():
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise OSError("run.tensorboard needs tensorboardX: pip install tensorboardX") from None
    return SummaryWriter
