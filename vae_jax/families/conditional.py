"""The conditional VAE p(x | c); c is the label or a visible part of the image.

Source: Sohn et al. 2015; Doersch 2016, section 3.

    loss = E_q(z | x, c)[-log p(x | z, c)] + beta KL(q(z | x, c) || p(z | c))

Given a condition the model is a VAE, `model.given(c)`, so it uses the objective, probes and evaluation of
families/vae.py. If the condition is a part of the image, p covers the hidden pixels only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vae_jax import figures, generate
from vae_jax.batch import Batch, example_keys, first_of_each_label
from vae_jax.evaluation.likelihood import make_log_weights
from vae_jax.families import reports
from vae_jax.families.labels import baselines, check_classes_present, check_labelled  # noqa: F401
from vae_jax.families.reports import METRICS, ledger, make_final_probes, make_probes  # noqa: F401
from vae_jax.families.vae import TERMS, decodes_per_example, make_objective, with_parts  # noqa: F401
from vae_jax.likelihoods import LIKELIHOODS, Likelihood, align
from vae_jax.model import ABSENT, Model
from vae_jax.nn.conditional import ConditionalAutoencoder
from vae_jax.nn.networks import (
    PRECISIONS,
    check_sizes,
    choose,
    configure,
    make_autoencoder,
)
from vae_jax.priors import Prior, conditional_normal, standard_normal

NAME = "Conditional VAE"
PARTS = ("quadrant1", "quadrant2", "quadrant3", "column")
CONDITIONS = ("label", *PARTS)
PRIORS = ("standard_normal", "learned")
BAYES_SAMPLES = 100  # importance samples per class for the class probabilities
DECODED = 8  # samples decoded at once, to bound the memory
STYLES = 8  # rows of the figure of samples


def make(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    condition: str = "label",
    condition_hidden: tuple[int, ...] = (),
    latent_dim: int = 20,
    network: str = "conv",
    encoder_features: tuple[int, ...] = (),
    decoder_features: tuple[int, ...] = (),
    hidden: tuple[int, ...] = (200, 200),
    likelihood: str = "unit_gaussian",
    scale: float = 1.0,
    learn_scale: bool = False,
    prior: str = "standard_normal",
    precision: str = "float32",
) -> Model:
    """The conditional VAE, by default with the post's networks; other fields are as in the family vae, but the output
    bias starts at 0.

    Args:
        condition: "label", or the visible pixels: the lower left quadrant ("quadrant1"), the left half ("quadrant2"),
            all but the upper right quadrant ("quadrant3"), or the centre "column" (Sohn et al. 2015; Doersch 2016).
        condition_hidden: widths of dense layers that embed the condition; empty: the condition itself.
        latent_dim: size of z; 0 gives a plain regression of the hidden pixels on the visible ones, whose loss is
            -log p(x | c).
        prior: p(z | c): "standard_normal" for every condition, or "learned", a Gaussian that depends on the condition.

    Raises ValueError as the family vae does, and for data without labels if they are the condition, an unknown
    condition or prior, quadrants of an image of odd size, and a part of the image with a likelihood whose scale depends
    on all pixels.
    """
    dtype = choose(PRECISIONS, "precision", precision)
    choose(dict.fromkeys(CONDITIONS), "condition", condition)
    choose(dict.fromkeys(PRIORS), "prior", prior)
    by_label = condition == "label"
    if latent_dim or by_label:
        check_sizes(latent_dim=(latent_dim,))
    if condition_hidden:
        check_sizes(condition_hidden=condition_hidden)
    if by_label and num_classes < 2:
        raise ValueError(f"model.condition is 'label', but the data have {num_classes} classes: give labelled data")
    visible = None if by_label else visible_part(image_shape, condition)
    scales = {"scale": (scale, 1.0), "learn_scale": (learn_scale, False)}
    p_x = configure(LIKELIHOODS, "likelihood", likelihood, {}, **scales)
    if visible is not None:
        p_x = of_hidden(p_x, visible, likelihood)
    autoencoder = make_autoencoder(
        *(network, image_shape, latent_dim, p_x.channels, dtype),
        encoder_features=encoder_features,
        decoder_features=decoder_features,
        hidden=hidden,
    )
    net = ConditionalAutoencoder(autoencoder, latent_dim, tuple(condition_hidden), prior == "learned")
    return make_given(net, p_x, image_shape, num_classes, visible)


def make_given(
    net: ConditionalAutoencoder,
    p_x: Likelihood,
    image_shape: tuple[int, int, int],
    num_classes: int,
    visible: Float[np.ndarray, "height width channel"] | None,
) -> Model:
    """The model of these networks, conditioned on the `visible` pixels, or on the label if `visible` is None."""

    def call(method, variables, *arguments) -> Any:
        networks = {name: part for name, part in variables["params"].items() if name != "likelihood"}
        return net.apply({"params": networks}, *arguments, method=method)

    def condition_of(image, label):
        return one_hot(label, num_classes) if visible is None else image * visible[None]

    def init(key, pixel_mean=None):
        image = jnp.zeros((1, *image_shape))
        variables = dict(net.init(key, image, condition_of(image, jnp.zeros(1, jnp.int32))))
        return with_parts(variables, p_x, standard_normal(net.latent_dim), key)

    def given(c) -> Model:
        p_z = standard_normal(net.latent_dim)
        if net.learned_prior:
            p_z = conditional_normal(lambda variables: call("prior", variables, c))
        return model._replace(
            encode=lambda variables, image: call("encode", variables, image, c),
            decode_raw=lambda variables, z: call("decode", variables, z, c),
            likelihood=p_x if visible is None else keep_visible(p_x, visible, c),
            prior=p_z,
            given=ABSENT,
        )

    model = Model(
        init=init,
        latent_dim=net.latent_dim,
        encode=needs_condition,
        decode_raw=needs_condition,
        likelihood=p_x,
        prior=Prior(
            init=lambda key: {},
            log_prob=needs_condition,
            sample=needs_condition,
            kl=needs_condition,
            shared=not net.learned_prior,
        ),
        num_classes=num_classes,
        condition_on="label" if visible is None else "image",
        encoder_takes_label=visible is None,
        condition=condition_of,
        given=given,
    )
    return model._replace(probabilities=functools.partial(bayes, model)) if visible is None else model


def one_hot(label: Int[Array | np.ndarray, " batch"], num_classes: int) -> Float[Array, "batch classes"]:
    """Labels as conditions. Raises ValueError for a label outside the classes; under `jit` such a label gives zeros."""
    if not isinstance(label, jax.core.Tracer):
        lowest, highest = np.asarray(label).min(), np.asarray(label).max()
        if lowest < 0 or highest >= num_classes:
            raise ValueError(f"labels go from {lowest} to {highest}, but must be from 0 to {num_classes - 1}")
    return jax.nn.one_hot(label, num_classes)


def needs_condition(*arguments):
    """Raise ValueError: a conditional model was called without a condition."""
    raise ValueError("this model needs a condition: use model.given(condition)")


def visible_part(image_shape: tuple[int, int, int], condition: str) -> Float[np.ndarray, "height width channel"]:
    """A mask, 1 for visible and 0 for hidden pixels. Raises ValueError for quadrants of an image of odd size."""
    height, width, _ = image_shape
    if condition != "column" and (height % 2 or width % 2):
        raise ValueError(f"model.condition is {condition!r}, but images of {height}x{width} have no equal quadrants")
    visible = np.zeros(image_shape, np.float32)
    if condition == "column":
        visible[:, width // 2] = 1
    else:
        visible[height // 2 :, : width // 2] = 1
    if condition in ("quadrant2", "quadrant3"):
        visible[:, : width // 2] = 1
    if condition == "quadrant3":
        visible[height // 2 :] = 1
    return visible


def of_hidden(p_x: Likelihood, visible: Float[np.ndarray, "height width channel"], name: str) -> Likelihood:
    """Restrict the likelihood to the hidden pixels, with its constant spread over all pixels.

    Raises ValueError if its variance depends on all pixels.
    """
    if p_x.update is not None:
        raise ValueError(f"model.likelihood is {name!r}, whose variance is computed over all pixels: take another")
    hidden = 1 - visible

    @functools.wraps(p_x.energy)  # with its mark `elementwise`
    def energy(variables, raw, image):
        values = p_x.energy(variables, raw, image)
        return values * hidden.reshape((1,) * (values.ndim - 3) + values.shape[-3:])

    share = float(hidden.mean())
    return p_x._replace(energy=energy, constant=p_x.constant * share, covered=share)


def keep_visible(p_x: Likelihood, visible: Float[np.ndarray, "height width channel"], c: Array) -> Likelihood:
    """Copy the visible pixels of the conditions into the likelihood's mean images and draws."""

    def keep(image):
        return jnp.where((visible > 0).reshape((1,) * (image.ndim - 3) + visible.shape), align(c, image), image)

    return p_x._replace(
        mean=lambda variables, raw: keep(p_x.mean(variables, raw)),
        sample=lambda variables, key, raw: keep(p_x.sample(variables, key, raw)),
    )


def bayes(
    model: Model, variables: Any, image: Float[Array, "batch height width channel"], samples: int = BAYES_SAMPLES
) -> Float[Array, "batch classes"]:
    """p(y | x) by Bayes' rule, with uniform p(y) and p(x | y) from `samples` importance samples of q(z | x, y).

    The noise is the same for all images, so an image's result does not depend on the others. Kingma et al. 2014, in
    section 3.1.2, use an inference network q(y | x) instead.
    """
    same = jnp.zeros(len(image), jnp.int32)
    weigh = make_log_weights(model, samples, min(samples, DECODED))

    def of(label):
        batch = Batch(image, jnp.full(len(image), label), weight=same, index=same)
        log_w = weigh(variables, batch, example_keys(jax.random.key(0), None, same))
        return jax.nn.logsumexp(log_w, axis=1)  # log p(x | y), but for constants

    return jax.nn.softmax(jax.lax.map(of, jnp.arange(model.num_classes)).T, axis=-1)


def check_data(dataset, *, condition: str = "label") -> None:
    """For a model of labels: raise ValueError if an image has none, or a class has no training images."""
    if condition == "label" and dataset.num_classes:
        check_labelled(dataset, ": label them all, or use the family vae")
        check_classes_present(dataset)


def make_figures(model: Model, test, key, title: str):
    """Training curve, reconstructions, and samples: one style per row and one label per column, or completed images."""
    shown = first_of_each_label(test.label)
    image, label = test.image[shown] / np.float32(255), test.label[shown]
    condition = model.condition(jnp.asarray(image), jnp.asarray(label))

    @jax.jit
    def rows(variables):
        def row(key):
            # the same noise for all conditions
            z = jax.vmap(lambda c: model.given(c[None]).prior.sample(variables, key, 1)[0])(condition)
            return generate.decode(model.given(condition), variables, z)

        return jax.lax.map(row, jax.random.split(jax.random.clone(key), STYLES))

    def samples(variables):
        made, heading = np.asarray(rows(variables)), [str(one) if one >= 0 else "" for one in label]
        if model.condition_on == "label":
            return figures.image_rows(made, [""] * STYLES, heading, f"One style per row: {title}")
        table = np.stack([np.asarray(condition), *made[: STYLES // 2], image])
        names = ["visible", *["completed"] * (STYLES // 2), "truth"]
        return figures.image_rows(table, names, heading, f"Completions of the visible part: {title}")

    return reports.make_figures(model, test, key, title, samples)
