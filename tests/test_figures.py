"""Figures say what they show, for labelled and unlabelled, grey and colour images."""

import numpy as np
import pytest
from PIL import Image

from vae_jax import figures
from vae_jax.run.files import save_film

HISTORY = [
    {
        "step": 1,
        "epoch": 0.5,
        "train/loss": 9.0,
        "train/reconstruction": 8.0,
        "train/kl": 1.0,
    },
    {
        "step": 2,
        "epoch": 1.0,
        "train/loss": 7.0,
        "train/reconstruction": 5.0,
        "train/kl": 2.0,
    },
    {
        "step": 2,
        "epoch": 1.0,
        "test/loss": 6.0,
        "test/reconstruction": 4.0,
        "test/kl": 2.0,
    },
]


PANELS = {"loss": "loss = reconstruction + KL", "reconstruction": "reconstruction", "kl": "KL from the prior"}


def test_a_film_shows_the_rows_side_by_side_and_goes_there_and_back():
    image = np.linspace(0, 1, 3 * 4)[:, None].repeat(2 * 2, axis=1).reshape(3, 4, 2, 2, 1)
    frames = figures.film(image)
    assert len(frames) == 6
    for frame, i in zip(frames, [0, 1, 2, 3, 2, 1]):
        expected = np.round(255 * figures.mosaic(image[:, i], 2, margin=1, fill=0.5))
        np.testing.assert_array_equal(frame[::48, ::48], expected)
    assert figures.film(np.zeros((1, 1, 200, 100, 1)))[0].shape == (202, 102, 1)
    wide, within = figures.film(image * 1.2 - 0.1)[3], figures.film((image * 1.2 - 0.1).clip(0, 1))[3]
    np.testing.assert_array_equal(wide, within)  # means outside [0, 1] do not wrap around


def test_a_film_is_saved_frame_by_frame_and_loops(tmp_path):
    frames = [np.full((20, 30, 3), value, np.uint8) for value in (0, 120, 255)]
    save_film(frames, tmp_path / "film.webp", milliseconds=70)
    with Image.open(tmp_path / "film.webp") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0 and film.size == (30, 20)
        for i, frame in enumerate(frames):
            film.seek(i)
            film.load()
            assert film.info["duration"] == 70
            np.testing.assert_allclose(np.asarray(film.convert("RGB")), frame, atol=3)


def test_training_curve_shows_the_rows_and_the_baselines(tmp_path):
    figure = figures.training_curve(HISTORY, {"collapsed model": 8.0}, "Training progress", PANELS)
    loss, reconstruction, kl = figure.axes
    train, test, baseline = loss.lines
    np.testing.assert_array_equal(train.get_xydata(), [[0.5, 9], [1, 7]])
    np.testing.assert_array_equal(test.get_xydata(), [[1, 6]])
    assert set(baseline.get_ydata()) == {8.0} and baseline.get_linestyle() == "--"
    assert [text.get_text() for text in loss.texts] == ["collapsed model: 8.00"]
    assert [ax.get_title() for ax in figure.axes] == list(PANELS.values())
    assert all(ax.get_xlabel() == "epoch" for ax in figure.axes)
    for ax, name in [(reconstruction, "reconstruction"), (kl, "kl")]:
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), [row[f"train/{name}"] for row in HISTORY[:2]])
        np.testing.assert_array_equal(ax.lines[1].get_ydata(), [HISTORY[2][f"test/{name}"]])
    assert loss.get_ylim()[0] < 6 and loss.get_ylim()[1] > 9
    figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstructions_stand_under_their_inputs(channels):
    image = np.random.default_rng(0).random((3, 4, 5, channels))
    figure = figures.reconstructions(image, image / 2, np.array([4, 7, -1]), "Reconstructions")
    axes = figure.axes
    assert [ax.get_title() for ax in axes[:3]] == ["4", "7", ""]
    for column in range(3):
        above, below = (axes[row * 3 + column].images[0].get_array() for row in range(2))
        np.testing.assert_allclose(above / 2, below)


def test_more_than_ten_reconstructions_take_more_rows():
    image = np.random.default_rng(0).random((12, 4, 5, 1))
    figure = figures.reconstructions(image, image / 2, np.arange(12), "Reconstructions")
    axes = np.reshape(figure.axes, (4, 10))
    assert [ax.get_title() for ax in axes[2, :3]] == ["10", "11", ""]
    above, below = (axes[row, 1].images[0].get_array() for row in (2, 3))
    np.testing.assert_allclose(above, image[11, ..., 0])
    np.testing.assert_allclose(above / 2, below)
    assert not axes[3, 2].images


def test_image_rows_are_labelled():
    image = np.random.default_rng(0).random((2, 3, 4, 5, 1))
    figure = figures.image_rows(image, ["z1", "z0"], ["-1", "0", "1"], "Latents")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["z1", "z0"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["-1", "0", "1"]
    np.testing.assert_allclose(ax.get_yticks(), [2.5, 8.5])  # the middle of rows of 4 pixels and a margin
    np.testing.assert_array_equal(ax.images[0].get_array()[7:11, 15:20], image[1, 2, ..., 0])
    assert not ax.lines


def test_marks_stand_below_their_row_at_their_column():
    """Images of 4x5 pixels with a margin of one: columns begin at 0, 7 and 14, and column 1.5 is between the last two."""
    image = np.zeros((2, 3, 4, 5, 1))
    (ax,) = figures.image_rows(image, ["", ""], ["", "", ""], "", np.array([0, 1.5])).axes
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [3, 13.5])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [4.5, 10.5])


@pytest.mark.parametrize("count,shape", [(1, (6, 7)), (5, (12, 21)), (9, (18, 21))])
def test_image_grid_holds_every_image(count, shape):
    image = np.arange(count).reshape(-1, 1, 1, 1) / 10 * np.ones((1, 4, 5, 3))
    grid = figures.image_grid(image, "Samples").axes[0].images[0].get_array()
    assert grid.shape == (*shape, 3)
    assert {round(float(value), 3) for value in np.unique(grid)} == {
        *np.arange(count) / 10,
        0.5,
    }


def test_training_curve_of_other_metrics():
    history = [
        {"epoch": 1, "train/loss": 0.5, "train/accuracy": 0.8},
        {"epoch": 1, "test/loss": 0.4, "test/accuracy": 0.9},
    ]
    panels = {"loss": "negative log-likelihood", "accuracy": "accuracy"}
    figure = figures.training_curve(history, {}, "Training", panels, loss_scale="log")
    loss, accuracy = figure.axes
    assert (loss.get_title(), accuracy.get_title()) == tuple(panels.values())
    assert loss.get_yscale() == "log" and accuracy.get_yscale() == "linear"
    np.testing.assert_array_equal(accuracy.lines[1].get_xydata(), [[1, 0.9]])


def test_training_curve_of_a_metric_without_rows(tmp_path):
    """A metric of total weight 0 has no rows, and no panel."""
    figure = figures.training_curve(HISTORY, {}, "Training", {"loss": "loss", "accuracy": "accuracy"})
    (loss,) = figure.axes
    assert [len(line.get_xdata()) for line in loss.lines] == [2, 1]
    figure.savefig(tmp_path / "figure.png")


def test_confusion_colours_the_errors_only(tmp_path):
    counts = np.array([[90, 3, 0], [0, 80, 7], [1, 0, 70]])
    figure = figures.confusion(counts, "Confusion")
    ax = figure.axes[0]
    shown = ax.images[0].get_array()
    assert shown.mask.tolist() == np.eye(3, dtype=bool).tolist()
    assert shown.max() == 7 and ax.images[0].get_clim() == (0, 7)
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts[2, 1] == "7" and texts[1, 1] == "80" and (2, 0) not in texts
    assert "11 errors in 251 images" in figure.get_suptitle()
    figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("classes", [3, 40])
def test_confusion_without_errors_and_of_many_classes(tmp_path, classes):
    figure = figures.confusion(np.eye(classes, dtype=int), "Confusion")
    assert len(figure.axes[0].texts) == (3 if classes == 3 else 0)
    figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("count", [0, 2, 7])
def test_mistakes_stand_under_what_they_were_taken_for(tmp_path, count):
    image = np.random.default_rng(0).random((count, 4, 5, 1))
    label, confidence = np.arange(count), np.linspace(0.9, 0.5, count)
    figure = figures.mistakes(image, label, label + 1, confidence, "Mistakes")
    shown = [ax for ax in figure.axes if ax.images]
    assert len(shown) == count
    for ax, pixels in zip(shown, image):
        np.testing.assert_array_equal(ax.images[0].get_array(), pixels[..., 0])
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles[0] == ("0 taken for 1\n90.0 %" if count else "none")
    figure.savefig(tmp_path / "figure.png")
