"""Means and their confidence intervals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy


def mean_and_interval(values: Sequence[Any]) -> tuple[Any, Any]:
    """The mean of at least two independent values, and the half-width of its 95 % confidence interval (Student's t).

    Values may be nested lists of numbers; the statistics are then elementwise.
    """
    quantile = scipy.special.stdtrit(len(values) - 1, 0.975)
    return np.mean(values, axis=0).tolist(), (quantile * standard_error(values)).tolist()


def standard_error(values: Any) -> Any:
    """The elementwise standard error of the mean of independent values."""
    return np.std(values, axis=0, ddof=1, dtype=np.float64) / math.sqrt(len(values))
