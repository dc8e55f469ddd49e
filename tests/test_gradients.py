"""Which term trains which network: norms that are known, exact zeros, and every family of several networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax.batch import Batch, example_keys
from vae_jax.evaluation.gradients import gradient_routing, routing_table
from vae_jax.families import FAMILIES
from vae_jax.run.config import fill_in

SHAPE = (4, 4, 1)
SMALL = {"network": "mlp", "hidden": (8,), "latent_dim": 3, "features": (4,)}
KNOWN = {"image_shape": SHAPE, "num_classes": 3, "labelled_share": 0.5, "binarize": "none", "steps_per_epoch": 2}
KNOWN["train_size"] = 6


def make_batch(label):
    n = len(label)
    image = np.random.default_rng(0).random((n, *SHAPE), np.float32)
    return Batch(jnp.asarray(image), jnp.asarray(label, jnp.int32), jnp.ones(n), jnp.arange(n))


def route(objective, variables, batch, terms):
    keys = example_keys(jax.random.key(0), 3, batch.index)
    return jax.jit(lambda variables: gradient_routing(objective, variables, batch, keys, terms))(variables)


def quadratic(variables, batch, keys, train, step, axis_name=None):
    """first = a^2 / 2 + b, second = 3 c of the examples labelled 1 alone, loss = first + 10 second; a is stopped in the
    loss.
    """
    assert train and step is None
    params, ones = variables["params"], jnp.ones(len(batch.label))
    a, b, c = params["autoencoder"]["encoder"], params["autoencoder"]["decoder"], params["head"]
    first, second = (0.5 * a @ a + b) * ones, 3 * c * ones
    loss = first + 10 * second - 0.5 * (a @ a - jax.lax.stop_gradient(a @ a)) * ones
    own = (batch.label == 1).astype(jnp.float32)
    return {"first": first, "second": (jnp.where(own > 0, second, 7.0), own), "loss": loss}, {}


def test_norms_that_are_known():
    """|a| = 5, and the weights are summed before they divide; a term that the objective does not return has no row."""
    variables = {
        "params": {"autoencoder": {"encoder": jnp.array([3.0, 4.0]), "decoder": jnp.ones(())}, "head": jnp.ones(())}
    }
    found = route(quadratic, variables, make_batch([1, 0, 1, -1]), ("first", "second", "third"))
    expected = {"first": (5, 1, 0), "second": (0, 0, 3), "loss": (0, 1, 30)}
    assert set(found) == set(expected)
    for term, norms in expected.items():
        assert [float(found[term][network]) for network in ("encoder", "decoder", "head")] == pytest.approx(norms)
    assert routing_table(found, ("first", "second", "third")) == [
        "| norm of the gradient | encoder | decoder | head |",
        "|---|---|---|---|",
        "| first | 5 | 1 | 0 |",
        "| second | 0 | 0 | 3 |",
        "| loss | 0 | 1 | 30 |",
    ]


def test_a_term_that_counts_no_example_trains_nothing():
    variables = {"params": {"autoencoder": {"encoder": jnp.ones(2), "decoder": jnp.ones(())}, "head": jnp.ones(())}}
    found = route(quadratic, variables, make_batch([0, -1]), ("second",))
    assert not any(float(norm) for norm in found["second"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if hasattr(family, "TERMS")])
def test_the_kl_trains_no_decoder_and_the_loss_trains_every_network(name):
    family = FAMILIES[name]
    small = SMALL if name != "vaegan" else {"latent_dim": 3, "decoder_features": (4,), "discriminator_features": (4, 4)}
    model = fill_in(family.make, **KNOWN, **small)
    objective = fill_in(family.make_objective, model=model, **KNOWN)
    noise = map(jax.random.key, range(1, 100))
    variables = jax.jit(model.init)(jax.random.key(0))
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape), variables)
    found = route(
        objective, variables, make_batch([0, 1, 2, -1] if name == "sparse_labels" else [0, 1, 2, 0]), family.TERMS
    )
    assert set(found) <= {*family.TERMS, "loss"} and set(found) <= {*family.METRICS}
    assert {"encoder", "decoder"} <= set(found["loss"])
    assert float(found["kl"]["decoder"]) == 0 and float(found["kl"]["encoder"]) > 0
    for network, norm in found["loss"].items():
        assert float(norm) > 0 or (name, network) == ("conditional", "of_prior")  # p(z | c) is N(0, I) by default


def test_a_family_of_one_network_has_no_table():
    assert not hasattr(FAMILIES["classifier"], "TERMS")
