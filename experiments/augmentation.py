"""Does generated training data help? The post's Table 5, with the controls it lacks.

    python -m experiments.augmentation --workdir=runs/augmentation [--data=mnist]

A VAE trains on half A of the training images, without labels. The classifier trains on p % of half B and, depending on
the arm, on extra images; every arm takes the same number of steps, and all seeds train in one program. The noise of the
generated images is chosen once, on images of half B that the classifier has not seen. Arm h is a recipe that does help:
a sharper VAE generates images from half A, and the classifier of arm c labels them. Each finished result is one line of
results.jsonl, so the same command resumes an interrupted study; summary.md and the figures come last.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import vae_jax
from experiments import arms, augmentation_report, launch
from experiments.arms import ARMS, SCALES, SHARES, SWEEP, Arm
from experiments.study import compute_once, open_study, settings_of
from experiments.trainer import RECIPE, Trainer
from vae_jax import data, generate
from vae_jax.batch import Dataset, Split, example_keys, first_of_each_label, mixed_order
from vae_jax.objectives import reparameterize
from vae_jax.pretrained import Pretrained
from vae_jax.run.files import atomic_file, local_path
from vae_jax.run.log import OwnedDirectory

MODELS = ("vae", "classifier")  # whose configs can be chosen
SWEPT = 10_000  # images perturbed at each noise scale of the sweep


def vary_images(vae: Pretrained, image: np.ndarray, choose_z: Callable) -> np.ndarray:
    """Compute decode(choose_z(mean, logvar, keys)) of each image, as uint8; keys depend on the image's position."""
    keys = example_keys(jax.random.key(0), 0, jnp.arange(len(image)))
    z = choose_z(*map(jnp.asarray, vae.encode(image)), keys)
    return np.round(vae.decode(z) * 255).astype(np.uint8)


def perturb_images(vae: Pretrained, image: np.ndarray, share: float, scale: float) -> np.ndarray:
    """Generate images as the post does: add noise of standard deviation `scale` to a share of the latents."""
    return vary_images(vae, image, lambda mean, _, keys: generate.perturb(mean, keys, share, scale))


def redraw_images(vae: Pretrained, image: np.ndarray) -> np.ndarray:
    """Decode one draw from q(z | x) of each image."""
    return vary_images(vae, image, lambda *q: reparameterize(*q)[0])


class Learner:
    """Train classifiers on half B and on what each arm adds to it; `learn` computes one result.

    Args:
        parts: {name: images} in the pool besides half B.
        table: {name: arm}; arm c's classifier labels the images of pseudo-labelled arms.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset, seeds: int, parts: dict[str, Split], table: dict[str, Arm]):
        self._half_a, half_b = arms.halves(dataset.splits["train"])
        self._test = dataset.splits["test"]
        self._trainer, self._table = trainer, table
        self._size = len(half_b.label)
        self.real, self._sources = orders(half_b, seeds, 2), orders(self._half_a, seeds, 3)
        self._pool = arms.make_pool({"real": half_b} | parts)
        self._predict_test = trainer.make_predict(self._test)
        self.train = functools.cache(self._train)

    def learn(self, percentage: float, arm: str) -> dict:
        """The test accuracy of an arm for each seed."""
        found = self._predict_test(self.train(percentage, arm))
        correct = (found["prediction"] == self._test.label).astype(np.float32)
        return {"accuracy": [float(own.mean()) for own in correct]}

    def _train(self, percentage: float, name: str) -> dict:
        """Train an arm's classifiers and return their variables."""
        arm, count = self._table[name], arms.count_of(percentage, self._size)
        label, sources = self._pool.label, [order[:count] for order in self._sources]
        if arm.pseudo_labelled:
            label, sources = self._pseudo_label(arm.extra, self.train(percentage, "c"))
        rows = [arms.training_rows(arm, self._pool, order[:count], own) for order, own in zip(self.real, sources)]
        return self._trainer(self._pool.image, label, rows, arm.augmented)

    def _pseudo_label(self, part: str, classifiers: dict) -> tuple:
        """Predict the labels of `part`; returns each seed's labels of the pool and confident positions in `part`."""
        where = slice(self._pool.start[part], self._pool.start[part] + len(self._half_a.label))
        split = Split(self._pool.image[where], self._pool.label[where])
        found = self._trainer.make_predict(split)(classifiers)
        confident = found["confidence"] >= arms.CONFIDENCE_THRESHOLD
        label = arms.replace_labels(self._pool.label, where, found["prediction"])
        return label, [np.flatnonzero(own) for own in confident]


def orders(half: Split, seeds: int, use: int) -> list[np.ndarray]:
    """The order in which each seed takes the images of a half."""
    return [arms.stratified_order(half.label, (seed, use)) for seed in range(seeds)]


class Experiment:
    """The data and the trained models of the study; `sweep` and `choose` each compute one result."""

    def __init__(self, path: Path, settings: dict, dataset: Dataset):
        self._half_a, self._half_b = arms.halves(dataset.splits["train"])
        self._test = dataset.splits["test"]
        self.size = len(self._half_b.label)
        self._judge, self._vae, self._sharp_vae = (vae_jax.load(str(path / name)) for name in arms.MODELS)
        self._trainer = Trainer(dataset, settings)
        self._predict_half_b = self._trainer.make_predict(self._half_b)
        self._make_learner = functools.partial(Learner, self._trainer, dataset, settings["seeds"])

    def sweep(self, share: float, scale: float) -> dict:
        """The share of generated images whose label by the judge differs from the true label of their source."""
        rows = mixed_order(self._half_a.label)[:SWEPT]
        label, _ = self._judge.predict(perturb_images(self._vae, self._half_a.image[rows], share, scale))
        return {"relabelled": float(np.mean(label != self._half_a.label[rows]))}

    def choose(self, percentage: float, share: float, scale: float) -> dict:
        """Train arm f at this noise on a percentage of half B; returns each seed's accuracy on the rest."""
        learner = self._make_learner({"generated from B": self._generate(self._half_b, share, scale)}, ARMS)
        prediction = self._predict_half_b(learner.train(percentage, "f"))["prediction"]
        correct = (prediction == self._half_b.label).astype(np.float32)
        count = arms.count_of(percentage, self.size)
        return {"accuracy": [float(c[order[count:]].mean()) for c, order in zip(correct, learner.real)]}

    def learner(self, noise: tuple) -> Learner:
        """The learner of all arms, with this noise in the generated images."""
        drawn = redraw_images(self._sharp_vae, self._half_a.image)
        parts = {
            "generated from A": self._generate(self._half_a, *noise),
            "originals of A": self._half_a,
            "generated from B": self._generate(self._half_b, *noise),
            "drawn from A": self._half_a._replace(image=drawn),
        }
        return self._make_learner(parts, ARMS)

    def variations(self, share: float) -> np.ndarray:
        """A test image of each class and its variations over the sweep, [classes, columns, height, width, channel]."""
        image = self._test.image[first_of_each_label(self._test.label)]
        varied = [perturb_images(self._vae, image, share, scale) for scale in SWEEP]
        return np.stack([image, *varied], axis=1)

    def _generate(self, half: Split, share: float, scale: float) -> Split:
        return half._replace(image=perturb_images(self._vae, half.image, share, scale))


def train_models(path: Path, settings: dict, dataset: Dataset, manual_dir: str) -> None:
    """Train what is missing: the judge on all training images, the two VAEs on half A."""
    judge, vae, sharp = (path / name for name in arms.MODELS)
    launch.train(settings["classifier"], judge, {"data.name": settings["data"]}, manual_dir)
    half_a = {"data.name": str(write_half_a(path, dataset))}
    for workdir, fields in [(vae, {}), (sharp, arms.SHARP_VAE)]:
        launch.train(settings["vae"], workdir, half_a | fields)


def write_half_a(path: Path, dataset: Dataset) -> Path:
    """Write half A and the test images as a data set, unless the file exists; returns its absolute path."""
    images = path.absolute() / "half_a.npz"
    if not images.exists():
        half_a, test = arms.halves(dataset.splits["train"])[0], dataset.splits["test"]
        with atomic_file(images) as part, open(part, "wb") as file:
            np.savez_compressed(
                file, image=half_a.image, label=half_a.label, test_image=test.image, test_label=test.label
            )
    return images


def run_study(study: OwnedDirectory, settings: dict, dataset: Dataset, manual_dir: str) -> None:
    """Compute every missing result, then write the summary."""
    train_models(study.path, settings, dataset, manual_dir)
    experiment = Experiment(study.path, settings, dataset)
    compute = functools.partial(compute_once, study)
    for share, scale in itertools.product(SHARES, SWEEP):
        compute("sweep", experiment.sweep, share=share, scale=scale)
    percentage = arms.choice_percentage(settings)
    if arms.count_of(percentage, experiment.size) < experiment.size:
        choose = functools.partial(experiment.choose, percentage)
        for share, scale in itertools.product(SHARES, SCALES):
            compute("choice", choose, share=share, scale=scale)
    noise = augmentation_report.chosen_noise(study.rows)
    learner = functools.cache(experiment.learner)

    def learn(percentage, arm):
        return learner(noise).learn(percentage, arm)

    for percentage, name in itertools.product(settings["percentages"], ARMS):
        compute("arm", learn, percentage=percentage, arm=name)
    variations = experiment.variations(share=noise[0])
    augmentation_report.write_summary(study.path, study.rows, settings, variations)


def make_settings(given: flags.FlagValues, dataset: Dataset, models: Sequence[str] = MODELS) -> dict:
    """Collect everything that affects the numbers. Raises ValueError for unlabelled data or a bad percentage."""
    arms.check_labelled(given.data, dataset)
    size = len(arms.halves(dataset.splits["train"])[1].label)
    classes = dataset.num_classes
    return settings_of(given.data, dataset) | {
        "percentages": arms.check_percentages(given.percentages, size, classes),
        "seeds": given.seeds,
        "steps": given.steps,
        "batch_size": given.batch_size,
        "recipe": RECIPE,
        **{name: given[name].value or launch.config_for(name, given.data) for name in models},
    }


def main() -> None:
    given = flags.FLAGS
    dataset = data.load(name=given.data, manual_dir=given.manual_dir)
    settings = make_settings(given, dataset)
    study = open_study(local_path(given.workdir), settings)
    run_study(study, settings, dataset, given.manual_dir)


def define_flags(workdir: str, percentages: list[str] | None = None, models: Sequence[str] = MODELS) -> None:
    usual = ", ".join(f"{percentage:g}" for percentage in arms.PERCENTAGES)
    usual += f"; those that leave {arms.MIN_PER_CLASS} images per class"
    launch.define_data_flags(workdir)
    flags.DEFINE_list("percentages", percentages, "Of half B." if percentages else f"Of half B. Default: {usual}.")
    flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=2)
    flags.DEFINE_integer("steps", 2500, "Training steps per arm.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Images per step.", lower_bound=1)
    for name in models:
        flags.DEFINE_string(name, None, f"Its config. Default: configs/{name}.py, or its variant :digits.")


if __name__ == "__main__":
    define_flags("runs/augmentation")
    launch.start("augmentation", main)
