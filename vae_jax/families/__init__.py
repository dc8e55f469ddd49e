"""The model families, one module each, with the members of `Family`. A config chooses among `FAMILIES`.

A new family is one file here, its import, and an entry in `FAMILIES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from vae_jax.batch import Batch, Dataset, Split
from vae_jax.model import Model, Variables
from vae_jax.objectives import Objective


class Metric(NamedTuple):
    """The meaning of a metric. `better` is "lower", "higher", or "" if neither is better."""

    meaning: str
    unit: str
    better: str = ""


class Probes(NamedTuple):
    """Measurements in the same compiled program as the objective.

    Attributes:
        measure: (variables, batch, keys) -> {name: [batch, ...] array}; the keys are those of the objective.
        reduce: ({name: [n, ...] NumPy array}, split) -> {metric: number, or nested list of numbers}.
    """

    measure: Callable[[Variables, Batch, Array], dict[str, Array]]
    reduce: Callable[[dict[str, np.ndarray], Split], dict[str, Any]]


@runtime_checkable
class Figures(Protocol):
    """Returns {name: function}; calling a function draws that figure."""

    def __call__(
        self, variables: Variables, arrays: dict[str, np.ndarray], history: list[dict], baselines: Mapping[str, float]
    ) -> dict[str, Callable[[], Any]]: ...


@runtime_checkable
class Family(Protocol):
    """The members of each family's module.

    Keyword-only arguments of `make` and `make_objective` are the fields of the config's sections `model` and
    `objective`; both raise ValueError, naming the field, for a value out of range. Other arguments are filled in by
    name: image_shape, num_classes, model, train_size, steps_per_epoch, labelled_share, binarize.

    Attributes:
        NAME: for titles.
        METRICS: {metric: Metric}, in the order in which they are drawn; includes "loss".
        make_final_probes: (model, number of samples from the run options, data.binarize) -> probes measured once, on
            the test split at the end of training, or None.
        check_data: (data set, fields of model); raises ValueError for data that the family cannot learn from.
        decodes_per_example: (model, fields of objective) -> the number of images that the objective decodes per
            example; evaluation divides its batch size by it, and the memory check multiplies by it.
        baselines: (model, training images, fields of model and objective) -> {name: loss}, closed-form baselines.
        ledger: (model, numbers, split, pixels of an image, whether they are binary, variance of the split's images
            about the mean training image, fields of model) -> {what: value}: what the numbers measure, and their values
            in other conventions.
        make_figures: returns the family's `Figures`; their `arrays` are the results of `Probes.measure` on the test
            split.

    A family with several networks also has TERMS, the metrics whose gradients the summary shows for each network. If
    each network has its own optimizer, GROUPS lists the networks, which are the top-level entries of `params`.
    """

    NAME: str
    METRICS: Mapping[str, Metric]

    def make(self, image_shape: tuple[int, int, int], **fields) -> Model: ...
    def make_objective(self, model: Model, **fields) -> Objective: ...
    def make_probes(self, model: Model) -> Probes: ...
    def make_final_probes(self, model: Model, samples: int, binarize: str) -> Probes | None: ...
    def check_data(self, dataset: Dataset, **fields) -> None: ...
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
