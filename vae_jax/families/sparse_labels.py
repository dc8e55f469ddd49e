"""A VAE whose encoder also classifies, after "One model to rule them all" (Berkhahn et al. 2019): few labels, one network.

    pi = p(y | x) from the last layer of the encoder,    z ~ q(z | x),    x ~ p(x | z, pi)
    loss = -log p(x | z, pi) + beta KL(q(z | x) || p(z)) + alpha 1[labelled] CE(y, pi)

As published pi is a side channel that costs nothing, so this is a loss and bounds no likelihood. With `charge` it is made one: the
label is summed out, p(y) is uniform, and an image pays KL(pi || p(y)), or ln C where its label is known:

    U(x) = sum_y pi_y (-log p(x | z, y)) + KL(q(z | x) || p(z)) + KL(pi || p(y))
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vae_jax.families import Metric, reports
from vae_jax.families.conditional import make_figures, needs_condition  # noqa: F401
from vae_jax.families.reports import ledger, make_final_probes, make_probes  # noqa: F401
from vae_jax.families.vae import check_objective
from vae_jax.likelihoods import LIKELIHOODS, distortion
from vae_jax.model import ABSENT, Model
from vae_jax.nn.networks import PRECISIONS, check_sizes, choose, configure, make_autoencoder
from vae_jax.objectives import cross_entropy, marginalize_label, reparameterize, warm_up
from vae_jax.priors import standard_normal

NAME = "VAE with sparse labels"
TERMS = ("reconstruction", "kl", "cross_entropy")
METRICS = reports.METRICS | {
    "bound": Metric("U(x), a bound on -log p(x) with the label summed out", "nats", "lower"),
    "cross_entropy": Metric("cross-entropy of the labelled images", "nats", "lower"),
    "accuracy": Metric("accuracy on the labelled images", "share", "higher"),
}


def make(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    latent_dim: int = 20,
    network: str = "conv",
    encoder_features: tuple[int, ...] = (32, 64),
    decoder_features: tuple[int, ...] = (64, 32),
    hidden: tuple[int, ...] = (200, 200),
    likelihood: str = "unit_gaussian",
    scale: float = 1.0,
    precision: str = "float32",
) -> Model:
    """The networks of the family vae, whose encoder's last layer also gives the logits of the classes; fields as there.

    Raises ValueError as the family vae does, and for data of fewer than 2 classes.
    """
    if num_classes < 2:
        raise ValueError(
            f"sparse labels are of at least 2 classes, but the data have {num_classes}: give labelled data"
        )
    check_sizes(latent_dim=(latent_dim,))
    p_x = configure(LIKELIHOODS, "likelihood", likelihood, {}, scale=(scale, 1.0))
    if p_x.update is not None:
        raise ValueError(
            f"model.likelihood is {likelihood!r}, whose variance depends on one reconstruction: take another"
        )
    autoencoder = make_autoencoder(
        *(network, image_shape, latent_dim + num_classes, p_x.channels, choose(PRECISIONS, "precision", precision)),
        encoder_features=encoder_features,
        decoder_features=decoder_features,
        hidden=hidden,
    )

    def parts(variables, image) -> tuple[Array, Array, Array]:
        """mean and logvar of q(z | x), and the logits of the classes."""
        mean, logvar = autoencoder.apply(variables, image, method="encode")
        return mean[:, :latent_dim], logvar[:, :latent_dim], mean[:, latent_dim:]

    def decode(variables, z, pi) -> Any:
        pi = jnp.broadcast_to(pi.reshape((1,) * (z.ndim - 2) + pi.shape), (*z.shape[:-1], num_classes))
        return autoencoder.apply(variables, jnp.concatenate([z, pi], axis=-1), method="decode")

    model = Model(
        init=lambda key, pixel_mean=None: dict(autoencoder.init(key, jnp.zeros((1, *image_shape)))),
        latent_dim=latent_dim,
        encode=lambda variables, image: parts(variables, image)[:2],
        decode_raw=needs_condition,
        likelihood=p_x,
        prior=standard_normal(latent_dim),
        probabilities=lambda variables, image: jax.nn.softmax(parts(variables, image)[2]),
        num_classes=num_classes,
        condition_on="label",
        condition=lambda image, label: jax.nn.one_hot(label, num_classes),
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
    """U(x) and the cross-entropy of the labelled few; without `charge` the published loss.

    Args:
        beta: weight of the KL of z.
        warmup_steps: training steps during which it rises linearly to beta.
        alpha: weight of the cross-entropy, divided by the share of labelled images in a batch, so that it does not fall with
            that (Kingma et al. 2014, section 3.1.2, where alpha is 0.1).
        charge: pay KL(pi || p(y)) with the label summed out, which takes as many decoder passes as there are classes.

    Raises ValueError for a number out of range.
    """
    check_objective(model, beta, warmup_steps, 0.0, 1, "iwae", binarize)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"objective.alpha is {alpha}, but must be at least 0")
    classes, weight_of_labels = model.num_classes, alpha / labelled_share if labelled_share else 0.0

    def objective(variables, batch, keys, train, step, axis_name=None):
        mean, logvar, logits = model.apply(variables, batch.image)
        log_pi = jax.nn.log_softmax(logits)
        z = reparameterize(mean, logvar, keys)
        kl = model.prior.kl(variables, mean, logvar).sum(axis=-1)
        labelled = (batch.label >= 0).astype(kl.dtype)
        label = jnp.maximum(batch.label, 0)

        def reconstruct(pi):
            raw = model.given(pi).decode_raw(variables, z)
            return distortion(model.likelihood, variables, raw, batch.image)[0]

        metrics = {"kl": kl}
        if charge or not train:
            one_hot = jnp.eye(classes)
            by_label = jax.lax.map(lambda pi: reconstruct(jnp.broadcast_to(pi[None], log_pi.shape)), one_hot)
            metrics["reconstruction"] = jnp.sum(jnp.exp(log_pi) * by_label.T, axis=-1)
            by_label = by_label + math.log(classes)
            unlabelled = marginalize_label(by_label, log_pi)
            metrics["bound"] = unlabelled + kl
        if charge:
            known = jnp.take_along_axis(by_label, label[None], axis=0)[0]
            loss = jnp.where(labelled > 0, known, unlabelled) if train else unlabelled
        else:
            loss = reconstruct(jnp.exp(log_pi))
            metrics = {"reconstruction": loss} | metrics
        loss = loss + warm_up(beta, step, warmup_steps) * kl
        own = cross_entropy(logits, label)
        if train:
            loss = loss + weight_of_labels * labelled * own
        correct = (logits.argmax(axis=-1) == batch.label).astype(kl.dtype)
        return metrics | {"loss": loss, "cross_entropy": (own, labelled), "accuracy": (correct, labelled)}, {}

    return objective


def decodes_per_example(model: Model, *, charge: bool = True) -> int:
    """One image for each class."""
    return model.num_classes


def check_data(dataset) -> None:
    """Unlabelled images are welcome in training."""
    for name, split in dataset.splits.items():
        if name != "train" and (split.label < 0).any():
            raise ValueError(f"{int(np.sum(split.label < 0))} {name} images have no label, but accuracy needs all")


def baselines(model: Model, image: np.ndarray) -> dict:
    """There is none in closed form."""
    return {}
