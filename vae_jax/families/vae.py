"""The variational autoencoder (Kingma & Welling 2013), with the post's convolutional networks.

    loss = E_q(z | x)[-log p(x | z)] + beta KL(q(z | x) || p(z)),    q(z | x) = N(mean(x), exp(logvar(x)))

Losses omit the likelihood's constant: with the unit-variance Gaussian they are half the squared error plus the KL.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vae_jax.batch import named_key
from vae_jax.families import Model
from vae_jax.families.reports import METRICS, baselines, ledger, make_figures, make_final_probes, make_probes  # noqa: F401
from vae_jax.likelihoods import BINARY, LIKELIHOODS, Likelihood, distortion, sigmoid_mean
from vae_jax.model import ABSENT
from vae_jax.nn.description import describe_autoencoder
from vae_jax.nn.networks import (
    PRECISIONS,
    DenseDecoder,
    check_sizes,
    choose,
    configure,
    init_output_bias,
    make_autoencoder,
)
from vae_jax.objectives import (
    doubly_reparameterized,
    free_bits_kl,
    importance_weighted_bound,
    log_weights,
    negative_elbo,
    reparameterize,
    warm_up,
)
from vae_jax.priors import PRIORS, Prior, log_normal

NAME = "VAE"
ESTIMATORS = ("iwae", "dreg")
TERMS = ("reconstruction", "kl")


def make(
    image_shape: tuple[int, int, int],
    *,
    latent_dim: int = 20,
    network: str = "conv",
    encoder_features: tuple[int, ...] = (),
    decoder_features: tuple[int, ...] = (),
    pooling: bool = False,
    hidden: tuple[int, ...] = (200, 200),
    likelihood: str = "unit_gaussian",
    scale: float = 1.0,
    learn_scale: bool = False,
    prior: str = "standard_normal",
    components: int = 100,
    precision: str = "float32",
) -> Model:
    """The VAE for images of `image_shape` (height, width, channels), by default with the post's networks.

    Args:
        latent_dim: size of z.
        network: "conv", the post's, or "mlp": dense tanh layers; the output bias starts at logit(mean training image).
        encoder_features: for conv: channels after each convolution; each one halves the image. Empty: 32, 64, 128, ...,
            until 7 to 13 pixels or an odd number are left; (32, 64) for 28x28, as in the post.
        decoder_features: for conv: channels of transposed convolutions; each doubles it. Empty: the encoder's reversed.
        pooling: for conv: halve the image by max pooling instead of strides; the post found that this fails.
        hidden: for mlp: widths of the encoder's layers; the decoder has them in reverse.
        likelihood: p(x | z): "unit_gaussian" (variance 1), "gaussian", "optimal_gaussian" (the optimal variance for
            each batch), "laplace", "bernoulli", "continuous_bernoulli" or "discretised_logistic".
        scale: for gaussian, laplace and discretised_logistic: the scale, for pixels in [0, 1].
        learn_scale: learn the scale, starting at `scale`.
        prior: p(z): "standard_normal", "mixture" (of learned Gaussians) or "vamp" (of posteriors of learned images).
        components: for mixture and vamp: number of components.
        precision: "float32" or "bfloat16", for the layers' computations; parameters, statistics and loss are float32.

    Raises ValueError if a size is below 1, a scale is not above 0, a name is unknown, a field has no effect, the
    decoder cannot reach the image's size by doubling, or pooling leaves nothing of the image.
    """
    dtype = choose(PRECISIONS, "precision", precision)
    p_x = configure(LIKELIHOODS, "likelihood", likelihood, {}, scale=(scale, 1.0), learn_scale=(learn_scale, False))
    check_sizes(latent_dim=(latent_dim,))
    autoencoder = make_autoencoder(
        *(network, image_shape, latent_dim, p_x.channels, dtype),
        encoder_features=encoder_features,
        decoder_features=decoder_features,
        hidden=hidden,
        pooling=pooling,
    )
    encode, decode = (functools.partial(autoencoder.apply, method=name) for name in ("encode", "decode"))
    known = {"latent_dim": latent_dim, "image_shape": image_shape, "encode": encode}
    p_z = configure(PRIORS, "prior", prior, known, components=(components, 100))

    return Model(
        init=functools.partial(init, autoencoder, p_x, p_z, image_shape),
        latent_dim=latent_dim,
        encode=encode,
        decode_raw=decode,
        likelihood=p_x,
        prior=p_z,
        layers=functools.partial(describe_autoencoder, autoencoder) if p_x.mean is sigmoid_mean else ABSENT,
    )


def init(
    autoencoder: Any, p_x: Likelihood, p_z: Prior, image_shape: tuple[int, int, int], key, pixel_mean=None
) -> dict:
    """The variables of networks, likelihood and prior; `pixel_mean` sets the output bias of a dense decoder with one
    number per pixel.
    """
    variables = dict(autoencoder.init(key, jnp.zeros((1, *image_shape))))
    dense = isinstance(getattr(autoencoder, "decoder", None), DenseDecoder)
    if pixel_mean is not None and dense and p_x.channels == 1:
        variables["params"] = init_output_bias(variables["params"], pixel_mean)
    return with_parts(variables, p_x, p_z, key)


def with_parts(variables: dict, p_x: Likelihood, p_z: Prior, key) -> dict:
    """Add the variables of likelihood and prior to those of the networks."""
    parts = {"likelihood": p_x.init(named_key(key, "likelihood")), "prior": p_z.init(key)}
    own = {name: part for name, part in parts.items() if part}
    state = {} if p_x.init_state is None else {"likelihood": p_x.init_state()}
    return variables | state | {"params": {**variables["params"], **own}}


def make_objective(
    model: Model,
    binarize: str = "none",
    *,
    beta: float = 1.0,
    warmup_steps: int = 0,
    free_bits: float = 0.0,
    samples: int = 1,
    estimator: str = "iwae",
):
    """The negative ELBO, or with several samples the importance-weighted bound.

    Args:
        binarize: how the data are made binary, as in `batch.binarize`.
        beta: weight of the KL (Higgins et al. 2017); 1 is the ELBO, and the post's loss.
        warmup_steps: training steps during which the weight of the KL rises linearly to beta.
        free_bits: nats of KL that are free for each latent in training, on average over a batch (Kingma et al. 2016).
        samples: draws of z per image; more than one gives the importance-weighted bound (Burda et al. 2016).
        estimator: gradient of that bound: "iwae", the plain one, or "dreg", with less variance (Tucker et al. 2019).

    Raises ValueError for a number out of range, for incompatible fields, and for binarized data with a likelihood of
    grey pixels. A Bernoulli accepts grey pixels, but `ledger` then labels its number as grey cross-entropy.
    """
    check_objective(model, beta, warmup_steps, free_bits, samples, estimator, binarize)

    def objective(variables, batch, keys, train, step, axis_name=None):
        net = model.of(batch)
        p_x, p_z = net.likelihood, net.prior
        mean, logvar = net.encode(variables, batch.image)
        z = reparameterize(mean, logvar, keys, samples)
        raw = net.decode_raw(variables, z)
        model_state = {}
        if train and p_x.update is not None:
            variables, state = p_x.update(variables, raw, batch.image, batch.weight, axis_name)
            model_state = {"likelihood": state}
        reconstruction = distortion(p_x, variables, raw, batch.image)
        if p_z.kl is None:
            kl = jnp.mean(log_normal(z, mean, logvar) - p_z.log_prob(variables, z), axis=0)
        else:
            by_latent = p_z.kl(variables, mean, logvar)
            kl = by_latent.sum(axis=-1)
        weight = warm_up(beta, step, warmup_steps)

        if samples == 1:  # a closed-form KL has less noise
            paid = free_bits_kl(by_latent, batch.weight, free_bits, axis_name) if train and free_bits else kl
            loss, bound = negative_elbo(reconstruction, paid, weight), negative_elbo(reconstruction, kl)
        else:
            parts = (z, mean, logvar, batch.image)
            loss, bound = (
                importance_weighted_bound(log_weights(net, variables, raw, *parts, b)) for b in (weight, 1.0)
            )
            if train and estimator == "dreg":
                loss = dreg_loss(net, variables, *parts, weight)
        metrics = {"loss": loss, "reconstruction": reconstruction.mean(axis=0), "kl": kl, "bound": bound}
        if p_x.scale is not None:
            metrics["scale"] = jnp.broadcast_to(p_x.scale(variables), kl.shape)
        return metrics, model_state

    return objective


def dreg_loss(model: Model, variables, z, mean, logvar, image, beta):
    """The importance-weighted bound with the gradient of `doubly_reparameterized`: two decoder passes."""
    fixed, fixed_z, mean, logvar = jax.tree.map(lax.stop_gradient, (variables, z, mean, logvar))
    raw_at, raw_along = model.decode_raw(variables, fixed_z), model.decode_raw(fixed, z)
    at_fixed_z = log_weights(model, variables, raw_at, fixed_z, mean, logvar, image, beta)
    along_z = log_weights(model, fixed, raw_along, z, mean, logvar, image, beta)
    return doubly_reparameterized(at_fixed_z, along_z, beta)


def check_objective(
    model: Model, beta: float, warmup_steps: int, free_bits: float, samples: int, estimator: str, binarize: str
) -> None:
    """Raise ValueError for a field of the objective that is out of range, or conflicts with another field or the data."""
    if binarize != "none" and model.likelihood.support != BINARY:
        raise ValueError(
            f"model.likelihood is a {model.likelihood.support}, but data.binarize is {binarize!r}: "
            "take model.likelihood=bernoulli, or data.binarize=none"
        )
    least = {"beta": (beta, 0), "warmup_steps": (warmup_steps, 0), "free_bits": (free_bits, 0), "samples": (samples, 1)}
    for name, (value, bound) in least.items():
        if not bound <= value < float("inf"):
            raise ValueError(f"objective.{name} is {value}, but must be at least {bound}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"objective.estimator is {estimator!r}, but must be one of {', '.join(ESTIMATORS)}")
    if estimator == "dreg" and samples == 1:
        raise ValueError(
            "objective.estimator is 'dreg', which with one sample is the ELBO without its score term "
            "('sticking the landing'): give objective.samples of at least 2"
        )
    if model.likelihood.update is not None and samples > 1:
        raise ValueError(
            f"objective.samples is {samples}, but this likelihood's variance is optimal only for the ELBO: leave "
            "samples at 1, or take model.likelihood=gaussian with model.learn_scale"
        )
    if not model.latent_dim and (beta, warmup_steps, free_bits, samples) != (1, 0, 0, 1):
        raise ValueError(
            "model.latent_dim is 0, a regression without KL: leave objective.beta, warmup_steps, free_bits and "
            "samples at their defaults"
        )
    if free_bits and samples > 1:
        raise ValueError(
            f"objective.free_bits is {free_bits}, but only the ELBO has them: leave objective.samples at 1"
        )
    if free_bits and model.prior.kl is None:
        raise ValueError(f"objective.free_bits is {free_bits}, but this prior has no KL in closed form: leave it at 0")


def check_data(dataset) -> None:
    """Accept any images."""


def decodes_per_example(*, samples: int = 1, estimator: str = "iwae") -> int:
    """One image for each sample of z, twice with DReG."""
    return samples * (2 if estimator == "dreg" else 1)
