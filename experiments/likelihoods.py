"""One network under every likelihood: what each number measures, the samples and the reconstructions.

    python -m experiments.likelihoods --workdir=runs/likelihoods [--data=mnist] [--epochs=20] [--seeds=3]

Trains the post's network by the recipe of configs/vae.py:best under each likelihood, one run directory each. The
summary has one table for each kind of number, since a density, a mass on 256 levels and a mass on two cannot be
compared, and one picture of the finished runs. Each finished likelihood is one line of results.jsonl, so the same
command resumes an interrupted experiment.
"""

import math
from pathlib import Path
from typing import Any

from absl import flags

import vae_jax
from configs.vae import BEST
from experiments import ablations, launch
from experiments.study import compute_once, open_study, settings_of
from vae_jax import data
from vae_jax.evaluation.baselines import convert
from vae_jax.likelihoods import DENSITY
from vae_jax.run.files import local_path, save_figure
from vae_jax.run.report import markdown_table

LEARNED = {"model.learn_scale": True, "model.scale": 0.1}
FIELDS = {  # what each likelihood changes in the config
    "unit_gaussian": {},
    "gaussian": LEARNED,
    "optimal_gaussian": {},
    "laplace": LEARNED,
    "continuous_bernoulli": {},
    "discretised_logistic": LEARNED,
    "bernoulli": {"data.binarize": "dynamic"},
}


def measure(run: Path) -> dict[str, Any]:
    """The test numbers of a run, means over its seeds, and of which kind they are.

    -ELBO includes the likelihood's constant. A density has no bits per dimension.
    """
    vae, last = vae_jax.load(str(run), "latest"), launch.last_test(run)
    p_x = vae.model.likelihood
    bound = convert(last["test/bound"], "loss", math.prod(vae.image_shape), p_x.constant)
    found = {"kind": p_x.support, "bound": bound["nats"]}
    if p_x.support != DENSITY:
        found["bits"] = bound["bits per dimension"]
    names = ("bound/interval", "kl", "kl/interval", "active_units", "scale")
    return found | {name: last[f"test/{name}"] for name in names if f"test/{name}" in last}


def tables(rows: list[dict]) -> dict[str, list[list[str]]]:
    """{kind of number: table}, from the results of `measure`."""
    found: dict[str, list[list[str]]] = {}
    for row in sorted(rows, key=lambda row: [*FIELDS].index(row["likelihood"])):
        heading = ["likelihood", "-ELBO, nats", "bits per dimension", "KL, nats", "active latents", "scale"]
        found.setdefault(row["kind"], [heading]).append(
            [
                row["likelihood"],
                with_interval(row["bound"], row.get("bound/interval")),
                f"{row['bits']:.4f}" if "bits" in row else "none",
                with_interval(row["kl"], row.get("kl/interval")),
                f"{row['active_units']:.1f}",
                f"{row['scale']:.4f}" if "scale" in row else "",
            ]
        )
    return found


def with_interval(mean: float, interval: float | None) -> str:
    """A number, with the half-width of its 95 % interval if there is one."""
    return f"{mean:.2f}" + ("" if interval is None else f" ± {interval:.2f}")


def main() -> None:
    given = flags.FLAGS
    if unknown := [name for name in given.likelihoods if name not in FIELDS]:
        raise ValueError(f"--likelihoods has {', '.join(unknown)}, but must be some of {', '.join(FIELDS)}")
    dataset = data.load(name=given.data, manual_dir=given.manual_dir)
    own = {"epochs": given.epochs, "seeds": given.seeds}
    settings = settings_of(given.data, dataset) | own | {"recipe": BEST, "fields": FIELDS}
    study = open_study(local_path(given.workdir), settings)

    def train_and_measure(likelihood):
        run = study.path / likelihood
        fields = {"data.name": given.data, "model.likelihood": likelihood} | own | FIELDS[likelihood]
        launch.train("configs/vae.py:best", run, fields, given.manual_dir)
        return measure(run)

    for name in given.likelihoods:
        compute_once(study, "model", train_and_measure, likelihood=name)
    title = f"One network under every likelihood: {given.data}, {given.epochs} epochs"
    seeds = f"{given.seeds} seeds, 95 % intervals" if given.seeds > 1 else "one seed"
    page = [f"## {kind}\n\n{markdown_table(cells)}" for kind, cells in tables(study.rows).items()]
    finished = {row["likelihood"] for row in study.rows}
    if here := {name: name for name in FIELDS if name in finished and (study.path / name).exists()}:
        figure = ablations.draw(ablations.load(study.path, here), dataset.splits["test"], f"{title}, seed 0")
        save_figure(figure, study.path / "likelihoods.png")
        page.append("![Samples and reconstructions](likelihoods.png)")
    launch.write_summary(study.path, f"{title}, {seeds}", *page)


if __name__ == "__main__":
    launch.define_data_flags("runs/likelihoods")
    flags.DEFINE_list("likelihoods", [*FIELDS], "Those to compare.")
    flags.DEFINE_integer("epochs", 20, "Epochs of each likelihood.", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "Seeds of each likelihood, trained together.", lower_bound=1)
    launch.start("likelihoods", main)
