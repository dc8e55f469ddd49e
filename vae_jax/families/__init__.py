"""The models: one file a family. Each is a module with the members of `Family`; `FAMILIES` names those that a config can choose.

A new family is one file here and one line in `FAMILIES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from vae_jax.batch import Batch, Dataset, Split
from vae_jax.model import Model, Variables
from vae_jax.objectives import Objective


class Metric(NamedTuple):
    """What a metric says. `better` is "lower" or "higher"; "" where neither is."""

    meaning: str
    unit: str
    better: str = ""


class Probes(NamedTuple):
    """Measurements beside the objective, in the same compiled program.

    Attributes:
        measure: (variables, batch, keys) -> {name: [batch, ...] array}; the keys are those that the objective has.
        reduce: ({name: [n, ...] NumPy array}, split) -> {metric: number, or nested list of numbers}.
    """

    measure: Callable[[Variables, Batch, Array], dict[str, Array]]
    reduce: Callable[[dict[str, np.ndarray], Split], dict[str, Any]]


@runtime_checkable
class Figures(Protocol):
    """Figures by name, each drawn when its function is called."""

    def __call__(
        self, variables: Variables, arrays: dict[str, np.ndarray], history: list[dict], baselines: Mapping[str, float]
    ) -> dict[str, Callable[[], Any]]: ...


@runtime_checkable
class Family(Protocol):
    """What each module of this package holds.

    Keyword-only arguments of `make` and `make_objective` are the fields of the config's sections `model` and
    `objective`; both raise ValueError, naming the field, for a value out of range. Other arguments are filled in by
    name: image_shape, num_classes, model, train_size, steps_per_epoch, labelled_share, binarize.

    Attributes:
        NAME: for titles.
        METRICS: {metric: Metric}, in the order in which they are drawn; "loss" is among them.
        make_final_probes: measured once, on the test split at the end of a training; None if there are none. A function of the
            model, the number of samples that the run asks for, and how the data are made binary.
        check_data: raises ValueError for data that the family cannot learn from.
        decodes_per_example: images that the objective decodes for each example, a function of its fields; it divides the
            batches of evaluation and enters the memory check.
        baselines: closed forms of the training images, {what: loss}, a function of the model, the training images and
            the fields of model and objective.
        ledger: {what: value} lines for people beside the numbers of a split: what they measure, and other conventions; a
            function of the model, the numbers, the split, the pixels of an image, whether they are binary, the variance of the split's images
            about the mean training image, and the fields of model.
        make_figures: the family's `Figures`, whose `arrays` are what `Probes.measure` gave for the test split.

    A family of several networks also has TERMS, the metrics whose gradients the summary shows network by network. Where each of its
    networks has its own optimizer, GROUPS names them, as the top level of `params` does.
    """

    NAME: str
    METRICS: Mapping[str, Metric]

    def make(self, image_shape: tuple[int, int, int], **fields) -> Model: ...
    def make_objective(self, model: Model, **fields) -> Objective: ...
    def make_probes(self, model: Model) -> Probes: ...
    def make_final_probes(self, model: Model, samples: int, binarize: str) -> Probes | None: ...
    def check_data(self, dataset: Dataset) -> None: ...
    def decodes_per_example(self, **fields) -> int: ...
    def baselines(self, model: Model, image: np.ndarray, **fields) -> dict[str, float]: ...
    def ledger(
        self, model: Model, numbers: dict, split: str, pixels: int, is_binary: bool, **fields
    ) -> dict[str, Any]: ...
    def make_figures(self, model: Model, test: Split, key: Array, title: str) -> Figures: ...


from vae_jax.families import classifier, conditional, semisupervised, sparse_labels, stacked, vae, vaegan

FAMILIES = {
    "vae": vae,
    "conditional": conditional,
    "sparse_labels": sparse_labels,
    "semisupervised": semisupervised,
    "stacked": stacked,
    "vaegan": vaegan,
    "classifier": classifier,
}
