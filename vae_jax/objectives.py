"""What is minimised, per example, in nats.

An objective is a pure function

    objective(variables, batch, keys, train, step, axis_name=None) -> (metrics, model_state)

`metrics` is a dict of `[batch]` arrays, and `metrics["loss"]` is minimised. A metric that counts some examples more than
others is a pair `(value, weight)` of such arrays. `step` is None in evaluation: schedules then stand at their end.
Steps and evaluation reduce the metrics; an objective never does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vae_jax.augment import augment
from vae_jax.batch import Batch


def reparameterize(
    mean: Float[Array, "batch latent"],
    logvar: Float[Array, "batch latent"],
    keys: Key[Array, " batch"],
    samples: int = 1,
) -> Float[Array, "samples batch latent"]:
    """z = mean + exp(logvar / 2) * e with e ~ N(0, 1), drawn `samples` times.

    Source: Kingma & Welling 2013, section 2.4; the post, Figure 2.
    """

    def draw(key):
        return jax.random.normal(key, (samples, *mean.shape[1:]), mean.dtype)

    noise = jax.vmap(draw, out_axes=1)(keys)
    return mean[None] + jnp.exp(logvar / 2)[None] * noise


def kl_to_standard_normal(
    mean: Float[Array, "batch latent"], logvar: Float[Array, "batch latent"]
) -> Float[Array, " batch"]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) = -1/2 sum(1 + logvar - mean^2 - exp(logvar)), in nats.

    Source: Kingma & Welling 2013, appendix B; the post's formula lacks the factor -1/2.
    """
    return -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), axis=-1)


def half_squared_error(
    image: Float[Array, "batch height width channel"],
    mean: Float[Array, "*samples batch height width channel"],
) -> Float[Array, "*samples batch"]:
    """1/2 sum((image - mean)^2) over pixels: -log N(image; mean, 1) less its constant D/2 ln(2 pi), in nats."""
    image = image.reshape((1,) * (mean.ndim - 4) + image.shape)
    return 0.5 * jnp.sum((image - mean) ** 2, axis=(-3, -2, -1))


def elbo(
    variables: Any,
    batch: Batch,
    keys: Key[Array, " batch"],
    train: bool,
    step: Int[Array, ""] | int | None,
    axis_name: str | None = None,
    *,
    encode: Callable,
    decode: Callable,
    beta: float = 1.0,
) -> tuple[dict[str, Float[Array, " batch"]], dict]:
    """The negative ELBO of a unit-variance Gaussian decoder, less D/2 ln(2 pi), from one sample of z an image.

        loss = 1/2 ||x - decode(z)||^2 + beta * KL(q(z | x) || N(0, 1)),    z ~ q(z | x) = N(mean, exp(logvar))

    Args:
        encode: (variables, image) -> (mean, logvar), each [batch, latent].
        decode: (variables, z) -> the mean of p(x | z), of the image's shape; z may have leading axes.
        beta: weight of the KL (Higgins et al. 2017); 1 is the ELBO, and the post's loss.

    Returns:
        `loss`, `reconstruction` and `kl` of each example, in nats; and no model state.
    """
    del train, step, axis_name
    mean, logvar = encode(variables, batch.image)
    z = reparameterize(mean, logvar, keys)
    reconstruction = half_squared_error(batch.image, decode(variables, z)).mean(axis=0)
    kl = kl_to_standard_normal(mean, logvar)
    return {
        "loss": reconstruction + beta * kl,
        "reconstruction": reconstruction,
        "kl": kl,
    }, {}


def cross_entropy(
    variables: Any,
    batch: Batch,
    keys: Key[Array, " batch"],
    train: bool,
    step: Int[Array, ""] | int | None,
    axis_name: str | None = None,
    *,
    apply: Callable,
    label_smoothing: float = 0.0,
    shift: int = 0,
    rotation: float = 0.0,
) -> tuple[dict[str, Float[Array, " batch"] | Int[Array, " batch"]], dict]:
    """The negative log-likelihood of each label, in nats.

        loss = -sum_k t_k log p_k,    t = (1 - label_smoothing) onehot(label) + label_smoothing / classes

    Only training augments the images and smooths the labels (Szegedy et al. 2016).

    Args:
        apply: (variables, image, train, axis_name) -> (logits [batch, classes], model_state).
        label_smoothing: share of a label that is spread evenly over the classes.
        shift: pixels by which training images are moved at most, in each direction.
        rotation: degrees by which they are rotated at most, either way.

    Returns:
        `loss` and `accuracy` of each example, in evaluation also the `prediction` and its probability, `confidence`; and
        the model state.
    """
    del step
    image = augment(batch.image, keys, shift, rotation) if train else batch.image
    logits, model_state = apply(variables, image, train, axis_name)
    log_p = jax.nn.log_softmax(logits)
    target = jax.nn.one_hot(batch.label, logits.shape[-1])
    if train:
        target = (1 - label_smoothing) * target + label_smoothing / logits.shape[-1]
    prediction = logits.argmax(axis=-1).astype(jnp.int32)
    metrics = {
        "loss": -jnp.sum(target * log_p, axis=-1),
        "accuracy": (prediction == batch.label).astype(logits.dtype),
    }
    if not train:
        metrics |= {"prediction": prediction, "confidence": jnp.exp(log_p.max(axis=-1))}
    return metrics, model_state


OBJECTIVES = {"elbo": elbo, "cross_entropy": cross_entropy}
