"""What latents carry: the parts of the KL where they are known, and probes of labels."""

import math

import numpy as np
import pytest
import scipy.stats

from vae_jax.evaluation.latents import (
    decompose_kl,
    log_aggregate_posterior,
    principal_axes,
    probe_labels,
    tsne_plane,
)

N = 600


def posterior(spread, variance, latents=2, n=N):
    """Draws, means and log-variances of q(z | x_n) = N(m_n, variance) with m_n ~ N(0, spread), and the KL by latent."""
    rng = np.random.default_rng(0)
    mean = math.sqrt(spread) * rng.standard_normal((n, latents)).astype(np.float32)
    logvar = np.full((n, latents), math.log(variance), np.float32)
    z = mean + math.sqrt(variance) * rng.standard_normal(mean.shape).astype(np.float32)
    return z, mean, logvar, 0.5 * (variance + mean**2 - 1 - logvar)


def decompose(spread, variance, **sizes):
    z, mean, logvar, by_latent = posterior(spread, variance, **sizes)
    return decompose_kl(z, mean, logvar, by_latent.sum(axis=1), by_latent), by_latent


def test_narrow_codes_carry_ln_n():
    """Not the log of a batch: the mixture is over all images."""
    numbers, _ = decompose(1.0, 1e-8)
    assert numbers["mutual_information"] == pytest.approx(math.log(N), abs=1e-3)
    assert numbers["mutual_information/most"] == math.log(N)


def test_codes_that_ignore_the_image_carry_nothing():
    numbers, _ = decompose(0.0, 1.0)
    assert numbers["mutual_information"] == pytest.approx(0, abs=1e-5)
    assert numbers["aggregate_kl"] == pytest.approx(0, abs=1e-5)
    assert numbers["total_correlation"] == pytest.approx(0, abs=1e-5)


def test_a_gaussian_channel_carries_what_shannon_says():
    """m ~ N(0, 3/4), z = m + N(0, 1/4): each latent carries 1/2 ln(1 / (1/4)), and q(z) is the prior."""
    numbers, _ = decompose(0.75, 0.25, n=4000)
    assert numbers["mutual_information"] == pytest.approx(math.log(4), abs=0.05)
    assert numbers["aggregate_kl"] == pytest.approx(0, abs=0.05)
    np.testing.assert_allclose(numbers["aggregate_kl_by_latent"], 0, atol=0.03)


def test_the_parts_add_up_to_the_kl():
    numbers, by_latent = decompose(2.0, 0.3, latents=3)
    total = by_latent.sum(axis=1).mean()
    assert numbers["mutual_information"] + numbers["aggregate_kl"] == pytest.approx(total, rel=1e-6)
    parts = numbers["total_correlation"] + sum(numbers["aggregate_kl_by_latent"])
    assert parts == pytest.approx(numbers["aggregate_kl"], abs=0.02)


def test_total_correlation_of_a_known_gaussian():
    """Two latents of correlation 0.8 as nearly exact codes: -1/2 ln(1 - 0.64)."""
    rng = np.random.default_rng(0)
    mean = rng.multivariate_normal([0, 0], [[0.9, 0.8], [0.8, 0.9]], 4000).astype(np.float32)
    logvar = np.full_like(mean, math.log(0.1))
    z = (mean + math.sqrt(0.1) * rng.standard_normal(mean.shape)).astype(np.float32)
    numbers = decompose_kl(z, mean, logvar, np.zeros(4000, np.float32))
    assert numbers["total_correlation"] == pytest.approx(-0.5 * math.log(1 - 0.64), abs=0.05)
    assert "aggregate_kl_by_latent" not in numbers


def test_the_aggregate_posterior_is_the_mean_of_the_posteriors():
    z, mean, logvar, _ = posterior(1.0, 0.5, n=40)
    joint, marginal = log_aggregate_posterior(z[:5], mean, logvar)
    density = scipy.stats.norm.pdf(z[:5, None], mean, np.exp(logvar / 2)).astype(np.float64)
    np.testing.assert_allclose(joint, np.log(density.prod(axis=2).mean(axis=1)), rtol=1e-5)
    np.testing.assert_allclose(marginal, np.log(density.mean(axis=1)), rtol=1e-4, atol=1e-5)


def test_probes_read_separated_labels_and_no_others():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 600).astype(np.int32)
    codes = 4 * np.eye(3, dtype=np.float32)[label] + rng.standard_normal((600, 3)).astype(np.float32)
    told = probe_labels((codes[:400], label[:400]), (codes[400:], label[400:]))
    assert min(told.values()) > 0.95 and {*told} == {"linear_probe_accuracy", "neighbour_accuracy"}
    shuffled = probe_labels((codes[:400], rng.permutation(label[:400])), (codes[400:], label[400:]))
    assert max(shuffled.values()) < 0.5


def test_the_principal_axes_keep_the_largest_variances():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5000, 4)) * [3.0, 0.1, 2.0, 0.1] + 7
    axes = principal_axes(values.astype(np.float32))
    plane = axes.project(values)
    np.testing.assert_allclose(plane.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(plane.std(axis=0), axes.deviation, rtol=1e-5)
    np.testing.assert_allclose(axes.deviation, [3, 2], rtol=0.03)
    np.testing.assert_allclose(axes.share, np.array([9, 4]) / 13.02, rtol=0.05)


def test_tsne_keeps_neighbours():
    """Of three far groups of codes, each code's nearest neighbour on the map is of its own group."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 20)
    mean = (10 * np.eye(3)[group] + rng.normal(size=(60, 3))).astype(np.float32)
    plane = tsne_plane(mean)
    distance = np.linalg.norm(plane[:, None] - plane[None], axis=-1) + 1e9 * np.eye(60)
    assert plane.shape == (60, 2) and (group[distance.argmin(axis=1)] == group).all()
    assert tsne_plane(mean[:5, :1]).shape == (5, 2)
    with pytest.raises(ValueError, match="there are 4 codes, but t-SNE needs at least 5"):
        tsne_plane(mean[:4])


def test_one_code_has_axes_of_length_0():
    axes = principal_axes(np.array([[1.0, 2.0, 3.0]]))
    assert axes.direction.shape == (2, 3) and axes.deviation.shape == axes.share.shape == (2,)
    np.testing.assert_array_equal(axes.project(np.array([[1.0, 2.0, 3.0]])), [[0.0, 0.0]])
