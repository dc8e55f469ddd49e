"""What fails, side by side: the post's Figure 6.

    python -m experiments.ablations --workdir=runs/ablations [--data=mnist] [--epochs=10]

Trains the reference, pooling instead of strided convolutions, and latents shorter than 20, all for the same epochs; draws
their samples and reconstructions; and splits their losses. Each is a run directory, and the same command continues.
"""

from pathlib import Path

import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure

import vae_jax
from configs import vae as vae_config
from experiments import launch
from experiments.report import markdown_table
from vae_jax import batch, data
from vae_jax.evaluation.latents import active_units
from vae_jax.figures import mosaic, show_image
from vae_jax.run import files
from vae_jax.run.files import save_figure, write_whole

VARIANTS = {  # of configs/vae.py
    "default": "the post's model",
    "pooling": "pooling",
    "latent10": "10 latents",
    "latent5": "5 latents",
    "latent2": "2 latents",
}
SIDE = 6  # samples in a row and in a column


def commands(workdir: Path, base: str, fields: dict, manual_dir: str) -> dict:
    """{variant: command}: the config `base` with `fields` and those of each variant."""
    return {
        name: launch.make_command(
            base,
            str(workdir / name),
            fields | vae_config.VARIANTS[name],
            manual_dir,
        )
        for name in VARIANTS
    }


def table(workdir: Path, test: batch.Split) -> list[list[str]]:
    """Test loss and its parts after the last epoch, and how many latents are in use."""
    cells = [["model", "loss", "reconstruction", "KL", "active latents"]]
    for name, title in VARIANTS.items():
        last = launch.last_test(workdir / name)
        vae = vae_jax.load(str(workdir / name))
        active = active_units(vae.encode(test.image)[0])
        metrics = [
            f"{last[f'test/{part}']:.2f}" for part in ("loss", "reconstruction", "kl")
        ]
        cells.append([title, *metrics, f"{active} of {vae.model.latent_dim}"])
    return cells


def draw(workdir: Path, test: batch.Split, title: str) -> Figure:
    """Samples of every model, and ten test images each followed by its reconstruction."""
    shown = batch.first_of_each_label(test.label)
    image = test.image[shown] / np.float32(255)
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    above, below = figure.subplots(2, len(VARIANTS))
    for i, (name, what) in enumerate(VARIANTS.items()):
        vae = vae_jax.load(str(workdir / name))
        pairs = np.stack([image, vae.reconstruct(image)], axis=1)
        show_image(above[i], mosaic(vae.sample(SIDE**2), SIDE))
        show_image(below[i], mosaic(pairs.reshape(-1, *image.shape[1:]), 4))
        above[i].set_title(what, fontsize=14)
    above[0].set_ylabel("samples from the prior", fontsize=12)
    below[0].set_ylabel("test images, each before\nits reconstruction", fontsize=12)
    figure.suptitle(title, fontsize=15)
    return figure


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    workdir = files.local_path(flags.FLAGS.workdir)
    name, epochs = flags.FLAGS.data, flags.FLAGS.epochs
    manual_dir = flags.FLAGS.manual_dir
    base = launch.config_for("vae", name)
    fields = {"epochs": epochs, "data.name": name}
    variants = commands(workdir, base, fields, manual_dir)
    title = f"What fails: {name}, {epochs} epochs each"
    with launch.in_one_line("ablations"):
        test = data.load(name=name, manual_dir=manual_dir).splits["test"]
        for command in variants.values():
            launch.run(command)
        cells = table(workdir, test)
        save_figure(draw(workdir, test, title), workdir / "ablations.png")
        write_whole(
            workdir / "summary.md",
            f"# {title}\n\n{markdown_table(cells)}\n\n![Samples and reconstructions](ablations.png)\n",
        )
    print((workdir / "summary.md").read_text("utf-8"))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/ablations", "Where the runs go.")
    flags.DEFINE_string("data", "mnist", "As --config.data.name of vae_jax.main.")
    flags.DEFINE_string("manual_dir", "", "As --config.data.manual_dir.")
    flags.DEFINE_integer("epochs", 10, "Of every model.", lower_bound=1)
    app.run(main)
