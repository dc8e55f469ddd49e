"""A config -> the job that it describes."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from vae_jax import generate
from vae_jax.batch import Dataset, first_of_each_label, make_batch
from vae_jax.data import load
from vae_jax.evaluation.baselines import covariance_eigenvalues, linear_vae_loss
from vae_jax.evaluation.classification import (
    class_accuracy,
    confusion_matrix,
    expected_calibration_error,
)
from vae_jax.nn.networks import MODELS
from vae_jax.objectives import OBJECTIVES
from vae_jax.optimizers import OPTIMIZERS, averaging
from vae_jax.run.config import (
    argument_docs,
    bind,
    choose,
    derive,
    fields,
    make_title,
    nearest,
)
from vae_jax.run.loop import Job, RunOptions
from vae_jax.steps import fixed_key, make_eval_step

LARGEST_COVARIANCE = 4096  # pixels; for larger images the yardsticks are left out
MISTAKES = 24  # misclassified images that are shown


def build(config: Mapping[str, Any]) -> Job:
    """The job that a config describes.

    Each section is passed by keyword to one function: `data.load`, the model, objective and optimizer that its `name`
    selects, `train.RunOptions`. Raises ValueError or OSError, in one line that names the field, for whatever is wrong.
    """
    job = bind("", make_job, config)()
    check_model_fits(job, jax.local_devices()[0])
    if job.metric not in (known := metric_names(job)):
        raise ValueError(
            f"unknown metric best {job.metric!r}: {nearest(job.metric, known)}"
        )
    return job._replace(about=job.about | {"config": config})


def make_job(
    *,
    seed: int,
    seeds: int,
    epochs: int,
    batch_size: int,
    best: str,
    data: Mapping,
    model: Mapping,
    objective: Mapping,
    optimizer: Mapping,
    run: Mapping,
) -> Job:
    """`build`, the config's fields being the arguments.

    Args:
        seed: of initial weights, noise and order of the examples; a run is a function of it.
        seeds: how many seeds, from `seed` on, are trained together in one program.
        epochs: passes over the training images.
        batch_size: images in one training step.
        best: the validation metric that marks the best checkpoint, where data.validation holds images out. A run cannot
            change it as it continues.
    """
    for name, value in [
        ("seeds", seeds),
        ("epochs", epochs),
        ("batch_size", batch_size),
    ]:
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if not 0 <= seed <= 2**32 - seeds:
        raise ValueError(f"seed is {seed}, but must lie in [0, 2**32 - seeds]")
    # Every section is checked before the first one acts: a slip in the last is told before data are read.
    load_data = bind("data", load, data)
    make_model = choose("model", model, MODELS)
    loss = choose("objective", objective, OBJECTIVES)
    averaged = {
        name: optimizer[name] for name in fields(averaging) if name in optimizer
    }
    average = bind("optimizer", averaging, averaged)()
    others = {name: optimizer[name] for name in optimizer if name not in averaged}
    make_optimizer = choose("optimizer", others, OPTIMIZERS)
    options = bind("run", RunOptions, run)()
    make_parts = parts_of(model["name"], objective["name"])

    dataset = load_data()
    check_fits(dataset, jax.local_devices()[0])
    size = len(dataset.splits["train"].label)
    if batch_size > size:
        raise ValueError(
            f"batch_size is {batch_size}, but there are {size} training images: give at most {size}"
        )
    network = derive(
        make_model, image_shape=dataset.image_shape, num_classes=dataset.num_classes
    )
    title = make_title(network, data["name"])
    loss, report = make_parts(network, loss, dataset, jax.random.key(seed), title)
    return Job(
        title=title,
        seed=seed,
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
        dataset=dataset,
        init=jax.jit(  # so that it is traced once
            lambda key: network.init(
                fixed_key(key, "init"), jnp.zeros((1, *dataset.image_shape))
            )
        ),
        objective=loss,
        optimizer=make_optimizer(epochs * (size // batch_size), batch_size),
        average=average,
        report=report,
        about={
            "image_shape": dataset.image_shape,
            "num_classes": dataset.num_classes,
            "data": fingerprint(dataset),
        },
        metric=best,
        run=options,
    )


def fingerprint(dataset: Dataset) -> dict:
    """The sizes of the splits, and a SHA-256 of all their images and labels."""
    total = hashlib.sha256()
    for split in dataset.splits.values():
        total.update(np.ascontiguousarray(split.image))
        total.update(np.ascontiguousarray(split.label))
    sizes = {name: len(split.label) for name, split in dataset.splits.items()}
    return sizes | {"sha256": total.hexdigest()}


def metric_names(job: Job) -> list[str]:
    """The metrics of the job's objective; nothing is computed."""
    key = jax.random.key(0)
    variables = jax.eval_shape(job.init, key)

    def metrics(variables, image, label):
        batch = make_batch(image, label, jnp.ones(1), jnp.zeros(1, int))
        return make_eval_step(job.objective)(variables, batch, key)

    example = [array[:1] for array in job.dataset.splits["train"]]
    shapes = jax.eval_shape(metrics, variables, *example)
    return [name for name, leaf in shapes.items() if leaf.dtype == jnp.float32]


def describe() -> list[tuple[str, str]]:
    """Every config field, and what the function that takes it says of it."""
    sections = {
        "": [make_job],
        "data": [load],
        "model": MODELS.values(),
        "objective": OBJECTIVES.values(),
        "optimizer": [averaging, *OPTIMIZERS.values()],
        "run": [RunOptions],
    }
    described = {}
    for section, functions in sections.items():
        if section in CHOICES:
            described[f"{section}.name"] = f"one of {', '.join(CHOICES[section])}"
        for function in functions:
            docs = argument_docs(function)
            for name, parameter in fields(function).items():
                if parameter.annotation is not Mapping:
                    field = f"{section}.{name}" if section else name
                    described.setdefault(field, docs.get(name, ""))
    return list(described.items())


def parts_of(model: str, objective: str) -> Callable:
    """The entry of `PARTS` for a model and its objective. Raises ValueError for two that do not fit."""
    if (model, objective) not in PARTS:
        fitting = ", ".join(other for name, other in PARTS if name == model)
        raise ValueError(
            f"objective.name {objective} does not fit model.name {model}: give {fitting}"
        )
    return PARTS[model, objective]


def check_fits(dataset: Dataset, device) -> None:
    """Raise ValueError if the images are larger than the device's memory; the CPU tells no limit."""
    needed = sum(split.image.nbytes for split in dataset.splits.values())
    limit = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    if needed > limit:
        raise ValueError(
            f"the images take {needed / 2**30:.1f} GiB, but {device.device_kind} has {limit / 2**30:.1f} GiB: data sets "
            "are held on the device, so take fewer or smaller images"
        )


def check_model_fits(job: Job, device) -> None:
    """Raise ValueError if weights, gradients and Adam's two averages are more than the device's memory, or the host's."""
    leaves = jax.tree.leaves(jax.eval_shape(job.init, jax.random.key(0)))
    numbers = sum(math.prod(leaf.shape) for leaf in leaves)
    needed = 4 * 4 * numbers * job.seeds
    free = psutil.virtual_memory().available
    limit = (device.memory_stats() or {}).get("bytes_limit", free)
    if needed > limit:
        raise ValueError(
            f"training {job.seeds} models of {numbers:,} weights takes {needed / 2**30:.1f} GiB, but {device.device_kind} has "
            f"{limit / 2**30:.1f} GiB: make the model smaller, or seeds fewer"
        )


def vae_parts(
    network, loss: Callable, dataset: Dataset, root: jax.Array, title: str
) -> tuple[Callable, Callable]:
    """The objective and the report of a VAE: the training curve, reconstructions and prior samples (Figures 3-5)."""
    beta = loss.keywords["beta"]
    if not 0 <= beta < math.inf:
        raise ValueError(f"objective.beta is {beta}, but must be at least 0")
    encode = functools.partial(network.apply, method="encode")
    decode = functools.partial(network.apply, method="decode")
    test = dataset.splits["test"]
    shown = first_of_each_label(test.label)
    image, label = test.image[shown] / np.float32(255), test.label[shown]
    reconstruct = jax.jit(functools.partial(generate.reconstruct, encode, decode))
    sample = jax.jit(
        lambda variables: decode(
            variables,
            generate.prior(fixed_key(root, "samples"), 100, network.latent_dim),
        )
    )

    @functools.cache
    def yardsticks():
        if np.prod(dataset.image_shape) > LARGEST_COVARIANCE:
            return {}
        eigenvalues = covariance_eigenvalues(dataset.splits["train"].image)
        return {
            "collapsed model": linear_vae_loss(eigenvalues, 0, beta),
            "best linear VAE": linear_vae_loss(eigenvalues, network.latent_dim, beta),
        }

    def report(variables, arrays, history):
        def draw():
            # Here and below: Matplotlib can wait until the first steps are taken.
            from vae_jax import figures

            return {
                "training": figures.training_curve(
                    history, yardsticks(), f"Training progress: {title}"
                ),
                "reconstructions": figures.reconstructions(
                    image,
                    np.asarray(reconstruct(variables, image)),
                    label,
                    f"Test images and their reconstructions: {title}",
                ),
                "samples": figures.image_grid(
                    np.asarray(sample(variables)),
                    f"Images decoded from z ~ N(0, 1): {title}",
                ),
            }

        return draw, yardsticks()

    return functools.partial(loss, encode=encode, decode=decode), report


def classifier_parts(
    network, loss: Callable, dataset: Dataset, root: jax.Array, title: str
) -> tuple[Callable, Callable]:
    """The objective and the report of a classifier: training curve, confusion matrix, its most confident mistakes."""
    del root
    fields, size = loss.keywords, min(dataset.image_shape[:2])
    for name, holds, rule in [
        ("label_smoothing", 0 <= fields["label_smoothing"] < 1, "lie in [0, 1)"),
        ("shift", 0 <= fields["shift"] < size, f"be from 0 to {size - 1} pixels"),
        ("rotation", 0 <= fields["rotation"] <= 180, "lie in [0, 180] degrees"),
    ]:
        if not holds:
            raise ValueError(f"objective.{name} is {fields[name]}, but must {rule}")
    for name, split in dataset.splits.items():
        unlabelled = np.sum(split.label < 0)
        if unlabelled:
            raise ValueError(
                f"{unlabelled} of {len(split.label)} {name} images have no label, but the classifier needs all labels"
            )
        counts = np.bincount(split.label, minlength=dataset.num_classes)
        if name == "train" and 0 in counts:
            raise ValueError(
                f"there is no training image labelled {np.argmin(counts)}, though labels go up to {len(counts) - 1}: number the classes without gaps"
            )
    test = dataset.splits["test"]

    def report(variables, arrays, history):
        prediction, confidence = (
            arrays["test"][name] for name in ("prediction", "confidence")
        )
        correct = prediction == test.label
        counts = confusion_matrix(test.label, prediction, dataset.num_classes)

        def draw():
            from vae_jax import figures

            wrong = np.flatnonzero(~correct)
            shown = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
            return {
                "training": figures.training_curve(
                    history,
                    {},
                    f"Training progress: {title}",
                    {"loss": "negative log-likelihood", "accuracy": "accuracy"},
                    loss_scale="log",
                ),
                "confusion": figures.confusion(
                    counts, f"Confusion of classes: {title}"
                ),
                "mistakes": figures.mistakes(
                    test.image[shown] / np.float32(255),
                    test.label[shown],
                    prediction[shown],
                    confidence[shown],
                    f"Misclassified test images, most confident first: {title}",
                ),
            }

        numbers = {
            "expected calibration error": expected_calibration_error(
                confidence, correct.astype(np.float32)
            )
        }
        for label, accuracy in enumerate(class_accuracy(counts)):
            if np.isfinite(accuracy):
                numbers[f"accuracy of class {label}"] = float(accuracy)
        return draw, numbers

    apply = functools.partial(network.apply, mutable=["batch_stats"])
    return functools.partial(loss, apply=apply), report


PARTS = {
    ("vae", "elbo"): vae_parts,
    ("classifier", "cross_entropy"): classifier_parts,
}
CHOICES = {"model": MODELS, "objective": OBJECTIVES, "optimizer": OPTIMIZERS}
