"""p(x | decoder output) as values. -log p of an image is the sum of `energy + constant` over its pixels.

A likelihood is a mass on {0, 1} for binary pixels, a density on [0, 1], or a mass on the 256 grey levels 0..255 (the
pixels times 255). Numbers of different kinds are not comparable.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vae_jax.batch import weighted_mean
from vae_jax.nn.layers import softplus

BINARY, DENSITY, LEVELS = "mass on {0, 1}", "density on [0, 1]", "mass on 0..255"
ABSENT: Any = None
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LARGEST_LOGIT = math.log((1 - 1e-4) / 1e-4)  # limit of the continuous Bernoulli: lambda lies in [1e-4, 1 - 1e-4]
DECAY = 0.99  # per step, of the moving average of the optimal variance
SMALLEST_VARIANCE = 1e-6


def sigmoid_mean(variables, raw: Float[Array, "*samples h w c"]) -> Float[Array, "*samples h w c"]:
    """The mean or location, sigmoid(raw)."""
    return jax.nn.sigmoid(raw)


class Likelihood(NamedTuple):
    """Pure functions that take the model's `variables` first and read only their parts named `likelihood`.

    Attributes:
        support: the kind of number: "density on [0, 1]", "mass on {0, 1}" or "mass on 0..255".
        channels: raw decoder channels per image channel.
        init: key -> the parameters, {} if there are none.
        energy: (variables, raw, image) -> -log p(image | raw) - `constant` per pixel in nats; raw may have sample axes.
        constant: nats per pixel. Reports add it; a loss never does, because that would cost float32 precision.
        mean: (variables, raw) -> mean image, in [0, 1].
        sample: (variables, key, raw) -> image drawn from p(x | raw).
        init_state: () -> the initial model state, ABSENT if there is none.
        update: (variables, raw, image, weight, axis_name) -> (variables for this batch's energy, new state), called in
            training; ABSENT if there is no state.
        scale: variables -> the learned scale, a standard deviation for Gaussians; ABSENT if none is learned.
        covered: share of the pixels that p covers; the others are given, and their energy is 0.
    """

    support: str
    energy: Callable[[Any, Any, Any], Float[Array, "*samples batch h w c"]]
    sample: Callable[[Any, Any, Any], Float[Array, "*samples h w c"]]
    mean: Callable[[Any, Any], Float[Array, "*samples h w c"]] = sigmoid_mean
    constant: float = 0.0
    channels: int = 1
    init: Callable[[Any], dict] = lambda key: {}
    init_state: Callable[[], dict] = ABSENT
    update: Callable[..., tuple[Any, dict]] = ABSENT
    scale: Callable[[Any], Float[Array, ""]] = ABSENT
    covered: float = 1.0


def elementwise(energy: Any) -> Any:
    """Mark an energy that depends on each pixel alone: `distortion` gives it the images as rows, [1, 1, pixels].

    On the CPU XLA does not vectorise exp and log over a last axis of one channel.
    """
    energy.is_elementwise = True
    return energy


def align(image: Float[Array, "batch h w c"], raw: Float[Array, "*samples batch h w c"]) -> Array:
    """Add leading axes of size 1 to the image, one for each sample axis of `raw`."""
    return image.reshape((1,) * (raw.ndim - image.ndim) + image.shape)


def residual(raw: Float[Array, "*samples batch h w c"], image: Float[Array, "batch h w c"]) -> Array:
    """The image minus its reconstruction sigmoid(raw)."""
    return align(image, raw) - jax.nn.sigmoid(raw)


def unit_gaussian() -> Likelihood:
    """N(x; sigmoid(raw), 1): energy (x - mean)^2 / 2, constant ln(2 pi) / 2 (the post's squared error)."""
    return gaussian(1.0)


def gaussian(scale: float = 1.0, learn_scale: bool = False) -> Likelihood:
    """N(x; sigmoid(raw), s^2): energy (x - mean)^2 / (2 s^2), with one fixed or learned s for all pixels.

    A fixed s is equivalent to a weight of 1 / s^2 on the squared error, or of s^2 on the KL. A learned s adds ln s to
    the energy. Source of the learned s: Rybkin et al. 2021, section 3.1.
    """
    kind = scaled(scale, learn_scale)

    @elementwise
    def energy(variables, raw, image):
        s, log_s = kind.at(variables)
        return 0.5 * (residual(raw, image) / s) ** 2 + log_s

    def sample(variables, key, raw):
        return jax.nn.sigmoid(raw) + kind.at(variables)[0] * jax.random.normal(key, raw.shape, raw.dtype)

    return Likelihood(
        DENSITY, energy, sample, constant=HALF_LOG_2PI + kind.constant, init=kind.init, scale=kind.learned
    )


def laplace(scale: float = 1.0, learn_scale: bool = False) -> Likelihood:
    """Laplace(x; sigmoid(raw), b): energy |x - location| / b, constant ln(2 b); a learned b has its ln b in the energy."""
    kind = scaled(scale, learn_scale)

    @elementwise
    def energy(variables, raw, image):
        b, log_b = kind.at(variables)
        return jnp.abs(residual(raw, image)) / b + log_b

    def sample(variables, key, raw):
        return jax.nn.sigmoid(raw) + kind.at(variables)[0] * jax.random.laplace(key, raw.shape, raw.dtype)

    return Likelihood(DENSITY, energy, sample, constant=math.log(2) + kind.constant, init=kind.init, scale=kind.learned)


def optimal_gaussian() -> Likelihood:
    """N(x; sigmoid(raw), s^2) with the optimal s^2 for the batch, the mean squared error of its pixels.

        energy = (x - mean)^2 / (2 s^2) + ln s,    s^2 = sum w (x - mean)^2 / (pixels sum w)

    The sums run over all devices and samples. By the envelope theorem s needs no gradient, since it maximises the ELBO;
    an importance-weighted bound would need one. Evaluation uses the debiased moving average from training, so an
    image's result does not depend on other images. Source: Rybkin et al. 2021, equation 6.
    """

    def variance(variables):
        total, weight = (variables["likelihood"][name] for name in ("total", "weight"))
        known = weight > 0
        return jnp.maximum(jnp.where(known, total / jnp.where(known, weight, 1.0), 1.0), SMALLEST_VARIANCE)

    @elementwise
    def energy(variables, raw, image):
        s2 = variance(variables)
        return 0.5 * (residual(raw, image) ** 2 / s2 + jnp.log(s2))

    def sample(variables, key, raw):
        return jax.nn.sigmoid(raw) + jnp.sqrt(variance(variables)) * jax.random.normal(key, raw.shape, raw.dtype)

    def update(variables, raw, image, weight: Float[Array, " batch"], axis_name: str | None):
        errors = jnp.mean(residual(raw, image) ** 2, axis=(-3, -2, -1)).reshape(-1, len(weight)).mean(axis=0)
        before, best = variables["likelihood"], lax.stop_gradient(weighted_mean(errors, weight, axis_name))
        total = DECAY * before["total"] + (1 - DECAY) * best
        state = {"total": total, "weight": DECAY * before["weight"] + (1 - DECAY)}
        return {**variables, "likelihood": {"total": best, "weight": jnp.ones(())}}, state

    return Likelihood(
        DENSITY,
        energy,
        sample,
        constant=HALF_LOG_2PI,
        init_state=lambda: {"total": jnp.zeros(()), "weight": jnp.zeros(())},
        update=update,
        scale=lambda variables: jnp.sqrt(variance(variables)),
    )


def bernoulli() -> Likelihood:
    """Bernoulli(x; sigmoid(raw)): energy softplus(raw) - x raw (Kingma & Welling 2013, appendix C.1).

    For grey pixels it is not a likelihood but a cross-entropy: the expected energy of binary images drawn from them.
    """

    @elementwise
    def energy(variables, raw, image):
        return softplus(raw) - align(image, raw) * raw

    def sample(variables, key, raw):
        return (jax.random.uniform(key, raw.shape) < jax.nn.sigmoid(raw)).astype(raw.dtype)

    return Likelihood(BINARY, energy, sample)


def continuous_bernoulli() -> Likelihood:
    """p(x) = C(l) l^x (1 - l)^(1 - x) on [0, 1] with l = sigmoid(a), a = raw clipped to +-ln 9999.

        energy = log((e^a - 1) / a) - x a,    mean = 1 / (1 - e^-a) - 1 / a

    Without a limit on a, the density of images with only the pixels 0 and 1 would be unbounded. As in the authors'
    code, l lies in [1e-4, 1 - 1e-4]. Source: Loaiza-Ganem & Cunningham 2019.
    """

    logit = partial(jnp.clip, min=-LARGEST_LOGIT, max=LARGEST_LOGIT)

    @elementwise
    def energy(variables, raw, image):
        a = logit(raw)
        return jnp.maximum(a, 0) + log_one_minus_exp_over(jnp.abs(a)) - align(image, raw) * a

    def mean(variables, raw):
        a = logit(raw)
        small = jnp.abs(a) < 1e-2
        safe = jnp.where(small, 1.0, a)
        return jnp.where(small, 0.5 + a / 12, -1 / jnp.expm1(-safe) - 1 / safe)

    def sample(variables, key, raw):
        """Sample by the inverse CDF at -|a|, where nothing overflows."""
        a = logit(raw)
        u = jax.random.uniform(key, raw.shape, raw.dtype)
        small = jnp.abs(a) < 1e-4
        safe = jnp.where(small, -1.0, -jnp.abs(a))
        x = jnp.where(small, u, jnp.log1p(u * jnp.expm1(safe)) / safe)
        return jnp.where(a > 0, 1 - x, x)

    return Likelihood(DENSITY, energy, sample, mean)


def log_one_minus_exp_over(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """log((1 - e^-t) / t) for t >= 0, the log of the mean of e^-s over s in [0, t]."""
    small = t < 1e-2
    safe = jnp.where(small, 1.0, t)
    return jnp.where(small, -t / 2 + t**2 / 24, jnp.log(-jnp.expm1(-safe) / safe))


def discretised_logistic(scale: float = 1.0, learn_scale: bool = False) -> Likelihood:
    """The mass of Logistic(m, 255 s) with m = 255 sigmoid(raw) on each grey level; 0 and 255 include the tails.

        energy = -log(F((c + 1/2 - m) / 255 s) - F((c - 1/2 - m) / 255 s)),    c = 255 x,    F = sigmoid

    The code uses a form without cancellation. `mean` is the mean of the clipped logistic, within half a grey level of
    the exact mean. Source: Kingma et al. 2016 (IAF), and Salimans et al. 2017 for the tails.
    """
    kind = scaled(scale, learn_scale)

    @elementwise
    def energy(variables, raw, image):
        s = 255 * kind.at(variables)[0]
        level = jnp.round(255 * align(image, raw))
        location = 255 * jax.nn.sigmoid(raw)
        above, below = (level + 0.5 - location) / s, (level - 0.5 - location) / s
        # F(b) - F(a) = F(b) F(-a) (1 - e^(a - b)). The lowest level is F(b) alone, the highest F(-a) alone.
        lowest, highest = level <= 0, level >= 255
        low = jnp.where(highest, 0.0, -softplus(-above))
        high = jnp.where(lowest, 0.0, -softplus(below))
        inside = jnp.where(lowest | highest, 0.0, jnp.log(-jnp.expm1(-1 / s)))
        return -(low + high + inside)

    def mean(variables, raw):
        s, m = kind.at(variables)[0], jax.nn.sigmoid(raw)
        return jnp.clip(s * (softplus(m / s) - softplus((m - 1) / s)), 0, 1)

    def sample(variables, key, raw):
        drawn = jax.nn.sigmoid(raw) + kind.at(variables)[0] * jax.random.logistic(key, raw.shape, raw.dtype)
        return jnp.clip(jnp.round(255 * drawn), 0, 255) / 255

    return Likelihood(LEVELS, energy, sample, mean, init=kind.init, scale=kind.learned)


class Scale(NamedTuple):
    """One scale s for all pixels. ln s is in the energy, as `at(variables)[1]`, if s is learned, else in `constant`."""

    init: Callable[[Any], dict]
    at: Callable[[Any], tuple[Any, Any]]
    constant: float
    learned: Callable[[Any], Float[Array, ""]] = ABSENT


def scaled(scale: float, learned: bool) -> Scale:
    """A fixed scale, or a learned one with this initial value. Raises ValueError unless it is positive and finite."""
    if not 0 < scale < math.inf:
        raise ValueError(f"model.scale is {scale}, but must be above 0")
    if not learned:
        return Scale(lambda key: {}, lambda variables: (scale, 0.0), math.log(scale))

    def at(variables):
        log_scale = variables["params"]["likelihood"]["log_scale"]
        return jnp.exp(log_scale), log_scale

    init = {"log_scale": jnp.full((), math.log(scale), jnp.float32)}
    return Scale(lambda key: init, at, 0.0, lambda variables: at(variables)[0])


def distortion(
    likelihood: Likelihood,
    variables: Any,
    raw: Float[Array, "*samples batch h w raw"],
    image: Float[Array, "batch h w c"],
) -> Float[Array, "*samples batch"]:
    """-log p(x | z) of each image without the likelihood's constant, in nats: the energy summed over pixels."""
    if getattr(likelihood.energy, "is_elementwise", False):
        raw, image = (x.reshape(*x.shape[:-3], 1, 1, -1) for x in (raw, image))
    return jnp.sum(likelihood.energy(variables, raw, image), axis=(-3, -2, -1))


LIKELIHOODS: dict[str, Callable[..., Likelihood]] = {
    "unit_gaussian": unit_gaussian,
    "gaussian": gaussian,
    "optimal_gaussian": optimal_gaussian,
    "laplace": laplace,
    "bernoulli": bernoulli,
    "continuous_bernoulli": continuous_bernoulli,
    "discretised_logistic": discretised_logistic,
}
