"""The report of the augmentation study: its choice of noise, tables, findings, conditions and figures.

`rows` are the rows of results.jsonl, `settings` the content of settings.json.
"""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import arms, launch
from experiments.arms import ARMS, PAIRS, SHARES, SWEEP, Arm
from vae_jax.evaluation.statistics import mean_and_interval
from vae_jax.figures import mosaic, show_image
from vae_jax.run.files import read_json_lines, save_figure
from vae_jax.run.report import bullets, markdown_table

REAL, GENERATED, NEUTRAL = "#1b4f8a", "#c05a00", "#8a93a0"


def read_study(path: Path) -> tuple[list[dict], dict]:
    """Rows and settings of a finished study. Raises ValueError if it is missing or unfinished."""
    if not (path / "summary.md").exists():
        raise ValueError(f"{path} is missing or unfinished: run its part first")
    settings = json.loads((path / "settings.json").read_text("utf-8"))
    return read_json_lines(path / "results.jsonl"), settings


def chosen_noise(rows: list[dict]) -> tuple[float, float]:
    """The share of latents and the scale with arm f's highest mean accuracy.

    Ties give the least noise, and so does a study without a choice stage.
    """
    tried = [row for row in rows if row["stage"] == "choice"]
    if not tried:
        return SHARES[0], arms.SCALES[0]
    best = max(tried, key=lambda row: np.mean(row["accuracy"]))
    return best["share"], best["scale"]


def relabelled(rows: list[dict], share: float) -> list[float]:
    """Percentage of generated images that the judge labels differently from their sources, for each scale in SWEEP."""
    found = {row["scale"]: row["relabelled"] for row in rows if row["stage"] == "sweep" and row["share"] == share}
    return [100 * found[scale] for scale in SWEEP]


def by_arm(rows: list[dict]) -> dict[tuple[float, str], np.ndarray]:
    """{(percentage, arm): test accuracies of the seeds, in %}"""
    return {(row["percentage"], row["arm"]): 100 * np.array(row["accuracy"]) for row in rows if row["stage"] == "arm"}


def mean_accuracy(accuracy: dict, percentage: float, arm: str) -> tuple[float, float]:
    """Mean over seeds and the half-width of its 95 % interval, in %."""
    return mean_and_interval(accuracy[percentage, arm].tolist())


def difference(accuracy: dict, percentage: float, pair: str) -> tuple[float, float]:
    """Mean paired difference of two arms over the seeds and the half-width of its 95 % interval, in points."""
    one, other = pair.split("-")
    return mean_and_interval((accuracy[percentage, one] - accuracy[percentage, other]).tolist())


def findings(rows: list[dict], settings: dict) -> list[str]:
    """One sentence per pair: where the first arm is better, worse, or not significantly different."""
    accuracy, sentences = by_arm(rows), []
    for pair, what in PAIRS.items():
        verdicts = {"better": [], "worse": [], "no significant difference": []}
        for percentage in settings["percentages"]:
            mean, interval = difference(accuracy, percentage, pair)
            verdict = "no significant difference"
            if abs(mean) > interval:
                verdict = "better" if mean > 0 else "worse"
            verdicts[verdict].append(f"{percentage:g} % ({mean:+.2f} ± {interval:.2f})")
        parts = [f"{name} at {', '.join(at)}" for name, at in verdicts.items() if at]
        sentences.append(f"{what[0].upper()}{what[1:]} ({pair}): {'; '.join(parts)}.")
    return sentences


def tables(rows: list[dict], settings: dict) -> dict[str, list[list[str]]]:
    """{title: cells} of the study's tables; the first row is the heading."""
    by_name, pairs = accuracy_tables(rows, settings["percentages"], ARMS, PAIRS)
    noise = [["share of latents", *(f"noise {scale:g}" for scale in SWEEP)]]
    for share in SHARES:
        noise.append([f"{share:g}", *(f"{lost:.1f} %" for lost in relabelled(rows, share))])
    return {
        "Test accuracy in %, by percentage of half B": by_name,
        "Paired differences, in points": pairs,
        "Generated images that the judge labels differently from their sources": noise,
    }


def accuracy_tables(
    rows: list[dict], percentages: list[float], table: dict[str, Arm], pairs: dict[str, str]
) -> tuple[list[list[str]], list[list[str]]]:
    """Table cells: the arms' accuracies and the pairs' differences, by percentage of half B."""
    accuracy, heading = by_arm(rows), [f"{percentage:g} %" for percentage in percentages]
    by_name = [["arm", "the classifier trains on", *heading]]
    for name, arm in table.items():
        cells = [mean_accuracy(accuracy, p, name) for p in percentages]
        by_name.append([name, arm.label, *(f"{mean:.2f} ± {half:.2f}" for mean, half in cells)])
    differences = [["pair", "compares", *heading]]
    for pair, what in pairs.items():
        cells = [difference(accuracy, p, pair) for p in percentages]
        differences.append([pair, what, *(f"{mean:+.2f} ± {half:.2f}" for mean, half in cells)])
    return by_name, differences


def conditions(rows: list[dict], settings: dict) -> str:
    """How the study was run, in two paragraphs."""
    share, scale = chosen_noise(rows)
    choice = "the least noise tried, because arm f left no images of half B to choose by"
    if any(row["stage"] == "choice" for row in rows):
        percentage = f"{arms.choice_percentage(settings):g}"
        choice = f"the best of those tried: arm f trained on {percentage} % of half B and was tested on the rest"
    return CONDITIONS.format(
        **settings,
        share=100 * share,
        scale=scale,
        choice=choice,
        sharp=arms.SHARP_VAE,
        threshold=100 * arms.CONFIDENCE_THRESHOLD,
    )


CONDITIONS = """\
Half A of the training images trains the VAEs, without labels. The classifier trains on a percentage of half B and,
depending on the arm, on extra images. Every arm takes {steps} steps of {batch_size} images with {seeds} seeds; the tables
give means with 95 % intervals. Seeds differ in the images drawn from the halves, the initial weights and the order of the
images. All seeds share the VAEs, the generated images and the test set, so the intervals do not cover their variation;
about one difference in twenty looks significant by chance.

Generated images have noise of standard deviation {scale:g} in {share:g} % of the latents, {choice}. Arm h instead
decodes one draw from q(z | x) for each image of half A, by a VAE with beta {sharp[objective.beta]:g} and
{sharp[model.latent_dim]} latents. The judge is the classifier trained on all training images. Arms h and i keep the
images that arm c's classifier labels with a probability of at least {threshold:g} %. This recipe was found on MNIST, on
images of half B that the classifier had not seen."""


def results(rows: list[dict], settings: dict) -> str:
    """Conditions, findings and tables, in Markdown."""
    parts = [conditions(rows, settings), bullets(findings(rows, settings))]
    for title, cells in tables(rows, settings).items():
        parts += [f"**{title}**", markdown_table(cells)]
    return "\n\n".join(parts)


def write_summary(
    path: Path, rows: list[dict], settings: dict, variations: UInt8[np.ndarray, "row column height width channel"]
) -> None:
    """Write and print summary.md, with its figures; `variations` as in `draw_noise`."""
    folder = path / "figures"
    folder.mkdir(exist_ok=True)
    save_figure(draw_arms(rows, settings), folder / "arms.png")
    save_figure(draw_noise(rows, settings, variations), folder / "noise.png")
    images = (
        "![Test accuracy of each arm, and differences between arms](figures/arms.png)",
        "![Generated images by noise](figures/noise.png)",
    )
    title = f"Does generated training data help? {settings['data']}"
    launch.write_summary(path, title, results(rows, settings), *images)


def draw_arms(rows: list[dict], settings: dict) -> Figure:
    """Draw the arms' accuracies and the paired differences, one panel with its own scale per percentage of half B."""
    accuracy, columns = by_arm(rows), settings["percentages"]
    figure = Figure(figsize=(4.4 + 2 * len(columns), 8.6), layout="constrained")
    figure.suptitle(f"Generated training data: {settings['data']}, {settings['seeds']} seeds, 95 % intervals")
    above, below = figure.subfigures(2, 1, height_ratios=[len(ARMS) + 1, len(PAIRS) + 2])
    above.supxlabel("test accuracy, %: orange with generated images, blue without", fontsize=10)
    _panels(
        above,
        columns,
        {name: f"{name}: {arm.label}" for name, arm in ARMS.items()},
        lambda percentage, name: mean_accuracy(accuracy, percentage, name),
        lambda name, mean, half: GENERATED if ARMS[name].generated else REAL,
    )
    below.supxlabel("paired difference, points: grey where the interval includes 0", fontsize=10)
    panels = _panels(
        below,
        columns,
        {pair: f"{pair}: {what}" for pair, what in PAIRS.items()},
        lambda percentage, pair: difference(accuracy, percentage, pair),
        lambda name, mean, half: REAL if abs(mean) > half else NEUTRAL,
    )
    for axes in panels:
        axes.axvline(0, color="black", linewidth=0.8)
    return figure


def _panels(figure, columns: list[float], labels: dict[str, str], find: Callable, color: Callable) -> list:
    """Draw means with intervals, one row per label and one panel per percentage.

    `find(percentage, name)` returns (mean, half-width); `color(name, mean, half)` returns the colour of a point.
    """
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, percentage in zip(panels, columns):
        for row, name in enumerate(labels):
            mean, half = find(percentage, name)
            axes.errorbar(mean, row, xerr=half, fmt="o", capsize=3, color=color(name, mean, half))
        axes.set_title(f"{percentage:g} % of half B", fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(alpha=0.3)
    wrapped = [textwrap.fill(label, 40, break_on_hyphens=False) for label in labels.values()]
    panels[0].set_yticks(range(len(labels)), wrapped, fontsize=9)
    panels[0].invert_yaxis()
    return panels


def draw_noise(
    rows: list[dict], settings: dict, variations: UInt8[np.ndarray, "row column height width channel"]
) -> Figure:
    """Plot the share of generated images that the judge labels differently, above variations of test images.

    Each row of `variations` is a test image followed by the VAE's variation of it at each scale in SWEEP.
    """
    shown, columns = variations.shape[:2]
    heights = [3, 0.9 * shown]
    figure = Figure(figsize=(10, 1 + sum(heights)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    for share in SHARES:
        label = f"{100 * share:g} % of the latents"
        above.plot(SWEEP, relabelled(rows, share), "o-", label=label)
    above.set(
        title=f"Generated images that the judge labels differently: {settings['data']}",
        xlabel="standard deviation of the noise (prior: 1)",
        ylabel="% of images",
    )
    above.grid(alpha=0.3)
    above.legend()
    tiles = variations.reshape(-1, *variations.shape[2:]) / np.float32(255)
    show_image(below, mosaic(tiles, columns, margin=1, fill=1.0))
    width = variations.shape[3] + 2
    names = ["original", *(f"{scale:g}" for scale in SWEEP)]
    below.set_xticks(width * (np.arange(columns) + 0.5), names)
    below.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    share, _ = chosen_noise(rows)
    below.set_title(f"Test images, and variations with noise in {100 * share:g} % of the latents")
    return figure
