"""A prior fitted after training, --prior=gmm."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from vae_jax.batch import Dataset
from vae_jax.evaluation.aggregate import bound_under, draw_posterior, fit_gmm
from vae_jax.families.reports import GREY
from vae_jax.full_evaluation.subject import Subject
from vae_jax.likelihoods import BINARY
from vae_jax.pretrained import Pretrained
from vae_jax.priors import Prior
from vae_jax.run.evaluate import map_examples


def fit_prior(vae: Pretrained, dataset: Dataset) -> Prior:
    """A mixture fitted to draws of q(z | x) on the training images. Raises ValueError for a conditional model."""
    if vae.model.condition_on:
        raise ValueError("--prior=gmm replaces p(z), but the prior of a conditional model depends on its condition")
    return fit_gmm(_map_split(vae, dataset, "train", functools.partial(draw_posterior, vae.model)))


def compare_bounds(vae: Pretrained, mixture: Prior, dataset: Dataset) -> list[str]:
    """Lines with the negative ELBO of the test images under p(z) and under the mixture, with the likelihood's constant."""
    priors = {"the model's prior": vae.model.prior, "the mixture": mixture}
    bounds = _map_split(vae, dataset, "test", functools.partial(bound_under, vae.model, priors))
    p_x = vae.model.likelihood
    constant = math.prod(vae.image_shape) * p_x.constant
    what = GREY if p_x.support == BINARY and not dataset.is_binary("test") else f"-log of a {p_x.support}"
    return [
        f"bound on the test images under {name}: {np.mean(nats, dtype=np.float64) + constant:.6g} nats ({what})"
        for name, nats in bounds.items()
    ]


def _map_split(vae: Pretrained, dataset: Dataset, split: str, function: Callable) -> Any:
    """`function(variables, batch, keys)` on all images of a split, with the noise of the run's evaluation."""
    subject = Subject(vae, dataset, split)
    return map_examples(function, subject.seen, devices=subject.devices)(vae.variables, subject.root)
