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
from experiments.augmentation import Learner, redraw_images, write_half_a
from experiments.augmentation_report import accuracy_tables
from experiments.study import compute_once, open_study, settings_of
from experiments.trainer import Trainer
from vae_jax import data
from vae_jax.batch import Dataset
from vae_jax.run.files import local_path
from vae_jax.run.report import markdown_table

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
    launch.run(launch.make_command(settings["vae"], path / "sharp", half_a | arms.SHARP_VAE))
    launch.run(launch.make_command(settings["vaegan"], path / "vaegan", half_a))


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
    arms.check_labelled(given.data, dataset)
    _, half_b = arms.halves(dataset.splits["train"])
    percentages = arms.check_percentages(given.percentages, len(half_b.label), dataset.num_classes)
    settings = settings_of(given.data, dataset) | {"percentages": percentages}
    settings |= {"seeds": given.seeds, "steps": given.steps, "batch_size": given.batch_size}
    settings |= {name: given[name].value or launch.config_for(name, given.data) for name in ("vae", "vaegan")}
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
    launch.define_data_flags("runs/vaegan-augmentation")
    flags.DEFINE_list("percentages", ["1", "5"], "Of half B.")
    flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=2)
    flags.DEFINE_integer("steps", 2500, "Training steps per arm.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Images per step.", lower_bound=1)
    for name in ("vae", "vaegan"):
        flags.DEFINE_string(name, None, f"Its config. Default: configs/{name}.py, or its variant :digits.")
    launch.start("vaegan_augmentation", main)
