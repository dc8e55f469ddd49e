"""One network under every likelihood: what each number measures, the samples and the reconstructions.

    python -m experiments.likelihoods --workdir=runs/likelihoods [--data=mnist] [--epochs=20] [--seeds=3]

Trains the post's network by the recipe of configs/vae.py:best under each likelihood, one run directory each. The summary has
one table for each kind of number, since a density, a mass on 256 levels and a mass on two cannot be compared, and one
picture. The same command resumes an interrupted experiment.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import ablations, launch
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


def commands(workdir: Path, fields: dict, manual_dir: str, chosen: Sequence[str] = (*FIELDS,)) -> dict[str, list[str]]:
    """{likelihood: command}, with `fields` overridden in all; log p(x) is not estimated, as no table shows it."""
    fields = fields | {"run.likelihood_samples": 0}
    return {
        name: launch.make_command(
            "configs/vae.py:best", workdir / name, fields | {"model.likelihood": name} | own, manual_dir
        )
        for name, own in FIELDS.items()
        if name in chosen
    }


def tables(models: list[ablations.Variant]) -> dict[str, list[list[str]]]:
    """{kind of number: table}: test bound in nats, with its constant, and in bits per dimension; KL, latents, scale."""
    found: dict[str, list[list[str]]] = {}
    for name, vae, last in models:
        p_x, pixels = vae.model.likelihood, int(np.prod(vae.image_shape))
        heading = ["likelihood", "-ELBO, nats", "bits a dimension", "KL, nats", "active latents", "scale"]
        cells = found.setdefault(p_x.support, [heading])
        bound = convert(last["test/bound"], "loss", pixels, p_x.constant)
        cells.append(
            [
                name,
                with_interval(bound["nats"], last.get("test/bound/interval")),
                "none" if p_x.support == DENSITY else f"{bound['bits a dimension']:.4f}",
                with_interval(last["test/kl"], last.get("test/kl/interval")),
                f"{last['test/active_units']:.1f}",
                f"{last['test/scale']:.4f}" if "test/scale" in last else "",
            ]
        )
    return found


def with_interval(mean: float, interval: float | None) -> str:
    """A number, with the half-width of its 95 % interval if there is one."""
    return f"{mean:.2f}" + ("" if interval is None else f" ± {interval:.2f}")


def main() -> None:
    given = flags.FLAGS
    workdir = local_path(given.workdir)
    test = data.load(name=given.data, manual_dir=given.manual_dir).splits["test"]
    fields = {"epochs": given.epochs, "seeds": given.seeds, "data.name": given.data}
    if unknown := [name for name in given.likelihoods if name not in FIELDS]:
        raise ValueError(f"--likelihoods has {', '.join(unknown)}, but must be some of {', '.join(FIELDS)}")
    for command in commands(workdir, fields, given.manual_dir, given.likelihoods).values():
        launch.run(command)
    seeds = f"{given.seeds} seeds, 95 % intervals" if given.seeds > 1 else "one seed"
    title = f"One network under every likelihood: {given.data}, {given.epochs} epochs, {seeds}"
    models = ablations.load(workdir, {name: name for name in FIELDS if name in given.likelihoods})
    save_figure(ablations.draw(models, test, title), workdir / "likelihoods.png")
    parts = [f"## {kind}\n\n{markdown_table(cells)}" for kind, cells in tables(models).items()]
    image = "![Samples and reconstructions](likelihoods.png)"
    launch.write_summary(workdir, title, *parts, image)


if __name__ == "__main__":
    launch.define_data_flags("runs/likelihoods")
    flags.DEFINE_list("likelihoods", [*FIELDS], "Those to compare.")
    flags.DEFINE_integer("epochs", 20, "Epochs of each likelihood.", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "Seeds of each likelihood, trained together.", lower_bound=1)
    launch.start("likelihoods", main)
