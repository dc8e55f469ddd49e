"""A VAE with few labels whose encoder also classifies, after "One model to rule them all" (Berkhahn et al. 2019).

    pi = p(y | x) from the last layer of the encoder,    z ~ q(z | x),    x ~ p(x | z, pi)
    loss = -log p(x | z, pi) + beta KL(q(z | x) || p(z)) + alpha' 1[labelled] CE(y, pi)

alpha' is alpha / (share of labelled images in a batch).

This is the published loss. It is not a bound on a likelihood, because pi carries information at no cost. With `charge`
the loss is a bound: the label is summed out, p(y) is uniform, and KL(pi || p(y)) is added, or ln C for a known label:

    U(x) = sum_y pi_y (-log p(x | z, y)) + KL(q(z | x) || p(z)) + KL(pi || p(y))
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vae_jax.families import Metric, labels
from vae_jax.families.conditional import make_figures, needs_condition, one_hot  # noqa: F401
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
from vae_jax.families.vae import check_objective, with_parts
from vae_jax.likelihoods import LIKELIHOODS, distortion
from vae_jax.model import ABSENT, Model
from vae_jax.nn.networks import PRECISIONS, check_sizes, choose, configure, make_autoencoder
from vae_jax.objectives import reparameterize, warm_up
from vae_jax.priors import standard_normal

NAME = "VAE with sparse labels"
LOSS = "loss: U(x), or L(x, y) + alpha' CE for a labelled training image; the published loss without `charge`"
METRICS = labels.METRICS | {"loss": Metric(LOSS, "nats", "lower")}
TERMS = ("reconstruction", "kl", "cross_entropy")


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
    """The networks of the family vae; the encoder's last layer also outputs class logits. Fields are as in the
    family vae, but the output bias starts at 0.

    Raises ValueError as the family vae does, and for data with fewer than 2 classes.
    """
    check_sizes(latent_dim=(latent_dim,))
    p_x = configure(LIKELIHOODS, "likelihood", likelihood, {}, scale=(scale, 1.0))
    p_z = standard_normal(latent_dim)
    check_classes(num_classes, p_x.update, likelihood)
    autoencoder = make_autoencoder(
        *(network, image_shape, latent_dim + num_classes, p_x.channels, choose(PRECISIONS, "precision", precision)),
        encoder_features=encoder_features,
        decoder_features=decoder_features,
        hidden=hidden,
    )

    def parts(variables, image) -> tuple[Array, Array, Array]:
        """mean and logvar of q(z | x), and the class logits."""
        mean, logvar = autoencoder.apply(variables, image, method="encode")
        return mean[:, :latent_dim], logvar[:, :latent_dim], mean[:, latent_dim:]

    def decode(variables, z, pi) -> Any:
        pi = jnp.broadcast_to(pi.reshape((1,) * (z.ndim - 2) + pi.shape), (*z.shape[:-1], num_classes))
        return autoencoder.apply(variables, jnp.concatenate([z, pi], axis=-1), method="decode")

    model = Model(
        init=lambda key, pixel_mean=None: with_parts(
            autoencoder.init(key, jnp.zeros((1, *image_shape))), p_x, p_z, key
        ),
        latent_dim=latent_dim,
        encode=lambda variables, image: parts(variables, image)[:2],
        decode_raw=needs_condition,
        likelihood=p_x,
        prior=p_z,
        probabilities=lambda variables, image: jax.nn.softmax(parts(variables, image)[2]),
        num_classes=num_classes,
        condition_on="label",
        condition=lambda image, label: one_hot(label, num_classes),
        given=lambda pi: model._replace(decode_raw=lambda variables, z: decode(variables, z, pi), given=ABSENT),
        apply=parts,
    )
    return model


def make_objective(
    model: Model,
    labelled_share: float,
    binarize: str = "none",
    *,
    beta: float = 1.0,
    warmup_steps: int = 0,
    alpha: float = 0.1,
    charge: bool = True,
):
    """U(x) and the cross-entropy of the labelled images; without `charge` the published loss.

    Args:
        beta: weight of the KL of z.
        warmup_steps: training steps during which it rises linearly to beta.
        alpha: weight of the cross-entropy, divided by the share of labelled images in a batch.
        charge: sum out the label and add KL(pi || p(y)); takes one decoder pass per class.

    Raises ValueError for a number out of range.
    """
    check_objective(model, beta, warmup_steps, 0.0, 1, "iwae", binarize)
    ce_weight = weight_of_labels(alpha, labelled_share)

    def objective(variables, batch, keys, train, step, axis_name=None):
        mean, logvar, logits = model.apply(variables, batch.image)
        pi = jax.nn.softmax(logits)
        z = reparameterize(mean, logvar, keys)
        kl = model.prior.kl(variables, mean, logvar).sum(axis=-1)
        labels = of_labelled(logits, batch.label)

        def reconstruct(pi):
            raw = model.given(pi).decode_raw(variables, z)
            return distortion(model.likelihood, variables, raw, batch.image)[0]

        metrics = {"kl": kl}
        if charge or not train:
            by_label = jax.lax.map(lambda y: reconstruct(jnp.broadcast_to(y, pi.shape)), jnp.eye(model.num_classes))
            unlabelled = jnp.full_like(batch.label, -1)
            metrics["bound"] = known_or_summed_out(by_label, logits, unlabelled) + kl
            metrics["reconstruction"] = jnp.sum(pi * by_label.T, axis=-1)
        if charge:
            loss = known_or_summed_out(by_label, logits, batch.label if train else unlabelled)
        else:
            loss = metrics["reconstruction"] = reconstruct(pi)
        loss = loss + warm_up(beta, step, warmup_steps) * kl
        if train:
            own, labelled = labels["cross_entropy"]
            loss = loss + ce_weight * labelled * own
        return metrics | labels | {"loss": loss}, {}

    return objective
