"""A prior fitted after training, --prior=gmm."""

import jax
import numpy as np

from vae_jax.batch import Dataset, example_keys
from vae_jax.evaluation.aggregate import bound_under, draw_posterior, fit_gmm
from vae_jax.pretrained import Pretrained
from vae_jax.priors import Prior
from vae_jax.run.evaluate import as_seen, map_examples


def fit_prior(vae: Pretrained, dataset: Dataset) -> tuple[Prior, list[str]]:
    """A mixture fitted to draws of q(z | x) on the training images, and lines with the test bound under it and under p(z)."""
    seed = vae.config["seed"]
    if vae.model.condition_on:
        raise ValueError("--prior=gmm replaces p(z), but the prior of a conditional model depends on its condition")

    def on(split, function):
        def measure(variables, batch, key):
            return function(variables, batch, example_keys(key, None, batch.index))

        seen = as_seen(dataset.splits[split], dataset.binarize, seed)
        return map_examples(measure, seen)(vae.variables, jax.random.key(seed))

    gmm = fit_gmm(on("train", draw_posterior(vae.model)))
    bounds = on("test", bound_under(vae.model, {"the model's prior": vae.model.prior, "the mixture": gmm}))
    return gmm, [f"test/bound under {name}: {np.mean(nats, dtype=np.float64):.6g}" for name, nats in bounds.items()]
