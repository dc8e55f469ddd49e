"""The VAE/GAN: it compares images by a discriminator's features instead of by pixels (Larsen et al. 2016).

x is an image, x~ = dec(z) with z ~ q(z | x) its reconstruction, and x_p = dec(z_p) with z_p ~ p(z) a sample. f is the
output of one of the convolutions of the discriminator D. Four terms train three networks:

    KL  = KL(q(z | x) || p(z))                                 R = 1/2 |f(x) - f(x~)|^2
    L_D = -1/2 log D(x) - 1/2 log(1 - D(x_p))                  A = -log D(x_p), or saturating: log(1 - D(x_p))

    encoder <- beta KL + R,      decoder <- gamma R / n + (1 - gamma) A,      discriminator <- L_D + penalty

with n features, so that gamma means the same at every layer. One scalar gives all three update directions; sg stops the
gradient:

    loss = beta KL + R(enc, dec, sg dis) + lambda A(dec, sg dis) + L_D(sg images, dis) + penalty
    lambda = n (1 - gamma) / gamma

The decoder's part is its objective times n / gamma. This factor has no effect, because each network has its own Adam,
which is invariant to the scale of its loss, unless `optimizer.clip_norm` is set. The released code freezes a network
when its opponent loses, and uses batch normalisation; neither is needed here (see `penalty`).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from vae_jax.batch import named_key
from vae_jax.families import Metric, Model, reports
from vae_jax.families.reports import ledger, make_final_probes, make_probes  # noqa: F401
from vae_jax.families.vae import check_data, check_objective, with_parts  # noqa: F401
from vae_jax.likelihoods import LIKELIHOODS, distortion, sigmoid_mean
from vae_jax.model import ABSENT
from vae_jax.nn.description import describe_autoencoder
from vae_jax.nn.discriminator import Discriminator, check_discriminator
from vae_jax.nn.networks import PRECISIONS, check_sizes, choose, configure, conv_autoencoder
from vae_jax.objectives import discriminator_loss, generator_loss, reparameterize
from vae_jax.priors import standard_normal

NAME = "VAE/GAN"
METHODS = ("vaegan", "vae", "gan")
GROUPS = ("encoder", "decoder", "discriminator")
TERMS = ("kl", "reconstruction", "feature_reconstruction", "adversarial", "discriminator", "penalty")
METRICS = reports.METRICS | {
    "loss": Metric("the sum of all terms; each network learns from its own", "nats", "lower"),
    "reconstruction": Metric("-log p(x | z) of the pixels, less its constant", "nats", "lower"),
    "bound": Metric("-ELBO of the pixels, on which only the method vae trains", "nats", "lower"),
    "feature_reconstruction": Metric("R: half the squared error of the discriminator's features", "nats"),
    "adversarial": Metric("A: the decoder's adversarial term, without its weight", "nats"),
    "discriminator": Metric("L_D: the discriminator's cross-entropy, ln 2 if it cannot tell samples from data", "nats"),
    "penalty": Metric("R1 penalty of the discriminator", "nats"),
    "discriminator_on_data": Metric("D(x): mean probability of being real, for data", "share"),
    "discriminator_on_samples": Metric("D(x_p): mean probability of being real, for samples", "share"),
}
PANELS = {"loss": "loss: all terms", "reconstruction": "pixels"} | {
    "feature_reconstruction": "features",
    "kl": "KL",
    "discriminator_on_data": "D(data)",
    "discriminator_on_samples": "D(samples)",
}


def make(
    image_shape: tuple[int, int, int],
    *,
    latent_dim: int = 20,
    encoder_features: tuple[int, ...] = (),
    decoder_features: tuple[int, ...] = (),
    discriminator_features: tuple[int, ...] = (32, 64, 128),
    feature_layer: int = 2,
    likelihood: str = "unit_gaussian",
    scale: float = 1.0,
    precision: str = "float32",
) -> Model:
    """The VAE with the post's networks, with the same initial weights as the family vae, and a discriminator.

    Shared fields are as in the family vae.

    Args:
        discriminator_features: channels after each of the discriminator's convolutions; each one halves the image.
        feature_layer: number, from 1, of the discriminator's convolution whose output is used to compare images.

    Raises ValueError as the family vae does, and for a discriminator too deep for the image, a feature layer that does
    not exist, and the optimal Gaussian, whose variance nothing would train.
    """
    check_sizes(latent_dim=(latent_dim,), discriminator_features=discriminator_features)
    check_discriminator(image_shape, discriminator_features, feature_layer)
    dtype = choose(PRECISIONS, "precision", precision)
    p_x = configure(LIKELIHOODS, "likelihood", likelihood, {}, scale=(scale, 1.0))
    if p_x.update is not None:
        raise ValueError(f"model.likelihood is {likelihood!r}, whose variance nothing here trains: take another")
    autoencoder: Any = conv_autoencoder(
        *(image_shape, latent_dim, p_x.channels, dtype), tuple(encoder_features), tuple(decoder_features), False
    )
    discriminator: Any = Discriminator(tuple(discriminator_features), dtype)

    def init(key, pixel_mean=None):
        image = jnp.zeros((1, *image_shape))
        variables = with_parts(dict(autoencoder.init(key, image)), p_x, p_z, key)
        own = discriminator.init(named_key(key, "discriminator"), image)["params"]
        return variables | {"params": {**variables["params"], "discriminator": own}}

    def discriminate(variables, image) -> tuple[Float[Array, " batch"], Float[Array, "batch feature"]]:
        """The logit of D(image), and f(image)."""
        logit, activations = discriminator.apply({"params": variables["params"]["discriminator"]}, image)
        return logit, activations[feature_layer - 1].reshape(len(image), -1)

    p_z = standard_normal(latent_dim)
    encode, decode = (functools.partial(autoencoder.apply, method=name) for name in ("encode", "decode"))
    return Model(
        init=init,
        latent_dim=latent_dim,
        encode=encode,
        decode_raw=decode,
        likelihood=p_x,
        prior=p_z,
        features=lambda variables, image: discriminate(variables, image)[1],
        layers=functools.partial(describe_autoencoder, autoencoder) if p_x.mean is sigmoid_mean else ABSENT,
        apply=discriminate,
    )


def make_objective(
    model: Model,
    binarize: str = "none",
    *,
    method: str = "vaegan",
    beta: float = 1.0,
    gamma: float = 0.99,
    saturating: bool = False,
    judge_reconstructions: bool = False,
    penalty: float = 0.0,
):
    """The loss above; evaluation omits the penalty.

    Args:
        method: "vaegan"; or, with the same networks, the plain "vae", which learns from pixels, or the plain "gan",
            whose encoder learns nothing.
        beta: weight of the KL.
        gamma: in (0, 1]: weight of R, as a mean over features, in the decoder's objective; A has the weight 1 - gamma.
        saturating: use the paper's A, log(1 - D), whose gradient vanishes where the discriminator wins.
        judge_reconstructions: the discriminator also sees x~, and the decoder learns to fool it with both, with equal
            weight. The paper's algorithm does this; the released code does not.
        penalty: weight of R1, penalty / 2 |d logit D(x) / dx|^2 (Mescheder et al. 2018).

    Raises ValueError for a field out of range or without effect for the method.
    """
    check_objective(model, beta, 0, 0.0, 1, "iwae", binarize)
    check_fields(method, beta, gamma, saturating, judge_reconstructions, penalty, binarize)

    def objective(variables, batch, keys, train, step, axis_name=None):
        mean, logvar = model.encode(variables, batch.image)
        z = reparameterize(mean, logvar, keys)[0]
        raw = model.decode_raw(variables, z)
        reconstruction = distortion(model.likelihood, variables, raw[None], batch.image)[0]
        kl = model.prior.kl(variables, mean, logvar).sum(axis=-1)
        metrics = {"reconstruction": reconstruction, "kl": kl, "bound": reconstruction + kl}
        if method == "vae":
            return {"loss": reconstruction + beta * kl} | metrics, {}
        metrics = {name: stop_gradient(value) for name, value in metrics.items()}  # measured, not trained on

        images = functools.partial(model.likelihood.mean, variables)
        fakes = [images(model.decode_raw(variables, draw_prior(model, variables, keys)))]
        if judge_reconstructions:
            fakes.append(images(model.decode_raw(variables, stop_gradient(z))))
        metrics |= game(model, variables, batch.image, fakes, saturating)
        loss = metrics["discriminator"]
        if penalty and train:
            metrics["penalty"] = penalty / 2 * slope(model, variables, batch.image)
            loss = loss + metrics["penalty"]
        if method == "gan":
            return {"loss": loss + metrics["adversarial"]} | metrics, {}

        fixed = stop_gradient(variables)
        target, found = model.apply(fixed, batch.image)[1], model.apply(fixed, images(raw))[1]
        similarity = 0.5 * jnp.sum((target - found) ** 2, axis=-1)
        weight = weight_of_adversarial(gamma, target.shape[-1])
        loss = loss + beta * kl + similarity + weight * metrics["adversarial"]
        return {"loss": loss} | metrics | {"kl": kl, "feature_reconstruction": similarity}, {}

    return objective


def game(model: Model, variables, image: Array, fakes: list[Array], saturating: bool) -> dict[str, Array]:
    """A with a fixed discriminator, L_D with fixed images, D(x) and D(x_p)."""
    fixed = stop_gradient(variables)
    judged = jnp.stack([model.apply(fixed, fake)[0] for fake in fakes])
    on_data = model.apply(variables, image)[0]
    on_fakes = jnp.stack([model.apply(variables, stop_gradient(fake))[0] for fake in fakes])
    return {
        "adversarial": generator_loss(judged, saturating),
        "discriminator": discriminator_loss(on_data, on_fakes),
        "discriminator_on_data": jax.nn.sigmoid(on_data),
        "discriminator_on_samples": jax.nn.sigmoid(on_fakes[0]),
    }


def draw_prior(model: Model, variables, keys) -> Float[Array, "batch latent"]:
    """z_p ~ p(z), one draw per example from its key stream "prior"."""

    def draw(key):
        return model.prior.sample(variables, key, 1)[0]

    return jax.vmap(draw)(named_key(keys, "prior"))


def slope(model: Model, variables, image: Float[Array, "batch height width channel"]) -> Float[Array, " batch"]:
    """|d logit D(x) / dx|^2 of each image. D treats images independently, so the gradient of the sum gives each
    gradient.
    """
    gradient = jax.grad(lambda image: model.apply(variables, image)[0].sum())(image)
    return jnp.sum(gradient**2, axis=(1, 2, 3))


def weight_of_adversarial(gamma: float, features: int) -> float:
    """lambda = n (1 - gamma) / gamma, the weight of A relative to R, which is a sum over n features."""
    return features * (1 - gamma) / gamma


def check_fields(
    method: str, beta: float, gamma: float, saturating: bool, judge_reconstructions: bool, penalty: float, binarize: str
) -> None:
    """Raise ValueError for a field of the objective that is out of range, or has no effect for the method, and for
    binary images where there is a discriminator.
    """
    if method not in METHODS:
        raise ValueError(f"objective.method is {method!r}, but must be one of {', '.join(METHODS)}")
    if not 0 < gamma <= 1:
        raise ValueError(f"objective.gamma is {gamma}, but must lie in (0, 1]: 1 leaves the adversarial term out")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"objective.penalty is {penalty}, but must be at least 0")
    dead = {
        "beta": (beta != 1, method == "gan"),
        "gamma": (gamma != 0.99, method != "vaegan"),
        "saturating": (saturating, method == "vae"),
        "judge_reconstructions": (judge_reconstructions, method != "vaegan"),
        "penalty": (penalty != 0, method == "vae"),
    }
    for name, (is_set, is_dead) in dead.items():
        if is_set and is_dead:
            raise ValueError(f"objective.{name} has no effect with objective.method={method}: leave it at its default")
    if binarize != "none" and method != "vae":
        raise ValueError(
            f"data.binarize is {binarize!r}, but a discriminator tells images of 0 and 1 from the decoder's grey means "
            "at once: leave it at none, or take objective.method=vae"
        )


def decodes_per_example(*, method: str = "vaegan", judge_reconstructions: bool = False) -> int:
    """A reconstruction, a sample, and a second reconstruction if the discriminator judges it; for "vae" a
    reconstruction.
    """
    return 1 if method == "vae" else 2 + judge_reconstructions


def baselines(
    model: Model,
    image: np.ndarray,
    *,
    method: str = "vaegan",
    beta: float = 1.0,
    likelihood: str = "unit_gaussian",
    scale: float = 1.0,
    binarize: str = "none",
) -> dict:
    """The baselines of the family vae for the method "vae"; empty for the others, which do not train on pixels."""
    if method != "vae":
        return {}
    return reports.baselines(model, image, likelihood=likelihood, scale=scale, beta=beta, binarize=binarize)


def make_figures(model: Model, test, key, title: str) -> Any:
    """Training curve, reconstructions and samples, as in the family vae."""
    return reports.make_figures(model, test, key, title, panels=PANELS)
