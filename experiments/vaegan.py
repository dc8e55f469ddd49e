"""VAE, VAE/GAN and GAN with the same networks: how close to the data their images are, how varied, and how sharp.

    python -m experiments.vaegan --workdir=runs/vaegan [--data=mnist] [--epochs=10] [--seeds=3]

Trains each method for the same number of steps, one run directory for each method and seed, then compares images from
the prior and reconstructions with the test images. Each finished measurement is one line of results.jsonl, so the same
command resumes an interrupted comparison. Once the four lines of a seed are written, its runs are needed only for the
picture, which shows the first seed with all its runs.
"""

import functools
import itertools
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import vae_jax
from configs import vaegan as config_file
from experiments import ablations, launch
from experiments.costs import make_run
from experiments.speed import Peer, measure
from experiments.study import compute_once, open_study, settings_of
from vae_jax import data, weights
from vae_jax.batch import Dataset, mixed_order
from vae_jax.evaluation.samples import manifold, sharpness
from vae_jax.evaluation.statistics import mean_and_interval
from vae_jax.full_evaluation.samples import compare
from vae_jax.pretrained import in_batches
from vae_jax.run import session
from vae_jax.run.files import local_path, save_figure
from vae_jax.run.report import markdown_table

TITLES = {"vae": "VAE", "sharp_vae": "VAE, beta 0.25", "vaegan": "VAE/GAN", "gan": "GAN"}
# The fields that each method changes in the VAE/GAN's config. The sharp VAE has the VAE/GAN's beta.
# The discriminator of the VAE/GAN judges all methods.
METHODS = {"vaegan": {}, **config_file.CONTROLS, "sharp_vae": {"objective.method": "vae"}}
COLUMNS = {  # of the table: number -> heading
    "frechet_distance": "Frechet classifier distance",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "sharpness": "sharpness / test images'",
    "reconstruction_sharpness": "the same, reconstructions",
    "pixel_error": "pixel error, nats",
    "classifier_error": "error in the classifier's features",
    "discriminator_error": "error in the discriminator's features",
}
ROUNDS, STEPS = 5, 5  # of the timing: rounds through the methods, steps in each


class Comparison:
    """The test images and their features in the pinned classifier; `measure` and `floor` each compute one result."""

    def __init__(self, workdir: Path, dataset: Dataset, count: int):
        classifier, variables = weights.pinned_classifier()
        if dataset.image_shape != (28, 28, 1):
            raise ValueError(f"images are {dataset.image_shape}, but the pinned classifier reads (28, 28, 1)")
        self._workdir, self._dataset, self._count = workdir, dataset, count
        self._featurize = functools.partial(in_batches, functools.partial(jax.jit(classifier.features), variables))
        self._test = self._first("test")
        self._of_test = self._featurize(self._test)
        self._real = manifold(self._of_test)

    def folder(self, method: str, seed: int) -> Path:
        return self._workdir / f"{method}-seed{seed}"

    def load(self, method: str, seed: int) -> Any:
        return vae_jax.load(str(self.folder(method, seed)), "latest")

    def measure(self, method: str, seed: int) -> dict[str, Any]:
        """Compare samples from the prior, and reconstructions if the method trains an encoder, with the test images.

        Reconstructions decode the posterior mean. Errors are half squared errors. The discriminator belongs to the
        VAE/GAN of the same seed.
        """
        vae = self.load(method, seed)
        numbers = self._near(vae.sample(self._count, seed))
        if method != "gan":
            again = vae.reconstruct(self._test)
            judge = self.load("vaegan", seed)
            look = functools.partial(in_batches, functools.partial(jax.jit(judge.model.features), judge.variables))
            numbers |= {
                "reconstruction_sharpness": self._sharpness(again),
                "pixel_error": half_squared(self._test, again),
                "classifier_error": half_squared(self._of_test, self._featurize(again)),
                "discriminator_error": half_squared(look(self._test), look(again)),
            }
        last = launch.last_test(self.folder(method, seed))
        return numbers | {"training_seconds": last["seconds"], "kl": last["test/kl"]}

    def floor(self) -> dict[str, Any]:
        """Measure as many training images in place of generated ones."""
        return self._near(self._first("train"))

    def _first(self, split: str) -> np.ndarray:
        """The compared number of images of a split, in [0, 1]."""
        image, label = self._dataset.splits[split]
        return image[mixed_order(label)[: self._count]] / np.float32(255)

    def _near(self, image: np.ndarray) -> dict[str, Any]:
        return compare(self._real, self._featurize(image), "") | {"sharpness": self._sharpness(image)}

    def _sharpness(self, image: np.ndarray) -> float:
        return sharpness(image) / sharpness(self._test)


def half_squared(target: np.ndarray, found: np.ndarray) -> float:
    """1/2 |target - found|^2, averaged over images."""
    error = (target.astype(np.float64) - found).reshape(len(target), -1)
    return float(0.5 * np.square(error).sum(axis=1).mean())


def speeds(base: str) -> dict[str, float]:
    """Training images per second of each method on this machine, medians over interleaved rounds in one process."""
    peers = []
    for method, fields in METHODS.items():
        config = config_file.get_config(base.partition(":")[2] or "default").to_dict()
        config["objective"] |= {name.removeprefix("objective."): value for name, value in fields.items()}
        config["data"]["name"] = "digits"  # images of the same size; their content does not matter
        config["run"]["steps_per_call"] = STEPS
        peers.append(Peer("training", method, make_run(session.build(config)), STEPS * config["batch_size"]))
    return {peer.name: statistics.median(rates) for peer, rates in zip(peers, measure(peers, ROUNDS))}


def table(rows: list[dict]) -> list[list[str]]:
    """One row per method, means over the seeds with 95 % intervals, and the floor."""
    cells = [["images", *COLUMNS.values(), "training images per second"]]
    rates = next((row for row in rows if row["stage"] == "speed"), {})
    for method, title in TITLES.items():
        found = [row for row in rows if row["stage"] == "model" and row["method"] == method]
        shown = [summarize([row.get(name) for row in found]) for name in COLUMNS]
        cells.append([title, *shown, f"{rates[method]:.0f}" if method in rates else ""])
    floor = next((row for row in rows if row["stage"] == "floor"), {})
    cells.append(["training images", *(summarize([floor.get(name)]) for name in COLUMNS), ""])
    return cells


def summarize(values: list) -> str:
    """The mean of the numbers in `values`, with its 95 % interval's half-width if there are several; "" for none."""
    values = [value for value in values if isinstance(value, float)]
    if len(values) < 2:
        return "".join(f"{value:.3g}" for value in values)
    mean, interval = mean_and_interval(values)
    return f"{mean:.3g} ± {interval:.2g}"


def main() -> None:
    given = flags.FLAGS
    dataset = data.load(name=given.data, manual_dir=given.manual_dir)
    count = min(given.count, *(len(dataset.splits[name].label) for name in ("train", "test")))
    base = launch.config_for("vaegan", given.data)
    settings = settings_of(given.data, dataset) | {"epochs": given.epochs, "count": count, "base": base}
    study = open_study(local_path(given.workdir), settings)
    comparison = Comparison(study.path, dataset, count)
    compute_once(study, "floor", comparison.floor)
    compute_once(study, "speed", functools.partial(speeds, base))

    def train_and_measure(method, seed):
        fields = {"epochs": given.epochs, "seed": seed, "data.name": given.data} | METHODS[method]
        launch.train(base, comparison.folder(method, seed), fields, given.manual_dir)
        return comparison.measure(method, seed)

    for seed, method in itertools.product(range(given.seeds), METHODS):
        compute_once(study, "model", train_and_measure, method=method, seed=seed)
    title = f"VAE, VAE/GAN and GAN: {given.data}, {given.epochs} epochs"
    seeds = f"{given.seeds} seeds, 95 % intervals" if given.seeds > 1 else "one seed"
    note = f"{count} images each. Errors are half squared errors of reconstructions from the posterior mean."
    rows = [row for row in study.rows if row.get("seed", 0) < given.seeds]
    page = [markdown_table(table(rows)), note]
    if complete := [s for s in range(given.seeds) if all(comparison.folder(name, s).exists() for name in TITLES)]:
        models = [ablations.Variant(what, comparison.load(name, complete[0]), {}) for name, what in TITLES.items()]
        figure = ablations.draw(models, dataset.splits["test"], f"{title}, seed {complete[0]}")
        save_figure(figure, study.path / "vaegan.png")
        page.append("![Samples and reconstructions](vaegan.png)")
    launch.write_summary(study.path, f"{title}, {seeds}", *page)


if __name__ == "__main__":
    launch.define_data_flags("runs/vaegan")
    flags.DEFINE_integer("epochs", 10, "Epochs of each training.", lower_bound=1)
    flags.DEFINE_integer(
        "seeds", 3, "Seeds of each method, one after the other; more can be added later.", lower_bound=1
    )
    flags.DEFINE_integer("count", 10_000, "Generated and test images that are compared.", lower_bound=1)
    launch.start("vaegan", main)
