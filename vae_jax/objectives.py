"""The equations of the objectives, per example and in nats; `families/` composes them.

An objective is a pure function

    objective(variables, batch, keys, train, step, axis_name=None) -> (metrics, model_state)

`metrics` is a dict of `[batch]` arrays, and `metrics["loss"]` is minimised. A metric with its own weight per example is
a pair `(value, weight)` of such arrays. Its values must be finite even where the weight is 0. In evaluation `step` is
None, and schedules have their final value. Steps and evaluation reduce the metrics; an objective never does.
"""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vae_jax.batch import Batch, named_key, weighted_mean
from vae_jax.likelihoods import distortion
from vae_jax.model import Model, Variables
from vae_jax.priors import log_normal


@runtime_checkable
class Objective(Protocol):
    """What a family's `make_objective` returns; see the module's docstring."""

    def __call__(
        self,
        variables: Any,
        batch: Batch,
        keys: Key[Array, " batch"],
        train: bool,
        step: Int[Array, ""] | int | None,
        axis_name: str | None = None,
    ) -> tuple[dict[str, Any], dict]: ...


def reparameterize(
    mean: Float[Array, "batch latent"],
    logvar: Float[Array, "batch latent"],
    keys: Key[Array, " batch"],
    samples: int = 1,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "samples batch latent"]:
    """z = mean + exp(logvar / 2) * e with e ~ N(0, 1): `samples` draws from each example's key stream "noise".

    The draws are numbered `first`, `first + 1`, ... Draw k depends only on the key and on k, so more samples never
    change the earlier ones. Source: Kingma & Welling 2013, section 2.4; the post, Figure 2.
    """

    def draw(k, key):
        return jax.random.normal(jax.random.fold_in(key, k), mean.shape[1:], mean.dtype)

    draws = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
    noise = draws(first + jnp.arange(samples), named_key(keys, "noise"))
    return mean[None] + jnp.exp(logvar / 2)[None] * noise


def negative_elbo(
    distortion: Float[Array, "samples batch"],
    kl: Float[Array, " batch"],
    beta: float | Float[Array, ""] = 1.0,
) -> Float[Array, " batch"]:
    """-ELBO = mean over samples of -log p(x | z) + beta KL(q(z | x) || p(z)).

    Source: Kingma & Welling 2013, equation 7; beta: Higgins et al. 2017.
    """
    return distortion.mean(axis=0) + beta * kl


def log_weights(
    model: Model,
    variables: Variables,
    raw: Float[Array, "samples batch h w c"],
    z: Float[Array, "samples batch latent"],
    mean: Float[Array, "batch latent"],
    logvar: Float[Array, "batch latent"],
    image: Float[Array, "batch height width channel"],
    beta: float | Float[Array, ""] = 1.0,
) -> Float[Array, "samples batch"]:
    """log w = log p(x | z) + beta (log p(z) - log q(z | x)) with raw = decode_raw(z), without the likelihood's
    constant.

    Source: Burda et al. 2016, equation 8.
    """
    ratio = model.prior.log_prob(variables, z) - log_normal(z, mean, logvar)
    return beta * ratio - distortion(model.likelihood, variables, raw, image)


def importance_weighted_bound(log_w: Float[Array, "samples batch"]) -> Float[Array, " batch"]:
    """-log(1/K sum_k w_k) with log w_k = log p(x, z_k) - log q(z_k | x), an upper bound on -log p(x).

    In expectation it does not increase with K, and K = 1 gives the negative ELBO.
    Source: Burda et al. 2016, equation 8.
    """
    return -(jax.nn.logsumexp(log_w, axis=0) - math.log(len(log_w)))


def doubly_reparameterized(
    at_fixed_z: Float[Array, "samples batch"],
    along_z: Float[Array, "samples batch"],
    beta: float | Float[Array, ""] = 1.0,
) -> Float[Array, " batch"]:
    """The importance-weighted bound with the doubly reparameterised gradient (DReG).

    The first two arguments are log w_k, with the weight `beta` of log q in them. In `at_fixed_z` the z are constants,
    so the gradient reaches only the parameters theta of p. In `along_z` everything except z is constant, so the
    gradient reaches the parameters phi of q only through z:

        theta: -sum_k u_k d log w_k / d theta
        phi:   -sum_k ((1 - beta) u_k + beta u_k^2) d log w_k / d z_k  d z_k / d phi

    with u = softmax(log w): the direct path of phi, beta u_k d log q / d phi, becomes beta (u_k - u_k^2) along z.
    Source: Tucker et al. 2019, equations 7 and 8, for beta 1.
    """
    u = jax.lax.stop_gradient(jax.nn.softmax(at_fixed_z, axis=0))
    surrogate = -jnp.sum(u * at_fixed_z + ((1 - beta) * u + beta * u**2) * along_z, axis=0)
    return surrogate + jax.lax.stop_gradient(importance_weighted_bound(at_fixed_z) - surrogate)


def free_bits_kl(
    kl: Float[Array, "batch latent"],
    weight: Float[Array, " batch"],
    least: float,
    axis_name: str | None = None,
) -> Float[Array, " batch"]:
    """The KL with free bits: each latent costs at least `least` on average, sum_j max(least, mean_i KL_ij).

    An example pays sum_j (KL_ij if mean_i KL_ij > least else least). The mean over the batch, across all devices, has
    the value and the gradient of the sum above. Source: Kingma et al. 2016, appendix C.8.
    """
    paid = jax.lax.stop_gradient(weighted_mean(kl, weight, axis_name)) > least
    return jnp.sum(jnp.where(paid, kl, least), axis=-1)


def marginalize_label(
    by_label: Float[Array, "classes batch"], log_q: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """U(x) = sum_y q(y | x) (L(x, y) + log q(y | x)), a bound on -log p(x) if L(x, y) bounds -log p(x, y).

    Summing out the label differs from evaluating L once at a soft label. Source: Kingma et al. 2014, equation 7.
    """
    return jnp.sum(jnp.exp(log_q) * (by_label.T + log_q), axis=-1)


def discriminator_loss(
    on_data: Float[Array, " batch"], on_fakes: Float[Array, "kinds batch"]
) -> Float[Array, " batch"]:
    """-1/2 log D(x) - 1/2 mean_k log(1 - D(fake_k)) from the logits of D; ln 2 if D is 1/2 everywhere.

    All kinds of fakes together have weight 1/2, so the optimal D is still 1/2 when fakes and data are
    indistinguishable. Source: Goodfellow et al. 2014, equation 1; Larsen et al. 2016.
    """
    return 0.5 * (jax.nn.softplus(-on_data) + jax.nn.softplus(on_fakes).mean(axis=0))


def generator_loss(on_fakes: Float[Array, "kinds batch"], saturating: bool) -> Float[Array, " batch"]:
    """mean_k -log D(fake_k) from the logits of D, or if `saturating` mean_k log(1 - D(fake_k)).

    The saturating form is -2 times the fake term of `discriminator_loss`. Source: Goodfellow et al. 2014, section 3.
    """
    by_kind = -jax.nn.softplus(on_fakes) if saturating else jax.nn.softplus(-on_fakes)
    return by_kind.mean(axis=0)


def warm_up(weight: float, step: Int[Array, ""] | int | None, warmup_steps: int) -> float | Float[Array, ""]:
    """A linear warm-up, weight (t + 1) / warmup_steps at step t and at most `weight`; `weight` itself in evaluation.

    Source: Sonderby et al. 2016, section 2.3.
    """
    if step is None or not warmup_steps:
        return weight
    return weight * jnp.minimum(1.0, (step + 1) / warmup_steps)


def cross_entropy(
    logits: Float[Array, "batch classes"],
    label: Int[Array, " batch"],
    label_smoothing: float = 0.0,
) -> Float[Array, " batch"]:
    """-sum_k t_k log p_k with t = (1 - s) onehot(label) + s / classes, s = `label_smoothing` and p = softmax(logits).

    Source of the label smoothing: Szegedy et al. 2016, section 7.
    """
    classes = logits.shape[-1]
    target = jax.nn.one_hot(label, classes)
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing / classes
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
