"""The post's Figure 6: pooling instead of strided convolutions, and fewer than 20 latents.

    python -m experiments.ablations --workdir=runs/ablations [--data=mnist] [--epochs=10]

Trains the reference and its variants for the same number of epochs, one run directory each, then draws their samples
and reconstructions and tabulates the parts of their losses. The same command resumes an interrupted experiment.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure

import vae_jax
from configs import vae as vae_config
from experiments import launch
from vae_jax import data
from vae_jax.batch import Split, first_of_each_label
from vae_jax.evaluation.latents import active_units
from vae_jax.figures import mosaic, show_image
from vae_jax.pretrained import Pretrained
from vae_jax.run.evaluate import as_seen
from vae_jax.run.files import local_path, save_figure
from vae_jax.run.report import markdown_table

VARIANTS = {  # variant of configs/vae.py -> title
    "default": "the post's model",
    "pooling": "pooling",
    "latent10": "10 latents",
    "latent5": "5 latents",
    "latent2": "2 latents",
}
SIDE = 6  # samples per row and column


class Variant(NamedTuple):
    title: str
    vae: Pretrained
    last: dict[str, float]  # its last evaluation


def commands(workdir: Path, base: str, fields: dict, manual_dir: str) -> dict[str, list[str]]:
    """{variant: command} for the config `base`, with `fields` overridden in all of them."""
    return {
        name: launch.train_command(base, workdir / name, fields | vae_config.VARIANTS[name], manual_dir)
        for name in VARIANTS
    }


def load(workdir: Path, titles: Mapping[str, str] = VARIANTS) -> list[Variant]:
    """The trained variants {folder: title}, the reference first. Raises ValueError if one is missing or unfinished."""
    return [
        Variant(title, vae_jax.load(str(workdir / name), "latest"), launch.last_test(workdir / name))
        for name, title in titles.items()
    ]


def table(variants: list[Variant], test: Split) -> list[list[str]]:
    """Test loss, its two parts, and the number of active latents of each variant."""
    cells = [["model", "loss", "reconstruction", "KL", "active latents"]]
    for title, vae, last in variants:
        active = active_units(vae.encode(test.image)[0])
        losses = [last[f"test/{name}"] for name in ("loss", "reconstruction", "kl")]
        shown = [f"{value:.2f}" for value in losses]
        cells.append([title, *shown, f"{active} of {vae.model.latent_dim}"])
    return cells


def draw(variants: list[Variant], test: Split, title: str) -> Figure:
    """Draw each variant's samples above test images as it sees them, each followed by its reconstruction."""
    figure = Figure(figsize=(max(9, 3 * len(variants)), 7.6), layout="constrained")  # wide enough for the title
    above, below = figure.subplots(2, len(variants), squeeze=False)
    for samples, below_it, (what, vae, _) in zip(above, below, variants):
        seen = as_seen(test, vae.config["data"]["binarize"], vae.config["seed"])
        image = seen.image[first_of_each_label(test.label)] / np.float32(255)
        show_image(samples, mosaic(vae.sample(SIDE**2), SIDE))
        samples.set_title(what, fontsize=14)
        if vae.config["objective"].get("method") == "gan":  # its encoder has learned nothing
            below_it.set_axis_off()
        else:
            both = np.stack([image, vae.reconstruct(image)], axis=1)
            show_image(below_it, mosaic(both.reshape(-1, *image.shape[1:]), 4))
    above[0].set_ylabel("samples from the prior", fontsize=12)
    below[0].set_ylabel("test images, each followed\nby its reconstruction", fontsize=12)
    figure.suptitle(title, fontsize=15)
    return figure


def main() -> None:
    given = flags.FLAGS
    workdir = local_path(given.workdir)
    test = data.load(name=given.data, manual_dir=given.manual_dir).splits["test"]
    base = launch.config_for("vae", given.data)
    fields = {"epochs": given.epochs, "data.name": given.data}
    for command in commands(workdir, base, fields, given.manual_dir).values():
        launch.run(command)
    title = f"Ablations: {given.data}, {given.epochs} epochs each"
    variants = load(workdir)
    save_figure(draw(variants, test, title), workdir / "ablations.png")
    cells = markdown_table(table(variants, test))
    image = "![Samples and reconstructions](ablations.png)"
    launch.write_summary(workdir, title, cells, image)


if __name__ == "__main__":
    launch.define_data_flags("runs/ablations")
    flags.DEFINE_integer("epochs", 10, "Epochs of each variant.", lower_bound=1)
    launch.start("ablations", main)
