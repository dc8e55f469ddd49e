"""The post's convolutional classifier (its Table 4), trained with the cross-entropy, optionally on shifted and rotated images.

loss = -sum_k t_k log p_k,    t = (1 - s) onehot(label) + s / classes,    p = softmax(logits)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax import figures
from vae_jax.augment import augment
from vae_jax.evaluation.classification import class_accuracy, confusion_matrix, expected_calibration_error
from vae_jax.families import Metric, Model, Probes
from vae_jax.families.labels import check_classes_present, check_labelled
from vae_jax.nn.description import describe
from vae_jax.nn.networks import PRECISIONS, Classifier, check_pooling, check_sizes, choose
from vae_jax.objectives import cross_entropy

NAME = "Classifier"
METRICS = {
    "loss": Metric("negative log-likelihood", "nats", "lower"),
    "accuracy": Metric("accuracy", "share", "higher"),
    "confidence": Metric("mean probability of the predicted class", "share"),
    "calibration_error": Metric("expected calibration error", "share", "lower"),
    "class_accuracy": Metric("accuracy on each class", "share"),
    "confusion": Metric("images by label and prediction", "images"),
}
PANELS = {name: METRICS[name].meaning for name in ("loss", "accuracy")}
MOST_CLASSES = 25  # with more classes, the confusion matrix is too large for the logs
MISTAKES = 24  # number of misclassified images in the figure


def make(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    features: tuple[int, ...] = (8, 16, 32),
    precision: str = "float32",
) -> Model:
    """The post's classifier, with pooling after every convolution but the last.

    Args:
        features: channels after each convolution.
        precision: "float32" or "bfloat16", for the computations of the layers; parameters, statistics and loss are
            float32.

    Raises ValueError if there are fewer than 2 classes, a size is below 1, or pooling leaves nothing of the image.
    """
    check_sizes(features=features)
    if num_classes < 2:
        raise ValueError(f"the classifier needs labels of at least 2 classes, but the data have {num_classes}")
    check_pooling(image_shape, len(features) - 1, "features")
    network = Classifier(num_classes, tuple(features), choose(PRECISIONS, "precision", precision))

    def probabilities(variables, image):
        logits: Any = network.apply(variables, image)
        return jax.nn.softmax(logits)

    def pooled_and_logits(variables, image):
        """The last convolution's channels, averaged over the image, and the logits."""
        logits, state = network.apply(variables, image, mutable=["intermediates"])
        return jnp.concatenate([state["intermediates"]["pooled"][0], logits], axis=-1)

    return Model(
        init=lambda key, pixel_mean=None: dict(network.init(key, jnp.zeros((1, *image_shape)))),
        probabilities=probabilities,
        num_classes=num_classes,
        features=pooled_and_logits,
        layers=lambda variables: {"classifier": describe(network, variables["params"], variables["batch_stats"])},
        apply=functools.partial(network.apply, mutable=["batch_stats"]),
    )


def make_objective(
    model: Model,
    image_shape: tuple[int, int, int],
    *,
    label_smoothing: float = 0.0,
    shift: int = 0,
    rotation: float = 0.0,
):
    """The cross-entropy. Only training augments the images and smooths the labels (Szegedy et al. 2016).

    Args:
        label_smoothing: share of a label that is spread evenly over the classes.
        shift: largest shift of training images, in pixels in each direction.
        rotation: largest rotation of training images, in degrees in either direction.

    Raises ValueError for a field out of range.
    """
    size = min(image_shape[:2])
    for name, value, holds, rule in [
        ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "lie in [0, 1)"),
        ("shift", shift, 0 <= shift < size, f"be from 0 to {size - 1} pixels"),
        ("rotation", rotation, 0 <= rotation <= 180, "lie in [0, 180] degrees"),
    ]:
        if not holds:
            raise ValueError(f"objective.{name} is {value}, but must {rule}")

    def objective(variables, batch, keys, train, step, axis_name=None):
        image = augment(batch.image, keys, shift, rotation) if train else batch.image
        logits, model_state = model.apply(variables, image, train, axis_name)
        smoothing = label_smoothing if train else 0.0
        correct = logits.argmax(axis=-1) == batch.label
        return {
            "loss": cross_entropy(logits, batch.label, smoothing),
            "accuracy": correct.astype(logits.dtype),
        }, model_state

    return objective


def make_probes(model: Model) -> Probes:
    """The prediction and confidence of each image; for a split the calibration error and the confusion matrix."""

    def measure(variables, batch, keys):
        probabilities = model.probabilities(variables, batch.image)
        return {
            "prediction": probabilities.argmax(axis=-1).astype(jnp.int32),
            "confidence": probabilities.max(axis=-1),
        }

    def reduce(arrays, split):
        prediction, confidence = arrays["prediction"], arrays["confidence"]
        correct = (prediction == split.label).astype(np.float32)
        numbers = {
            "confidence": float(confidence.mean(dtype=np.float64)),
            "calibration_error": expected_calibration_error(confidence, correct),
        }
        if model.num_classes <= MOST_CLASSES:
            confusion = confusion_matrix(split.label, prediction, model.num_classes)
            numbers["confusion"] = confusion.tolist()
            if confusion.sum(axis=1).all():  # otherwise the accuracy of an absent class is undefined
                numbers["class_accuracy"] = class_accuracy(confusion).tolist()
        return numbers

    return Probes(measure, reduce)


def make_final_probes(model: Model, samples: int, binarize: str) -> None:
    """None: the probes of each epoch measure everything."""


def check_data(dataset) -> None:
    """Raise ValueError if an image has no label, or a class has no training images."""
    check_labelled(dataset, ", but the classifier needs all labels")
    check_classes_present(dataset)


def decodes_per_example() -> int:
    """A classifier decodes nothing."""
    return 0


def baselines(model: Model, image: np.ndarray) -> dict:
    """Empty: there is no closed form."""
    return {}


def ledger(model: Model, numbers: dict, split: str, pixels: int, is_binary: bool) -> dict:
    """Empty: the classifier's numbers have only one convention."""
    return {}


def make_figures(model: Model, test, key, title: str):
    """Training curve, confusion matrix, the most confident mistakes."""

    def mistakes(arrays):
        prediction, confidence = arrays["prediction"], arrays["confidence"]
        wrong = np.flatnonzero(prediction != test.label)
        shown = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
        return figures.mistakes(
            test.image[shown] / np.float32(255),
            test.label[shown],
            prediction[shown],
            confidence[shown],
            f"Misclassified test images, most confident first: {title}",
        )

    def draw(variables, arrays, history, baselines):
        return {
            "training": lambda: figures.training_curve(
                history, baselines, f"Training progress: {title}", PANELS, "log"
            ),
            "confusion": lambda: figures.confusion(
                confusion_matrix(test.label, arrays["prediction"], model.num_classes),
                f"Confusion of classes: {title}",
            ),
            "mistakes": lambda: mistakes(arrays),
        }

    return draw
