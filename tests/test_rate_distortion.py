"""Rate and distortion: a linear VAE trained over many betas in one program lies on its closed-form curve."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import rate_distortion
from vae_jax.batch import Batch
from vae_jax.evaluation.baselines import linear_rate_distortion, linear_vae_loss
from vae_jax.families import vae
from vae_jax.likelihoods import unit_gaussian
from vae_jax.model import Model
from vae_jax.priors import standard_normal
from vae_jax.steps import init_state, make_train_step

PIXELS, LATENT, EXAMPLES, STEPS = 6, 3, 400, 3000
BETAS = (0.25, 0.5, 1.0, 1.5, 3.0, 6.0)


def linear_vae():
    """x ~ N(W z, I), q(z | x) = N(A x, diag(v))."""

    def init(key):
        of_a, of_w = jax.random.split(key)
        params = {"a": 0.1 * jax.random.normal(of_a, (PIXELS, LATENT)), "logvar": jnp.zeros(LATENT)}
        return {"params": params | {"w": 0.1 * jax.random.normal(of_w, (LATENT, PIXELS))}}

    def encode(variables, image):
        mean = image.reshape(-1, PIXELS) @ variables["params"]["a"]
        return mean, jnp.broadcast_to(variables["params"]["logvar"][None], mean.shape)

    def decode(variables, z):
        return (z @ variables["params"]["w"]).reshape(*z.shape[:-1], PIXELS, 1, 1)

    p_x = unit_gaussian()._replace(energy=lambda variables, raw, image: 0.5 * (raw - image[None]) ** 2)
    return Model(init, LATENT, encode, decode, p_x, standard_normal(LATENT))


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((EXAMPLES, PIXELS)) * np.sqrt([9, 4, 2, 1, 0.5, 0.1])
    return x - x.mean(axis=0)


def test_a_linear_vae_lies_on_its_curve_for_every_beta(examples):
    model = linear_vae()
    at_beta_1 = vae.make_objective(model)
    image = jnp.asarray(examples, jnp.float32).reshape(EXAMPLES, PIXELS, 1, 1)
    batch = Batch(image, -jnp.ones(EXAMPLES, jnp.int32), jnp.ones(EXAMPLES), jnp.arange(EXAMPLES))

    def train(beta):
        def objective(*arguments):
            metrics, state = at_beta_1(*arguments)
            return metrics | {"loss": metrics["reconstruction"] + beta * metrics["kl"]}, state

        optimizer = optax.adam(optax.cosine_decay_schedule(0.02, STEPS))
        step = make_train_step(objective, optimizer)

        def advance(state, _):
            state, metrics = step(state, batch)
            return state, (metrics["kl"].mean, metrics["reconstruction"].mean)

        state = init_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
        _, (rate, distortion) = jax.lax.scan(advance, state, None, STEPS)
        return rate[-500:].mean(), distortion[-500:].mean()

    found = np.array(jax.jit(jax.vmap(train))(jnp.array(BETAS)))
    eigenvalues = np.linalg.eigvalsh(examples.T @ examples / EXAMPLES)[::-1]
    expected = np.array([linear_rate_distortion(eigenvalues, LATENT, beta) for beta in BETAS]).T
    np.testing.assert_allclose(found, expected, rtol=0.015, atol=0.005)
    assert (np.diff(expected[0]) < 0).all() and (np.diff(expected[1]) > 0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("latent_dim", [0, 2, 6])
def test_the_curve_and_the_loss_of_the_best_linear_vae_agree(beta, latent_dim):
    eigenvalues = np.array([9.0, 4, 2, 1, 0.5, 0.1])
    rate, distortion = linear_rate_distortion(eigenvalues, latent_dim, beta)
    assert distortion + beta * rate == pytest.approx(linear_vae_loss(eigenvalues, latent_dim, beta), rel=1e-12)


def test_the_table_and_the_picture_of_a_sweep():
    chosen = rate_distortion.runs(["0.5", "2"], ["5"])
    assert chosen == {
        "beta0.5": {"objective.beta": "0.5"},
        "beta2": {"objective.beta": "2"},
        "latent5": {"model.latent_dim": "5"},
    }
    found = {
        name: {"test/kl": 3.0 - i, "test/reconstruction": 5.0 + i, "test/frechet_distance": "left out: why"}
        for i, name in enumerate(chosen)
    }
    heading, first, *_ = rate_distortion.table(found)
    assert first == ["beta0.5", "3.00", "5.00", *[""] * (len(heading) - 3)]
    figure = rate_distortion.draw(found, np.array([9.0, 4, 2, 1]), 2, "a sweep")
    assert [text.get_text() for text in figure.axes[0].texts] == ["beta 0.5", "beta 2", "5 latents"]
