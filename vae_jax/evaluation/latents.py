"""The information in a model's latents.

q(z) is the aggregate posterior, the mean of q(z | x_n) over the N images of a split. The KL divergence from the prior
decomposes into two parts (Hoffman & Johnson 2016), or into three for a prior with independent latents (Chen et al.
2018):

    mean KL(q(z | x) || p(z)) = I(n; z) + KL(q(z) || p(z)) = I(n; z) + total correlation + sum_j KL(q(z_j) || p(z_j))
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from vae_jax.evaluation.statistics import standard_error

LOG_2PI = math.log(2 * math.pi)
CHUNK = 256  # codes evaluated under all posteriors at once, to bound the memory
FEWEST_MAPPED = 5
ACTIVE = 0.01  # variance of the posterior mean


def active_units(mean: Float[np.ndarray, "n latent"], threshold: float = ACTIVE) -> int:
    """The number of latents whose posterior mean varies over the data: Var_x(E_q[z_j | x]) >= threshold.

    Source: Burda et al. 2016, section 5.2.
    """
    return int(np.sum(mean.var(axis=0, dtype=np.float64) >= threshold))


@jax.jit
def log_aggregate_posterior(
    z: Float[Array, "chunk latent"], mean: Float[Array, "n latent"], logvar: Float[Array, "n latent"]
) -> tuple[Float[Array, " chunk"], Float[Array, "chunk latent"]]:
    """log q(z), and log q(z_j) for each latent, with q the mean of N(mean_n, exp(logvar_n)) over n."""

    def add(joint, latent):
        z, mean, logvar = latent
        log_q = -0.5 * ((z[:, None] - mean[None]) ** 2 * jnp.exp(-logvar)[None] + (logvar + LOG_2PI)[None])
        return joint + log_q, jax.nn.logsumexp(log_q, axis=1)

    joint, marginal = lax.scan(add, jnp.zeros((len(z), len(mean))), (z.T, mean.T, logvar.T))
    return jax.nn.logsumexp(joint, axis=1) - math.log(len(mean)), marginal.T - math.log(len(mean))


def decompose_kl(
    z: Float[np.ndarray, "n latent"],
    mean: Float[np.ndarray, "n latent"],
    logvar: Float[np.ndarray, "n latent"],
    kl: Float[np.ndarray, " n"] | None,
    kl_by_latent: Float[np.ndarray, "n latent"] | None = None,
) -> dict[str, Any]:
    """Mutual information of image and code, KL(q(z) || p(z)), total correlation, and KL(q(z_j) || p(z_j)) of each
    latent.

        I(n; z) = mean_n [log q(z_n | x_n) - log q(z_n)],    z_n ~ q(z | x_n)

    Each term is at most ln N, reported as `mutual_information/most`, so the estimate cannot show more information. The
    mixture q(z) is over all N images; over a batch, the limit would be the log of the batch size.

    Args:
        z: one draw from each q(z | x_n).
        kl: KL(q(z | x_n) || p(z)) of each image, in nats, or an estimate of it; None if the images do not share one
            p(z), so that KL(q(z) || p(z)) is not defined.
        kl_by_latent: the KL of each latent, if the latents of the prior are independent.
    """
    parts = [log_aggregate_posterior(z[i : i + CHUNK], mean, logvar) for i in range(0, len(z), CHUNK)]
    log_q, log_q_by_latent = (np.concatenate(part).astype(np.float64) for part in zip(*parts))
    log_q_given_x = -0.5 * ((z - mean).astype(np.float64) ** 2 * np.exp(-logvar) + logvar + LOG_2PI)
    information = log_q_given_x.sum(axis=1) - log_q
    numbers = {
        "mutual_information": information.mean(),
        "mutual_information/most": math.log(len(z)),
        "total_correlation": np.mean(log_q - log_q_by_latent.sum(axis=1)),
    }
    if kl is not None:
        numbers["aggregate_kl"] = np.mean(kl, dtype=np.float64) - information.mean()
    if len(z) > 1:
        numbers["mutual_information/standard_error"] = standard_error(information)
    if kl_by_latent is not None:
        by_latent = (log_q_given_x - log_q_by_latent).mean(axis=0)
        numbers["aggregate_kl_by_latent"] = kl_by_latent.mean(axis=0, dtype=np.float64) - by_latent
    return {name: np.asarray(value).tolist() for name, value in numbers.items()}


def probe_labels(
    train: tuple[Float[np.ndarray, "n latent"], Int[np.ndarray, " n"]],
    test: tuple[Float[np.ndarray, "m latent"], Int[np.ndarray, " m"]],
    neighbours: int = 15,
) -> dict[str, float]:
    """How well codes predict the labels: accuracy of multinomial logistic regression and of `neighbours` nearest
    neighbours.

    Both are fitted to the training codes, scaled to unit variance for the regression, and scored on the test codes.
    """
    from sklearn.neighbors import KNeighborsClassifier

    nearest = KNeighborsClassifier(min(neighbours, len(train[1])))
    return {
        "linear_probe_accuracy": linear_probe(train, test),
        "neighbour_accuracy": float(nearest.fit(*train).score(*test)),
    }


def linear_probe(
    train: tuple[Float[np.ndarray, "n latent"], Int[np.ndarray, " n"]],
    test: tuple[Float[np.ndarray, "m latent"], Int[np.ndarray, " m"]],
) -> float:
    """The test accuracy of multinomial logistic regression on codes scaled to unit variance."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(probe.fit(*train).score(*test))


def tsne_plane(mean: Float[np.ndarray, "n latent"]) -> Float[np.ndarray, "n 2"]:
    """A t-SNE map, in which near codes stay near; far distances have no meaning. Raises ValueError for fewer than five
    codes.

    Source: van der Maaten & Hinton 2008. scikit-learn's version, initialised with PCA (randomly for one latent), with
    seed 0.
    """
    from sklearn.manifold import TSNE

    if len(mean) < FEWEST_MAPPED:
        raise ValueError(f"there are {len(mean)} codes, but t-SNE needs at least {FEWEST_MAPPED}")
    perplexity = min(30.0, (len(mean) - 1) / 3)
    start = "pca" if mean.shape[1] > 1 else "random"
    return TSNE(init=start, perplexity=perplexity, random_state=0).fit_transform(mean)


class Axes(NamedTuple):
    """The first two principal axes of a set of vectors."""

    centre: Float[np.ndarray, " latent"]
    direction: Float[np.ndarray, "2 latent"]
    deviation: Float[np.ndarray, " 2"]  # standard deviation along each axis
    share: Float[np.ndarray, " 2"]  # share of the variance along each axis

    def project(self, values: Float[np.ndarray, "n latent"]) -> Float[np.ndarray, "n 2"]:
        """Coordinates in the plane of the axes."""
        return (values - self.centre[None]) @ self.direction.T


def principal_axes(values: Float[np.ndarray, "n latent"]) -> Axes:
    """The first two principal axes of vectors with at least two entries; of one vector, both have length 0."""
    centre = values.mean(axis=0, dtype=np.float64)
    from_centre = np.concatenate([values - centre[None], np.zeros((1, len(centre)))])  # at least two rows
    _, singular, directions = np.linalg.svd(from_centre, full_matrices=False)
    variance = singular**2 / len(values)
    share = variance[:2] / max(variance.sum(), np.finfo(float).tiny)
    return Axes(centre, directions[:2], np.sqrt(variance[:2]), share)
