"""The table of Burda et al. 2016: one layer, dynamically binarized MNIST, trained with 1, 5 and 50 samples.

    python -m experiments.iwae --workdir=runs/iwae [--samples=1,5,50] [--epochs=60] [--seeds=0,1,2]

Network, data and evaluation are the paper's: 5,000 samples on all 10,000 test images. The training is shorter and
modern: batches of 128, shuffled, and a one-cycle schedule; the paper's own 3,280 epochs are configs/vae.py:iwae_paper.
Each finished model is one line of results.jsonl, so the same command resumes an interrupted experiment, its evaluation
included.
"""

from pathlib import Path

import numpy as np
from absl import flags

import vae_jax
from experiments import launch
from experiments.likelihoods import with_interval
from experiments.study import compute_once, open_study, settings_of
from vae_jax import data
from vae_jax.batch import Dataset
from vae_jax.evaluation.latents import active_units
from vae_jax.evaluation.statistics import mean_and_interval
from vae_jax.full_evaluation.likelihood import weigh
from vae_jax.full_evaluation.subject import Subject
from vae_jax.run.files import local_path
from vae_jax.run.report import markdown_table

RECIPE = {
    "model.network": "mlp",
    "model.latent_dim": 50,
    "model.likelihood": "bernoulli",
    "data.binarize": "dynamic",
    "batch_size": 128,
    "optimizer.learning_rate": 0.002,
    "optimizer.schedule": "onecycle",
    "optimizer.warmup": 0.1,
}
# -log p(x) of IWAE in nats after the paper's 3,280 epochs: the paper, and older READMEs of public code with 50 latents
PUBLISHED = {
    "the paper": {1: 86.76, 5: 85.54, 50: 84.78},
    "nbip, TensorFlow": {1: 87.75, 5: 85.50, 50: 84.65},
    "xqding, PyTorch": {1: 87.75, 5: 85.46, 50: 84.59},
}


def evaluate(run: Path, dataset: Dataset, samples: int, count: int) -> dict[str, float]:
    """The test numbers of a run: NLL, effective sample size and active units."""
    vae = vae_jax.load(str(run))
    subject = Subject(vae, dataset, "test")
    each = weigh(subject, samples, count, run / f"likelihood-samples{samples}-count{count}.jsonl")
    return {
        "nll": float(each["nll"].mean()),
        "effective_sample_size": float(np.median(each["effective_sample_size"])),
        "active_units": active_units(subject.encode()["mean"]),
    }


def table(rows: list[dict], data_name: str) -> list[list[str]]:
    """One row per k: means over the seeds, and the published results on MNIST."""
    published = PUBLISHED if data_name == "mnist" else {}
    cells = [["samples k", "-log p(x), nats", "active units", "effective sample size", *published]]
    for k in sorted({row["k"] for row in rows}):
        nll, *others = (
            [row[name] for row in rows if row["k"] == k] for name in ("nll", "active_units", "effective_sample_size")
        )
        mean, interval = mean_and_interval(nll) if len(nll) > 1 else (nll[0], None)
        known = [f"{values[k]:.2f}" if k in values else "" for values in published.values()]
        cells.append([str(k), with_interval(mean, interval), *(f"{np.mean(values):.1f}" for values in others), *known])
    return cells


def integers(name: str, least: int) -> list[int]:
    """The flag --`name`, a list of integers. Raises ValueError for anything else, and for one below `least`."""
    given = flags.FLAGS[name].value
    if not given or not all(text.isdecimal() and int(text) >= least for text in given):
        raise ValueError(f"--{name} is {','.join(given)!r}, but must be integers of at least {least}, such as 1,5")
    return [int(text) for text in given]


def main() -> None:
    given = flags.FLAGS
    samples, seeds = integers("samples", least=1), integers("seeds", least=0)
    dataset = data.load(name=given.data, manual_dir=given.manual_dir, binarize="dynamic")
    count = min(given.count, len(dataset.splits["test"].label))
    settings = settings_of(given.data, dataset) | {"epochs": given.epochs, "recipe": RECIPE}
    settings |= {"importance_samples": given.importance_samples, "count": count}
    study = open_study(local_path(given.workdir), settings)

    def train_and_evaluate(k, seed):
        run = study.path / f"k{k}-seed{seed}"
        fields = {"data.name": given.data, "objective.samples": k, "seed": seed, "epochs": given.epochs} | RECIPE
        launch.train("configs/vae.py", run, fields, given.manual_dir)
        return evaluate(run, dataset, given.importance_samples, count)

    for seed in seeds:
        for k in samples:
            compute_once(study, "model", train_and_evaluate, k=k, seed=seed)
    title = f"Importance-weighted autoencoders: {given.data}, {given.epochs} epochs"
    note = (
        f"{given.importance_samples} samples of z for each of {count} test images. Intervals are 95 %, over the seeds."
    )
    launch.write_summary(study.path, title, markdown_table(table(study.rows, given.data)), note)


if __name__ == "__main__":
    launch.define_data_flags("runs/iwae")
    flags.DEFINE_list("samples", "1,5,50", "Samples of the objective, one training each.")
    flags.DEFINE_integer("epochs", 60, "Epochs of each training.", lower_bound=1)
    flags.DEFINE_list("seeds", "0,1,2", "Seeds, one training each.")
    flags.DEFINE_integer("importance_samples", 5000, "Draws of z for each image's likelihood.", lower_bound=1)
    flags.DEFINE_integer("count", 10_000, "Test images.", lower_bound=1)
    launch.start("iwae", main)
