"""The variational autoencoder (Kingma & Welling 2013), with the post's convolutional networks.

    loss = E_q(z | x)[-log p(x | z)] + beta KL(q(z | x) || p(z)),    q(z | x) = N(mean(x), exp(logvar(x)))

Losses leave out the likelihood's constant: with the unit-variance Gaussian they are half the squared error plus the KL.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax import figures, generate
from vae_jax.batch import first_of_each_label
from vae_jax.evaluation.baselines import linear_vae_baselines
from vae_jax.evaluation.latents import active_units
from vae_jax.families import Metric, Model, Probes
from vae_jax.likelihoods import LIKELIHOODS, distortion
from vae_jax.nn.networks import (
    PRECISIONS,
    Autoencoder,
    Decoder,
    Encoder,
    check_doublings,
    check_pooling,
    check_sizes,
    choose,
)
from vae_jax.objectives import importance_weighted_bound, log_normal, negative_elbo, reparameterize, warm_up
from vae_jax.priors import PRIORS

NAME = "VAE"
METRICS = {
    "loss": Metric("loss = reconstruction + beta KL", "nats", "lower"),
    "reconstruction": Metric("-log p(x | z), less its constant", "nats", "lower"),
    "kl": Metric("KL from the prior", "nats", "lower"),
    "bound": Metric("-ELBO: the loss at beta 1", "nats", "lower"),
    "active_units": Metric("latents whose posterior mean varies by at least 0.01", "latents"),
    "kl_by_latent": Metric("KL from the prior of each latent", "nats"),
}
PANELS = {name: METRICS[name].meaning for name in ("loss", "reconstruction", "kl")}


def make(
    image_shape: tuple[int, int, int],
    *,
    latent_dim: int = 20,
    encoder_features: tuple[int, ...] = (32, 64),
    decoder_features: tuple[int, ...] = (64, 32),
    pooling: bool = False,
    likelihood: str = "unit_gaussian",
    prior: str = "standard_normal",
    precision: str = "float32",
) -> Model:
    """The post's VAE for images of `image_shape` (height, width, channels).

    Args:
        latent_dim: size of z.
        encoder_features: channels after each convolution; every one halves the image.
        decoder_features: channels after each transposed convolution but the last; every one doubles the image.
        pooling: halve the image by max pooling instead of strided convolutions, which the post found to fail.
        likelihood: p(x | z): "unit_gaussian", whose variance is 1.
        prior: p(z): "standard_normal".
        precision: "float32" or "bfloat16", in which the layers compute; parameters, statistics and loss are float32.

    Raises ValueError if a size is below 1, a name is unknown, the decoder's doublings cannot end at the image's size,
    or pooling leaves nothing of the image.
    """
    check_sizes(
        latent_dim=(latent_dim,),
        encoder_features=encoder_features,
        decoder_features=decoder_features,
    )
    check_doublings(image_shape, len(decoder_features))
    if pooling:
        check_pooling(image_shape, len(encoder_features), "encoder_features")
    p_x = choose(LIKELIHOODS, "likelihood", likelihood)()
    p_z = choose(PRIORS, "prior", prior)(latent_dim)
    dtype = choose(PRECISIONS, "precision", precision)
    *size, channels = image_shape
    network = Autoencoder(
        Encoder(latent_dim, tuple(encoder_features), pooling, dtype),
        Decoder((*size, channels * p_x.channels), tuple(decoder_features), dtype),
    )

    def init(key):
        variables = dict(network.init(key, jnp.zeros((1, *image_shape))))
        parts = {"likelihood": p_x.init(key), "prior": p_z.init(key)}
        own = {name: part for name, part in parts.items() if part}
        return variables | {"params": {**variables["params"], **own}}

    apply: Any = network.apply
    return Model(
        init=init,
        latent_dim=latent_dim,
        encode=functools.partial(apply, method="encode"),
        decode_raw=functools.partial(apply, method="decode"),
        likelihood=p_x,
        prior=p_z,
    )


def make_objective(model: Model, *, beta: float = 1.0, warmup_steps: int = 0, samples: int = 1):
    """The negative ELBO, or with several samples the importance-weighted bound.

    Args:
        beta: weight of the KL (Higgins et al. 2017); 1 is the ELBO, and the post's loss.
        warmup_steps: training steps during which the weight of the KL rises linearly to beta.
        samples: draws of z for each image; more than one give the importance-weighted bound (Burda et al. 2016).

    Raises ValueError for a beta or warmup_steps below 0, or samples below 1.
    """
    for name, value, least in [("beta", beta, 0), ("warmup_steps", warmup_steps, 0), ("samples", samples, 1)]:
        if not least <= value < float("inf"):
            raise ValueError(f"objective.{name} is {value}, but must be at least {least}")

    def bound(variables, z, mean, logvar, reconstruction, kl, beta=1.0):
        if samples == 1:  # the KL in closed form has less noise
            return negative_elbo(reconstruction, kl, beta)
        ratio = model.prior.log_prob(variables, z) - log_normal(z, mean, logvar)
        return importance_weighted_bound(-reconstruction + beta * ratio)

    def objective(variables, batch, keys, train, step, axis_name=None):
        mean, logvar = model.encode(variables, batch.image)
        z = reparameterize(mean, logvar, keys, samples)
        raw = model.decode_raw(variables, z)
        reconstruction = distortion(model.likelihood, variables, raw, batch.image)
        kl = model.prior.kl(variables, mean, logvar).sum(axis=-1)
        parts = (variables, z, mean, logvar, reconstruction, kl)
        return {
            "loss": bound(*parts, warm_up(beta, step, warmup_steps)),
            "reconstruction": reconstruction.mean(axis=0),
            "kl": kl,
            "bound": bound(*parts),
        }, {}

    return objective


def make_probes(model: Model) -> Probes:
    """Which latents are in use: active units (Burda et al. 2016) and the mean KL of each latent."""

    def measure(variables, batch):
        mean, logvar = model.encode(variables, batch.image)
        return {"mean": mean, "kl_by_latent": model.prior.kl(variables, mean, logvar)}

    def reduce(arrays, split):
        return {
            "active_units": active_units(arrays["mean"]),
            "kl_by_latent": arrays["kl_by_latent"].mean(axis=0, dtype=np.float64).tolist(),
        }

    return Probes(measure, reduce)


def check_data(dataset) -> None:
    """A VAE learns from any images."""


def decodes_per_example(*, samples: int = 1) -> int:
    """One image for each sample of z."""
    return samples


def baselines(
    model: Model,
    image: np.ndarray,
    *,
    likelihood: str = "unit_gaussian",
    prior: str = "standard_normal",
    beta: float = 1.0,
) -> dict:
    """The losses of a collapsed model and of the best linear VAE, for a unit-variance Gaussian and a standard normal."""
    if (likelihood, prior) != ("unit_gaussian", "standard_normal"):
        return {}
    return linear_vae_baselines(image, model.latent_dim, beta)


def make_figures(model: Model, test, key, title: str):
    """Training curve, reconstructions and prior samples (the post, Figures 3 to 5)."""
    shown = first_of_each_label(test.label)
    image, label = test.image[shown] / np.float32(255), test.label[shown]
    reconstruct = jax.jit(functools.partial(generate.reconstruct, model))
    sample = jax.jit(lambda variables: generate.sample(model, variables, jax.random.clone(key), 100))

    def draw(variables, arrays, history, baselines):
        return {
            "training": lambda: figures.training_curve(history, baselines, f"Training progress: {title}", PANELS),
            "reconstructions": lambda: figures.reconstructions(
                image,
                np.asarray(reconstruct(variables, image)),
                label,
                f"Test images and their reconstructions: {title}",
            ),
            "samples": lambda: figures.image_grid(
                np.asarray(sample(variables)),
                f"Images decoded from the prior: {title}",
            ),
        }

    return draw
