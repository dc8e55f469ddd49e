"""A fit to the aggregate posterior, the mean of q(z | x) over images, made after training and used as a prior."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from vae_jax.batch import Batch
from vae_jax.likelihoods import HALF_LOG_2PI, distortion
from vae_jax.model import Model, Variables
from vae_jax.objectives import reparameterize
from vae_jax.priors import Prior, log_normal


def fit_gmm(z: Float[np.ndarray, "n latent"], components: int = 10, seed: int = 0) -> Prior:
    """A mixture of Gaussians with full covariances, fitted by scikit-learn to draws of q(z | x) over the training
    images; never more Gaussians than draws.

    Source: Ghosh et al. 2020, section 4, who sample from it instead of p(z). It can also replace p(z) in the bound.
    """
    from sklearn.mixture import GaussianMixture

    components = min(components, len(z))
    found = GaussianMixture(components, covariance_type="full", random_state=seed, reg_covar=1e-6).fit(z)
    weight, mean, root = (
        jnp.asarray(part, jnp.float32) for part in (found.weights_, found.means_, found.precisions_cholesky_)
    )
    log_det = jnp.sum(jnp.log(jnp.diagonal(root, axis1=1, axis2=2)), axis=-1)
    factor = jnp.asarray(np.linalg.cholesky(found.covariances_), jnp.float32)
    latent_dim = z.shape[1]

    def log_prob(variables, z: Float[Array, "*samples batch latent"]) -> Float[Array, "*samples batch"]:
        flat = z.reshape(-1, latent_dim)
        whitened = jnp.einsum("ncl,clk->nck", flat[:, None] - mean[None], root)
        log_component = (log_det - latent_dim * HALF_LOG_2PI)[None] - 0.5 * jnp.sum(whitened**2, axis=-1)
        return jax.nn.logsumexp(jnp.log(weight)[None] + log_component, axis=-1).reshape(z.shape[:-1])

    def sample(variables, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        which, noise = jax.random.split(key)
        chosen = jax.random.categorical(which, jnp.log(weight), shape=(count,))
        e = jax.random.normal(noise, (count, latent_dim))
        return mean[chosen] + jnp.einsum("nlk,nk->nl", factor[chosen], e)

    return Prior(init=lambda key: {}, log_prob=log_prob, sample=sample)


def draw_posterior(
    model: Model, variables: Variables, batch: Batch, keys: Key[Array, " batch"]
) -> Float[Array, "batch latent"]:
    """One z ~ q(z | x) per image."""
    return reparameterize(*model.encode(variables, batch.image), keys)[0]


def bound_under(
    model: Model, priors: dict[str, Prior], variables: Variables, batch: Batch, keys: Key[Array, " batch"]
) -> dict[str, Float[Array, " batch"]]:
    """Each image's negative ELBO under each prior, without the likelihood's constant.

    -log p(x | z) - log p(z) + log q(z | x), in nats. All priors use the same z, so the bounds differ only in log p(z).
    """
    mean, logvar = model.encode(variables, batch.image)
    z = reparameterize(mean, logvar, keys)
    common = distortion(model.likelihood, variables, model.decode_raw(variables, z), batch.image)
    common = common + log_normal(z, mean, logvar)
    return {name: (common - prior.log_prob(variables, z))[0] for name, prior in priors.items()}
