"""Several runs side by side: what differs between their configs, their last numbers, and their curves in one picture.

    python -m experiments.compare runs/* [--output=comparison]

Reads config.json and metrics.jsonl, also of unfinished runs. Folders that are not runs are reported and left out.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import launch
from vae_jax.families import FAMILIES, Metric
from vae_jax.likelihoods import LIKELIHOODS
from vae_jax.run.config import flatten, with_defaults
from vae_jax.run.directory import read_config
from vae_jax.run.files import check_local, local_path, save_figure, write_atomically
from vae_jax.run.log import read_rows
from vae_jax.run.report import markdown_table

IGNORED = ("run.", "data.manual_dir")  # fields that affect no number
DECIDE = ("data.", "model.name", "model.likelihood", "model.scale", "model.learn_scale", "model.condition")
DECIDE += ("objective.samples", "objective.beta", "objective.method", "objective.charge", "objective.gamma")
DECIDE += (
    "objective.saturating",
    "objective.judge_reconstructions",
    "model.feature_layer",
    "model.discriminator_features",
)
MEASURED = ("loss", "reconstruction", "bound")  # numbers of the likelihood's kind
MOST_LABELLED = 12  # most runs that a legend can name
WAY_OUT = ": name another with --workdir"  # advice for a training run, removed from its error messages
FILES = {"summary.md", "curves.png", "summary.tmp", "curves.tmp"}  # .tmp: left by a killed process


class Run(NamedTuple):
    """A run as its files describe it."""

    name: str
    config: dict[str, Any]  # flattened
    rows: list[dict]


def read_run(folder: Path, name: str) -> Run:
    """Read a run, finished or not. Raises ValueError or OSError, in one line, for anything else."""
    config = read_config(str(folder))
    if config is None:
        raise ValueError(f"there is no run in {folder}")
    rows = read_rows(folder)
    if not rows:
        raise ValueError(f"the run in {folder} has no numbers yet")
    flat = flatten(with_defaults(config))
    return Run(name, {key: value for key, value in flat.items() if not key.startswith(IGNORED)}, rows)


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read the runs among these folders and report the others on stderr. Raises ValueError if there is no run."""
    for path in paths:
        check_local(path, "a comparison")
    runs, given = [], [local_path(path) for path in paths]
    folders = [path for path in given if not path.is_file()]
    if len(folders) < len(given):
        print(f"compare: left out: {len(given) - len(folders)} files that are not folders", file=sys.stderr)
    for folder, name in zip(folders, short_names(folders)):
        try:
            runs.append(read_run(folder, name))
        except (ValueError, OSError) as error:
            print(f"compare: left out: {str(error).removesuffix(WAY_OUT)}", file=sys.stderr)
    if not runs:
        raise ValueError("none of these folders is a run with numbers: give run directories, such as runs/*")
    return runs


def short_names(folders: Sequence[Path]) -> list[str]:
    """Shorten each path to its last parts, as few as keep the names distinct."""
    for parts in range(1, 1 + max((len(folder.parts) for folder in folders), default=0)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len({*names}) == len(folders):
            return names
    return [str(folder) for folder in folders]


def differing(runs: Sequence[Run]) -> list[str]:
    """The config fields that differ between the runs that have them."""
    values: dict[str, list] = {}
    for run in runs:
        for name, value in run.config.items():
            values.setdefault(name, []).append(value)
    return [name for name, found in values.items() if found != found[:1] * len(found)]


def metrics_of(runs: Sequence[Run]) -> dict[str, Metric]:
    """The loss, and the other metrics with a better direction that some run has logged on the test images.

    If the runs' likelihoods are of different kinds, their numbers do not belong in one column and are left out.
    """
    known, of_one_kind = {}, len(kinds(runs)) <= 1
    for run in runs:
        family = FAMILIES.get(run.config.get("model.name"))
        known |= {name: metric for name, metric in getattr(family, "METRICS", {"loss": Metric("loss", "")}).items()}
    return {
        name: metric
        for name, metric in known.items()
        if (of_one_kind or name not in MEASURED)
        and (name == "loss" or (metric.better and any(is_number(row, name) for run in runs for row in run.rows)))
    }


def is_number(row: dict, metric: str) -> bool:
    """Whether a row has one number of this metric on the test images."""
    return isinstance(row.get(f"test/{metric}"), int | float)


def kinds(runs: Sequence[Run]) -> list[str]:
    """What the runs' likelihoods are: densities, masses on 256 levels, masses on two."""
    named = (run.config.get("model.likelihood") for run in runs)
    return sorted({LIKELIHOODS[name]().support for name in named if name in LIKELIHOODS})


def last(run: Run, name: str) -> dict | None:
    """The last row that contains a metric."""
    return next((row for row in reversed(run.rows) if name in row), None)


def table(runs: Sequence[Run]) -> list[list[str]]:
    """A heading and a row per run: its differing fields, its progress and its last numbers."""
    fields, metrics = differing(runs), metrics_of(runs)
    cells = [["run", *fields, "trained", *(f"test/{name}" for name in metrics), "minutes"]]
    for run in runs:
        epoch, epochs = run.rows[-1]["epoch"], run.config["epochs"]
        most = "at most " if run.config.get("patience") else ""  # whether it has ended is in its checkpoints alone
        state = f"{epoch:.3g} of {most}{epochs} epochs" if epoch < epochs else f"{epochs} epochs"
        values = [show(run, f"test/{name}") for name in metrics]
        minutes = f"{run.rows[-1]['seconds'] / 60:.1f}"
        cells.append([run.name, *(describe(run.config, name) for name in fields), state, *values, minutes])
    return cells


def describe(config: dict[str, Any], field: str) -> str:
    """A field's value, or "" if the config lacks the field."""
    value = config.get(field, "")
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def show(run: Run, metric: str) -> str:
    """The last value of a metric, with its 95 % interval if there are several seeds."""
    row = last(run, metric)
    if row is None:
        return ""
    interval = row.get(f"{metric}/interval")
    return f"{row[metric]:.4g}" + (f" ± {interval:.2g}" if isinstance(interval, int | float) else "")


def caveat(runs: Sequence[Run]) -> str:
    """A warning that names the fields that make the runs' losses incomparable; "" if there are none."""
    if len(kinds(runs)) > 1:
        return f"The runs measure different things ({', '.join(kinds(runs))}), so {', '.join(MEASURED)} are left out."
    fields = [name for name in differing(runs) if name.startswith(DECIDE)]
    return f"The runs differ in {', '.join(fields)}, so their losses may measure different things." if fields else ""


def draw(runs: Sequence[Run]) -> Figure:
    """Draw a panel per metric with each run's test curve and, paler, its training curve."""
    metrics = metrics_of(runs)
    columns = min(3, len(metrics)) or 1
    lines = -(-len(metrics) // columns) or 1
    figure = Figure(figsize=(5.2 * columns + 2.5, 4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    colors = matplotlib.colormaps["tab10" if len(runs) <= 10 else "viridis"]
    shades = [colors(i if len(runs) <= 10 else i / (len(runs) - 1)) for i in range(len(runs))]
    for ax, (name, metric) in zip(axes, metrics.items()):
        shown = []
        for run, color in zip(runs, shades):
            train, test = curve(run, f"train/{name}"), curve(run, f"test/{name}")
            ax.plot(*train.T, color=color, alpha=0.3, linewidth=1)
            ax.plot(*test.T, color=color, marker="o" if len(test) < 20 else None, markersize=3, label=plain(run.name))
            shown += [*test[len(test) // 20 :, 1], *train[len(train) // 10 :, 1]]
        low, high = min(shown, default=0.0), max(shown, default=1.0)
        margin = 0.05 * (high - low + 1e-6)
        ax.set(title=f"{name}: {plain(metric.meaning)}", xlabel="epoch", ylabel=metric.unit)
        ax.set_ylim(low - margin, high + margin)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(metrics) :]:
        ax.remove()
    if len(runs) <= MOST_LABELLED:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle("Test images; paler: training, during the epoch")
    return figure


def plain(text: str) -> str:
    """Escape text for Matplotlib, where $ starts a formula and a leading underscore hides a line from the legend."""
    return text.replace("$", r"\$").lstrip("_")


def curve(run: Run, name: str) -> np.ndarray:
    """Epochs and values of a metric, [rows, 2]."""
    return np.array([[row["epoch"], row[name]] for row in run.rows if name in row]).reshape(-1, 2)


def main(paths: Sequence[str]) -> None:
    if not paths:
        raise ValueError("no runs are given: python -m experiments.compare runs/*")
    output = local_path(flags.FLAGS.output)
    if output.exists() and not (output.is_dir() and {path.name for path in output.iterdir()} <= FILES):
        raise FileExistsError(f"{output} holds something other than a comparison: name another with --output")
    runs = read_runs(paths)
    cells, note = markdown_table(table(runs)), caveat(runs)
    print("\n\n".join(filter(None, [cells, note])))
    output.mkdir(parents=True, exist_ok=True)
    save_figure(draw(runs), output / "curves.png")
    parts = [f"# {len(runs)} runs", cells, note, "![Curves](curves.png)"]
    write_atomically(output / "summary.md", "\n\n".join(filter(None, parts)) + "\n")
    print(f"\n{output / 'summary.md'}")


if __name__ == "__main__":
    flags.DEFINE_string("output", "comparison", "The folder of the table and the picture.")
    launch.start("compare", main, takes_arguments=True)
