"""Means and their intervals."""

import math
from collections.abc import Sequence

import numpy as np
import scipy.special
from jaxtyping import Float


def mean_and_interval(
    values: Sequence[float] | Float[np.ndarray, " n"],
) -> tuple[float, float]:
    """The mean, and the half-width of its 95 % interval (Student's t), of at least two independent values."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    quantile = scipy.special.stdtrit(len(values) - 1, 0.975)
    return float(np.mean(values)), float(quantile * error)
