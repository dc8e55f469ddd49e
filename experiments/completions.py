"""The rest of an image from one, two or three of its quadrants: a conditional VAE compared with a plain regression.

    python -m experiments.completions --workdir=runs/completions [--data=mnist] [--epochs=20]

Widths and data are those of Pyro's tutorial "Conditional Variational Auto-encoder": dense layers of 500 units, 200
latents, grey pixels. The regression is the same decoder without latents. Checkpoints are chosen by 5,000 validation
images. The summary gives -log p(hidden pixels | visible ones) on all test images, by importance samples of z, and one
picture shows completions by the available models. Each finished model is one line of results.jsonl, so the same command
resumes an interrupted experiment.
"""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

import vae_jax
from experiments import launch
from experiments.study import compute_once, open_study, settings_of
from vae_jax import data, figures
from vae_jax.batch import Dataset, first_of_each_label
from vae_jax.evaluation.statistics import standard_error
from vae_jax.full_evaluation.likelihood import weigh
from vae_jax.full_evaluation.subject import Subject
from vae_jax.run.files import local_path, save_figure
from vae_jax.run.report import markdown_table

QUADRANTS = (1, 2, 3)
MODELS = {"regression": {"model.latent_dim": 0}, "conditional VAE": {}}
PUBLISHED = {"regression": (100.4, 61.9, 25.4), "conditional VAE": (71.8, 51.0, 24.2)}  # Pyro's tutorial, in nats
COMPLETIONS = 3  # shown per image


def run_of(workdir: Path, count: int, model: str) -> Path:
    """The run directory of a model."""
    return workdir / f"quadrant{count}-{model.replace(' ', '-').lower()}"


def evaluate(run: Path, dataset: Dataset, samples: int, images: int) -> dict[str, float]:
    """Estimate -log p(hidden | visible) in nats and its standard error over the test images.

    The regression needs one sample.
    """
    vae = vae_jax.load(str(run))
    samples = samples if vae.model.latent_dim else 1
    subject = Subject(vae, dataset, "test")
    nll = weigh(subject, samples, images, run / f"likelihood-samples{samples}-count{images}.jsonl")["nll"]
    return {"nll": float(nll.mean()), "standard_error": float(standard_error(nll))}


def table(rows: list[dict], data_name: str) -> list[list[str]]:
    """One row per model and one column per number of visible quadrants; on MNIST, Pyro's numbers below."""
    cells = [["-log p(hidden pixels), nats", *(f"{count} visible" for count in QUADRANTS)]]
    for model in MODELS:
        found = {
            row["quadrants"]: f"{row['nll']:.1f} ± {row['standard_error']:.1f}" for row in rows if row["model"] == model
        }
        cells.append([model, *(found.get(count, "") for count in QUADRANTS)])
    if data_name == "mnist":
        cells += [[f"*{model}, Pyro*", *map(str, values)] for model, values in PUBLISHED.items()]
    return cells


def draw(workdir: Path, quadrants: list[int], dataset: Dataset, title: str) -> Figure:
    """For each of these numbers of quadrants, draw the visible part, the regression's completion and three of the
    VAE's.

    The truth comes last.
    """
    test = dataset.splits["test"]
    shown = first_of_each_label(test.label)
    image = test.image[shown] / np.float32(255)
    rows, names = [], []
    for count in quadrants:
        regression, vae = (vae_jax.load(str(run_of(workdir, count, model))) for model in MODELS)
        visible = np.asarray(vae.model.condition(jnp.asarray(image), None))
        drawn = [vae.sample(len(image), seed, image=image) for seed in range(COMPLETIONS)]
        rows += [visible, regression.sample(len(image), image=image), *drawn]
        names += [f"visible: {count}", "regression", *["conditional VAE"] * COMPLETIONS]
    return figures.image_rows(np.stack([*rows, image]), [*names, "truth"], list(map(str, test.label[shown])), title)


def main() -> None:
    given = flags.FLAGS
    dataset = data.load(name=given.data, manual_dir=given.manual_dir)
    images, size = min(given.count, len(dataset.splits["test"].label)), len(dataset.splits["train"].label)
    if given.validation >= size:
        raise ValueError(f"--validation is {given.validation}, but there are only {size} training images: give fewer")
    settings = settings_of(given.data, dataset) | {"epochs": given.epochs, "validation": given.validation}
    settings |= {"importance_samples": given.importance_samples, "count": images}
    study = open_study(local_path(given.workdir), settings)
    fields = {"epochs": given.epochs, "data.name": given.data, "data.validation": given.validation}

    def train_and_evaluate(quadrants, model):
        run, config = run_of(study.path, quadrants, model), f"configs/conditional.py:quadrant{quadrants}"
        launch.train(config, run, fields | MODELS[model], given.manual_dir)
        return evaluate(run, dataset, given.importance_samples, images)

    for quadrants, model in itertools.product(QUADRANTS, MODELS):
        compute_once(study, "model", train_and_evaluate, quadrants=quadrants, model=model)
    title = f"Images completed from their visible quadrants: {given.data}, {given.epochs} epochs"
    note = f"Grey cross-entropy of {images:,} test images, {given.importance_samples} samples of z each, with standard error."
    if given.data == "mnist":
        note += " Pyro's numbers of the conditional VAE are bounds."
    page = [markdown_table(table(study.rows, given.data)), note]
    if here := [count for count in QUADRANTS if all(run_of(study.path, count, model).exists() for model in MODELS)]:
        save_figure(draw(study.path, here, dataset, title), study.path / "completions.png")
        page.append("![Completions](completions.png)")
    launch.write_summary(study.path, title, *page)


if __name__ == "__main__":
    launch.define_data_flags("runs/completions")
    flags.DEFINE_integer("epochs", 20, "Epochs of each model.", lower_bound=1)
    flags.DEFINE_integer("validation", 5000, "Training images held out to choose the checkpoint.", lower_bound=0)
    flags.DEFINE_integer("importance_samples", 100, "Draws of z for each image's likelihood.", lower_bound=1)
    flags.DEFINE_integer("count", 10_000, "Test images.", lower_bound=2)
    launch.start("completions", main)
