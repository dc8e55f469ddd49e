"""What the latents of a model carry."""

import numpy as np
from jaxtyping import Float


def active_units(mean: Float[np.ndarray, "n latent"], threshold: float = 0.01) -> int:
    """The number of latents whose posterior mean varies over the data: Var_x(E_q[z_j | x]) >= threshold.

    Source: Burda et al. 2016, section 5.2.
    """
    return int(np.sum(mean.var(axis=0, dtype=np.float64) >= threshold))
