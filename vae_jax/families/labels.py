"""Shared by the families for few labels: the sum over labels, and the metrics on labelled images."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import log_softmax
from jaxtyping import Array, Float, Int

from vae_jax.families import Metric, reports
from vae_jax.model import Model
from vae_jax.objectives import cross_entropy, marginalize_label

METRICS = reports.METRICS | {
    "loss": Metric("loss: U(x), or L(x, y) + alpha' CE(y, q(y | x)) for a labelled training image", "nats", "lower"),
    "bound": Metric("U(x), a bound on -log p(x) with the label summed out", "nats", "lower"),
    "cross_entropy": Metric("cross-entropy of the labelled images", "nats", "lower"),
    "accuracy": Metric("accuracy on the labelled images", "share", "higher"),
}


def of_labelled(logits: Float[Array, "batch classes"], label: Int[Array, " batch"]) -> dict[str, tuple]:
    """Cross-entropy and accuracy, with weight 0 for an image without a label."""
    labelled = (label >= 0).astype(logits.dtype)
    correct = (logits.argmax(axis=-1) == label).astype(logits.dtype)
    return {"cross_entropy": (cross_entropy(logits, jnp.maximum(label, 0)), labelled), "accuracy": (correct, labelled)}


def known_or_summed_out(
    by_label: Float[Array, "classes batch"],
    logits: Float[Array, "batch classes"],
    label: Int[Array, " batch"],
    gradient_weight: Any = 1.0,
) -> Float[Array, " batch"]:
    """L(x, y) of a labelled image, U(x) of an unlabelled one, with p(y) = 1 / C. `by_label` is -log p(x | y) or a bound
    on it.

    `gradient_weight` scales the gradient with respect to `logits`.
    """
    by_label = by_label + math.log(len(by_label))
    fixed = lax.stop_gradient(log_softmax(logits))
    log_q = fixed + gradient_weight * (log_softmax(logits) - fixed)
    known = jnp.take_along_axis(by_label, jnp.maximum(label, 0)[None], axis=0)[0]
    return jnp.where(label >= 0, known, marginalize_label(by_label, log_q))


def weight_of_labels(alpha: float, labelled_share: float) -> float:
    """The weight of a labelled image's cross-entropy, alpha / (share of labelled images in a batch).

    The division makes the total weight of the cross-entropy independent of that share. Source: Kingma et al. 2014,
    section 3.1.2, with alpha 0.1. Raises ValueError for a negative alpha.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"objective.alpha is {alpha}, but must be at least 0")
    return alpha / labelled_share if labelled_share else 0.0


def check_classes(num_classes: int, update: Any = None, likelihood: str = "") -> None:
    """Raise ValueError for data with fewer than 2 classes, and for a likelihood with its variance fitted to a batch."""
    if num_classes < 2:
        raise ValueError(f"labels of at least 2 classes are needed, but the data have {num_classes}: give labels")
    if update is not None:
        raise ValueError(
            f"model.likelihood is {likelihood!r}, whose variance needs a single reconstruction per image: take another"
        )


def check_data(dataset) -> None:
    """Accept unlabelled training images. Raises ValueError if all are, and for an unlabelled image in another split."""
    check_labelled(dataset, ", but accuracy needs all", but="train")
    if (dataset.splits["train"].label < 0).all():
        raise ValueError("no training image has a label, but this family needs some: raise data.labelled")


def check_labelled(dataset, need: str, but: str = "") -> None:
    """Raise ValueError, which ends with `need`, if an image outside the split `but` has no label."""
    for name, split in dataset.splits.items():
        unlabelled = int(np.sum(split.label < 0))
        if unlabelled and name != but:
            raise ValueError(f"{unlabelled} of {len(split.label)} {name} images have no label{need}")


def check_classes_present(dataset) -> None:
    """Raise ValueError if a class has no training images."""
    counts = np.bincount(dataset.splits["train"].label, minlength=dataset.num_classes)
    if 0 in counts:
        raise ValueError(
            f"there is no training image labelled {np.argmin(counts)}, though labels go up to {len(counts) - 1}: "
            "number the classes without gaps, and give each class training images"
        )


def decodes_per_example(model: Model) -> int:
    """One image per class."""
    return model.num_classes


def baselines(model, image: np.ndarray) -> dict:
    """Empty: there is no closed form."""
    return {}
