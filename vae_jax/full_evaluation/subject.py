"""The model and the data of a full evaluation."""

import dataclasses
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax.batch import Batch, Dataset, Split, make_batch, mixed_order
from vae_jax.objectives import reparameterize
from vae_jax.pretrained import Pretrained
from vae_jax.priors import log_normal
from vae_jax.run.devices import Devices
from vae_jax.run.evaluate import as_seen, map_examples


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, and the split of a data set that it is evaluated on."""

    vae: Pretrained
    dataset: Dataset
    name: str  # of the split

    @property
    def stored(self) -> Split:
        return self.dataset.splits[self.name]

    @cached_property
    def seen(self) -> Split:
        """The split with the pixels that the model sees."""
        return as_seen(self.stored, self.vae.config["data"]["binarize"], self.vae.config["seed"])

    @cached_property
    def devices(self) -> Devices:
        return Devices(precision=self.vae.config["model"].get("precision"))

    def encode(self) -> dict[str, np.ndarray]:
        """For each image of `seen`: mean and logvar of q(z | x), a draw z, the KL, and the KL of each latent if it has a
        closed form.
        """

        def measure(variables, batch, keys):
            model = self.vae.model.of(batch)
            mean, logvar = model.encode(variables, batch.image)
            z = reparameterize(mean, logvar, keys)
            found = {"mean": mean, "logvar": logvar, "z": z[0]}
            if model.prior.kl is None:
                return found | {"kl": (log_normal(z, mean, logvar) - model.prior.log_prob(variables, z))[0]}
            by_latent = model.prior.kl(variables, mean, logvar)
            return found | {"kl": by_latent.sum(axis=-1), "kl_by_latent": by_latent}

        return map_examples(measure, self.seen, devices=self.devices)(self.vae.variables, self.root)

    def first(self, count: int) -> Split:
        """The first `count` images in `mixed_order`, as the model sees them."""
        rows = mixed_order(self.seen.label)[:count]
        return Split(self.seen.image[rows], self.seen.label[rows])

    def batch(self, start: int, count: int) -> Batch:
        """`count` images in `mixed_order` as the model sees them, from place `start` on; wraps around at the end."""
        rows = mixed_order(self.seen.label)[np.arange(start, start + count) % len(self.seen.label)]
        image, label = (jnp.asarray(part[rows]) for part in self.seen)
        return make_batch(image, label, jnp.asarray(rows), jnp.asarray(rows))

    @property
    def root(self):
        return jax.random.key(self.vae.config["seed"])


def as_floats(image: np.ndarray) -> np.ndarray:
    """Stored bytes as floats in [0, 1]."""
    return image / np.float32(255)
