"""What every VAE reports: metrics, probes, baselines, its numbers in other conventions, and figures."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Float

from vae_jax import figures, generate
from vae_jax.batch import Batch, first_of_each_label, has_grey
from vae_jax.evaluation.baselines import convert, cross_entropy_baselines, histogram_loss, linear_vae_baselines
from vae_jax.evaluation.latents import Axes, active_units, decompose_kl, principal_axes
from vae_jax.evaluation.likelihood import effective_sample_size, log_mean_exp, make_log_weights
from vae_jax.evaluation.verdict import is_plain_gan
from vae_jax.families import Metric, Model, Probes
from vae_jax.likelihoods import BINARY, DENSITY
from vae_jax.objectives import reparameterize
from vae_jax.priors import log_normal

GREY = "grey cross-entropy"
MANIFOLD = 16  # images along each axis of the figure "manifold"
METRICS = {
    "loss": Metric("loss: reconstruction + beta KL, or the importance-weighted bound", "nats", "lower"),
    "reconstruction": Metric("-log p(x | z), less its constant", "nats", "lower"),
    "kl": Metric("KL from the prior", "nats", "lower"),
    "bound": Metric("-ELBO, or the importance-weighted bound: the loss at beta 1", "nats", "lower"),
    "scale": Metric("the scale that the likelihood has learned", "pixels in [0, 1]"),
    "active_units": Metric("latents whose posterior mean has a variance of at least 0.01", "latents"),
    "kl_by_latent": Metric("KL from the prior of each latent", "nats"),
}
PANELS = {"loss": "loss"} | {name: METRICS[name].meaning for name in ("reconstruction", "kl")}


def make_probes(model: Model) -> Probes:
    """Which latents are used: active units (Burda et al. 2016) and the mean KL of each latent.

    An encoder that takes the label is measured on labelled images only.
    """

    def measure(variables, batch, keys):
        net = model.of(batch)
        mean, logvar = net.encode(variables, batch.image)
        if net.prior.kl is None:
            return {"mean": mean}
        return {"mean": mean, "kl_by_latent": net.prior.kl(variables, mean, logvar)}

    def reduce(arrays, split):
        known = split.label >= 0 if model.encoder_takes_label else np.full(len(split.label), True)
        if not known.any():
            return {}
        numbers = {"active_units": active_units(arrays["mean"][known])} if known.sum() > 1 else {}
        if "kl_by_latent" in arrays:
            numbers["kl_by_latent"] = arrays["kl_by_latent"][known].mean(axis=0, dtype=np.float64).tolist()
        return numbers

    return Probes(measure, reduce)


def make_final_probes(model: Model, samples: int, binarize: str) -> Probes | None:
    """The likelihood by importance sampling, and the decomposition of the KL (see `evaluation`)."""
    if not samples:
        return None
    weigh = make_log_weights(model, samples)

    def measure(variables, batch, keys):
        net = model.of(batch)
        mean, logvar = net.encode(variables, batch.image)
        z = reparameterize(mean, logvar, keys)
        kl = (log_normal(z, mean, logvar) - net.prior.log_prob(variables, z))[0]
        return {"log_w": weigh(variables, batch, keys), "z": z[0], "mean": mean, "logvar": logvar, "kl": kl}

    def reduce(arrays, split):
        kl = arrays["kl"] if model.prior.shared else None
        numbers = decompose_kl(arrays["z"], arrays["mean"], arrays["logvar"], kl)
        if model.likelihood.support == BINARY and binarize == "none" and has_grey(split.image):
            return numbers
        nll = split.image[0].size * model.likelihood.constant - log_mean_exp(arrays["log_w"])
        numbers |= {"nll": float(nll.mean()), "nll/samples": samples, "nll/images": len(nll)}
        numbers["effective_sample_size"] = float(np.median(effective_sample_size(arrays["log_w"])))
        return numbers

    return Probes(measure, reduce)


def baselines(
    model: Model,
    image: np.ndarray,
    *,
    likelihood: str = "unit_gaussian",
    scale: float = 1.0,
    learn_scale: bool = False,
    prior: str = "standard_normal",
    beta: float = 1.0,
    binarize: str = "none",
) -> dict:
    """Closed-form losses on the training images, where known: a collapsed model, the best linear VAE, and the floor."""
    if likelihood == "bernoulli":
        has_floor = beta >= 1 or binarize != "dynamic"
        return cross_entropy_baselines(image, rounded=binarize == "threshold", has_floor=has_floor)
    if likelihood == "discretised_logistic":
        return {"a histogram of each pixel": histogram_loss(image)}
    if prior != "standard_normal":
        return {}
    if likelihood == "unit_gaussian" or (likelihood == "gaussian" and not learn_scale):
        return linear_vae_baselines(image, model.latent_dim, beta, scale)
    if likelihood in ("gaussian", "optimal_gaussian") and beta == 1:
        return linear_vae_baselines(image, model.latent_dim, scale=None)
    return {}


def ledger(
    model: Model,
    numbers: dict,
    split: str,
    pixels: int,
    is_binary: bool,
    variance: float = 0.0,
    *,
    likelihood: str = "unit_gaussian",
    scale: float = 1.0,
) -> dict[str, Any]:
    """What the numbers measure, and their values on a split in other applicable conventions.

    The explained variance is 1 - squared error / `variance`; `variance` is that of the split about the mean training
    image.
    """
    p_x = model.likelihood
    if is_plain_gan(numbers, split):
        return {
            "the numbers measure": "adversarial terms; KL, reconstruction, bound, nll and codes are those of an encoder "
            "that nothing trains"
        }
    if p_x.support == BINARY and not is_binary:
        return {
            "the numbers measure": f"{GREY}: the mean over binary images drawn from the grey ones, not a likelihood"
        }
    if f"{split}/bound" not in numbers:
        return {"the numbers measure": f"-log of a {p_x.support}"}
    nats = convert(numbers[f"{split}/bound"], "loss", pixels, p_x.constant)["nats"]
    covered = round(pixels * p_x.covered)
    of = f", of {covered} hidden pixels" if covered < pixels else ""
    if model.condition_on == "label" and f"{split}/cross_entropy" not in numbers:  # with few labels it is summed out
        of += ", given each image's own label"
    lines = {
        "the numbers measure": f"-log of a {p_x.support}{of}",
        f"{split}/bound, with its constant, nats": nats,
    }
    if model.condition_on == "label" and f"{split}/nll" in numbers:
        lines[f"{split}/nll measures"] = "-log p(x | y), given each image's own label"
    if p_x.support == DENSITY:
        lines[f"{split}/bound, bits per dimension"] = "none, since the pixels are not dequantised"
    else:
        lines[f"{split}/bound, bits per dimension"] = convert(nats, "nats", covered)["bits per dimension"]
    gaussian = likelihood in ("unit_gaussian", "gaussian", "optimal_gaussian")
    if gaussian and f"{split}/scale/interval" not in numbers:  # the scale of a mean over seeds is not the mean scale
        learned = numbers.get(f"{split}/scale")
        scale = learned or scale
        rest = numbers[f"{split}/reconstruction"] - (covered * math.log(learned) if learned else 0.0)
        error = 2 * scale**2 * rest
        lines[f"{split}/squared error of an image"] = error
        if variance and model.condition_on != "image":  # otherwise the error covers only the hidden pixels
            lines[f"{split}/explained variance"] = 1 - error / variance
        lines[f"{split}/scale that this error implies"] = math.sqrt(error / covered)
        lines["weight of the KL relative to half the squared error, at beta 1"] = scale**2
    return lines


def figures_of_codes(
    model: Model, decode: Callable[[Any], Any], mean: Float[np.ndarray, "n latent"], label: np.ndarray, title: str
) -> dict[str, Callable[[], Any]]:
    """The codes coloured by label, and images decoded over a plane: the two latents, or two principal axes if there are
    more.
    """
    if model.latent_dim < 2:
        return {}
    if model.latent_dim == 2:
        axes = Axes(np.zeros(2), np.eye(2), np.ones(2), np.ones(2))
        names, what = ("z0", "z1"), "the plane of the latents"
    else:
        axes = principal_axes(mean)
        first, second = (f"PCA, {share:.0%} of the variance" for share in axes.share)
        names, what = (first, second), "the first two principal axes of the codes"
    drawn = {"codes": lambda: figures.codes(axes.project(mean), label, names, f"Codes of the test images: {title}")}
    if not model.condition_on:
        drawn["manifold"] = lambda: figures.image_grid(
            np.asarray(decode(plane_grid(axes))), f"Images decoded over {what}: {title}"
        )
    return drawn


def plane_grid(axes: Axes) -> Float[np.ndarray, "count latent"]:
    """Codes at the quantiles of a Gaussian along both axes, row by row, with the second axis pointing up.

    Source: Kingma & Welling 2013, figure 4.
    """
    at = scipy.special.ndtri((np.arange(MANIFOLD) + 0.5) / MANIFOLD)
    along, up = np.meshgrid(at, at[::-1])
    steps = np.stack([along.ravel(), up.ravel()], axis=1) * axes.deviation[None]
    return (axes.centre[None] + steps @ axes.direction).astype(np.float32)


def make_figures(
    model: Model,
    test,
    key,
    title: str,
    samples: Callable[[Any], Any] | None = None,
    panels: Mapping[str, str] = PANELS,
):
    """Training curve, reconstructions and prior samples (the post, Figures 3 to 5); `samples(variables)` replaces the
    last.
    """
    shown = first_of_each_label(test.label)
    image, label = test.image[shown] / np.float32(255), test.label[shown]
    if model.likelihood.support == BINARY and has_grey(test.image):
        panels = {**panels, "reconstruction": GREY}
    of_shown = model.of(Batch(jnp.asarray(image), jnp.asarray(label), weight=label, index=label))
    reconstruct = jax.jit(functools.partial(generate.reconstruct, of_shown))
    decode = jax.jit(functools.partial(generate.decode, model))
    sample = jax.jit(lambda variables: generate.sample(model, variables, jax.random.clone(key), 100))

    def grid(variables):
        return figures.image_grid(np.asarray(sample(variables)), f"Images decoded from the prior: {title}")

    def of_codes(variables, mean):
        return figures_of_codes(model, functools.partial(decode, variables), mean, test.label, title)

    def draw(variables, arrays, history, baselines):
        return {
            "training": lambda: figures.training_curve(history, baselines, f"Training progress: {title}", panels),
            "reconstructions": lambda: figures.reconstructions(
                image,
                np.asarray(reconstruct(variables, image)),
                label,
                f"Test images and their reconstructions: {title}",
            ),
            "samples": lambda: (samples or grid)(variables),
            **(of_codes(variables, arrays["mean"]) if "mean" in arrays else {}),
        }

    return draw
