"""What simple models reach, in closed form."""

import numpy as np
from jaxtyping import Float, UInt8

LARGEST_COVARIANCE = 4096  # pixels; the baselines of larger images are left out


def linear_vae_baselines(
    image: UInt8[np.ndarray, "n height width channel"], latent_dim: int, beta: float
) -> dict[str, float]:
    """The losses of a collapsed model and of the best linear VAE on these training images; {} if they are too large."""
    if image[0].size > LARGEST_COVARIANCE:
        return {}
    eigenvalues = covariance_eigenvalues(image)
    return {
        "collapsed model": linear_vae_loss(eigenvalues, 0, beta),
        "best linear VAE": linear_vae_loss(eigenvalues, latent_dim, beta),
    }


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


def linear_vae_loss(eigenvalues: Float[np.ndarray, " pixels"], latent_dim: int, beta: float = 1.0) -> float:
    """The lowest loss that a linear VAE with unit decoder variance can reach, in nats, on the scale of the VAE's loss.

        sum over the latent_dim largest eigenvalues l > beta of beta/2 (1 + ln(l / beta)), plus half of all the others

    With latent_dim = 0 it is half the total variance: the loss of a collapsed model. Source: the
    maximum-likelihood solution of probabilistic PCA (Tipping & Bishop 1999) with its variance held at 1.
    """
    used = eigenvalues[:latent_dim][eigenvalues[:latent_dim] > beta]
    paid = beta / 2 * np.sum(1 + np.log(used / beta)) if beta else 0.0
    return float(paid + (eigenvalues.sum() - used.sum()) / 2)
