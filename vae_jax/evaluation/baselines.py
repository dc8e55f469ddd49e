"""Closed-form losses of simple models."""

import math
from collections.abc import Iterator

import numpy as np
import scipy
from jaxtyping import Float, UInt8

from vae_jax.batch import chunks, mean_image

LARGEST_MATRIX = 4096  # rows of the largest symmetric matrix for a full eigendecomposition
OVERSAMPLED, ITERATIONS = 10, 8  # parameters of `leading_eigenvalues`


def linear_vae_baselines(
    image: UInt8[np.ndarray, "n height width channel"], latent_dim: int, beta: float = 1.0, scale: float | None = 1.0
) -> dict[str, float]:
    """The losses of a collapsed model and of the best linear VAE on these training images.

    The decoder is a Gaussian with standard deviation `scale`, or with the optimal one for each model if `scale` is
    None. Losses omit ln(2 pi) / 2 per pixel, and for a given scale also ln(scale). A loss without a lower limit is left
    out: the optimal scale of a model that explains all of the variance is 0.
    """
    eigenvalues = covariance_eigenvalues(image, latent_dim)
    if scale is None:
        losses = (ppca_loss(eigenvalues, dim) for dim in (0, latent_dim))
    else:  # the squared error has weight 1 / scale^2, so this is the loss with KL weight beta scale^2, divided by scale^2
        losses = (linear_vae_loss(eigenvalues, dim, beta * scale**2) / scale**2 for dim in (0, latent_dim))
    return {name: loss for name, loss in zip(("collapsed model", "best linear VAE"), losses) if math.isfinite(loss)}


def ppca_loss(eigenvalues: Float[np.ndarray, " pixels"], latent_dim: int) -> float:
    """The lowest loss of a linear VAE that also learns its decoder's variance, in nats, without ln(2 pi) / 2 per pixel.

        1/2 (sum_{j <= latent_dim} ln l_j + (D - latent_dim) ln s^2 + D),    s^2 = the mean of the D - latent_dim others

    It is -inf if s^2 is 0 up to the rounding of the eigenvalues, whose covariance is summed in float32.

    Source: Tipping & Bishop 1999, section 3.2.
    """
    used, left = eigenvalues[:latent_dim], eigenvalues[latent_dim:]
    if not len(left) or left.mean() <= np.finfo(np.float32).eps * eigenvalues[0]:
        return -math.inf
    return float((np.sum(np.log(used)) + len(left) * np.log(left.mean()) + len(eigenvalues)) / 2)


def cross_entropy_baselines(
    image: UInt8[np.ndarray, "n height width channel"], rounded: bool = False, has_floor: bool = True
) -> dict[str, float]:
    """For a Bernoulli decoder: the loss of a collapsed model, and the floor, which no model beats.

        collapsed = sum_pixels H(mean pixel),    floor = mean_x sum_pixels H(x)

    H is the entropy of a binary pixel. The expected loss of any model on these images, binarized or grey, is at least
    the floor. `rounded` is for a model that sees each pixel rounded to 0 or 1. Where there is no floor it is
    left out: at beta below 1 the code can hold pixels that were drawn.
    """
    value, mean = np.arange(256) / 255, mean_image(image)
    if rounded:
        value = np.round(value)
        mean = np.sum([(part > 127).sum(axis=0) for part in chunks(image)], axis=0) / len(image)
    counts = np.sum([np.bincount(part.reshape(-1), minlength=256) for part in chunks(image)], axis=0)
    floor = {"floor: the entropy of the pixels": float(counts @ entropy(value) / len(image))}
    return {"collapsed model": float(entropy(mean).sum())} | (floor if has_floor else {})


def entropy(p: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """-p ln p - (1 - p) ln(1 - p), the entropy of a binary variable, in nats."""
    return scipy.special.entr(p) + scipy.special.entr(1 - p)


def histogram_loss(image: UInt8[np.ndarray, "n height width channel"]) -> float:
    """The entropy of each pixel's histogram, summed over pixels, in nats.

    No model without latents is better on these images; a logistic for each pixel cannot reach it.
    """
    counts = np.zeros((image[0].size, 256), np.int64)
    for part in chunks(image):
        for count, column in zip(counts, part.reshape(len(part), -1).T):
            count += np.bincount(column, minlength=256)
    return float(sum(scipy.special.entr(count / len(image)).sum() for count in counts))


def convert(value: float, source: str, pixels: int, constant: float = 0.0) -> dict[str, float]:
    """Convert the negative log-likelihood of an image, or a bound on it, to every convention.

        loss                           nats without the likelihood's constant: what training minimises
        nats                           loss + pixels * constant
        bits per dimension             nats / (pixels ln 2)
        bits per dequantised dimension 8 more: for a density on [0, 1] of pixels (k + u) / 256 with u uniform in [0, 1)

    Bits per dimension are defined for a mass on 0..255. For a density on [0, 1] only the dequantised bits are defined,
    and only if the images were dequantised. Source: Theis et al. 2016, section 3.1.

    Args:
        value: the number in the convention `source`.
        pixels: number of pixels of an image times channels.
        constant: nats per pixel, as in `Likelihood`.
    """
    bit = pixels * math.log(2)
    to_nats = {
        "loss": lambda value: value + pixels * constant,
        "nats": lambda value: value,
        "bits per dimension": lambda value: value * bit,
        "bits per dequantised dimension": lambda value: (value - 8) * bit,
    }
    if source not in to_nats:
        raise ValueError(f"there is no convention {source!r}: give one of {', '.join(to_nats)}")
    nats = to_nats[source](value)
    return {
        "loss": nats - pixels * constant,
        "nats": nats,
        "bits per dimension": nats / bit,
        "bits per dequantised dimension": nats / bit + 8,
    }


def covariance_eigenvalues(
    image: UInt8[np.ndarray, "n height width channel"], largest: int | None = None
) -> Float[np.ndarray, " pixels"]:
    """Eigenvalues of the covariance of images scaled to [0, 1], in descending order; their sum is the total variance.

    Up to 4,096 pixels they come from the pixels' covariance. For larger images they come from the Gram matrix of the
    images, padded with zeros. With more than 4,096 images as well, only the `largest` are computed. The others then
    share the rest of the variance evenly; `linear_vae_loss` and `ppca_loss` need only their sum.
    """
    flat = image.reshape(len(image), -1)
    mean = mean_image(flat).astype(np.float32)
    n, pixels = flat.shape
    if pixels <= LARGEST_MATRIX:
        second = np.zeros((pixels, pixels))
        for chunk in centred(flat, mean):
            second += chunk.T @ chunk
        return np.maximum(np.linalg.eigvalsh(second / n)[::-1], 0)
    if n <= LARGEST_MATRIX:
        rows = np.concatenate([*centred(flat, mean)])
        found = np.linalg.eigvalsh((rows @ rows.T).astype(np.float64) / n)[::-1]
        return np.maximum(np.pad(found, (0, pixels - n)), 0)
    found = leading_eigenvalues(flat, mean, min(largest or LARGEST_MATRIX, LARGEST_MATRIX))
    rest = max(mean_square_distance(image, mean) - found.sum(), 0.0) / (pixels - len(found))
    return np.append(found, np.full(pixels - len(found), rest))


def leading_eigenvalues(
    flat: UInt8[np.ndarray, "n pixels"], mean: Float[np.ndarray, " pixels"], count: int
) -> Float[np.ndarray, " count"]:
    """The largest eigenvalues of the covariance, by randomised subspace iteration (Halko et al. 2011, algorithm 4.4).

    scikit-learn's `randomized_svd` would hold all images in memory as floats; this function processes them in chunks.
    """
    basis = np.random.default_rng(0).standard_normal((flat.shape[1], count + OVERSAMPLED)).astype(np.float32)
    for _ in range(ITERATIONS):
        basis, _ = np.linalg.qr(basis)
        basis = np.sum([chunk.T @ (chunk @ basis) for chunk in centred(flat, mean)], axis=0)
    basis, _ = np.linalg.qr(basis)
    codes = np.zeros((basis.shape[1],) * 2)
    for chunk in centred(flat, mean):
        projected = chunk @ basis
        codes += projected.T @ projected
    return np.linalg.eigvalsh(codes / len(flat))[::-1][:count]


def mean_square_distance(
    image: UInt8[np.ndarray, "n height width channel"], centre: Float[np.ndarray, "*pixels"]
) -> float:
    """The mean over images, scaled to [0, 1], of sum_pixels (x - centre)^2. At their mean it is the total variance."""
    flat = image.reshape(len(image), -1)
    return float(sum(np.sum(chunk**2, dtype=np.float64) for chunk in centred(flat, centre.reshape(-1))) / len(flat))


def centred(flat: UInt8[np.ndarray, "n pixels"], centre: Float[np.ndarray, " pixels"]) -> Iterator[np.ndarray]:
    """Yield images scaled to [0, 1] minus `centre`, one chunk at a time."""
    for part in chunks(flat):
        yield part.astype(np.float32) / 255 - centre


def linear_rate_distortion(
    eigenvalues: Float[np.ndarray, " pixels"], latent_dim: int, beta: float
) -> tuple[float, float]:
    """KL and half the squared error of the best linear VAE with unit decoder variance and KL weight beta, in nats.

        rate = 1/2 sum_{l > beta} ln(l / beta),    distortion = 1/2 (beta #{l > beta} + sum of the other eigenvalues)

    over the latent_dim largest eigenvalues l (reverse water-filling). No linear VAE lies below the curve of these
    points. Source: Cover & Thomas 2006, section 10.3.3, applied to the solution of probabilistic PCA (Tipping & Bishop
    1999).
    """
    used = eigenvalues[:latent_dim][eigenvalues[:latent_dim] > beta]
    rate = 0.5 * np.sum(np.log(used / beta))
    return float(rate), float(0.5 * (beta * len(used) + eigenvalues.sum() - used.sum()))


def linear_vae_loss(eigenvalues: Float[np.ndarray, " pixels"], latent_dim: int, beta: float = 1.0) -> float:
    """The lowest loss that a linear VAE with unit decoder variance can reach, in nats, on the scale of the VAE's loss.

        sum over the latent_dim largest eigenvalues l > beta of beta/2 (1 + ln(l / beta)), plus half of all the others

    With latent_dim = 0 it is half the total variance, the loss of a collapsed model. Source: the
    maximum-likelihood solution of probabilistic PCA (Tipping & Bishop 1999) with its variance fixed at 1.
    """
    used = eigenvalues[:latent_dim][eigenvalues[:latent_dim] > beta]
    paid = beta / 2 * np.sum(1 + np.log(used / beta)) if beta else 0.0
    return float(paid + (eigenvalues.sum() - used.sum()) / 2)
