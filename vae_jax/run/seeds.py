"""Several seeds trained in one program: mapping over them, and their mean with its interval."""

from collections.abc import Callable, Sequence
from operator import itemgetter

import jax
import numpy as np
from jax import lax

from vae_jax.evaluation.statistics import mean_and_interval


def root_keys(seeds: range):
    """The root key of each seed, [seeds]."""
    return jax.vmap(jax.random.key)(np.array(seeds, np.uint32))


def map_seeds(function: Callable, seeded: int) -> Callable:
    """`function` for several seeds, which its first `seeded` arguments and its results have in front.

    `jax.vmap`; on the CPU in one program too, but one seed after the other. There it is faster, and the numbers are to
    the last bit those of each seed alone.
    """

    def mapped(*arguments):
        own, shared = arguments[:seeded], arguments[seeded:]
        if jax.default_backend() == "cpu":
            return lax.map(lambda own: function(*own, *shared), own)
        return jax.vmap(lambda *own: function(*own, *shared))(*own)

    return mapped


def mean_metrics(arrays: dict) -> dict[str, float]:
    """The mean of each metric over the examples; of a pair `(value, weight)` the weighted mean.

    A metric whose weights are all 0 is left out. Integers, such as predicted classes, are no metrics.
    """
    means = {}
    for name, values in arrays.items():
        if isinstance(values, tuple):
            values, weight = (np.float64(part) for part in values)
            if weight.sum() > 0:
                means[name] = float((values * weight).sum() / weight.sum())
        elif not np.issubdtype(values.dtype, np.integer):
            means[name] = float(values.mean(dtype=np.float64))
    return means


def over_seeds(arrays: dict, first_seed: int) -> dict[str, float]:
    """`mean_metrics` of [n] arrays; of [seeds, n] arrays also each seed's, and the half-width of the mean's 95 % interval.

    The interval is Student's; beside `loss` there are then `loss/interval`, `loss/seed0`, ...
    """
    leaves = jax.tree.leaves(arrays)
    if leaves[0].ndim == 1:
        return mean_metrics(arrays)
    seeds = range(len(leaves[0]))
    return combine_seeds(
        [mean_metrics(jax.tree.map(itemgetter(i), arrays)) for i in seeds], first_seed
    )


def combine_seeds(seeds: Sequence[dict], first_seed: int) -> dict[str, float]:
    """Of the numbers of several seeds their mean, its interval, and each seed's, named as in `over_seeds`."""
    metrics = {}
    for name in seeds[0]:
        values = [of_seed[name] for of_seed in seeds]
        metrics[name], metrics[f"{name}/interval"] = mean_and_interval(values)
        for seed, value in enumerate(values, first_seed):
            metrics[f"{name}/seed{seed}"] = value
    return metrics
