"""Accuracy and calibration of a classifier."""

import numpy as np
from jaxtyping import Float, Int


def expected_calibration_error(
    confidence: Float[np.ndarray, " n"],
    correct: Float[np.ndarray, " n"],
    bins: int = 15,
) -> float:
    """Expected calibration error: sum over bins of |accuracy - mean confidence|, weighted by the bin's share of the
    examples.

    The bins ((i - 1) / bins, i / bins] are of equal width. Source: Guo et al. 2017, equation 3.
    """
    position = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(position, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def confusion_matrix(
    label: Int[np.ndarray, " n"], prediction: Int[np.ndarray, " n"], num_classes: int
) -> Int[np.ndarray, "label prediction"]:
    """Counts of examples by label (rows) and prediction (columns)."""
    pairs = np.bincount(label * num_classes + prediction, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def class_accuracy(
    confusion: Int[np.ndarray, "label prediction"],
) -> Float[np.ndarray, " label"]:
    """The accuracy on the examples of each class; NaN for a class without examples."""
    total = confusion.sum(axis=1)
    return np.divide(confusion.diagonal(), total, out=np.full(len(total), np.nan), where=total > 0)
