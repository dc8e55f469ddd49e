"""The contract of a model: pure functions of its variables."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from vae_jax.batch import Batch
from vae_jax.likelihoods import Likelihood
from vae_jax.priors import Prior

Variables = dict[str, Any]
ABSENT: Any = None


class Model(NamedTuple):
    """Pure functions of `variables`. Members that a family does not have are ABSENT (None).

    Attributes:
        init: (key, pixel_mean=None) -> variables; `pixel_mean`, the mean training image, may set the output's bias.
        latent_dim: size of z.
        encode: (variables, image) -> (mean, logvar) of q(z | x), each [batch, latent].
        decode_raw: (variables, z) -> the raw input of the likelihood; z may have leading sample axes.
        likelihood: p(x | decoder output).
        prior: p(z).
        probabilities: (variables, image) -> p(label | image), [batch, classes].
        num_classes: number of classes.
        condition_on: what p(x | c) is conditioned on: "label", "image" (a part of it), or "" for p(x).
        condition: (image, label) -> the conditions c of a batch, [batch, ...].
        given: c -> the model of p(x | c), whose functions take batches of the length of c.
        encoder_takes_label: whether q(z | x, y) depends on the label y.
        features: (variables, image) -> features for comparing generated and real images, [batch, feature].
        layers: variables -> {network: its layers as data, as `nn.description.Layer`}, for other runtimes.
        apply: private to the family and used only by its objective, such as a one-pass function of several networks.
    """

    init: Callable[..., Variables]
    latent_dim: int = ABSENT
    encode: Callable[[Variables, Array], tuple[Array, Array]] = ABSENT
    decode_raw: Callable[[Variables, Array], Array] = ABSENT
    likelihood: Likelihood = ABSENT
    prior: Prior = ABSENT
    probabilities: Callable[[Variables, Array], Array] = ABSENT
    num_classes: int = ABSENT
    features: Callable[[Variables, Array], Array] = ABSENT
    condition_on: str = ""
    condition: Callable[[Array, Array], Array] = ABSENT
    given: Callable[[Array], "Model"] = ABSENT
    encoder_takes_label: bool = False
    layers: Callable[[Variables], dict[str, Any]] = ABSENT
    apply: Any = ABSENT

    def of(self, batch: Batch) -> "Model":
        """The model given the conditions of a batch, or the model itself if it is unconditional."""
        return self if self.given is None else self.given(self.condition(batch.image, batch.label))
