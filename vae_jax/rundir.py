"""The run directory (config.json, metrics.jsonl, figures/, summary.md) and what the terminal shows."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def check_unused(path: str) -> None:
    """Raise FileExistsError if there is a directory that holds something."""
    folder = Path(path).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"the work directory {path} is not empty: name another with --workdir, or remove it"
        )


class RunDirectory:
    """Creates `path` and writes into it. Raises OSError where that cannot be, or where something is there already."""

    def __init__(self, path: str, config: dict, tensorboard: bool = False):
        check_unused(path)
        self.path = Path(path).expanduser()
        make_writer = _tensorboard() if tensorboard else None
        try:
            (self.path / "figures").mkdir(parents=True)
            (self.path / "metrics.jsonl").touch()
            text = json.dumps(config, indent=2) + "\n"
            (self.path / "config.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(
                f"cannot create the work directory {path} ({error.strerror}): name another with --workdir"
            ) from error
        self._board = (
            make_writer(str(self.path / "tensorboard")) if tensorboard else None
        )
        self.started = time.time()
        self.history: list[dict] = []

    def log(self, row: dict) -> None:
        """Append a row: `step`, `epoch` and flat metric names such as `train/loss`."""
        self.history.append(row)
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board:
            for name, value in row.items():
                if "/" in name:
                    self._board.add_scalar(name, value, row["step"])

    def save_figures(self, figures: dict) -> None:
        """Write each figure to figures/NAME.png, at no moment leaving half a file."""
        for name, figure in figures.items():
            path = self.path / "figures" / f"{name}.png"
            figure.savefig(path.with_suffix(".tmp"), format="png", dpi=110)
            os.replace(path.with_suffix(".tmp"), path)

    def write_summary(
        self, title: str, command: str, numbers: dict[str, float | int]
    ) -> None:
        """Write summary.md: what was trained, its numbers, how to repeat it, the figures."""
        minutes, seconds = divmod(round(time.time() - self.started), 60)
        device = jax.devices()[0]
        versions = ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES
        )
        facts = {
            "command": f"`{command}`",
            "time": f"{minutes} min {seconds} s",
            "device": f"{device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores, {platform.platform()}",
            "versions": f"Python {platform.python_version()}, {versions}",
            "matmul precision": f"{jax.config.jax_default_matmul_precision or 'default'}",
        }
        lines = [f"# {title}", "", "| number | value |", "|---|---|"]
        lines += [
            f"| {name} | {value:.4g} |"
            if isinstance(value, float)
            else f"| {name} | {value} |"
            for name, value in numbers.items()
        ]
        lines += ["", *(f"- {name}: {fact}" for name, fact in facts.items()), ""]
        lines += [
            f"![{path.stem}](figures/{path.name})\n"
            for path in sorted((self.path / "figures").glob("*.png"))
        ]
        (self.path / "summary.md").write_text("\n".join(lines), encoding="utf-8")

    def close(self) -> None:
        if self._board:
            self._board.close()


def _tensorboard():
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise OSError(
            "run.tensorboard needs tensorboardX: pip install tensorboardX"
        ) from None
    return SummaryWriter


class Progress:
    """A bar on a terminal; elsewhere a plain line an epoch, at most one in `PAUSE` seconds."""

    PAUSE = 5.0

    def __init__(self, images: int, epochs: int):
        self._bar = tqdm(
            total=images,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._images, self._epochs = images, epochs
        self._started = self._printed = time.time()
        self._done = 0
        self._tested = ""

    def update(self, images: int, epoch: int, loss: float) -> None:
        """Some more training images are done; `epoch` counts from 1."""
        self._done += images
        self._bar.set_description(f"epoch {epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(f"loss {loss:.2f}{self._tested}", refresh=False)
        self._bar.update(images)

    def epoch_done(self, epoch: int, metrics: dict) -> None:
        """An epoch ended with these metrics, `train/loss` and `test/loss` among them."""
        text = f"epoch {epoch}/{self._epochs}  " + "  ".join(
            f"{name} {value:.3f}"
            for name, value in metrics.items()
            if name.endswith("/loss")
        )
        self._tested = f", test {metrics['test/loss']:.2f}"
        now = time.time()
        if self._bar.disable and (
            now - self._printed > self.PAUSE or epoch in (1, self._epochs)
        ):
            rate = self._done / (now - self._started)
            print(
                f"{text}  {rate:,.0f} images/s  {(self._images - self._done) / rate / 60:.1f} min left",
                flush=True,
            )
            self._printed = now

    def close(self) -> None:
        self._bar.close()
