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
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from vae_jax.run.files import (
    is_remote,
    local_path,
    read_objects,
    reason,
    save_figure,
    write_whole,
)

FIELDS = dict.fromkeys(("data", "model", "objective", "optimizer", "run"), dict)
FIELDS |= dict.fromkeys(("epochs", "seed", "seeds"), int) | {
    "best": str
}  # of a config.json
BEGINNING = {"lock", "config.tmp"}  # all that a run killed in its first moment leaves
LARGEST = 1e300  # in metrics.jsonl; this refuses NaN and infinity too
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def read_config(path: str) -> dict | None:
    """The config of the run in a directory; None if there is no directory, or nothing in it.

    Raises FileExistsError if it holds something else.
    """
    folder = epath.Path(path).expanduser()
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} <= BEGINNING:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not all(
        isinstance(config.get(name), kind) for name, kind in FIELDS.items()
    ):
        raise FileExistsError(
            f"the work directory {path} is not empty and has no config.json of a run: name another with --workdir"
        )
    return config


class RunDirectory:
    """Creates `path`, or opens the run that it holds, and writes into it.

    Where `path` is on gs://, files are written into a temporary folder, `self.path`, and `upload` copies them; nothing
    then keeps a second process from writing there.

    Raises OSError where that cannot be, or where another process is writing there; and what `check(stored, config)`
    raises, where a run with the config `stored` is there.
    """

    def __init__(
        self,
        path: str,
        config: dict,
        command: str,
        tensorboard: bool = False,
        check: Callable[[dict, dict], None] = lambda stored, config: None,
    ):
        self.remote = epath.Path(path) if is_remote(path) else None
        local = tempfile.mkdtemp(prefix="vae_jax-") if self.remote else path
        self.path = local_path(local)
        self.command = command
        self.history: list[dict] = []
        self._open_board = _tensorboard() if tensorboard else None
        self._board = None
        with contextlib.ExitStack() as undo:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = undo.enter_context(open(self.path / "lock", "w"))
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (stored := read_config(path)) is not None:
                    check(stored, config)
                write_whole(
                    self.path / "config.json", json.dumps(config, indent=2) + "\n"
                )
                (self.path / "figures").mkdir(exist_ok=True)
                if self.remote and (rows := self.remote / "metrics.jsonl").exists():
                    write_whole(self.path / rows.name, rows.read_text(encoding="utf-8"))
            except BlockingIOError as error:
                raise OSError(
                    f"another process is training in the work directory {path}: name another with --workdir"
                ) from error
            except FileExistsError as error:
                if error.strerror is None:  # what read_config says
                    raise
                raise OSError(
                    f"the work directory {path} is a file: name another with --workdir"
                ) from error
            except OSError as error:
                raise OSError(
                    f"cannot write to the work directory {path} ({error.strerror}): name another with --workdir"
                ) from error
            self.upload()
            undo.pop_all()

    def rewind(self, step: int, note: Callable[[str], None]) -> None:
        """Drop the rows after `step`, and a last one that is torn: training continues from there.

        Rows up to `step` that are missing are told by `note`. Raises OSError, naming the line, if one is damaged.
        """
        rows = read_rows(self.path)
        self.history = [row for row in rows if row["step"] <= step]
        last = self.history[-1]["step"] if self.history else 0
        if last < step:
            note(f"metrics.jsonl has lost its rows after step {last}, up to {step}")
        write_whole(self.path / "metrics.jsonl", "".join(map(_line, self.history)))
        self._opened = time.time()
        self._before = self.history[-1]["seconds"] if self.history else 0.0
        if self._open_board:
            folder = str(self.path / "tensorboard")
            self._board = self._open_board(folder, purge_step=step + 1)

    def log(self, row: dict) -> None:
        """Append a row: `step`, `epoch` and flat metric names such as `train/loss`; the seconds of training are added."""
        seconds = round(self._before + time.time() - self._opened, 2)
        row = {"step": row["step"], "epoch": row["epoch"], "seconds": seconds} | row
        self.history.append(row)
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(_line(row))
        if self._board:
            for name, value in row.items():
                if "/" in name:
                    self._board.add_scalar(name, value, row["step"])

    def save_figures(self, figures: dict) -> None:
        """Write each figure to figures/NAME.png."""
        for name, figure in figures.items():
            save_figure(figure, self.path / "figures" / f"{name}.png")

    def write_summary(self, title: str, numbers: dict[str, float | int]) -> None:
        """Write summary.md: what was trained, its numbers, how to repeat it, the figures."""
        minutes, seconds = divmod(round(self.history[-1]["seconds"]), 60)
        device = jax.devices()[0]
        facts = {
            "command": f"`{self.command}`",
            "time": f"{minutes} min {seconds} s",
            "device": f"{device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores, {platform.platform()}",
            "versions": ", ".join(map(" ".join, versions().items())),
            "matmul precision": f"{jax.config.jax_default_matmul_precision or 'default'}",
        }
        lines = [f"# {title}", "", "| number | value |", "|---|---|"]
        for name, value in numbers.items():
            text = f"{value:.4g}" if isinstance(value, float) else f"{value}"
            if f"{name}/interval" in numbers:
                text += f" ± {numbers[f'{name}/interval']:.2g} (95 %)"
            if not name.endswith("/interval"):
                lines.append(f"| {name} | {text} |")
        lines += ["", *(f"- {name}: {fact}" for name, fact in facts.items()), ""]
        lines += [
            f"![{path.stem}](figures/{path.name})\n"
            for path in sorted((self.path / "figures").glob("*.png"))
        ]
        write_whole(self.path / "summary.md", "\n".join(lines))

    def upload(self, part: str = "") -> None:
        """Copy every file, or those of the folder `part`, to where `path` is remote: there they are whole and of one moment.

        Raises OSError where they cannot be copied.
        """
        if self.remote is None:
            return
        try:
            for file in (self.path / part).rglob("*"):
                if file.is_file() and file.name != "lock":
                    target = self.remote / file.relative_to(self.path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
        except Exception as error:  # of gcsfs, of its credentials, of the network
            raise OSError(
                f"cannot copy the run's files to {self.remote} ({reason(error)}): the same command continues once it can be written to"
            ) from error

    def close(self) -> None:
        """Release the lock, and drop a temporary folder."""
        if self._board:
            self._board.close()  # only now it has written all that was logged
            with contextlib.suppress(OSError):
                self.upload("tensorboard")
        self._lock.close()
        if self.remote:
            shutil.rmtree(self.path)


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    return {"Python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in LIBRARIES
    }


def read_rows(path: Path) -> list[dict]:
    """The rows of metrics.jsonl in a run directory, as `read_objects` gives them."""
    return read_objects(path / "metrics.jsonl", _check_row)


def _check_row(row, before):
    """Raise ValueError unless it is finite numbers by name, of a step that is not before that of the row before."""
    if not {"step", "epoch", "seconds"} <= row.keys():
        raise ValueError("no row of a run")
    if not all(type(v) in (int, float) and abs(v) < LARGEST for v in row.values()):
        raise ValueError("not numbers")
    if type(row["step"]) is not int or row["step"] < before.get("step", 0):
        raise ValueError("not in order")


def _line(row):
    return json.dumps(row) + "\n"


def _tensorboard():
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise OSError(
            "run.tensorboard needs tensorboardX: pip install tensorboardX"
        ) from None
    return SummaryWriter
