"""The report of the few-labels study: its tables and its figure.

`rows` are the rows of results.jsonl, `settings` the content of settings.json.
"""

from operator import itemgetter
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import launch
from vae_jax.evaluation.statistics import mean_and_interval
from vae_jax.run.files import save_figure
from vae_jax.run.report import markdown_table

PUBLISHED = {  # test accuracy in %: Pyro's tutorial "The Semi-Supervised VAE", five draws; Kingma et al. 2014, at 100 and 1,000
    "M2 in Pyro's tutorial": {100: 93.2, 600: 94.4, 1000: 94.9, 3000: 95.8},
    "M2, Kingma et al.": {100: 88.03, 1000: 96.40},
    "M1 + M2, Kingma et al.": {100: 96.67, 1000: 97.60},
}
SHIFTED = "classifier, shifted"
PAIRS = [  # one method minus another
    ("label spreading, VAE's codes", "label spreading, pixels"),
    ("label spreading, VAE's codes", "classifier"),
    ("label spreading, VAE's codes", "classifier, pseudo-labels"),
    ("classifier, pseudo-labels", "classifier"),
    ("M2", "classifier"),
    ("M1 + M2", "classifier"),
    ("linear probe, VAE's codes", "linear probe, pixels"),
    (SHIFTED, "classifier"),
    (f"{SHIFTED}, pseudo-labels", SHIFTED),
    (f"{SHIFTED}, labels spread over VAE's codes", SHIFTED),
    (f"{SHIFTED}, labels spread over VAE's codes", f"{SHIFTED}, pseudo-labels"),
    (f"{SHIFTED}, labels spread over VAE's codes", f"{SHIFTED}, labels spread over pixels"),
]


def by_method(rows: list[dict], number: str = "accuracy", scale: float = 100) -> dict[str, dict[int, np.ndarray]]:
    """{method: {labels: a number of each draw, by default the test accuracy in %}}, of the methods that have it."""
    found: dict[str, dict[int, list]] = {}
    for row in sorted(rows, key=lambda row: row.get("draw", 0)):
        if number in row:
            here = found.setdefault(row["stage"], {}).setdefault(row["labels"], [])
            if row.get("draw", 0) != len(here):
                raise ValueError(
                    f"results.jsonl lacks draw {len(here)} of {row['stage']} with {row['labels']} labels: "
                    f"compute it with --methods={row['stage']!r}"
                )
            here.extend(row[number] if isinstance(row[number], list) else [row[number]])
    return {
        method: {labels: scale * np.array(values) for labels, values in sorted(of.items())}
        for method, of in found.items()
    }


def cell(values: np.ndarray | None, signed: bool = False, draws: int = 0) -> str:
    """Mean and half-width of the 95 % interval; the bare value for one draw, and "" for none.

    The number of draws is added if it is below `draws`.
    """
    if values is None or not len(values):
        return ""
    sign, few = "+" if signed else "", f" ({len(values)} of {draws} draws)" if len(values) < draws else ""
    if len(values) == 1:
        return f"{values[0]:{sign}.2f}{few}"
    mean, half = mean_and_interval(values.tolist())
    return f"{mean:{sign}.2f} ± {half:.2f}{few}"


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """One method minus another, draw by draw, over the draws that both have."""
    both = min(len(one), len(other))
    return one[:both] - other[:both]


def numbers_of(settings: dict) -> list[int]:
    """The numbers of labels, without that of all."""
    return [labels for labels in settings["labels"] if labels > 0]


def tables(rows: list[dict], settings: dict) -> dict[str, list[list[str]]]:
    """{title: cells}: accuracy without and with augmentation, paired differences, nats, minutes."""
    found, labels = by_method(rows), numbers_of(settings)
    heading = [f"{count:,} labels" for count in labels] + ["all labels"]
    counts = [*labels, -1]

    def table(numbers, methods):
        def of(name, count):
            return cell(numbers[name].get(count), draws=settings["draws"] if count > 0 else 1)

        return [["method", *heading], *([name, *(of(name, count) for count in counts)] for name in methods)]

    nats = by_method(rows, "bound", 1) | by_method(rows, "nll", 1)  # nll replaces a bound on -log p(x | y)
    plain = [name for name in found if not name.startswith(SHIFTED)]
    known = PUBLISHED.items() if settings["data"] == "mnist" else ()
    others = [[f"*{name}*", *(f"{of[n]:.2f}" if n in of else "" for n in counts)] for name, of in known]
    pairs = [["one method minus another", *heading[:-1]]]
    for one, other in PAIRS:
        if one in found and other in found:
            both = [n for n in labels if n in found[one] and n in found[other]]
            values = {n: difference(found[one][n], found[other][n]) for n in both}
            pairs.append(
                [f"{one} - {other}", *(cell(values.get(n), signed=True, draws=settings["draws"]) for n in labels)]
            )
    minutes = [["method", "minutes"]]
    for name in found:
        seconds = sum(row["seconds"] for row in rows if row["stage"] == name)
        minutes.append([name, f"{seconds / 60:.1f}"])
    return {
        "Test accuracy in %, images as they are": table(found, plain) + others,
        "Test accuracy in %, images shifted and rotated": table(found, [n for n in found if n.startswith(SHIFTED)]),
        "Paired differences over the draws, in points": pairs,
        "Nats of a test image: a bound on -log p(x), or by Bayes' rule an estimate of it": table(nats, nats),
        "Minutes of all draws and numbers of labels; what methods share counts for the first of them": minutes,
    }


def draw(rows: list[dict], settings: dict) -> Figure:
    """Plot the error by number of labels, one line per method: warm colours with a generative model, blue without."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    found = by_method(rows)
    error = [100 - values for of in found.values() for values in of.values()]
    lowest, highest = 0.8 * max(0.1, min(map(np.min, error))), 1.2 * max(map(np.max, error))
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if lowest <= tick <= highest]
    for ax, shifted in zip(axes, (False, True)):
        ax.set(title="Images shifted and rotated" if shifted else "Images as they are")
        ax.set(xscale="log", yscale="log", xlabel="labelled training images", ylim=(lowest, highest))
        ax.set_xticks(numbers_of(settings), [f"{n:,}" for n in numbers_of(settings)], rotation=45)
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        plot(ax, {name: found[name] for name in found if name.startswith(SHIFTED) == shifted})
    axes[0].set(ylabel="test error in %")
    figure.suptitle(title_of(settings))
    return figure


def plot(ax: Axes, found: dict[str, dict[int, np.ndarray]]) -> None:
    """Plot one line per method, with its name at its end and intervals where there are several draws; dotted for a
    method that is trained on all labels alone.
    """
    generative = [name for name in found if is_generative(name)]
    ends = []  # of each line: the error, the name, the colour
    for group, colours in ((generative, "YlOrRd"), ([name for name in found if name not in generative], "Blues")):
        shades = colormaps[colours](np.linspace(0.45, 0.95, max(len(group), 1)))
        for name, colour, marker in zip(group, shades, "osD^vPX*"):
            counts = [n for n in found[name] if n > 0]
            if not counts:
                error = 100 - found[name][-1].mean()
                ax.axhline(error, ls=":", lw=2, color=colour)
                ends.append((error, f"{name}, all labels", colour))
                continue
            error = [100 - found[name][n].mean() for n in counts]
            half = [
                mean_and_interval(found[name][n].tolist())[1] if len(found[name][n]) > 1 else np.nan for n in counts
            ]
            ax.errorbar(counts, error, half, marker=marker, ms=6, lw=2, capsize=2, elinewidth=1, color=colour)
            ends.append((error[-1], name.removeprefix(f"{SHIFTED}, "), colour))
    height = 0.0
    for error, name, colour in sorted(ends, key=itemgetter(0)):
        height = max(ax.transAxes.inverted().transform(ax.transData.transform((1, error)))[1], height + 0.035)
        ax.text(1.02, height, name, color=colour, transform=ax.transAxes, va="center", fontsize=10)


def is_generative(method: str) -> bool:
    """Whether a method uses a generative model of the images."""
    return any(name in method for name in ("VAE", "M2", "sparse"))


def title_of(settings: dict) -> str:
    """The title of the study."""
    draws = f"{settings['draws']} draws unless a table says fewer"
    return f"How few labels are enough? {settings['data']}, {draws}, 95 % intervals"


def write_summary(path: Path, rows: list[dict], settings: dict) -> None:
    """Write and print summary.md, with its figure, from the available results."""
    save_figure(draw(rows, settings), path / "labels.png")
    parts = [
        f"## {title}\n\n{markdown_table(cells)}" for title, cells in tables(rows, settings).items() if len(cells) > 1
    ]
    launch.write_summary(path, title_of(settings), "![Test error](labels.png)", *parts)
