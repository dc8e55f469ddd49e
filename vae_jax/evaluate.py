"""Per-example arrays over a split, brought to the host once; what is computed of them is NumPy."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import scipy.special
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt8

from vae_jax.data import Split
from vae_jax.objectives import make_batch
from vae_jax.parallel import Devices
from vae_jax.steps import make_eval_step

BATCH_SIZE = 256  # bounds the memory of evaluation; the result does not depend on it


def make_evaluate(
    objective: Callable,
    split: Split,
    map_seeds: Callable = lambda function, seeded: function,
    batch_size: int = BATCH_SIZE,
    devices: Devices | None = None,
) -> Callable[[dict, Key[Array, "..."]], dict]:
    """`evaluate(variables, key) -> {name: [n] array}` on the host, for every example of the split.

    The split is placed on the devices once, by default on one, and divided over them; what the last batches lack is
    filled up with weight 0 and cut off again. `map_seeds` as in `train.Job`: with several seeds, variables and key have
    them in front, and the arrays are [seeds, n].
    """
    devices = devices or Devices(1)
    size = len(split.label)
    batch_size = min(batch_size, -(-size // devices.count))
    batches = -(-size // (batch_size * devices.count))
    index = np.arange(devices.count * batches * batch_size)
    index = index.reshape(devices.count, batches, batch_size)
    weight = (index < size).astype(np.float32)
    index, weight, image, label = devices.place(
        (np.minimum(index, size - 1), weight, *split)
    )
    eval_step = make_eval_step(objective)

    def run(variables, key, index, weight, image, label, shard):
        def one_batch(rows):
            rows, weight = rows
            return eval_step(
                variables, make_batch(image[rows], label[rows], weight, rows), key
            )

        arrays = {
            name: values.reshape(-1, *values.shape[2:])
            for name, values in lax.map(
                one_batch, (index[shard], weight[shard])
            ).items()
        }
        if devices.axis_name is not None:
            arrays = lax.all_gather(arrays, devices.axis_name, tiled=True)
        return {name: values[:size] for name, values in arrays.items()}

    run = devices.compile(map_seeds(run, 2))

    def evaluate(variables, key):
        return jax.device_get(run(variables, key, index, weight, image, label))

    return evaluate


def mean_metrics(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean of each array over the examples. Whole numbers, such as predicted classes, are no metrics."""
    return {
        name: float(values.mean(dtype=np.float64))
        for name, values in arrays.items()
        if not np.issubdtype(values.dtype, np.integer)
    }


def over_seeds(arrays: dict[str, np.ndarray], first_seed: int) -> dict[str, float]:
    """`mean_metrics` of [n] arrays; of [seeds, n] arrays also each seed's, and the half-width of the mean's 95 % interval.

    The interval is Student's; beside `loss` there are then `loss/interval`, `loss/seed0`, ...
    """
    if next(iter(arrays.values())).ndim == 1:
        return mean_metrics(arrays)
    return combine_seeds(
        [mean_metrics(dict(zip(arrays, row))) for row in zip(*arrays.values())],
        first_seed,
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


def mean_and_interval(
    values: Sequence[float] | Float[np.ndarray, " n"],
) -> tuple[float, float]:
    """The mean, and the half-width of its 95 % interval (Student's t), of at least two independent values."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    quantile = scipy.special.stdtrit(len(values) - 1, 0.975)
    return float(np.mean(values)), float(quantile * error)


def expected_calibration_error(
    confidence: Float[np.ndarray, " n"],
    correct: Float[np.ndarray, " n"],
    bins: int = 15,
) -> float:
    """How far confidence is from accuracy: sum over bins of |accuracy - mean confidence|, each times its share of the examples.

    The bins ((i - 1) / bins, i / bins] are of equal width. Source: Guo et al. 2017, equation 3.
    """
    position = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(position, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def confusion_matrix(
    label: Int[np.ndarray, " n"], prediction: Int[np.ndarray, " n"], num_classes: int
) -> Int[np.ndarray, "label prediction"]:
    """How many examples of each class (rows) were taken for each class (columns)."""
    pairs = np.bincount(label * num_classes + prediction, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def class_accuracy(
    confusion: Int[np.ndarray, "label prediction"],
) -> Float[np.ndarray, " label"]:
    """The share of each class's examples that were recognised; NaN for a class without examples."""
    total = confusion.sum(axis=1)
    return np.divide(
        confusion.diagonal(), total, out=np.full(len(total), np.nan), where=total > 0
    )


def active_units(mean: Float[np.ndarray, "n latent"]) -> int:
    """How many latents the encoder uses: those whose posterior mean varies by more than 0.01 over the data.

    Source: Burda et al. 2016, section 5.2.
    """
    return int(np.sum(mean.var(axis=0) > 0.01))


def covariance_eigenvalues(
    image: UInt8[np.ndarray, "n height width channel"],
) -> Float[np.ndarray, " pixels"]:
    """Eigenvalues of the covariance of images scaled to [0, 1], in descending order; their sum is the total variance."""
    flat = image.reshape(len(image), -1)
    mean = (flat.mean(axis=0, dtype=np.float64) / 255).astype(np.float32)
    second = np.zeros((flat.shape[1], flat.shape[1]))
    for start in range(0, len(flat), 4096):
        chunk = flat[start : start + 4096].astype(np.float32) / 255 - mean
        second += chunk.T @ chunk
    return np.maximum(np.linalg.eigvalsh(second / len(flat))[::-1], 0)


def linear_vae_loss(
    eigenvalues: Float[np.ndarray, " pixels"], latent_dim: int, beta: float = 1.0
) -> float:
    """The lowest loss that a linear VAE with unit decoder variance can reach, in nats, on the scale of `elbo`.

        sum over the latent_dim largest eigenvalues l > beta of beta/2 (1 + ln(l / beta)), plus half of the others

    With latent_dim = 0 it is half the total variance: the loss of a collapsed model. Source: the
    maximum-likelihood solution of probabilistic PCA (Tipping & Bishop 1999) with its variance held at 1.
    """
    used = eigenvalues[:latent_dim][eigenvalues[:latent_dim] > beta]
    paid = beta / 2 * np.sum(1 + np.log(used / beta)) if beta else 0.0
    return float(paid + (eigenvalues.sum() - used.sum()) / 2)
