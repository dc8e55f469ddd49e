"""What the latents of a model carry."""

import numpy as np
from jaxtyping import Float


def active_units(mean: Float[np.ndarray, "n latent"]) -> int:
    """How many latents the encoder uses: those whose posterior mean varies by more than 0.01 over the data.

    Source: Burda et al. 2016, section 5.2.
    """
    return int(np.sum(mean.var(axis=0) > 0.01))
