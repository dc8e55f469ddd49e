"""The generative semi-supervised model M2 (Kingma et al. 2014): a label-conditioned VAE and a classifier that infers
the label.

    p(x, y, z) = p(y) p(z) p(x | y, z),    q(y, z | x) = q(y | x) q(z | x, y),    p(y) = 1 / C

A labelled image costs L(x, y). An unlabelled image costs U(x), with the label summed out. Both bound the likelihood.

    L(x, y) = E_q(z | x, y)[-log p(x | y, z)] + KL(q(z | x, y) || p(z)) + ln C  >=  -log p(x, y)
    U(x) = sum_y q(y | x) (L(x, y) + log q(y | x))                              >=  -log p(x)
    loss = L(x, y) + alpha' CE(y, q(y | x)) with a label, U(x) without

The KL is weighted by beta in the loss, and alpha' is alpha / (share of labelled images in a batch).
"""

import jax
import jax.numpy as jnp

from vae_jax.families import Metric, labels, vae
from vae_jax.families.conditional import make_figures, make_given  # noqa: F401
from vae_jax.families.labels import (  # noqa: F401
    baselines,
    check_classes,
    check_data,
    decodes_per_example,
    known_or_summed_out,
    of_labelled,
    weight_of_labels,
)
from vae_jax.families.reports import ledger, make_final_probes, make_probes  # noqa: F401
from vae_jax.likelihoods import LIKELIHOODS, Likelihood
from vae_jax.model import Model
from vae_jax.nn.conditional import ConditionalAutoencoder
from vae_jax.nn.networks import PRECISIONS, Autoencoder, check_sizes, choose, configure, make_autoencoder
from vae_jax.objectives import warm_up

NAME = "Semi-supervised VAE (M2)"
TERMS = ("reconstruction", "kl", "label_entropy", "cross_entropy")
METRICS = labels.METRICS | {"label_entropy": Metric("entropy of q(y | x)", "nats")}


def make(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    latent_dim: int = 20,
    network: str = "conv",
    encoder_features: tuple[int, ...] = (),
    decoder_features: tuple[int, ...] = (),
    hidden: tuple[int, ...] = (200, 200),
    likelihood: str = "unit_gaussian",
    scale: float = 1.0,
    precision: str = "float32",
) -> Model:
    """The label-conditioned networks of the family conditional, with a second encoder of the same size as q(y | x).

    Fields are as in the family conditional. Raises ValueError as the family vae does, and for data with fewer than 2
    classes.
    """
    dtype = choose(PRECISIONS, "precision", precision)
    check_sizes(latent_dim=(latent_dim,))
    p_x = configure(LIKELIHOODS, "likelihood", likelihood, {}, scale=(scale, 1.0))
    check_classes(num_classes, p_x.update, likelihood)
    autoencoder = make_autoencoder(
        *(network, image_shape, latent_dim, p_x.channels, dtype),
        encoder_features=encoder_features,
        decoder_features=decoder_features,
        hidden=hidden,
    )
    return infer_label(autoencoder, latent_dim, p_x, image_shape, num_classes)


def infer_label(
    autoencoder: Autoencoder, latent_dim: int, p_x: Likelihood, image_shape: tuple[int, int, int], num_classes: int
) -> Model:
    """The label-conditioned VAE of these networks, with q(y | x) as its `probabilities`."""
    net = ConditionalAutoencoder(autoencoder, latent_dim)
    given_label = make_given(net, p_x, image_shape, num_classes, None)
    classifier = autoencoder.encoder.clone(outputs=num_classes)

    def init(key, pixel_mean=None):
        of_label, of_rest = jax.random.split(key)
        variables = given_label.init(of_rest)
        own = classifier.init(of_label, jnp.zeros((1, *image_shape)))["params"]
        return variables | {"params": {**variables["params"], "classifier": own}}

    def logits(variables, image):
        return classifier.apply({"params": variables["params"]["classifier"]}, image)

    return given_label._replace(
        init=init, apply=logits, probabilities=lambda variables, image: jax.nn.softmax(logits(variables, image))
    )


def make_objective(
    model: Model,
    labelled_share: float,
    binarize: str = "none",
    *,
    beta: float = 1.0,
    warmup_steps: int = 0,
    alpha: float = 0.1,
    label_warmup_steps: int = 0,
):
    """L(x, y) and the cross-entropy of the labelled images, U(x) of the others.

    Args:
        beta: weight of the KL of z.
        warmup_steps: training steps during which it rises linearly to beta.
        alpha: weight of the cross-entropy, divided by the share of labelled images in a batch.
        label_warmup_steps: training steps during which the gradient of U(x) in q(y | x) rises linearly to its full
            size. Without it q(y | x) settles on classes other than the labels' before the decoder has learned to use
            the label.

    Raises ValueError for a number out of range.
    """
    given_label = vae.make_objective(model, binarize, beta=beta, warmup_steps=warmup_steps)
    if label_warmup_steps < 0:
        raise ValueError(f"objective.label_warmup_steps is {label_warmup_steps}, but must be at least 0")
    ce_weight = weight_of_labels(alpha, labelled_share)

    def objective(variables, batch, keys, train, step, axis_name=None):
        def of(label):
            labelled = batch._replace(label=jnp.full_like(batch.label, label))
            return given_label(variables, labelled, keys, train, step)[0]

        by_label = jax.vmap(of)(jnp.arange(model.num_classes))  # {metric: [classes, batch]}
        logits = model.apply(variables, batch.image)
        log_q, unlabelled = jax.nn.log_softmax(logits), jnp.full_like(batch.label, -1)
        q = jnp.exp(log_q)
        of_labels = of_labelled(logits, batch.label)
        metrics = {name: jnp.sum(q * by_label[name].T, axis=-1) for name in ("reconstruction", "kl")}
        metrics["bound"] = known_or_summed_out(by_label["bound"], logits, unlabelled)
        metrics["label_entropy"] = -jnp.sum(q * log_q, axis=-1)
        label = batch.label if train else unlabelled
        gradient_weight = warm_up(1.0, step, label_warmup_steps)
        loss = known_or_summed_out(by_label["loss"], logits, label, gradient_weight)
        if train:
            own, labelled = of_labels["cross_entropy"]
            loss = loss + ce_weight * labelled * own
        return metrics | of_labels | {"loss": loss}, {}

    return objective
