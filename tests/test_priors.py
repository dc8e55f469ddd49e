"""Each prior against SciPy, Monte Carlo and its own samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.mixture import GaussianMixture

from vae_jax.batch import Batch, example_keys
from vae_jax.evaluation.aggregate import bound_under, draw_posterior, fit_gmm
from vae_jax.families import vae
from vae_jax.priors import mixture, mixture_log_prob, standard_normal, vamp


def test_log_prob_equals_scipy():
    """Summed over latents, normalised, for any leading sample axes."""
    z = np.random.default_rng(0).normal(scale=3, size=(4, 2, 5, 3)).astype(np.float32)
    expected = scipy.stats.norm.logpdf(np.float64(z)).sum(axis=-1)
    prior = standard_normal(3)
    np.testing.assert_allclose(prior.log_prob({}, jnp.asarray(z)), expected, rtol=1e-6)
    np.testing.assert_allclose(prior.log_prob({}, jnp.asarray(z[0, 0])), expected[0, 0], rtol=1e-6)


def test_kl_equals_the_closed_form_of_each_latent():
    """KL(N(m, s^2) || N(0, 1)) = ln(1 / s) + (s^2 + m^2 - 1) / 2, not summed over latents."""
    mean, deviation = np.array([[0.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), np.array([[1.0, 1.0, 0.3], [2.0, 0.1, 1.0]])
    logvar = jnp.asarray(2 * np.log(deviation), jnp.float32)
    expected = -np.log(deviation) + (deviation**2 + mean**2 - 1) / 2
    kl = standard_normal(3).kl({}, jnp.asarray(mean, jnp.float32), logvar)
    np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-7)


def test_kl_at_the_standard_normal_is_exactly_zero():
    np.testing.assert_array_equal(standard_normal(4).kl({}, jnp.zeros((2, 4)), jnp.zeros((2, 4))), 0)


def encode(variables, image):
    """A linear encoder of two pixels, whose weights are variables."""
    flat = image.reshape(len(image), 2)
    return flat @ variables["weights"], 0.3 * flat @ variables["weights"] - 0.5


PRIORS = {
    "standard_normal": standard_normal,
    "mixture": lambda latent_dim: mixture(latent_dim, components=4),
    "vamp": lambda latent_dim: vamp(latent_dim, encode, (1, 2, 1), components=4),
}


@pytest.fixture(params=PRIORS)
def prior(request):
    """A prior of three latents, and the variables that it reads; the vamp prior also reads the encoder's."""
    prior = PRIORS[request.param](3)
    weights = jnp.array([[1.0, -2.0, 0.5], [0.3, 1.0, 1.0]])
    own = jax.tree.map(lambda leaf: leaf * 2, prior.init(jax.random.key(0)))
    return prior, {"weights": weights, "params": {"prior": own}}


def test_each_prior_integrates_to_one():
    for name, make in PRIORS.items():
        prior = make(1)
        variables = {"weights": jnp.array([[1.5], [-0.7]]), "params": {"prior": prior.init(jax.random.key(3))}}
        z = jnp.linspace(-15, 15, 20_001).reshape(-1, 1)
        density = np.exp(np.float64(prior.log_prob(variables, z)))
        assert np.trapezoid(density, z[:, 0]) == pytest.approx(1, abs=1e-5), name


def test_a_mixture_equals_scipy():
    rng = np.random.default_rng(0)
    weight, mean, deviation = np.array([0.2, 0.8]), rng.normal(size=(2, 3)), rng.uniform(0.3, 2, (2, 3))
    z = rng.normal(size=(4, 5, 3))
    density = sum(w * scipy.stats.norm.pdf(z, m, d).prod(axis=-1) for w, m, d in zip(weight, mean, deviation))
    parts = (jnp.asarray(part, jnp.float32) for part in (z, np.log(weight), mean, 2 * np.log(deviation)))
    np.testing.assert_allclose(mixture_log_prob(*parts), np.log(density), rtol=1e-5)


def test_a_vamp_prior_of_one_image_is_its_posterior():
    """With q(z | u) = N(0, I) the one-sample KL has the mean of the closed form of the standard normal."""

    def encode(variables, image):
        return jnp.zeros((len(image), 3)), jnp.zeros((len(image), 3))

    prior = vamp(3, encode, (2, 2, 1), components=1)
    variables = {"params": {"prior": prior.init(jax.random.key(0))}}
    z = jax.random.normal(jax.random.key(1), (7, 5, 3))
    np.testing.assert_allclose(prior.log_prob(variables, z), standard_normal(3).log_prob({}, z), rtol=1e-6)
    assert prior.kl is None


def test_the_gradient_of_a_vamp_prior_reaches_images_and_encoder():
    prior = PRIORS["vamp"](3)
    variables = {"weights": jnp.ones((2, 3)), "params": {"prior": prior.init(jax.random.key(0))}}
    grads = jax.grad(lambda variables: prior.log_prob(variables, jnp.ones((1, 3))).sum())(variables)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    image = variables["params"]["prior"]["image"]
    assert image.shape == (4, 1, 2, 1)
    assert image.mean() == pytest.approx(0.05, abs=0.02) and image.std() < 0.05


@pytest.mark.parametrize("make", [lambda: mixture(3, 0), lambda: vamp(3, encode, (1, 2, 1), 0)])
def test_a_mixture_has_components(make):
    with pytest.raises(ValueError, match="model.components is 0, but must be at least 1"):
        make()


def test_kl_equals_monte_carlo():
    """The mean of log q(z) - log p(z) over z ~ q, of each latent and of all together."""
    prior, variables = standard_normal(3), {}
    mean, logvar = jnp.array([[0.5, -1.0, 0.0]]), jnp.array([[0.2, -1.5, 0.0]])
    n = 200_000
    z = mean + jnp.exp(logvar / 2) * jax.random.normal(jax.random.key(1), (n, 3))
    log_q = scipy.stats.norm.logpdf(z, mean, np.exp(logvar / 2)).sum(axis=-1)
    log_ratio = log_q - prior.log_prob(variables, z)
    kl = prior.kl(variables, mean, logvar)
    assert kl.shape == mean.shape
    np.testing.assert_allclose(kl.sum(), log_ratio.mean(), atol=5 * log_ratio.std() / np.sqrt(n))


def test_draws_have_the_moments_and_follow_the_key():
    sample = standard_normal(2).sample
    z = sample({}, jax.random.key(0), 20_000)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=5 / np.sqrt(20_000))
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=0.05)
    np.testing.assert_allclose((z**4).mean(axis=0), 3, atol=5 * np.sqrt(96 / 20_000))
    np.testing.assert_array_equal(z, sample({}, jax.random.key(0), 20_000))
    assert (z != sample({}, jax.random.key(1), 20_000)).all()


def test_draws_are_of_the_density(prior):
    """The mean of g(z) / p(z) over z ~ p is 1 for any density g, which ties `sample` to `log_prob`."""
    prior, variables = prior
    n = 200_000
    z = prior.sample(variables, jax.random.key(2), n)
    assert z.shape == (n, 3)
    log_g = scipy.stats.norm.logpdf(z, 0.3, 0.7).sum(axis=-1)
    ratio = np.exp(log_g - np.float64(prior.log_prob(variables, z)))
    np.testing.assert_allclose(ratio.mean(), 1, atol=5 * ratio.std() / np.sqrt(n))


def test_a_fitted_mixture_equals_scikit_learn():
    rng = np.random.default_rng(0)
    z = np.concatenate(
        [rng.normal([0, 3], [0.3, 1], (3000, 2)), rng.normal([2, -1], 0.5, (1000, 2)) @ [[1, 0.8], [0, 1]]]
    )
    prior = fit_gmm(z.astype(np.float32), components=2)
    expected = GaussianMixture(2, random_state=0, reg_covar=1e-6).fit(z.astype(np.float32)).score_samples(z[:50])
    found = prior.log_prob({}, jnp.asarray(z[:50], jnp.float32).reshape(5, 10, 2))
    np.testing.assert_allclose(np.reshape(found, 50), expected, rtol=1e-3, atol=1e-3)
    drawn = prior.sample({}, jax.random.key(0), 50_000)
    np.testing.assert_allclose(drawn.mean(axis=0), z.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(z.T), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_bounds_under_two_priors_differ_by_their_log_densities():
    model = vae.make((8, 8, 1), latent_dim=2, encoder_features=(4,), decoder_features=(4,))
    variables = model.init(jax.random.key(0))
    image = jax.random.uniform(jax.random.key(1), (500, 8, 8, 1))
    batch = Batch(image, -jnp.ones(500, jnp.int32), jnp.ones(500), jnp.arange(500))
    keys = example_keys(jax.random.key(2), None, batch.index)
    z = jax.jit(functools.partial(draw_posterior, model))(variables, batch, keys)
    gmm = fit_gmm(np.asarray(z), components=2)
    bounds = jax.jit(functools.partial(bound_under, model, {"own": model.prior, "gmm": gmm}))(variables, batch, keys)
    expected = model.prior.log_prob(variables, z) - gmm.log_prob(variables, z)
    np.testing.assert_allclose(bounds["gmm"] - bounds["own"], expected, rtol=1e-3, atol=1e-3)
    objective = vae.make_objective(model)
    metrics, _ = jax.jit(lambda *given: objective(*given, False, None))(variables, batch, keys)
    error = float(5 * np.std(bounds["own"] - metrics["bound"]) / np.sqrt(500))
    assert float(bounds["own"].mean()) == pytest.approx(float(metrics["bound"].mean()), abs=error)
