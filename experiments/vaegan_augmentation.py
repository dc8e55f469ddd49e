"""Do a VAE/GAN's images help a classifier more than a sharp VAE's? Arm h of experiments.augmentation with either one.

    python -m experiments.vaegan_augmentation --workdir=runs/vaegan-augmentation [--data=mnist] [--percentages=1,5] [--seeds=5]

Both models train on half A of the training images, without labels. The classifier trains on p % of half B, shifted and
rotated, and on one draw from q(z | x) of each image of half A, labelled by the classifier trained without them. Each
finished result is one line of results.jsonl, so the same command resumes an interrupted experiment.
"""

import functools
import itertools
from pathlib import Path

from absl import flags

import vae_jax
from experiments import arms, launch
from experiments.arms import ARMS
from experiments.augmentation import Learner, define_flags, make_settings, redraw_images, write_half_a
from experiments.augmentation_report import accuracy_tables
from experiments.study import compute_once, open_study
from experiments.trainer import Trainer
from vae_jax import data
from vae_jax.batch import Dataset
from vae_jax.run.files import local_path
from vae_jax.run.report import markdown_table

MODELS = ("vae", "vaegan")
COMPARED = {
    "c": ARMS["c"],
    "h": ARMS["h"]._replace(label="as c + drawn from A by a sharp VAE, pseudo-labelled"),
    "j": ARMS["h"]._replace(
        label="as c + drawn from A by a VAE/GAN, pseudo-labelled", extra="drawn by a VAE/GAN from A"
    ),
    "i": ARMS["i"],
}
PAIRS = {
    "h-c": "a sharp VAE's images on top of shifts and rotations",
    "j-c": "a VAE/GAN's images on top of shifts and rotations",
    "j-h": "a VAE/GAN's images vs. a sharp VAE's",
    "j-i": "a VAE/GAN's images vs. their originals",
}


def train_models(path: Path, dataset: Dataset, settings: dict) -> None:
    """Train the sharp VAE and the VAE/GAN on half A."""
    half_a = {"data.name": str(write_half_a(path, dataset))}
    launch.train(settings["vae"], path / "sharp", half_a | arms.SHARP_VAE)
    launch.train(settings["vaegan"], path / "vaegan", half_a)


def make_learner(path: Path, dataset: Dataset, settings: dict) -> Learner:
    """The classifiers of the compared arms."""
    half_a, _ = arms.halves(dataset.splits["train"])

    def redrawn(name):
        return half_a._replace(image=redraw_images(vae_jax.load(str(path / name)), half_a.image))

    parts = {"drawn from A": redrawn("sharp"), "drawn by a VAE/GAN from A": redrawn("vaegan"), "originals of A": half_a}
    return Learner(Trainer(dataset, settings), dataset, settings["seeds"], parts, COMPARED)


def main() -> None:
    given = flags.FLAGS
    dataset = data.load(name=given.data, manual_dir=given.manual_dir)
    settings = make_settings(given, dataset, MODELS)
    percentages = settings["percentages"]
    study = open_study(local_path(given.workdir), settings)
    train_models(study.path, dataset, settings)
    learner = functools.cache(functools.partial(make_learner, study.path, dataset, settings))

    def learn(percentage, arm):
        return learner().learn(percentage, arm)

    for percentage, arm in itertools.product(percentages, COMPARED):
        compute_once(study, "arm", learn, percentage=percentage, arm=arm)
    title = f"A VAE/GAN's images as training data: {given.data}, {given.seeds} seeds, 95 % intervals"
    note = (
        "Test accuracy in %, by percentage of half B, and paired differences in points. The two models are trained by recipes of "
        f"their own: {settings['vae']} with {arms.SHARP_VAE}, and {settings['vaegan']}."
    )
    tables = map(markdown_table, accuracy_tables(study.rows, percentages, COMPARED, PAIRS))
    launch.write_summary(study.path, title, note, *tables)


if __name__ == "__main__":
    define_flags("runs/vaegan-augmentation", ["1", "5"], MODELS)
    launch.start("vaegan_augmentation", main)
