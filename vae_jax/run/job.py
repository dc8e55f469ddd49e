"""The job that a config describes: everything that a training needs."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vae_jax.batch import Dataset, Split, example_keys, make_batch, mixed_order
from vae_jax.data import epoch_order
from vae_jax.evaluation.baselines import mean_square_distance
from vae_jax.evaluation.gradients import gradient_routing, routing_table
from vae_jax.evaluation.likelihood import SAMPLES_AT_ONCE
from vae_jax.families import Family, Metric, Model, Probes
from vae_jax.nn.layer_table import BATCH, layer_table, output_shapes
from vae_jax.objectives import Objective
from vae_jax.run.config import RunOptions, fill_in
from vae_jax.run.devices import Devices
from vae_jax.run.evaluate import make_evaluate
from vae_jax.run.seeds import first_seed, map_seeds, root_keys
from vae_jax.run.summary import About
from vae_jax.steps import init_state, make_run_steps, make_train_step

ROUTED = 256  # most images for the summary's table of gradients
FINAL_PIXELS = 1000 * 784  # pixels of the test images for the final probes, whatever the size of an image


class Job(NamedTuple):
    """Everything that the loop needs; `session.build` makes it."""

    title: str
    seeds: range
    epochs: int
    batch_size: int
    dataset: Dataset
    model: Model
    init: Callable  # key -> variables
    objective: Objective
    probes: Probes
    final_probes: Probes | None  # run on the first test images at the end
    prepare: Callable  # as in `make_train_step`
    decodes_per_example: int
    optimizer: optax.GradientTransformation
    ema_decay: float
    best: tuple[str, str] | None  # the metric that marks the best checkpoint, and which direction is better
    baselines: Callable[[], Mapping[str, float]]
    ledger: Callable[[Mapping[str, Any], str], Mapping[str, Any]]  # numbers, split -> what they measure
    figures: Callable  # the result of `Family.make_figures`
    metadata: dict  # stored with each checkpoint
    run: RunOptions
    groups: tuple[str, ...] = ()  # networks, each with its own optimizer
    terms: tuple[str, ...] = ()  # metrics whose gradients the summary shows by network
    metrics: Mapping[str, Metric] = {}  # the family's
    patience: int = 0  # epochs without improvement of `best` after which the training ends; 0: never

    @property
    def steps_per_epoch(self) -> int:
        """Only full batches are trained on; the examples left over differ from epoch to epoch."""
        return len(self.dataset.splits["train"].label) // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def steps_per_call(self) -> int:
        """The most steps in one call of the compiled program; a call ends with the epoch at the latest."""
        return min(self.run.steps_per_call, self.steps_per_epoch)

    def map_seeds(self, function: Callable, seeded: int) -> Callable:
        """`map_seeds` over the job's seeds."""
        return map_seeds(function, seeded, len(self.seeds))

    def root(self):
        """The root key; with several seeds, one key per seed, [seeds]."""
        if len(self.seeds) == 1:
            return jax.random.key(self.seeds[0])
        return root_keys(self.seeds)

    def order(self, epoch: int) -> np.ndarray:
        """The order of the training examples in an epoch, [size]; with several seeds [seeds, size]."""
        of_data = self.dataset.splits["train"].label, self.dataset.shuffle
        orders = [
            epoch_order(seed, epoch, *of_data, self.batch_size, self.dataset.labelled_per_batch) for seed in self.seeds
        ]
        return orders[0] if len(orders) == 1 else np.stack(orders)

    def evaluate_finally(self, variables: Any, key: Any, devices: Devices) -> dict[str, Any]:
        """Run the final probes on some test images."""
        if self.final_probes is None:
            return {}
        image, label = self.dataset.splits["test"]
        few = mixed_order(label)[: max(1, FINAL_PIXELS // image[0].size)]
        few = Split(image[few], label[few])
        shares = (self.seeds, SAMPLES_AT_ONCE, devices, self.prepare)
        numbers, _ = make_evaluate(lambda *_: ({}, {}), self.final_probes, few, *shares)(variables, key)
        return {f"test/{name}": value for name, value in numbers.items()}

    def make_route(self) -> Callable[[Any], list[str]]:
        """`route(variables)` returns a Markdown table of which loss term trains which network, for the first seed.

        It is measured on the images with which training starts. It is [] for a family of one network.
        """
        if not self.terms:
            return lambda variables: []
        own = self._replace(seeds=self.seeds[:1])
        image, label = self.dataset.splits["train"]
        first = own.order(1)[: min(self.batch_size, ROUTED)]
        rows = jnp.asarray(first)

        @jax.jit
        def routing(variables, image, label):
            keys = example_keys(own.root(), None, rows)
            batch = make_batch(image, label, jnp.ones(len(rows)), rows)
            return gradient_routing(self.objective, variables, self.prepare(batch, keys), keys, self.terms)

        def route(variables):
            found = jax.device_get(routing(first_seed(variables, self.seeds), image[first], label[first]))
            return routing_table(found, self.terms) if len(found["loss"]) > 1 else []

        return route

    def about(self) -> About:
        """The summary's facts about metrics, data and layers; the objective is traced once, and nothing is computed."""

        def evaluate(variables, image, label):
            rows = jnp.arange(BATCH)
            keys = example_keys(jax.random.key(0), None, rows)
            batch = self.prepare(make_batch(image, label, jnp.ones(BATCH), rows), keys)
            return self.objective(variables, batch, keys, False, None)

        variables = jax.eval_shape(self.init, jax.random.key(0))
        split = self.dataset.splits["train"]
        shapes = (jax.ShapeDtypeStruct((BATCH, *part.shape[1:]), part.dtype) for part in split)
        images = {name: len(split.label) for name, split in self.dataset.splits.items()}
        layers = layer_table(variables["params"], output_shapes(evaluate, variables, *shapes))
        return About(self.metrics, images, layers)

    def evaluate_on(self, split: str, devices: Devices | None = None) -> Callable:
        """`make_evaluate` for one of the data set's splits, by default on one device."""
        devices = devices or Devices(1, self.metadata["config"]["model"].get("precision"))
        return make_evaluate(
            self.objective,
            self.probes,
            self.dataset.splits[split],
            self.seeds,
            self.decodes_per_example,
            devices,
            self.prepare,
        )


class Programs(NamedTuple):
    """The compiled programs of a job on some devices; each is compiled at its first call."""

    make_state: Callable  # root key -> the initial state
    run_steps: Callable  # the result of `steps.make_run_steps`
    evaluations: dict[str, Callable]  # for each split that is not trained on, the result of `make_evaluate`


def make_programs(job: Job, devices: Devices) -> Programs:
    """Make the programs of a job."""

    def make_state(root):
        return init_state(job.init(root), job.optimizer, root, job.ema_decay)

    train_step = make_train_step(
        *(job.objective, job.optimizer, devices.axis_name, job.ema_decay, job.prepare, job.groups)
    )
    run_steps = make_run_steps(train_step, job.batch_size, job.steps_per_call, devices.count)
    return Programs(
        jax.jit(job.map_seeds(make_state, 1)),
        devices.compile(job.map_seeds(run_steps, 2), training=True),
        {name: job.evaluate_on(name, devices) for name in job.dataset.splits if name != "train"},
    )


def check_data(family: Family, dataset: Dataset, batch_size: int, patience: int, **fields) -> int:
    """Check the data and return the batch size; 0 chooses at most 64, and at least four steps per epoch.

    `fields` are those of the model. Raises ValueError if the data do not suffice.
    """
    fill_in(family.check_data, dataset=dataset, **fields)
    label, each = dataset.splits["train"].label, dataset.labelled_per_batch
    size, known = len(label), int(np.sum(label >= 0))
    batch_size = batch_size or max(1, min(64, size // 4))
    if batch_size > size:
        raise ValueError(f"batch_size is {batch_size}, but there are {size} training images: give at most {size}")
    rest = size - known
    if each and not (0 < each <= known and 0 < batch_size - each <= rest):
        raise ValueError(
            f"data.labelled_per_batch is {each}, but a batch of {batch_size} must hold 1 to {known} labelled "
            f"and 1 to {rest} unlabelled images"
        )
    if patience and "validation" not in dataset.splits:
        raise ValueError(
            f"patience is {patience}, which needs validation images: give data.validation, or leave patience at 0"
        )
    return batch_size


def describe_data(dataset: Dataset) -> dict:
    """What a model must know about its data."""
    return {"image_shape": dataset.image_shape, "num_classes": dataset.num_classes}


def fingerprint(dataset: Dataset) -> dict:
    """The sizes of the splits, and a SHA-256 of all their images and labels."""
    total = hashlib.sha256()
    for split in dataset.splits.values():
        total.update(np.ascontiguousarray(split.image))
        total.update(np.ascontiguousarray(split.label))
    sizes = {name: len(split.label) for name, split in dataset.splits.items()}
    return sizes | {"sha256": total.hexdigest()}


def describe_batches(dataset: Dataset, batch_size: int) -> dict:
    """What an objective may ask about its batches; `labelled_share` is the mean share of labelled examples in a batch."""
    label, each = dataset.splits["train"].label, dataset.labelled_per_batch
    return {
        "train_size": len(label),
        "steps_per_epoch": len(label) // batch_size,
        "labelled_share": each / batch_size if each else float(np.mean(label >= 0)),
        "binarize": dataset.binarize,
    }


def describe_numbers(
    family: Family, known: Mapping, dataset: Dataset, pixel_mean: np.ndarray, numbers: Mapping, split: str
) -> dict[str, Any]:
    """The family's ledger for the numbers of a split."""
    spread = mean_square_distance(dataset.splits[split].image, pixel_mean)
    of_data = {"pixels": known["image"][0].size, "is_binary": dataset.is_binary(split), "variance": spread}
    return fill_in(family.ledger, **{**known, **of_data, "numbers": numbers, "split": split})
