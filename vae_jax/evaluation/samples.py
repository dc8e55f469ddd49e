"""How close generated images are to real ones in a classifier's features, and whether they are copies.

`real` is the first argument of every function that takes both. The order matters: precision is recall with real and
fake exchanged. The values depend on the number of images, so compare them only at equal numbers, and with a floor, the
same measure between two sets of real images.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float, Int
from scipy.spatial.distance import cdist

ROWS = 1000  # rows of a distance matrix in memory at once
IMAGES_PER_DIMENSION = 10  # fewest images per dimension for a covariance
PRECISION_K, COVERAGE_K = 3, 5  # nearest neighbours, as published


def frechet_distance(real: Float[np.ndarray, "n feature"], fake: Float[np.ndarray, "m feature"]) -> float:
    """The squared Frechet distance between Gaussians fitted to both: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The trace of the root is computed from the symmetric (S1^(1/2) S2 S1^(1/2))^(1/2), in float64. Source: Heusel et al.
    2017, equation 6, there with Inception features.

    Raises ValueError for fewer than ten images per dimension.
    """
    for name, features in (("real", real), ("generated", fake)):
        least = IMAGES_PER_DIMENSION * features.shape[1]
        if len(features) < least:
            raise ValueError(
                f"{len(features)} {name} images are fewer than the {least} that {features.shape[1]} features need"
            )
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    gap = real.mean(axis=0) - fake.mean(axis=0)
    first, second = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (real, fake))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    both = np.linalg.eigvalsh(root @ second @ root)
    return float(gap @ gap + np.trace(first) + np.trace(second) - 2 * np.sqrt(np.maximum(both, 0)).sum())


class Manifold(NamedTuple):
    """Points, and the distance from each point to its k-th nearest neighbour."""

    points: Float[np.ndarray, "n feature"]
    radius: dict[int, Float[np.ndarray, " n"]]  # by k


def manifold(points: Float[np.ndarray, "n feature"]) -> Manifold:
    """Compute the `Manifold` of the points. Raises ValueError if there are too few."""
    if len(points) <= COVERAGE_K:
        raise ValueError(f"{len(points)} images are fewer than the {COVERAGE_K + 1} that {COVERAGE_K} neighbours need")
    points = points.astype(np.float64)
    nearest = [np.partition(rows, (PRECISION_K, COVERAGE_K), axis=1) for _, rows in distances(points, points)]
    ordered = np.concatenate([rows[:, [PRECISION_K, COVERAGE_K]] for rows in nearest])  # entry 0 is the point itself
    return Manifold(points, {PRECISION_K: ordered[:, 0], COVERAGE_K: ordered[:, 1]})


def distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, Float[np.ndarray, "rows m"]]]:
    """Yield the matrix of Euclidean distances in blocks of rows."""
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, cdist(a[rows], b)


def precision_recall_density_coverage(real: Manifold, fake: Manifold) -> dict[str, float]:
    """How close generated images are to real ones, and how many real ones they cover. Balls reach to the k-th
    neighbour.

        precision   share of fakes inside a ball around a real image (k = 3, closed balls)
        recall      share of real images inside a ball around a fake (k = 3, closed balls)
        density     mean number of balls of real images around a fake, divided by k (k = 5, open balls)
        coverage    share of real images with a fake in their ball (k = 5, open balls)

    For two samples of the same distribution, the expected density is 1 and the expected coverage is
    1 - prod_{i<=5} (n - i) / (n + m - i). Sources: Kynkaanniemi et al. 2019, there with 50,000 images; Naeem et al.
    2020, there with 10,000.
    """
    precise, near = np.zeros(len(fake.points), bool), np.zeros(len(fake.points))
    recalled, covered = np.zeros(len(real.points), bool), np.zeros(len(real.points), bool)
    for rows, distance in distances(real.points, fake.points):
        precise |= (distance <= real.radius[PRECISION_K][rows, None]).any(axis=0)
        recalled[rows] = (distance <= fake.radius[PRECISION_K]).any(axis=1)
        inside = distance < real.radius[COVERAGE_K][rows, None]
        near += inside.sum(axis=0)
        covered[rows] = inside.any(axis=1)
    return {
        "precision": float(precise.mean()),
        "recall": float(recalled.mean()),
        "density": float(near.mean() / COVERAGE_K),
        "coverage": float(covered.mean()),
    }


def nearest(
    points: Float[np.ndarray, "n feature"], training: Float[np.ndarray, "train feature"]
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The distance from each point to the nearest training image, and the index of that image."""
    from sklearn.neighbors import NearestNeighbors

    training, points = training.astype(np.float64), points.astype(np.float64)
    which = (
        NearestNeighbors(n_neighbors=1, algorithm="brute").fit(training).kneighbors(points, return_distance=False)[:, 0]
    )
    return np.linalg.norm(points - training[which], axis=1), which


def sharpness(image: Float[np.ndarray, "n height width channel"]) -> float:
    """The mean over images of the variance of the Laplacian, the four neighbours minus four times the pixel, off the
    border.

    Blur lowers it and noise raises it; compare it with the value for real images. Source: Pech-Pacheco et al. 2000; for
    generated images Tolstikhin et al. 2018, section 4.
    """
    grey = image.astype(np.float64).mean(axis=-1)
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float((around - 4 * inner).var(axis=(1, 2)).mean())


def memorisation(fake: Float[np.ndarray, " n"], test: Float[np.ndarray, " m"]) -> dict[str, float]:
    """Whether generated images lie closer to the training images than test images do, from their nearest distances.

        nearest_training_distance      median over fakes, and over test images
        rank_test                      P(a fake is closer than a test image), 1/2 for equal distributions; its z-score
        closer_than_1_percent          share of fakes closer than the 1 % quantile of the test images

    For copies of training images, `rank_test` and `closer_than_1_percent` are 1. Source: the data-copying test of
    Meehan et al. 2020, with a single cell.
    """
    found = scipy.stats.mannwhitneyu(test, fake, method="asymptotic")
    n, m = len(fake), len(test)
    deviation = np.sqrt(n * m * (n + m + 1) / 12)
    return {
        "nearest_training_distance": float(np.median(fake)),
        "nearest_training_distance/of_the_split": float(np.median(test)),
        "nearest_training_distance/rank_test": float(found.statistic / (n * m)),
        "nearest_training_distance/rank_test_z": float((found.statistic - n * m / 2) / deviation),
        "nearest_training_distance/closer_than_1_percent": float(np.mean(fake < np.quantile(test, 0.01))),
    }
