"""Several seeds trained in one program: mapping over them, and their mean with its interval."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import jax
import numpy as np
from jax import lax

from vae_jax.evaluation.statistics import mean_and_interval


def root_keys(seeds: range):
    """The root key of each seed, [seeds]."""
    return jax.vmap(jax.random.key)(np.array(seeds, np.uint32))


def map_seeds(function: Callable, seeded: int, seeds: int) -> Callable:
    """Map `function` over a leading seed axis of its first `seeded` arguments and of its results.

    For one seed the result is `function` itself. This is `jax.vmap`, but on the CPU the seeds run one after the other
    in the same program: that is faster there, and each seed ends with the bits that it has alone.
    """

    if seeds == 1:
        return function

    def mapped(*arguments):
        own, shared = arguments[:seeded], arguments[seeded:]
        if jax.default_backend() == "cpu":
            return lax.map(lambda own: function(*own, *shared), own)
        return jax.vmap(lambda *own: function(*own, *shared))(*own)

    return mapped


def first_seed(tree: Any, seeds: range) -> Any:
    """The first seed's part of arrays that have a leading seed axis if there are several seeds."""
    return tree if len(seeds) == 1 else jax.tree.map(itemgetter(0), tree)


def mean_metrics(arrays: dict[str, Any]) -> dict[str, float]:
    """The mean of each metric over the examples, weighted for a pair `(value, weight)`.

    A metric whose weights are all 0 is left out.
    """
    means = {}
    for name, values in arrays.items():
        if isinstance(values, tuple):
            values, weight = (np.float64(part) for part in values)
            if weight.sum() > 0:
                means[name] = float((values * weight).sum() / weight.sum())
        else:
            means[name] = float(values.mean(dtype=np.float64))
    return means


def reduce_seeds(reduce: Callable[[Any], dict[str, Any]], arrays: Any, seeds: range) -> dict[str, Any]:
    """`reduce(arrays)`; several seeds, on the arrays' leading axis, are reduced one by one and combined."""
    if len(seeds) == 1:
        return reduce(arrays)
    each = [reduce(jax.tree.map(itemgetter(i), arrays)) for i in range(len(seeds))]
    return combine_seeds(each, seeds)


def combine_seeds(each: Sequence[dict[str, Any]], seeds: range) -> dict[str, Any]:
    """Average numbers over the seeds; adds the half-width of the 95 % interval (Student's t) and each seed's number.

    Besides `loss` there are then `loss/interval`, `loss/seed0`, `loss/seed1`, ...
    """
    metrics = {}
    for name in each[0]:
        values = [numbers[name] for numbers in each if name in numbers]
        if len(values) < len(each):  # it is defined for some seeds only
            continue
        metrics[name], metrics[f"{name}/interval"] = mean_and_interval(values)
        metrics |= {f"{name}/seed{seed}": v for seed, v in zip(seeds, values)}
    return metrics
