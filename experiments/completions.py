"""The rest of an image from one, two or three of its quadrants: a conditional VAE compared with a plain regression.

    python -m experiments.completions --workdir=runs/completions [--data=mnist] [--epochs=20]

Networks and data are those of Pyro's tutorial "Conditional Variational Auto-encoder": dense layers of 500 units, 200 latents, grey
pixels. The regression is the same decoder without latents. Checkpoints are chosen by 5,000 validation images. The summary gives
-log p(hidden pixels | visible ones) on all test images, by importance samples of z, and one picture shows completions. The same
command resumes an interrupted experiment.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

import vae_jax
from experiments import launch
from vae_jax import data, figures
from vae_jax.batch import Dataset, first_of_each_label
from vae_jax.evaluation.statistics import standard_error
from vae_jax.full_evaluation.likelihood import weigh
from vae_jax.full_evaluation.subject import Subject
from vae_jax.pretrained import Pretrained
from vae_jax.run.devices import Devices
from vae_jax.run.files import json_line, local_path, save_figure, write_atomically
from vae_jax.run.report import markdown_table

QUADRANTS = (1, 2, 3)
MODELS = {"regression": {"model.latent_dim": 0}, "conditional VAE": {}}
PUBLISHED = {"regression": (100.4, 61.9, 25.4), "conditional VAE": (71.8, 51.0, 24.2)}  # Pyro's tutorial, in nats
COMPLETIONS = 3  # shown per image


def commands(workdir: Path, fields: dict, manual_dir: str) -> dict[tuple[int, str], list[str]]:
    """{(visible quadrants, model): command}."""
    return {
        (count, model): launch.make_command(
            f"configs/conditional.py:quadrant{count}", run_of(workdir, count, model), fields | own, manual_dir
        )
        for count, (model, own) in itertools.product(QUADRANTS, MODELS.items())
    }


def run_of(workdir: Path, count: int, model: str) -> Path:
    """The run directory of a model."""
    return workdir / f"quadrant{count}-{model.replace(' ', '-').lower()}"


def evaluate(workdir: Path, count: int, model: str, dataset: Dataset, samples: int, images: int) -> dict:
    """Estimate -log p(hidden | visible) in nats and its standard error over the test images.

    The regression needs one sample.
    """
    run = run_of(workdir, count, model)
    vae, test = vae_jax.load(str(run)), dataset.splits["test"]
    samples = samples if vae.model.latent_dim else 1
    subject = Subject(vae, dataset, "test", test, test, Devices())
    nll = weigh(subject, samples, images, run / f"likelihood-samples{samples}-count{images}.jsonl")["nll"]
    return {"quadrants": count, "model": model, "nll": float(nll.mean()), "standard_error": float(standard_error(nll))}


def table(rows: list[dict]) -> list[list[str]]:
    """One row per model and one column per number of visible quadrants; Pyro's numbers below."""
    cells = [["-log p(hidden pixels), nats", *(f"{count} visible" for count in QUADRANTS)]]
    for model in MODELS:
        found = [row for row in rows if row["model"] == model]
        cells.append([model, *(f"{row['nll']:.1f} ± {row['standard_error']:.1f}" for row in found)])
    cells += [[f"*{model}, Pyro*", *map(str, values)] for model, values in PUBLISHED.items()]
    return cells


def complete(vae: Pretrained, image: np.ndarray, count: int) -> np.ndarray:
    """Complete each image by `count` draws z ~ p(z | visible); returns [count, images, height, width, channel]."""
    net = vae.model.given(vae.model.condition(jnp.asarray(image), None))

    def one(key):
        z = net.prior.sample(vae.variables, key, len(image))
        return net.likelihood.mean(vae.variables, net.decode_raw(vae.variables, z))

    return np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(0), count)))


def draw(workdir: Path, dataset: Dataset, title: str) -> Figure:
    """For each number of quadrants, draw the visible part, the regression's completion and three of the VAE's.

    The truth comes last.
    """
    test = dataset.splits["test"]
    shown = first_of_each_label(test.label)
    image = test.image[shown] / np.float32(255)
    rows, names = [], []
    for count in QUADRANTS:
        regression, vae = (vae_jax.load(str(run_of(workdir, count, model))) for model in MODELS)
        visible = np.asarray(vae.model.condition(jnp.asarray(image), None))
        rows += [visible, *complete(regression, image, 1), *complete(vae, image, COMPLETIONS)]
        names += ["visible", "regression", *["conditional VAE"] * COMPLETIONS]
    return figures.image_rows(np.stack([*rows, image]), [*names, "truth"], list(map(str, test.label[shown])), title)


def main() -> None:
    given = flags.FLAGS
    workdir = local_path(given.workdir)
    fields = {
        "epochs": given.epochs,
        "data.name": given.data,
        "data.validation": given.validation,
        "run.likelihood_samples": 0,
    }
    dataset = data.load(name=given.data, manual_dir=given.manual_dir)
    images = min(given.count, len(dataset.splits["test"].label))
    for command in commands(workdir, fields, given.manual_dir).values():
        launch.run(command)
    rows = [
        evaluate(workdir, count, model, dataset, given.importance_samples, images)
        for count, model in itertools.product(QUADRANTS, MODELS)
    ]
    write_atomically(workdir / "rows.jsonl", "".join(map(json_line, rows)))
    title = f"Images completed from their visible quadrants: {given.data}, {given.epochs} epochs"
    save_figure(draw(workdir, dataset, title), workdir / "completions.png")
    note = (
        f"Grey cross-entropy of {images:,} test images, {given.importance_samples} samples of z each, with standard error. "
        "Pyro's numbers of the conditional VAE are bounds."
    )
    launch.write_summary(workdir, title, markdown_table(table(rows)), note, "![Completions](completions.png)")


if __name__ == "__main__":
    launch.define_data_flags("runs/completions")
    flags.DEFINE_integer("epochs", 20, "Epochs of each model.", lower_bound=1)
    flags.DEFINE_integer("validation", 5000, "Training images held out to choose the checkpoint.", lower_bound=1)
    flags.DEFINE_integer("importance_samples", 100, "Draws of z for each image's likelihood.", lower_bound=1)
    flags.DEFINE_integer("count", 10_000, "Test images.", lower_bound=1)
    launch.start("completions", main)
