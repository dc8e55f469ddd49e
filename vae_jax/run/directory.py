"""The run directory: config.json, metrics.jsonl, checkpoints/, figures/, summary.md and summary.html."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from vae_jax.run.config import changes
from vae_jax.run.environment import code_version
from vae_jax.run.files import (
    atomic_file,
    describe_error,
    explained,
    is_remote,
    local_path,
    read_regular,
    save_figure,
    save_film,
    write_atomically,
)
from vae_jax.run.log import LogDigest, OwnedDirectory, read_rows
from vae_jax.run.report import to_html
from vae_jax.run.summary import About, summarize

FORMAT = 3
OLD_FORMAT = "was written by an earlier format of vae_jax, which commit af11a1a reads"
SECTIONS = dict.fromkeys(("data", "model", "objective", "optimizer", "run"), dict)
FIELDS = SECTIONS | {"best": str}
FILMED = ("reconstructions", "samples")  # figures that are also animated over the epochs
FRAME = 500  # milliseconds per epoch
LOGS = "tensorboard"  # the folder of the event files for TensorBoard
LEFTOVERS = {"lock", "config.tmp"}  # left by a run killed right after its start


def read_config(path: str) -> dict | None:
    """The config of the run in a directory; None if the directory is missing or empty.

    Raises FileExistsError if it holds anything else, or a run of another format.
    """
    return (read_settings(path) or {}).get("config")


def read_settings(path: str) -> dict | None:
    """Read config.json as {"saved": step of the latest checkpoint, "config": the config's fields}.

    Returns None and raises as `read_config` does.
    """
    folder = epath.Path(path).expanduser()
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} <= LEFTOVERS:
        return None
    try:
        config = json.loads(read_regular(folder / "config.json").decode())
    except (FileNotFoundError, ValueError, RecursionError):
        config = None
    another = "name another with --workdir"
    if not isinstance(config, dict) or not SECTIONS.keys() <= config.keys():
        raise FileExistsError(f"the work directory {path} is not empty and has no config.json of a run: {another}")
    number, saved = config.pop("format", 1), config.pop("saved", 0)
    if type(number) is int and number != FORMAT:
        what = OLD_FORMAT if number == 1 else f"has format {number}, but this version of vae_jax reads {FORMAT}"
        raise FileExistsError(f"the run in {path} {what}: {another}")
    integers = [number, saved, *(config.get(name) for name in ("epochs", "seed", "seeds"))]
    whole = all(type(value) is int and value >= 0 for value in integers)
    if not whole or not all(isinstance(config.get(name), kind) for name, kind in FIELDS.items()):
        raise FileExistsError(f"{path}/config.json is damaged: restore it, or {another}")
    return {"saved": saved, "config": config}


def check_same_config(workdir: str, stored: Mapping, config: Mapping) -> None:
    """Raise ValueError, naming the differing fields, if the run in the work directory has another config."""
    if changed := changes(stored, config):
        raise ValueError(
            f"the work directory {workdir} holds another run ({'; '.join(changed)}): name another with --workdir"
        )


class RunDirectory:
    """The directory of a run, new or resumed.

    If `path` is on gs://, files go to a temporary folder, `self.path`, and `upload` copies them; no lock then keeps a
    second process out. Raises OSError if the directory cannot be used, and ValueError if it holds a run with another
    config.
    """

    def __init__(self, path: str, config: Mapping, command: str):
        self.remote = epath.Path(path) if is_remote(path) else None
        self.path = local_path(tempfile.mkdtemp(prefix="vae_jax-") if self.remote else path)
        self.command, self.config = command, config
        self._code = code_version()  # taken at the start: the files may change during training
        with contextlib.ExitStack() as on_error:
            if self.remote:
                on_error.callback(shutil.rmtree, self.path)
            with explained(f"cannot write to the work directory {path}", "name another with --workdir"):
                self._owned = OwnedDirectory(self.path, "metrics.jsonl")
                on_error.callback(self._owned.close)
                stored = read_settings(path)
                if stored is not None:
                    check_same_config(path, stored["config"], config)
                self._saved = int(stored["saved"]) if stored else 0
                self._write_settings()
                (self.path / "figures").mkdir(exist_ok=True)
                if self.remote:
                    self._fetch_frames(self.remote / "figures" / "epochs")
            self.upload()
            on_error.pop_all()

    def _fetch_frames(self, remote):
        """Copy the frames of a resumed run's films from gs://."""
        for frame in remote.glob("*.png") if remote.exists() else ():
            local = self.path / "figures" / "epochs" / frame.name
            local.parent.mkdir(exist_ok=True)
            local.write_bytes(frame.read_bytes())

    def _write_settings(self):
        settings = {"format": FORMAT, "saved": self._saved, **self.config}
        write_atomically(self.path / "config.json", json.dumps(settings, indent=2) + "\n")

    def mark_saved(self, step: int) -> None:
        """Record the step of the latest checkpoint in config.json, so that its loss is noticed."""
        self._saved = step
        self._write_settings()
        self.upload("config.json")

    @property
    def history(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        return self._owned.rows

    @property
    def summary(self):
        """The path of summary.md."""
        return (self.remote or self.path) / "summary.md"

    def rewind(self, step: int, log: dict | None = None) -> bool:
        """Drop rows after `step`, where training resumes, an incomplete last row, and duplicate rows.

        `log` is the `log_digest` that was taken at `step`; returns whether the rows still match it.
        Raises OSError, naming the line, for a damaged row, and if the run's checkpoints are gone.
        """
        rows = [row for row in read_rows(self.remote or self.path) if row["step"] <= step]
        if step == 0 and self._saved:
            raise OSError(
                f"the run in {self.remote or self.path} has lost its checkpoints: bring them back, or name another "
                "--workdir"
            )
        self._keep({(row["step"], *sorted(row)): row for row in reversed(rows)}.values())
        if step:
            self.mark_saved(step)
        self._started = time.monotonic() - (self.history[-1]["seconds"] if rows else 0.0)
        return log is None or (len(rows) == log["rows"] and self.log_digest() == log)

    def _keep(self, rows):
        self._owned.keep(sorted(rows, key=lambda row: (row["step"], "test/loss" in row)))
        self._digest = LogDigest(self.history)

    def log_digest(self) -> dict:
        """The digest of the log that a checkpoint stores."""
        return self._digest.value()

    def log(self, row: dict) -> None:
        """Append a row of `step`, `epoch` and metrics such as `train/loss`, and add the seconds of training so far."""
        row = self._timed(row, time.monotonic() - self._started)
        self._owned.append(row)
        self._digest.add(row)

    def insert(self, row: dict) -> None:
        """Insert a lost row in its place, with the time of the row before it."""
        before = [other["seconds"] for other in self.history if other["step"] <= row["step"]]
        self._keep([*self.history, self._timed(row, before[-1] if before else 0.0)])

    def _timed(self, row, seconds):
        return {"step": row["step"], "epoch": row["epoch"], "seconds": round(seconds, 2)} | row

    def save_figures(self, figures: Mapping[str, Callable], epoch: int) -> None:
        """Draw each figure into figures/NAME.png; those in FILMED also get figures/NAME.webp, one frame per epoch."""
        from PIL import Image

        folder = self.path / "figures"
        for name, draw in figures.items():
            save_figure(draw(), folder / f"{name}.png")
            if name in FILMED:
                (folder / "epochs").mkdir(exist_ok=True)
                with atomic_file(folder / "epochs" / f"{name}-{epoch:05d}.png") as part:
                    shutil.copyfile(folder / f"{name}.png", part)
                frames = sorted((folder / "epochs").glob(f"{name}-*.png"))
                save_film(
                    [np.asarray(Image.open(frame).convert("RGB")) for frame in frames], folder / f"{name}.webp", FRAME
                )

    def write_summary(self, title: str, numbers: Mapping[str, Any], about: About) -> None:
        """Write summary.md, and summary.html with the figures embedded."""
        figures = [f"figures/{path.name}" for path in sorted((self.path / "figures").glob("*.png"))]
        seconds = self.history[-1]["seconds"]
        text = summarize(title, numbers, about, self.command, self._code, seconds, figures)
        write_atomically(self.path / "summary.md", text)
        write_atomically(self.path / "summary.html", to_html(text, self.path))

    def upload(self, pattern: str = "*") -> None:
        """Copy the files that match `pattern` to gs://, by default all, so that the remote files fit together.

        Raises OSError if they cannot be copied.
        """
        if self.remote is None:
            return
        try:
            for file in self.path.rglob(pattern):
                if file.is_file() and file.name != "lock":
                    target = self.remote / file.relative_to(self.path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
        except Exception as error:  # gcsfs, credentials and network raise many kinds
            raise OSError(
                f"cannot copy the run's files to {self.remote} ({describe_error(error)}): the same command continues "
                "once it can be written to"
            ) from error

    def close(self) -> None:
        """Release the lock, and remove a temporary folder."""
        with contextlib.suppress(OSError):
            self.upload(f"{LOGS}/*")  # its last rows
        self._owned.close()
        if self.remote:
            shutil.rmtree(self.path)
