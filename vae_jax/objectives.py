"""What is minimised, per example, in nats.

An objective is a pure function

    objective(variables, batch, keys, train, axis_name=None) -> (metrics, model_state)

where metrics is a dict of `[batch]` arrays, of which `metrics["loss"]` is differentiated. Steps and evaluation reduce
them; nothing here does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, Key, UInt8


class Batch(NamedTuple):
    """Examples of one step."""

    image: Float[Array, "batch height width channel"]  # in [0, 1]
    label: Int[Array, " batch"]  # -1 = unlabelled
    weight: Float[Array, " batch"]  # 0 = padding
    index: Int[Array, " batch"]  # position in the data set


def make_batch(
    image: UInt8[Array, "batch height width channel"], label, weight, index
) -> Batch:
    """A batch of float images in [0, 1] from stored ones in 0..255."""
    return Batch(image.astype(jnp.float32) / 255, label, weight, index)


def example_keys(
    key: Key[Array, ""], step: Int[Array, ""] | int, index: Int[Array, " batch"]
) -> Key[Array, " batch"]:
    """One key an example, a pure function of (root key, step, example): the same however a batch is divided."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def reparameterize(
    mean: Float[Array, "batch latent"],
    logvar: Float[Array, "batch latent"],
    keys: Key[Array, " batch"],
) -> Float[Array, "batch latent"]:
    """z = mean + exp(logvar / 2) * e with e ~ N(0, 1) (Kingma & Welling 2013, section 2.4; the post, Figure 2)."""
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(
        keys
    )
    return mean + jnp.exp(logvar / 2) * noise


def kl_to_standard_normal(
    mean: Float[Array, "batch latent"], logvar: Float[Array, "batch latent"]
) -> Float[Array, " batch"]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) = -1/2 sum(1 + logvar - mean^2 - exp(logvar)), in nats.

    Source: Kingma & Welling 2013, appendix B; the post's formula lacks the factor -1/2.
    """
    return -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), axis=-1)


def half_squared_error(
    image: Float[Array, "batch ..."], mean: Float[Array, "batch ..."]
) -> Float[Array, " batch"]:
    """1/2 sum((image - mean)^2) over pixels: -log N(image; mean, 1) less its constant D/2 ln(2 pi), in nats."""
    return 0.5 * jnp.sum((image - mean) ** 2, axis=tuple(range(1, image.ndim)))


def elbo(
    variables: Any,
    batch: Batch,
    keys: Key[Array, " batch"],
    train: bool,
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
        decode: (variables, z) -> the mean of p(x | z), of the image's shape.
        beta: weight of the KL (Higgins et al. 2017); 1 is the ELBO, and the post's loss.

    Returns:
        `loss`, `reconstruction` and `kl` of each example, in nats; and no model state.
    """
    del train, axis_name
    mean, logvar = encode(variables, batch.image)
    z = reparameterize(mean, logvar, keys)
    reconstruction = half_squared_error(batch.image, decode(variables, z))
    kl = kl_to_standard_normal(mean, logvar)
    return {
        "loss": reconstruction + beta * kl,
        "reconstruction": reconstruction,
        "kl": kl,
    }, {}


def rotate(
    image: Float[Array, "batch height width channel"], degrees: Float[Array, " batch"]
) -> Float[Array, "batch height width channel"]:
    """Each image turned counterclockwise about its centre, bilinearly; what comes from outside is 0."""
    _, height, width, _ = image.shape
    row, column = jnp.mgrid[:height, :width]
    down, right = row - (height - 1) / 2, column - (width - 1) / 2

    def turn(image, angle):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        sources = [
            cos * down + sin * right + (height - 1) / 2,
            cos * right - sin * down + (width - 1) / 2,
        ]
        return jax.vmap(lambda plane: map_coordinates(plane, sources, 1), -1, -1)(image)

    return jax.vmap(turn)(image, jnp.deg2rad(degrees))


def translate(
    image: Float[Array, "batch height width channel"],
    offset: Int[Array, "batch 2"],
    furthest: int,
) -> Float[Array, "batch height width channel"]:
    """Each image moved by its (down, right) pixels, exactly, none above `furthest`; what comes from outside is 0."""
    margin = (furthest, furthest)
    padded = jnp.pad(image, ((0, 0), margin, margin, (0, 0)))

    def cut(padded, offset):
        down, right = furthest - offset
        return lax.dynamic_slice(padded, (down, right, 0), image.shape[1:])

    return jax.vmap(cut)(padded, offset)


def augment(
    image: Float[Array, "batch height width channel"],
    keys: Key[Array, " batch"],
    shift: int,
    rotation: float,
) -> Float[Array, "batch height width channel"]:
    """Each image rotated by up to `rotation` degrees, then moved by up to `shift` pixels, uniformly by its own key."""

    def draw(key):
        turn, move = jax.random.split(key)
        return (
            jax.random.uniform(turn, minval=-rotation, maxval=rotation),
            jax.random.randint(move, (2,), -shift, shift + 1),
        )

    degrees, offset = jax.vmap(draw)(keys)
    if rotation:
        image = rotate(image, degrees)
    if shift:
        image = translate(image, offset, shift)
    return image


def cross_entropy(
    variables: Any,
    batch: Batch,
    keys: Key[Array, " batch"],
    train: bool,
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
