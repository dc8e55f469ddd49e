"""The post, reproduced: every table and figure with our numbers next to the post's, in one report.

    python -m experiments.reproduce --workdir=runs/post            MNIST
    python -m experiments.reproduce --workdir=runs/quick --quick   the bundled digits, in about 15 minutes

It runs commands of this project. Each of them can be run, stopped and resumed alone, and so can the reproduction. The
report is report.html, one self-contained file, and report.md with its figures in report/.
"""

import math
import shutil
from pathlib import Path

from absl import flags

import vae_jax
from experiments import ablations, arms, augmentation_report, launch
from vae_jax import data
from vae_jax.batch import Dataset
from vae_jax.evaluation.baselines import covariance_eigenvalues, linear_vae_loss
from vae_jax.nn.layer_table import layer_table
from vae_jax.run.files import local_path, save_figure, write_atomically
from vae_jax.run.log import read_rows
from vae_jax.run.report import markdown_table, to_html

PARTS = ("vae", "ablations", "classifier", "augmentation", "report")
POST_LOSS, POST_ACCURACY = 18.5, 99.21
POST_TABLE5 = {20.0: 97.50, 50.0: 98.34, 100.0: 98.70}
SEEDS = 5
FIGURES = [  # (part, name) of the figures that the page shows
    ("vae", "training"),
    ("vae", "reconstructions"),
    ("vae", "samples"),
    ("classifier", "confusion"),
    ("augmentation", "arms"),
    ("augmentation", "noise"),
]


def plan(workdir: Path, name: str, manual_dir: str, quick: bool) -> dict[str, list]:
    """{part: its commands}"""
    vae, classifier = (launch.config_for(model, name) for model in ("vae", "classifier"))
    epochs = {"epochs": 40} if quick else {}
    variants = ablations.commands(workdir / "ablations", vae, {"epochs": 40 if quick else 10}, manual_dir)
    study = ["python", "-m", "experiments.augmentation", f"--data={name}", f"--workdir={workdir / 'augmentation'}"]
    study += ["--steps=100", "--seeds=3", "--percentages=20,100"] if quick else []
    study += [f"--manual_dir={manual_dir}"] if manual_dir else []
    return {
        "vae": [launch.make_command(vae, workdir / "vae", epochs, manual_dir)],
        "ablations": list(variants.values()),
        "classifier": [launch.make_command(classifier, workdir / "classifier", {"seeds": SEEDS}, manual_dir)],
        "augmentation": [study],
    }


class Report:
    """The report on a work directory in which all parts are done; its figures go to report/ there.

    Raises ValueError if a part is missing, unfinished or of another data set.
    """

    def __init__(self, workdir: Path, name: str, dataset: Dataset, commands: dict):
        self._workdir, self._name, self._commands = workdir, name, commands
        self._dataset, self._test = dataset, dataset.splits["test"]
        self._losses = launch.last_test(workdir / "vae")
        self._accuracies = launch.last_test(workdir / "classifier")
        self._study = augmentation_report.read_study(workdir / "augmentation")
        self._vae = vae_jax.load(str(workdir / "vae"))
        stored = self._vae.config["data"]["name"]
        if stored != name:
            flag = "leave out" if stored == "mnist" else "give"
            raise ValueError(f"{workdir} is of {stored}, not of {name}: {flag} --quick")
        self._classifier = vae_jax.load(str(workdir / "classifier"))
        self._variants = ablations.load(workdir / "ablations")

    def markdown(self) -> str:
        """The page in Markdown; copies or draws its figures."""
        self._save_figures()
        pixels = math.prod(self._dataset.image_shape)
        eigenvalues = covariance_eigenvalues(self._dataset.splits["train"].image)
        return PAGE.format(
            name=self._name,
            other_data="" if self._name == "mnist" else OTHER_DATA,
            numbers=markdown_table(self._numbers()),
            vae_layers=markdown_table(layer_table(self._vae.variables["params"])),
            training=markdown_table(self._training()),
            ignoring=linear_vae_loss(eigenvalues, 0),
            linear=linear_vae_loss(eigenvalues, self._vae.model.latent_dim),
            pixels=pixels,
            half_pixels=pixels / 2,
            constant=pixels / 2 * math.log(2 * math.pi),
            losses=self._losses,
            epochs=self._variants[0].vae.config["epochs"],
            costs=self._costs(),
            ablations=markdown_table(ablations.table(self._variants, self._test)),
            classifier_layers=markdown_table(layer_table(self._classifier.variables["params"])),
            size=len(self._dataset.splits["train"].label),
            seeds=SEEDS,
            accuracy={name: 100 * x for name, x in self._accuracies.items()},
            accuracies=self._accuracy_of_seeds(),
            study=augmentation_report.results(*self._study),
            machine=self._machine(),
            times=markdown_table(self._times()),
            commands=self._command_blocks(),
        )

    def _save_figures(self) -> None:
        folder = self._workdir / "report"
        folder.mkdir(exist_ok=True)
        for part, name in FIGURES:
            source = self._workdir / part / "figures" / f"{name}.png"
            shutil.copyfile(source, folder / f"{part}-{name}.png")
        figure = ablations.draw(self._variants, self._test, f"Ablations: {self._name}")
        save_figure(figure, folder / "ablations.png")

    def _numbers(self) -> list[list[str]]:
        """The headline numbers; for MNIST also the post's, and the differences."""
        epochs, accuracies = self._vae.config["epochs"], self._accuracies
        accuracy, interval = (100 * accuracies[name] for name in ("test/accuracy", "test/accuracy/interval"))
        loss = f"VAE: test loss after {epochs} epochs, nats"
        full = "Table 4: classifier trained on all images, test accuracy, %"
        numbers = [(loss, self._losses["test/loss"], None, POST_LOSS), (full, accuracy, interval, POST_ACCURACY)]
        rows, settings = self._study
        found = augmentation_report.by_arm(rows)
        for percentage in settings["percentages"]:
            what = f"Table 5: {percentage:g} % of half B + generated images, test accuracy, %"
            mean, interval = augmentation_report.mean_accuracy(found, percentage, "d")
            numbers.append((what, mean, interval, POST_TABLE5.get(percentage)))
        cells = [["what", "ours", "the post", "difference"]]
        for what, ours, interval, post in numbers:
            shown = f"**{ours:.2f}**" + (f" ± {interval:.2f}" if interval else "")
            versus = [f"{post:.2f}", f"{ours - post:+.2f}"] if post else ["", ""]
            cells.append([what, shown, *versus])
        return cells if self._name == "mnist" else [row[:2] for row in cells]

    def _training(self) -> list[list[str]]:
        config, optimizer = self._vae.config, self._vae.config["optimizer"]
        heading = ["epochs", "batch", "learning rate", "schedule", "gradient decay factor"]
        values = [config["epochs"], config["batch_size"]]
        values += [optimizer[name] for name in ("learning_rate", "schedule", "beta1")]
        return [heading, list(map(str, values))]

    def _costs(self) -> str:
        """Each variant's test loss relative to the reference, in nats."""
        reference, *others = self._variants
        return ", ".join(f"{title} {last['test/loss'] - reference.last['test/loss']:+.2f}" for title, _, last in others)

    def _accuracy_of_seeds(self) -> str:
        names = [f"test/accuracy/seed{seed}" for seed in range(SEEDS)]
        return ", ".join(f"{100 * self._accuracies[name]:.2f}" for name in names)

    def _machine(self) -> str:
        """The lines about the machine in the summary of the VAE's run."""
        summary = (self._workdir / "vae" / "summary.md").read_text("utf-8")
        machine = ("- device", "- versions", "- matmul")
        return "\n".join(line for line in summary.splitlines() if line.startswith(machine))

    def _times(self) -> list[list[str]]:
        workdir = self._workdir
        study = sum(row["seconds"] for row in self._study[0])
        seconds = {
            "vae": trained_seconds(workdir, "vae"),
            "ablations": trained_seconds(workdir / "ablations", *ablations.VARIANTS),
            "classifier": trained_seconds(workdir, "classifier"),
            "augmentation": study + trained_seconds(workdir / "augmentation", *arms.MODELS),
        }
        seconds["all"] = sum(seconds.values())
        body = [[part, f"{spent / 60:.1f}"] for part, spent in seconds.items()]
        return [["part", "minutes"], *body]

    def _command_blocks(self) -> str:
        blocks = []
        for part, commands in self._commands.items():
            lines = "\n".join(map(launch.shell_line, commands))
            blocks.append(f"**{part}**\n\n```sh\n{lines}\n```")
        return "\n\n".join(blocks)


def trained_seconds(folder: Path, *runs: str) -> float:
    """The total training seconds of runs in a folder."""
    return sum(read_rows(folder / run)[-1]["seconds"] for run in runs)


def main() -> None:
    given = flags.FLAGS
    workdir = local_path(given.workdir)
    name = "digits" if given.quick else "mnist"
    if unknown := set(given.parts) - set(PARTS):
        raise ValueError(f"--parts has {unknown.pop()!r}: choose from {', '.join(PARTS)}")
    commands = plan(workdir, name, given.manual_dir, given.quick)
    dataset = data.load(name=name, manual_dir=given.manual_dir)
    workdir.mkdir(parents=True, exist_ok=True)
    for part in given.parts:
        for command in commands.get(part, ()):
            launch.run(command)
    if "report" in given.parts:
        markdown = Report(workdir, name, dataset, commands).markdown()
        write_atomically(workdir / "report.md", markdown)
        write_atomically(workdir / "report.html", to_html(markdown, workdir))
        print(f"\ndone: {workdir / 'report.html'} and {workdir / 'report.md'}")


OTHER_DATA = "The data set is not the post's MNIST: the same tables and figures in minutes, with other numbers."
PAGE = """# The post, reproduced: {name}

A convolutional VAE that generates digits, a small classifier, and a study of generated training data, after the post
"Generate Digit Images using VAE" (2021). The commands at the end computed every number. Intervals are 95 % intervals over
seeds. {other_data}

{numbers}

## Tables 1-3: the VAE

**Tables 1 and 2: the layers as trained**

{vae_layers}

**Table 3: training by Adam**

{training}

![Loss, reconstruction and KL over the epochs](report/vae-training.png)

*Figure 3: training progress. Dashed lines are closed forms: the loss of a model that ignores its latents ({ignoring:.2f})
and of the best linear VAE ({linear:.2f}).*

![Test images and their reconstructions](report/vae-reconstructions.png)

*Figure 4: a test image of each class above its reconstruction.*

![Samples](report/vae-samples.png)

*Figure 5: images decoded from z ~ N(0, 1).*

## What the loss is

The loss is half the squared error, summed over pixels in [0, 1], plus the KL divergence from the prior, summed over
latents. It is in nats, with one sample of z per image, averaged over the test images: {losses[test/reconstruction]:.2f} +
{losses[test/kl]:.2f}. It equals the negative ELBO of a Gaussian decoder with variance 1, minus the constant
{pixels}/2 ln(2 pi) = {constant:.2f}.

**Other scales of the reconstruction term are other models**

| loss per image | decoder's variance | equivalent beta |
| --- | --- | --- |
| half the squared error + KL (ours; the post's 18.5) | 1 | 1 |
| squared error + KL (the post's formula) | 1/2 | 1/2 |
| mean squared error over {pixels} pixels + KL | {half_pixels:g} | {half_pixels:g} |
| binary cross-entropy + KL | not Gaussian | not comparable |

## Figure 6: what fails

The post reports that pooling layers and fewer latents do much worse, and shows images without numbers. Test losses
relative to the post's model after the same {epochs} epochs, in nats: {costs}.

**Test images after {epochs} epochs**

{ablations}

![Samples and reconstructions of each model](report/ablations.png)

*Figure 6: the post's model, pooling instead of strided convolutions, and fewer latents.*

## Table 4: the classifier

**Table 4: the layers as trained**

{classifier_layers}

Trained on all {size:,} images with {seeds} seeds: {accuracies} %; mean
**{accuracy[test/accuracy]:.2f} ± {accuracy[test/accuracy/interval]:.2f} %**. The post does not say how it trained.

![Confusion matrix](report/classifier-confusion.png)

*Test images by label and predicted class, for the first seed.*

## Table 5: does generated training data help?

The post's table is arm d. It has no control, and its generated images bring labels of half A that arms a to c never see.
Two comparisons are fair: arm f with arm b, and arm d with arm e. Arms h and i go beyond the post: they look for generated
images that help without labels of half A.

{study}

![Test accuracy of each arm, and differences between arms](report/augmentation-arms.png)

*The arms and their paired differences.*

![Generated images by noise](report/augmentation-noise.png)

*The noise at which generated images stop looking like their label.*

## How it was made

{machine}

**Time per part, without startup and interruptions**

{times}

These commands, in this order, made every number and figure:

{commands}
"""


if __name__ == "__main__":
    launch.define_workdir("runs/post")
    flags.DEFINE_string("manual_dir", "", "As --config.data.manual_dir of vae_jax.")
    flags.DEFINE_bool("quick", False, "The bundled digits, and a small study.")
    flags.DEFINE_list("parts", list(PARTS), f"Which of {', '.join(PARTS)} to do.")
    launch.start("reproduce", main)
