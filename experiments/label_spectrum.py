"""How few labels are enough? From 10 labels to all, with and without a generative model.

    python -m experiments.label_spectrum --workdir=runs/label-spectrum [--data=mnist] [--labels=10,100,600,1000,3000,all] [--draws=5]

Each method sees all training images but few labels, drawn anew for each of `--draws`, and is tested on all test images.
The recipe and the confidence threshold of the classifier were found with the labels of MNIST, and `ALPHA` with those of
the digits' test images; nothing else is tuned. Each result is one line of results.jsonl, so the same command resumes an
interrupted study; `--methods` computes a part of it. summary.md and the figure come last, from the available results.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

import vae_jax
from experiments import arms, label_report, launch
from experiments.study import compute_once, open_study, settings_of
from experiments.trainer import RECIPE, Trainer
from vae_jax import data
from vae_jax.batch import Dataset
from vae_jax.evaluation.latents import linear_probe
from vae_jax.evaluation.likelihood import log_mean_exp
from vae_jax.nn.networks import PRECISIONS
from vae_jax.run.files import local_path
from vae_jax.run.log import OwnedDirectory

ALL = -1  # labels, as in data.labelled
NEIGHBOURS = 10  # of each image in the graph
TRAIN, TEST = 0, 1  # given to scikit-learn in place of images; its kernel then returns the precomputed graph
SPREADING = 0.99  # weight of the neighbours: alpha of Zhou et al. 2004, section 4
ALPHA = 10.0  # weight of the cross-entropy: of 0.1 (published), 1, 10 and 100 the best on the bundled digits
BATCH_SIZE = 128
MOST_LABELLED = 16  # in a batch
BAYES_SAMPLES = 1000  # draws of z for each image and label, as in Kingma et al.'s code of M2


class Family(NamedTuple):
    """A generative model of images and labels: the folder of its runs, its config and changes to it, epochs on MNIST."""

    folder: str
    config: str
    epochs: int = 10  # the 26 runs of M2 take 72 minutes of one core with AMX, nearly all in bfloat16
    uses_unlabelled: bool = True
    fields: Mapping[str, Any] = {}


FAMILIES = {
    "sparse labels": Family("sparse", "configs/sparse_labels.py:dense"),
    "sparse labels, published loss": Family(
        "sparse-published", "configs/sparse_labels.py:dense", fields={"objective.charge": False}
    ),
    "M2": Family("m2", "configs/semisupervised.py"),
    "M1 + M2": Family("stacked", "configs/stacked.py", epochs=20),
    "conditional VAE, Bayes' rule": Family(
        "conditional", "configs/conditional.py:dense", epochs=100, uses_unlabelled=False
    ),
}
# name: (method of `Spectrum`, its arguments); each computes all draws at once
METHODS: dict[str, tuple[str, dict[str, bool]]] = {
    "classifier": ("classifier", {}),
    "classifier, pseudo-labels": ("classifier", {"pseudo_labels": True}),
    "linear probe, pixels": ("probe", {"codes": False}),
    "linear probe, VAE's codes": ("probe", {"codes": True}),
    "label spreading, pixels": ("spread", {"codes": False}),
    "label spreading, VAE's codes": ("spread", {"codes": True}),
    "classifier, shifted": ("classifier", {"augmented": True}),
    "classifier, shifted, pseudo-labels": ("classifier", {"augmented": True, "pseudo_labels": True}),
    "classifier, shifted, labels spread over pixels": ("classifier_of_spread", {"codes": False}),
    "classifier, shifted, labels spread over VAE's codes": ("classifier_of_spread", {"codes": True}),
}


class Spectrum:
    """The data, label draws and models that several results share."""

    def __init__(self, path: Path, settings: dict, dataset: Dataset, manual_dir: str):
        self._path, self._settings, self._manual_dir = path, settings, manual_dir
        self._train, self._test = dataset.splits["train"], dataset.splits["test"]
        self._classes = dataset.num_classes
        self._draws = range(settings["draws"])
        trainer = settings | {"seeds": settings["draws"]}
        self._trainer = functools.cache(lambda: Trainer(dataset, trainer))
        self._graph = functools.cache(self._make_graph)
        self._codes = functools.cache(self._encode)
        self._supervised = functools.cache(self._train_supervised)

    def hidden(self, labels: int, draw: int) -> np.ndarray:
        """The training labels, with -1 for those that this draw hides."""
        return data.hide_labels(self._train, labels, draw, self._classes).label

    def classifier(self, labels: int, augmented: bool = False, pseudo_labels: bool = False) -> dict:
        """Train the post's classifier; `pseudo_labels` trains it again with every image that it labels confidently."""
        trainer, train = self._trainer(), self._train
        variables = self._supervised(labels, augmented)
        if pseudo_labels:
            found = trainer.make_predict(train)(variables)
            hidden = np.stack([self.hidden(labels, draw) for draw in self._draws])
            label = np.where(hidden >= 0, hidden, found["prediction"]).astype(np.int32)
            confident = (hidden >= 0) | (found["confidence"] >= arms.CONFIDENCE_THRESHOLD)
            variables = trainer(train.image, label, list(map(np.flatnonzero, confident)), augmented)
        return self._count(variables)

    def _train_supervised(self, labels: int, augmented: bool) -> dict:
        rows = [np.flatnonzero(self.hidden(labels, draw) >= 0) for draw in self._draws]
        return self._trainer()(self._train.image, self._train.label, rows, augmented)

    def _count(self, variables: dict) -> dict:
        prediction = self._trainer().make_predict(self._test)(variables)["prediction"]
        return {"accuracy": np.mean(prediction == self._test.label, axis=1).tolist()}

    def probe(self, labels: int, codes: bool) -> dict:
        """Multinomial logistic regression on the labelled images."""
        train, test = self._codes() if codes else self._pixels()
        accuracy = []
        for draw in self._draws if labels != ALL else range(1):
            label = self.hidden(labels, draw)
            known = label >= 0
            accuracy.append(linear_probe((train[known], label[known]), (test, self._test.label)))
        return {"accuracy": accuracy}

    def spread(self, labels: int, codes: bool) -> dict:
        """Label spreading; a test image takes the label of its neighbours among the training images."""
        test = np.full((len(self._test.label), 1), TEST)
        models = [self._spread(labels, draw, codes) for draw in self._draws]
        return {"accuracy": [float(model.score(test, self._test.label)) for model in models]}

    def classifier_of_spread(self, labels: int, codes: bool) -> dict:
        """Train the classifier on all images, shifted and rotated, with the labels that spreading gives them."""
        label = np.stack([self._spread(labels, draw, codes).transduction_ for draw in self._draws])
        everything = [np.arange(len(self._train.label))] * len(self._draws)
        return self._count(self._trainer()(self._train.image, label.astype(np.int32), everything, True))

    def _spread(self, labels: int, draw: int, codes: bool) -> Any:
        """Fit label spreading (Zhou et al. 2004) over the nearest-neighbour graph to the training images."""
        from sklearn.semi_supervised import LabelSpreading

        among, to_test = self._graph(codes)
        model = LabelSpreading(
            kernel=lambda _, which: to_test if which[0, 0] == TEST else among, alpha=SPREADING, max_iter=100
        )
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            return model.fit(np.full((among.shape[0], 1), TRAIN), self.hidden(labels, draw))

    def _make_graph(self, codes: bool) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """The symmetric neighbour graph of the training images, and each test image's neighbours, [train, test]."""
        from sklearn.neighbors import NearestNeighbors

        train, test = self._codes() if codes else self._pixels()
        nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(train)
        among = nearest.kneighbors_graph()
        return among.maximum(among.T).tocsr(), nearest.kneighbors_graph(test).T.tocsr()

    def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(split.image.reshape(len(split.image), -1) / np.float32(255) for split in (self._train, self._test))

    def _encode(self) -> tuple[np.ndarray, np.ndarray]:
        """The posterior means of a VAE trained without labels."""
        run = self._path / "vae"
        self._run("configs/vae.py:bernoulli", run, {"epochs": self._settings["vae_epochs"]})
        vae = vae_jax.load(str(run), "latest")
        return tuple(vae.encode(split.image)[0] for split in (self._train, self._test))

    def family(self, method: str, labels: int, draw: int) -> dict:
        """Train a generative model of images and labels once; returns its test numbers."""
        family = FAMILIES[method]
        run = self._path / f"{family.folder}-{labels}-{draw}"
        fields = {"epochs": self._settings["epochs"][method], "seed": draw}
        own = {"model.precision": self._settings["precision"]}
        if family.uses_unlabelled:
            each = 0 if labels == ALL else min(MOST_LABELLED, labels)
            fields |= {"data.labelled": labels, "data.label_seed": draw, "data.labelled_per_batch": each}
            own["objective.alpha"] = self._settings["alpha"]
        self._run(family.config, run, {**fields, **own, **family.fields})
        last = launch.last_test(run)
        found = {name: last[f"test/{name}"] for name in ("accuracy", "bound") if f"test/{name}" in last}
        start = time.monotonic()
        if not family.uses_unlabelled:
            found |= self._by_bayes(run)
        # The run's own seconds include those before an interruption.
        return found | own | {"seconds": round(last["seconds"] + time.monotonic() - start, 1)}

    def _by_bayes(self, run: Path) -> dict[str, float]:
        """Test accuracy by Bayes' rule, and the mean nats -log p(x | y) and -log p(x) = -log 1/C sum_y p(x | y)."""
        vae, test = vae_jax.load(str(run), "latest"), self._test
        of_label = [vae.log_likelihood(test.image, BAYES_SAMPLES, label=label) for label in range(self._classes)]
        log_p = np.stack(of_label, axis=1)
        return {
            "accuracy": float(np.mean(log_p.argmax(axis=1) == test.label)),
            "nll_given_label": float(-np.mean(log_p[np.arange(len(log_p)), test.label])),
            "nll": float(-np.mean(log_mean_exp(log_p))),
        }

    def _run(self, config: str, run: Path, fields: dict) -> None:
        launch.train(config, run, {"data.name": self._settings["data"]} | fields, self._manual_dir)


def takes_all(method: str) -> bool:
    """Whether a method of `METHODS` can use all labels: the others label the images that have none."""
    return "spread" not in method and "pseudo" not in method


def run_study(study: OwnedDirectory, settings: dict, dataset: Dataset, manual_dir: str, chosen: list[str]) -> None:
    """Compute the missing results of the chosen methods, then write the summary of all available results."""
    spectrum = Spectrum(study.path, settings, dataset, manual_dir)
    for method in chosen:
        if method in METHODS:
            name, arguments = METHODS[method]
            compute = functools.partial(getattr(spectrum, name), **arguments)
            for labels in settings["labels"]:
                if labels != ALL or takes_all(method):
                    compute_once(study, method, compute, labels=labels)
        else:
            compute = functools.partial(spectrum.family, method)
            counts = settings["labels"] if FAMILIES[method].uses_unlabelled else [ALL]
            for draw, labels in itertools.product(range(settings["draws"]), counts):
                if labels != ALL or draw == 0:
                    compute_once(study, method, compute, labels=labels, draw=draw)
    label_report.write_summary(study.path, study.rows, settings)


def check_chosen(chosen: list[str], labels: list[int], size: int) -> None:
    """Raise ValueError if the methods and numbers of labels leave nothing to compute, or too few images without label."""
    if labels == [ALL] and not any(method in FAMILIES or takes_all(method) for method in chosen):
        raise ValueError("--labels=all leaves nothing to compute: these methods label images that have no label")
    most = size - (BATCH_SIZE - MOST_LABELLED)
    generative = [method for method in chosen if method in FAMILIES and FAMILIES[method].uses_unlabelled]
    if generative and max(labels) > most:
        raise ValueError(
            f"--labels has {max(labels)} of {size}, but {generative[0]} takes {size - most} unlabelled images in a batch: "
            f"give at most {most}, or all, or other --methods"
        )


def main() -> None:
    given = flags.FLAGS
    dataset = data.load(name=given.data, manual_dir=given.manual_dir)
    settings = settings_of(given.data, dataset) | {
        "labels": [ALL if count == "all" else int(count) for count in given.labels],
        "draws": given.draws,
        "epochs": {name: given.epochs or family.epochs for name, family in FAMILIES.items()},
        "alpha": ALPHA,
        "precision": given.precision,
        "steps": given.steps,
        "batch_size": BATCH_SIZE,
        "recipe": RECIPE,
        "vae_epochs": given.vae_epochs,
    }
    arms.check_labelled(given.data, dataset)
    if not settings["labels"]:
        raise ValueError("--labels is empty: give numbers of labelled images, such as 100,1000")
    fewest, size = dataset.num_classes, len(dataset.splits["train"].label)
    for labels in settings["labels"]:
        if labels != ALL and not fewest <= labels < size:
            raise ValueError(
                f"--labels has {labels}, but each must be from {fewest}, one for each class, to {size - 1}, or all"
            )
        data.hide_labels(dataset.splits["train"], labels, 0, dataset.num_classes)
    methods = {**METHODS, **FAMILIES}
    if unknown := set(given.methods) - {*methods}:
        raise ValueError(f"--methods has {', '.join(sorted(unknown))}, but must be some of: {'; '.join(methods)}")
    chosen = given.methods or [*methods]
    check_chosen(chosen, settings["labels"], size)
    study = open_study(local_path(given.workdir), settings)
    run_study(study, settings, dataset, given.manual_dir, chosen)


if __name__ == "__main__":
    launch.define_data_flags("runs/label-spectrum")
    flags.DEFINE_list("labels", "10,100,600,1000,3000,all", "Labelled training images.")
    flags.DEFINE_integer("draws", 5, "Draws of the labelled images.", lower_bound=2)
    flags.DEFINE_integer(
        "epochs", 0, "Epochs of each generative model of images and labels; 0: its own.", lower_bound=0
    )
    flags.DEFINE_enum("precision", "float32", [*PRECISIONS], "Precision of their layers.")
    flags.DEFINE_integer("steps", 2500, "Steps of each classifier, of 128 images.", lower_bound=1)
    flags.DEFINE_integer("vae_epochs", 20, "Epochs of the VAE that gives the codes.", lower_bound=1)
    flags.DEFINE_multi_string("methods", [], "A method to compute, given once for each; all by default.")
    launch.start("label_spectrum", main)
