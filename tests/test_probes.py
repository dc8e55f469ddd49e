"""Probes: what they measure, and that they cost no second pass; test_commands.py has that every split reports them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax.batch import Batch, Split
from vae_jax.evaluation.latents import active_units
from vae_jax.families import classifier, vae
from vae_jax.steps import make_eval_step


def make_batch(n=16, shape=(8, 8, 1)):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random((n, *shape), np.float32))
    return Batch(image, jnp.arange(n) % 3, jnp.ones(n), jnp.arange(n))


@pytest.fixture(scope="module")
def small_vae():
    model = vae.make((8, 8, 1), latent_dim=3, encoder_features=(4, 4), decoder_features=(4, 4))
    return model, model.init(jax.random.key(0))


def test_active_units_count_the_means_that_vary():
    mean = np.zeros((1000, 3))
    mean[:, 1] = 0.1001 * np.resize([1, -1], 1000)  # variance just above 0.01
    mean[:, 2] = 0.0999 * np.resize([1, -1], 1000) + 7  # just below it, far from 0
    assert active_units(mean) == 1


def test_the_kl_by_latent_sums_to_the_kl(small_vae):
    model, variables = small_vae
    batch, key = make_batch(), jax.random.key(1)
    metrics = make_eval_step(vae.make_objective(model))(variables, batch, key)
    probes = vae.make_probes(model)
    arrays = jax.device_get(probes.measure(variables, batch, None))
    numbers = probes.reduce(arrays, Split(np.zeros((16, 8, 8, 1), np.uint8), np.arange(16, dtype=np.int32)))
    np.testing.assert_allclose(sum(numbers["kl_by_latent"]), metrics["kl"].mean(), rtol=1e-5)
    assert len(numbers["kl_by_latent"]) == 3 and 0 <= numbers["active_units"] <= 3
    one = probes.reduce(
        jax.tree.map(lambda leaf: leaf[:1], arrays), Split(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int32))
    )
    assert [*one] == ["kl_by_latent"]  # the mean of one image has no variance


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def family_model(name):
    if name == "vae":
        return vae, vae.make((8, 8, 1), latent_dim=3, encoder_features=(8, 8), decoder_features=(8, 8))
    return classifier, classifier.make((8, 8, 1), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "classifier"])
def test_nothing_is_encoded_twice(name):
    """The compiler merges the probes' pass with the objective's: together they cost little more than the objective."""
    family, model = family_model(name)
    fields = {} if name == "vae" else {"image_shape": (8, 8, 1)}
    objective, probes = family.make_objective(model, **fields), family.make_probes(model)
    variables, batch, key = model.init(jax.random.key(0)), make_batch(128), jax.random.key(1)
    alone = make_eval_step(objective)

    def both(variables, batch, key):
        return alone(variables, batch, key), probes.measure(variables, batch, None)

    assert flops(both, variables, batch, key) < 1.05 * flops(alone, variables, batch, key)


def test_a_classifier_reports_confusion_and_calibration():
    """Three classes; one of the two images of class 2 is taken for class 0."""
    _, model = family_model("classifier")
    label = np.array([0, 0, 1, 1, 2, 2], np.int32)
    arrays = {"prediction": np.array([0, 0, 1, 1, 2, 0]), "confidence": np.full(6, 0.9, np.float32)}
    split = Split(np.zeros((6, 8, 8, 1), np.uint8), label)
    numbers = classifier.make_probes(model).reduce(arrays, split)
    assert numbers["confusion"] == [[2, 0, 0], [0, 2, 0], [1, 0, 1]]
    assert numbers["class_accuracy"] == [1.0, 1.0, 0.5]
    assert numbers["calibration_error"] == pytest.approx(0.9 - 5 / 6, rel=1e-5)
    without = classifier.make_probes(model).reduce(
        {name: values[:4] for name, values in arrays.items()}, Split(split.image[:4], label[:4])
    )
    assert "class_accuracy" not in without  # class 2 has no image
