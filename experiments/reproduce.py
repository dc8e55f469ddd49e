"""The post, reproduced: every table and figure, our numbers beside the post's, in one report.

    python -m experiments.reproduce --workdir=runs/post            MNIST
    python -m experiments.reproduce --workdir=runs/quick --quick   the same on the bundled digits, in 12 minutes or so

It runs commands of this project, each of which can be run, stopped and continued alone, and so can this one. The report
is report.html, one file, and report.md with its figures in report/.
"""

import math
import shutil
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

import vae_jax
from experiments import ablations, augmentation, launch
from experiments.report import (
    Code,
    Heading,
    Items,
    Picture,
    Table,
    Text,
    to_html,
    to_markdown,
)
from vae_jax import batch, data
from vae_jax.evaluation.baselines import covariance_eigenvalues, linear_vae_loss
from vae_jax.evaluation.statistics import mean_and_interval
from vae_jax.run import files
from vae_jax.run.directory import read_config, read_rows
from vae_jax.run.files import save_figure, write_whole

PARTS = ("vae", "ablations", "classifier", "augmentation", "report")
POST_LOSS, POST_ACCURACY = 18.5, 99.21
POST_TABLE5 = {20.0: 97.50, 50.0: 98.34, 100.0: 98.70}
SEEDS = 5


def plan(workdir: Path, name: str, manual_dir: str, quick: bool) -> dict[str, list]:
    """{part: its commands}"""
    vae, classifier = (
        launch.config_for(model, name) for model in ("vae", "classifier")
    )
    study = ["python", "-m", "experiments.augmentation"]
    study += [f"--data={name}", f"--workdir={workdir / 'augmentation'}"]
    if quick:
        study += ["--steps=100", "--seeds=3", "--percentages=20,100"]
    if manual_dir:
        study += [f"--manual_dir={manual_dir}"]
    epochs = {"epochs": 40} if quick else {}
    failing = ablations.commands(workdir / "ablations", vae, {"epochs": 10}, manual_dir)
    return {
        "vae": [launch.make_command(vae, str(workdir / "vae"), epochs, manual_dir)],
        "ablations": list(failing.values()),
        "classifier": [
            launch.make_command(
                classifier, str(workdir / "classifier"), {"seeds": SEEDS}, manual_dir
            )
        ],
        "augmentation": [study],
    }


class Report:
    """The blocks of the report of a work directory in which all parts are done; its figures go to report/ there."""

    def __init__(
        self, workdir: Path, name: str, dataset: batch.Dataset, commands: dict
    ):
        self._workdir, self._name, self._commands = workdir, name, commands
        self._dataset, self._test = dataset, dataset.splits["test"]
        self._of_post = name == "mnist"
        self._losses = launch.last_test(workdir / "vae")
        self._accuracies = launch.last_test(workdir / "classifier")
        self._study = augmentation.read_study(workdir / "augmentation")
        self._vae = vae_jax.load(str(workdir / "vae"))
        made_of = self._vae.config["data"]["name"]
        if made_of != name:
            raise ValueError(
                f"{workdir} is of {made_of}, not of {name}: {'leave out' if made_of == 'mnist' else 'give'} --quick"
            )
        self._classifier = vae_jax.load(str(workdir / "classifier"))
        (workdir / "report").mkdir(exist_ok=True)

    def blocks(self) -> list:
        return [
            *self._summary(),
            *self._about_vae(),
            *self._about_loss(),
            *self._about_failures(),
            *self._about_classifier(),
            *self._about_study(),
            *self._about_making(),
        ]

    def _picture(self, source, caption, width=900):
        path = f"report/{source.parent.parent.name}-{source.name}"
        shutil.copyfile(source, self._workdir / path)
        return Picture(path, caption, width)

    def _summary(self):
        rows = [
            (
                f"VAE: test loss after {self._vae.config['epochs']} epochs, nats",
                self._losses["test/loss"],
                None,
                POST_LOSS,
            ),
            (
                "Table 4: classifier of all training images, test accuracy, %",
                100 * self._accuracies["test/accuracy"],
                100 * self._accuracies["test/accuracy/interval"],
                POST_ACCURACY,
            ),
        ]
        found = augmentation.by_arm(self._study[0])
        for percentage in self._study[1]["percentages"]:
            rows.append(
                (
                    f"Table 5: {percentage:g} % of half B + generated images, test accuracy, %",
                    *mean_and_interval(found[percentage, "d"]),
                    POST_TABLE5.get(percentage),
                )
            )
        cells = [["what", "ours", "the post", "difference"]]
        for what, ours, interval, post in rows:
            shown = f"**{ours:.2f}**" + (f" ± {interval:.2f}" if interval else "")
            versus = (
                ["", ""] if post is None else [f"{post:.2f}", f"{ours - post:+.2f}"]
            )
            cells.append([what, shown, *versus])
        if not self._of_post:
            cells = [line[:2] for line in cells]
        return [
            Heading(f"The post, reproduced: {self._name}", 1),
            Text(
                "A convolutional VAE that generates digits, a small classifier, and a study of generated training data, after "
                'the post "Generate Digit Images using VAE" (2021). Every number was computed by the commands at the end. '
                "Intervals are 95 %, over seeds."
            ),
            *(
                []
                if self._of_post
                else [
                    Text(
                        f"The data are **{self._name}**, not the post's MNIST: the same tables and figures in little time, with other numbers."
                    )
                ]
            ),
            Table(cells),
        ]

    def _about_vae(self):
        eigenvalues = covariance_eigenvalues(self._dataset.splits["train"].image)
        linear = linear_vae_loss(eigenvalues, self._vae.model.latent_dim)
        config, figures = self._vae.config, self._workdir / "vae" / "figures"
        optimizer = config["optimizer"]
        training = [
            ["epochs", "batch", "learning rate", "schedule", "gradient decay factor"],
            [
                str(config["epochs"]),
                str(config["batch_size"]),
                str(optimizer["learning_rate"]),
                optimizer["schedule"],
                str(optimizer["beta1"]),
            ],
        ]
        return [
            Heading("Tables 1-3: the VAE"),
            Table(layers(self._vae), "Tables 1 and 2: the layers as trained"),
            Table(training, "Table 3: training, by Adam"),
            self._picture(
                figures / "training.png",
                f"Figure 3: training progress. Dashed, in closed form: a model that ignores its latents ({linear_vae_loss(eigenvalues, 0):.2f}), "
                f"and the best linear VAE ({linear:.2f}).",
            ),
            self._picture(
                figures / "reconstructions.png",
                "Figure 4: a test image of each class, and its reconstruction.",
            ),
            self._picture(
                figures / "samples.png",
                "Figure 5: images decoded from z ~ N(0, 1).",
                620,
            ),
        ]

    def _about_loss(self):
        pixels = math.prod(self._dataset.image_shape)
        conventions = [
            ["loss of an image", "decoder's variance", "beta on our scale"],
            ["half the squared error + KL (ours; the post's 18.5)", "1", "1"],
            ["squared error + KL (the post's formula)", "1/2", "1/2"],
            [
                f"mean squared error over {pixels} pixels + KL",
                f"{pixels / 2:g}",
                f"{pixels / 2:g}",
            ],
            ["binary cross-entropy + KL", "no Gaussian", "not comparable"],
        ]
        return [
            Heading("What the loss is"),
            Text(
                "Half the squared error, summed over pixels in [0, 1], plus the KL divergence from the prior, summed over latents; in nats, with one "
                f"sample of z an image, averaged over the test images: {self._losses['test/reconstruction']:.2f} + {self._losses['test/kl']:.2f}. It is the negative ELBO of a Gaussian decoder "
                f"of variance 1, less the constant {pixels}/2 ln(2 pi) = {pixels / 2 * math.log(2 * math.pi):.2f}."
            ),
            Table(
                conventions, "Scaled otherwise, the reconstruction means another model"
            ),
        ]

    def _about_failures(self):
        folder = self._workdir / "ablations"
        epochs = read_config(str(folder / "default"))["epochs"]
        figure = ablations.draw(folder, self._test, f"What fails: {self._name}")
        save_figure(figure, self._workdir / "report" / "ablations.png")
        reference = launch.last_test(folder / "default")["test/loss"]
        costs = ", ".join(
            f"{what} {launch.last_test(folder / name)['test/loss'] - reference:+.2f}"
            for name, what in ablations.VARIANTS.items()
            if name != "default"
        )
        return [
            Heading("Figure 6: what fails"),
            Text(
                "The post found pooling layers and shorter latents very bad, and shows pictures without numbers. "
                f"In nats against the post's model, after the same {epochs} epochs: {costs}."
            ),
            Table(
                ablations.table(folder, self._test),
                f"On the test images after {epochs} epochs",
            ),
            Picture(
                "report/ablations.png",
                "Figure 6: pooling instead of strided convolutions, and shorter latents, beside the post's model.",
                1000,
            ),
        ]

    def _about_classifier(self):
        accuracies = self._accuracies
        each = ", ".join(
            f"{100 * accuracies[f'test/accuracy/seed{seed}']:.2f}"
            for seed in range(SEEDS)
        )
        figures = self._workdir / "classifier" / "figures"
        return [
            Heading("Table 4: the classifier"),
            Table(layers(self._classifier), "Table 4: the layers as trained"),
            Text(
                f"Trained on all {len(self._dataset.splits['train'].label):,} images, {SEEDS} seeds: {each} %; mean "
                f"**{100 * accuracies['test/accuracy']:.2f} ± {100 * accuracies['test/accuracy/interval']:.2f} %**. The post does not say how it trained."
            ),
            self._picture(
                figures / "confusion.png",
                "Test images of each class, and the classes they were taken for; first seed.",
                620,
            ),
        ]

    def _about_study(self):
        figures = self._workdir / "augmentation" / "figures"
        return [
            Heading("Table 5: does generated training data help?"),
            Text(
                "The post's table is arm d. It has no control, and its generated images carry labels of half A that no other arm sees; "
                "so generated images are judged by arm f, and by what arm d loses against arm e. Arms h and i are not the post's: they ask "
                "for a way in which generated images do help, without labels of half A."
            ),
            Text(augmentation.conditions(*self._study)),
            Items(augmentation.findings(*self._study)),
            *(
                Table(cells, title)
                for title, cells in augmentation.tables(*self._study)
            ),
            self._picture(
                figures / "arms.png", "The arms, and their paired differences.", 1000
            ),
            self._picture(
                figures / "noise.png",
                "Where generated images stop looking like their label.",
                700,
            ),
        ]

    def _about_making(self):
        told = (self._workdir / "vae" / "summary.md").read_text("utf-8").splitlines()
        machine = [
            line.removeprefix("- ")
            for line in told
            if line.startswith(("- device", "- versions", "- matmul"))
        ]
        seconds = {
            "vae": trained_for(self._workdir / "vae"),
            "ablations": sum(
                trained_for(self._workdir / "ablations" / name)
                for name in ablations.VARIANTS
            ),
            "classifier": trained_for(self._workdir / "classifier"),
            "augmentation": sum(
                trained_for(self._workdir / "augmentation" / name)
                for name in ("classifier", "vae", "sharp")
            )
            + sum(row["seconds"] for row in self._study[0]),
        }
        seconds["all"] = sum(seconds.values())
        time_table = [["part", "minutes"]]
        time_table += [[part, f"{spent / 60:.1f}"] for part, spent in seconds.items()]
        commands = [
            block
            for part, of_part in self._commands.items()
            for block in (
                Text(f"**{part}**"),
                Code("\n".join(launch.shown(command) for command in of_part)),
            )
        ]
        return [
            Heading("How it was made"),
            Items(machine),
            Table(time_table, "Time by part, without starting up and interruptions"),
            Text("These commands, in this order, made every row and figure:"),
            *commands,
        ]


def trained_for(run: Path) -> float:
    """Seconds."""
    return read_rows(run)[-1]["seconds"]


def layers(model) -> list[list[str]]:
    """The layers of a trained model: the sizes of their kernels, and how many parameters they have."""
    found, total = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.variables["params"]):
        *layer, kind = (key.key for key in path)
        shape, count = found.get(" ".join(layer), ("", 0))
        if kind == "kernel":
            shape = "x".join(map(str, leaf.shape))
        found[" ".join(layer)] = (shape, count + leaf.size)
        total += leaf.size
    body = [[name, shape, f"{count:,}"] for name, (shape, count) in found.items()]
    body.sort(key=lambda line: line[0].startswith("decoder"))
    return [["layer", "kernel", "parameters"], *body, ["all", "", f"{total:,}"]]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    workdir = files.local_path(given.workdir)
    name = "digits" if given.quick else "mnist"
    commands = plan(workdir, name, given.manual_dir, given.quick)
    for part in given.parts:
        if part not in PARTS:
            sys.exit(
                f"reproduce: --parts has {part!r}, but there are {', '.join(PARTS)}"
            )
    with launch.in_one_line("reproduce"):
        dataset = data.load(name=name, manual_dir=given.manual_dir)
        workdir.mkdir(parents=True, exist_ok=True)
        for part in given.parts:
            for command in commands.get(part, ()):
                launch.run(command)
        if "report" in given.parts:
            blocks = Report(workdir, name, dataset, commands).blocks()
            for file, text in [
                ("report.md", to_markdown(blocks)),
                ("report.html", to_html(blocks, workdir)),
            ]:
                write_whole(workdir / file, text)
    if "report" in given.parts:
        print(f"\ndone: {workdir / 'report.html'} and {workdir / 'report.md'}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/post", "Where all of it goes.")
    flags.DEFINE_string(
        "manual_dir", "", "As --config.data.manual_dir of vae_jax.main."
    )
    flags.DEFINE_bool("quick", False, "The bundled digits, and a small study.")
    flags.DEFINE_list("parts", list(PARTS), f"Those of {', '.join(PARTS)} to do.")
    app.run(main)
