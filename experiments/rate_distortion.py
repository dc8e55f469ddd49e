"""Rate and distortion: what a VAE pays in KL and gets in squared error as beta, or the latent size, changes.

    python -m experiments.rate_distortion --workdir=runs/rate-distortion [--data=mnist] [--epochs=5]

Trains the post's VAE for each beta and for each latent size, one run directory each, evaluates each with --full, and
draws the curve next to the closed-form curve of the best linear VAE. Each finished run is one line of results.jsonl, so
the same command resumes an interrupted experiment.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import launch
from experiments.study import compute_once, open_study, settings_of
from vae_jax import commands, data
from vae_jax.evaluation.baselines import covariance_eigenvalues, linear_rate_distortion
from vae_jax.run.directory import read_config
from vae_jax.run.files import local_path, save_figure
from vae_jax.run.report import markdown_table

COLUMNS = {  # of the table: metric -> heading
    "kl": "rate: KL, nats",
    "reconstruction": "distortion: half the squared error",
    "bound": "-ELBO, without its constant",
    "nll": "-log p(x), with its constant",
    "mutual_information": "I(n; z)",
    "aggregate_kl": "KL(q(z) to p(z))",
    "active_units": "active units",
    "frechet_distance": "Frechet classifier distance",
}


def runs(betas: list[str], latents: list[str]) -> dict[str, dict[str, str]]:
    """{folder: changed fields}: the sweep over beta, then the sweep over the latent size at beta 1."""
    sweep = {f"beta{beta}": {"objective.beta": beta} for beta in betas}
    return sweep | {f"latent{latent}": {"model.latent_dim": latent} for latent in latents}


def evaluate(workdir: Path, samples: int, count: int) -> dict[str, Any]:
    """The table's test numbers of a run, and its latent size; the run directory keeps all numbers."""
    config = read_config(str(workdir))
    numbers = commands.evaluate(str(workdir), config, "latest", "test", full=True, samples=samples, count=count)
    found = {name: numbers[name] for name in (f"test/{metric}" for metric in COLUMNS) if name in numbers}
    return {"latent_dim": config["model"]["latent_dim"]} | found


def table(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One row per run."""
    cells = [["run", *COLUMNS.values()]]
    for name, numbers in found.items():
        values = [numbers.get(f"test/{metric}", "") for metric in COLUMNS]
        cells.append([name, *("" if isinstance(value, str) else f"{value:.2f}" for value in values)])
    return cells


def draw(found: Mapping[str, Mapping[str, Any]], eigenvalues: np.ndarray, latent_dim: int, title: str) -> Figure:
    """Draw the runs in the rate-distortion plane, with lines of equal sum and the linear VAE's curve."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    ax = figure.subplots()
    points = {name: (numbers["test/kl"], numbers["test/reconstruction"]) for name, numbers in found.items()}
    for kind, color in (("beta", "#1b4f8a"), ("latent", "#2e7d32")):
        names = sorted((n for n in points if n.startswith(kind)), key=lambda name: float(name.removeprefix(kind)))
        chosen = {name: points[name] for name in names}
        if not chosen:
            continue
        rate, distortion = np.transpose([*chosen.values()])
        ax.plot(rate, distortion, "o-", color=color, label=f"the VAE, by {'beta' if kind == 'beta' else 'latent size'}")
        for name, point in chosen.items():
            value = name.removeprefix(kind)
            text = f"beta {value}" if kind == "beta" else f"{value} latents"
            ax.annotate(text, point, xytext=(5, 5), textcoords="offset points", fontsize=9, color=color)
    betas = np.geomspace(1e-3, eigenvalues[0], 200)
    curve = np.array([linear_rate_distortion(eigenvalues, latent_dim, beta) for beta in betas])
    right = 1.15 * max(rate for rate, _ in points.values()) + 1
    ax.plot(*curve.T, color="#a04000", linestyle="--", label="the best linear VAE")
    top = 1.1 * max(eigenvalues.sum() / 2, *(distortion for _, distortion in points.values()))
    for total in np.linspace(0, right + top, 14)[1:]:
        ax.plot([0, total], [total, 0], color="#cccccc", linewidth=0.7, zorder=0)
    ax.set(xlim=(0, right), ylim=(0, top), xlabel="rate: KL, nats", ylabel="distortion: half the squared error, nats")
    ax.legend(frameon=False)
    figure.suptitle(f"{title}\ngrey: lines of equal loss at beta 1")
    return figure


def main() -> None:
    given = flags.FLAGS
    base = launch.config_for("vae", given.data)
    chosen = runs(given.betas, given.latents)
    if not chosen:
        raise ValueError("--betas and --latents are both empty: give one of them")
    dataset = data.load(name=given.data, manual_dir=given.manual_dir)
    settings = settings_of(given.data, dataset) | {"epochs": given.epochs, "seed": given.seed}
    count = min(given.count, len(dataset.splits["test"].label))
    settings |= {"samples": given.samples, "count": count}
    study = open_study(local_path(given.workdir), settings)

    def train_and_evaluate(run):
        fields = {"epochs": given.epochs, "data.name": given.data, "seed": given.seed} | chosen[run]
        launch.train(base, study.path / run, fields, given.manual_dir)
        return evaluate(study.path / run, given.samples, count)

    for name in chosen:
        compute_once(study, "model", train_and_evaluate, run=name)
    found = {row["run"]: row for row in study.rows}
    title = f"Rate and distortion: {given.data}, {given.epochs} epochs each, seed {given.seed}"
    eigenvalues = covariance_eigenvalues(dataset.splits["train"].image)
    latent_dim = max(numbers["latent_dim"] for numbers in found.values())
    save_figure(draw(found, eigenvalues, latent_dim, title), study.path / "rate_distortion.png")
    cells = markdown_table(table(found))
    note = f"-log p(x) is that of {count} test images from {given.samples} samples each; rate, distortion and -ELBO are those of all."
    launch.write_summary(study.path, title, cells, note, "![Rate and distortion](rate_distortion.png)")


if __name__ == "__main__":
    launch.define_data_flags("runs/rate-distortion")
    flags.DEFINE_list("betas", "0.05,0.2,0.5,1,2,5", "Weights of the KL.")
    flags.DEFINE_list("latents", "2,5,10", "Latent sizes at beta 1.")
    flags.DEFINE_integer("epochs", 5, "Epochs of each run.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The seed of each run.", lower_bound=0)
    flags.DEFINE_integer("samples", 500, "Draws of z for each image's likelihood.", lower_bound=1)
    flags.DEFINE_integer("count", 200, "Test images whose likelihood is estimated.", lower_bound=1)
    launch.start("rate_distortion", main)
