"""Make Matplotlib figures from arrays. Nothing here shows or saves a figure, and importing it does not import
Matplotlib.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, UInt8

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, TEST, BASELINE, UNLABELLED = "#8fb3d9", "#1b4f8a", "#a04000", "#c8c8c8"
SMALL = 96  # pixels: a film enlarges smaller images by a whole factor
LEGEND = 0.25  # free space above the curves, as a share of their height
LARGEST_COUNTED = 25  # classes; with more, the counts would be too small to read


def new_figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure with a title, and its size in inches.

    The title may contain the name of a user's file: $ is escaped, since it would start a formula, and so is what is not
    UTF-8.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title.replace("$", r"\$").encode(errors="backslashreplace").decode(), wrap=True)
    return figure


def whole_numbers(**options):
    """A locator of axis ticks at integers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, **options)


def training_curve(
    history: Sequence[dict],
    baselines: Mapping[str, float],
    title: str,
    panels: Mapping[str, str],
    loss_scale: str = "linear",
) -> "Figure":
    """Training and test loss over the epochs, next to other metrics such as the loss terms (the post's Figure 3).

    Args:
        history: rows as in metrics.jsonl: `epoch`, and `train/loss`, `test/loss`, ... where known.
        baselines: {name: loss}, drawn as labelled dashed lines.
        panels: {metric: title of its panel}, "loss" first; metrics without rows have no panel.
        loss_scale: "linear" or "log".
    """
    figure = new_figure(12.0, 4.5, title)
    known = {name.partition("/")[2] for row in history for name in row}
    others = [name for name in panels if name != "loss" and name in known]
    columns: list[Any] = [*["loss"] * max(1, len(others)), *others]
    axes = figure.subplot_mosaic([columns])
    axes["loss"].set_yscale(loss_scale)
    for name, ax in axes.items():
        train, test = (_curve(history, f"{part}/{name}") for part in ("train", "test"))
        _draw_curves(ax, train, test)
        ax.set_title(panels[name])
        if ax.get_yscale() != "log":
            # The losses of the first steps are much larger than the rest: scale the axis to the later steps.
            shown = [*test[:, 1], *train[len(train) // 20 :, 1]]
            _limit(ax, shown + [*baselines.values()] if name == "loss" else shown, LEGEND if name == "loss" else 0.06)
    _draw_baselines(axes["loss"], baselines)
    axes["loss"].set_ylabel("nats per image")
    axes["loss"].legend(frameon=False, loc="upper right")
    return figure


def _curve(history, metric) -> np.ndarray:
    """Epochs and values of the rows with this metric, [rows, 2]."""
    rows = [[row["epoch"], row[metric]] for row in history if metric in row]
    return np.array(rows).reshape(-1, 2)


def _draw_curves(ax, train, test):
    ax.plot(*train.T, color=TRAIN, label="training, during the epoch")
    marker = "o" if len(test) < 20 else None
    ax.plot(*test.T, color=TEST, label="test", marker=marker)
    ax.set_xlabel("epoch")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(whole_numbers(steps=[1, 2, 5, 10]))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _limit(ax, values, above):
    low, high = min(values, default=0.0), max(values, default=1.0)
    spread = high - low + 1e-3
    ax.set_ylim(low - 0.06 * spread, high + above * spread)


def _draw_baselines(ax, baselines):
    for name, value in baselines.items():
        ax.axhline(value, color=BASELINE, linestyle="--", linewidth=1)
        ax.annotate(
            f"{name}: {value:.2f}",
            xy=(1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=BASELINE,
            fontsize=9,
        )


def reconstructions(
    image: Float[np.ndarray, "n height width channel"],
    reconstruction: Float[np.ndarray, "n height width channel"],
    label: Int[np.ndarray, " n"],
    title: str,
) -> "Figure":
    """Each image above its reconstruction (the post's Figure 4), ten in a row."""
    columns = min(10, len(image))
    rows = -(-len(image) // columns)
    figure = new_figure(1.1 * columns + 0.9, 2.4 * rows + 0.5, title)
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i in range(len(image)):
        row, column = divmod(i, columns)
        above, below = axes[2 * row : 2 * row + 2, column]
        show_image(above, image[i])
        show_image(below, reconstruction[i])
        if label[i] >= 0:
            above.set_title(str(label[i]))
        if column == 0:
            above.set_ylabel("input")
            below.set_ylabel("reconstruction")
    return figure


def image_rows(
    image: Float[np.ndarray, "row column height width channel"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    marks: Float[np.ndarray, " row"] | None = None,
) -> "Figure":
    """Images in labelled rows and columns. `marks` gives a column number per row, marked by a triangle below the image."""
    rows, columns, height, width, channels = image.shape
    figure = new_figure(0.75 * columns + 2.2, 0.75 * rows + 1, title)
    ax = figure.subplots()
    show_image(ax, mosaic(image.reshape(-1, height, width, channels), columns, margin=1, fill=1.0))
    ax.set_xticks((np.arange(columns) + 0.5) * (width + 2) - 0.5, column_labels, fontsize=10)
    ax.set_yticks((np.arange(rows) + 0.5) * (height + 2) - 0.5, row_labels)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    if marks is not None:
        below = (np.arange(rows) + 1) * (height + 2) - 1.5
        along = (marks + 0.5) * (width + 2) - 0.5
        ax.plot(along, below, "^", color=BASELINE, markersize=7, clip_on=False, scalex=False, scaley=False)
    return figure


def mosaic(
    image: Float[np.ndarray, "n height width channel"],
    columns: int,
    margin: int = 0,
    fill: float = 0.0,
) -> Float[np.ndarray, "rows_height columns_width channel"]:
    """Tile images into one image. `fill` is the pixel value of the margins and of missing tiles in the last row."""
    rows = -(-len(image) // columns)
    around = (margin, margin)
    pad = ((0, rows * columns - len(image)), around, around, (0, 0))
    tiles = np.pad(image, pad, constant_values=fill)
    height, width, channels = tiles.shape[1:]
    grid = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def as_bytes(image: Float[np.ndarray, "*any"]) -> UInt8[np.ndarray, "*any"]:
    """Pixels in [0, 1] as bytes. Those outside are clipped, since the mean of p(x | z) may leave [0, 1]."""
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)


def film(
    image: Float[np.ndarray, "row frame height width channel"],
) -> list[UInt8[np.ndarray, "frame_height frame_width channel"]]:
    """Frames of a film that shows all rows at once, tiled in a square, from the first frame to the last and back."""
    columns = int(np.ceil(np.sqrt(len(image))))
    there_and_back = [*range(image.shape[1]), *range(image.shape[1] - 2, 0, -1)]
    frames = [as_bytes(mosaic(image[:, i], columns, margin=1, fill=0.5)) for i in there_and_back]
    enlarged = max(1, SMALL // max(image.shape[2:4]))
    return [frame.repeat(enlarged, axis=0).repeat(enlarged, axis=1) for frame in frames]


def image_grid(image: Float[np.ndarray, "n height width channel"], title: str) -> "Figure":
    """Images tiled in a square (the post's Figure 5)."""
    columns = int(np.ceil(np.sqrt(len(image))))
    rows = -(-len(image) // columns)
    figure = new_figure(7.0, 7 * rows / columns + 0.5, title)
    show_image(figure.subplots(), mosaic(image, columns, margin=1, fill=0.5))
    return figure


def confusion(counts: Int[np.ndarray, "label prediction"], title: str) -> "Figure":
    """The confusion matrix, labels in rows and predictions in columns. Only errors are coloured, so the hits do not
    hide them.
    """
    classes = len(counts)
    errors = counts - np.diag(counts.diagonal())
    figure = new_figure(8.2, 7.4, f"{title}\n{errors.sum():,} errors in {counts.sum():,} images")
    ax = figure.subplots()
    shown = np.ma.masked_array(errors, np.eye(classes, dtype=bool))
    image = ax.imshow(shown, cmap="Oranges", vmin=0, vmax=max(errors.max(), 1))
    ax.set_facecolor("#e8eef5")
    if classes <= LARGEST_COUNTED:
        size = np.interp(classes, (10, LARGEST_COUNTED), (12, 6))
        for row, column in np.argwhere(counts > 0):
            count = counts[row, column]
            strong = row != column and count > 0.6 * errors.max()
            color = "white" if strong else "black"
            ax.text(column, row, str(count), color=color, ha="center", va="center", fontsize=size)
        ax.set(xticks=range(classes), yticks=range(classes))
    ax.set(xlabel="predicted", ylabel="label")
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, shrink=0.6, label="errors")
    bar.ax.yaxis.set_major_locator(whole_numbers())
    bar.outline.set_visible(False)
    return figure


def mistakes(
    image: Float[np.ndarray, "n height width channel"],
    label: Int[np.ndarray, " n"],
    prediction: Int[np.ndarray, " n"],
    confidence: Float[np.ndarray, " n"],
    title: str,
) -> "Figure":
    """Misclassified images in the given order, each titled with its label, prediction and the prediction's probability."""
    columns = 6
    rows = max(-(-len(image) // columns), 1)
    figure = new_figure(1.75 * columns, 2.15 * rows + 0.6, title)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for i, ax in enumerate(axes[: len(image)]):
        show_image(ax, image[i])
        ax.set_title(
            f"{label[i]} taken for {prediction[i]}\n{100 * confidence[i]:.1f} %",
            fontsize=11,
        )
    if not len(image):
        axes[columns // 2].set_title("none")
    return figure


def codes(plane: Float[np.ndarray, "n 2"], label: Int[np.ndarray, " n"], axes: tuple[str, str], title: str) -> "Figure":
    """Codes in a plane, coloured by label."""
    figure = new_figure(7.5, 6.5, title)
    draw_plane(figure.subplots(), plane, label, axes)
    return figure


def draw_plane(ax, plane: Float[np.ndarray, "n 2"], label: Int[np.ndarray, " n"], axes: tuple[str, str]) -> None:
    """Points coloured by label, with a legend for at most ten labels; one colour for those without a label."""
    known = label >= 0
    if not known.all():
        ax.scatter(*plane[~known].T, color=UNLABELLED if known.any() else TEST, s=3)
    if known.any():
        few = label.max() < 10
        colours = {"cmap": "tab10", "vmin": 0, "vmax": 9} if few else {"cmap": "viridis"}
        points = ax.scatter(*plane[known].T, c=label[known], s=3, **colours)
        if few and label.max() > 0:
            ax.legend(*points.legend_elements(), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel=axes[0], ylabel=axes[1])


def show_image(ax, image: Float[np.ndarray, "height width channel"]) -> None:
    """Draw one image in [0, 1] without ticks or frame."""
    ax.imshow(
        image.squeeze(-1) if image.shape[-1] == 1 else image,
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
