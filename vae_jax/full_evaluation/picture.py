"""The figure of a full evaluation."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from vae_jax.figures import BASELINE, TEST, draw_plane, new_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_evaluation(
    curve: Mapping[int, float],
    variance: Float[np.ndarray, " latent"],
    error: Float[np.ndarray, " n"],
    planes: Mapping[str, tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " 2"]]],
    label: Int[np.ndarray, " n"],
    title: str,
) -> "Figure":
    """The likelihood by number of samples, the latents' variances, the reconstruction errors, and the codes in planes.

    Args:
        curve: {number of samples: estimate of -log p(x)}; {} if there is none.
        variance: variance of each latent's posterior mean over the split.
        error: mean squared error of each image's reconstruction, over the pixels that p covers.
        planes: {title: (codes on two principal axes, shares of the variance)}.
    """
    figure = new_figure(15.0, 8.0, title)
    axes = figure.subplot_mosaic([["curve", "variance", "error"], [*planes, *["empty"] * (3 - len(planes))]])
    axes.pop("empty").set_axis_off()
    axes["curve"].plot([*curve], [*curve.values()], color=TEST, marker="o")
    axes["curve"].set(xscale="log", xlabel="samples of z", ylabel="nats per image", title="estimate of -log p(x)")
    exponent = np.log10(np.maximum(variance, 1e-12))
    edges = np.linspace(exponent.min(initial=-4), exponent.max(initial=1), 40)
    axes["variance"].hist(exponent, bins=edges.tolist(), color=TEST)
    axes["variance"].axvline(-2, color=BASELINE, linestyle="--")
    axes["variance"].yaxis.set_major_locator(whole_numbers())
    axes["variance"].set(
        xlabel="log10 of the variance of the posterior mean",
        ylabel="latents",
        title="active units lie right of the line",
    )
    axes["error"].hist(error, bins=60, color=TEST)
    axes["error"].axvline(error.mean(), color=BASELINE, linestyle="--")
    axes["error"].set(xlabel="mean squared error", ylabel="images", title=f"reconstruction: mean {error.mean():.4f}")
    for name, (plane, share) in planes.items():
        names = f"first, {share[0]:.0%} of the variance", f"second, {share[1]:.0%}"
        draw_plane(axes[name], plane, label, names)
        axes[name].set(title=name)
    return figure
