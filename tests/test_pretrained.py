"""`vae_jax.load`: the evaluated model, wherever the directory is now, without what training needs."""

import base64
import copy
import io
import pickle
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_run import run_job, small_job

import vae_jax
from configs import conditional
from vae_jax import generate
from vae_jax.families import classifier
from vae_jax.pretrained import Pretrained, of_seed
from vae_jax.pretrained.arguments import check_integer


@pytest.fixture(scope="module")
def vae(small):
    return vae_jax.load(str(small[1].path))


def test_the_moving_average_is_loaded(small, vae):
    state, _, job, _ = small
    jax.tree.map(np.testing.assert_array_equal, vae.variables, state.ema)
    assert vae.step == 10 and vae.config["model"]["latent_dim"] == vae.model.latent_dim == 20
    assert vae.data == job.metadata["data"] and vae.title == job.title == "VAE on digits"


def test_methods_are_the_pure_functions(small, vae):
    image = small[2].dataset.splits["test"].image[:300]  # more than one batch
    mean, logvar = vae.encode(image)
    scaled = image / np.float32(255)
    expected = vae.model.encode(vae.variables, jnp.asarray(scaled))
    np.testing.assert_allclose(mean, expected[0], atol=1e-5)
    np.testing.assert_allclose(logvar, expected[1], atol=1e-5)
    np.testing.assert_array_equal(vae.encode(scaled[..., 0])[0], mean)
    decoded = jax.nn.sigmoid(vae.model.decode_raw(vae.variables, jnp.asarray(mean)))
    np.testing.assert_array_equal(decoded, generate.decode(vae.model, vae.variables, jnp.asarray(mean)))
    np.testing.assert_allclose(vae.decode(mean), decoded, atol=1e-6)
    np.testing.assert_allclose(vae.reconstruct(image), decoded, atol=1e-6)


def test_samples(vae):
    sample = vae.sample(5, seed=3)
    assert sample.shape == (5, 28, 28, 1)
    np.testing.assert_array_equal(sample, vae.sample(5, seed=3))
    assert np.abs(sample - vae.sample(5, seed=4)).max() > 0
    z = jax.random.normal(jax.random.key(3), (5, 20))
    np.testing.assert_array_equal(sample, vae.decode(z))


def test_draws_have_the_moments_of_q_and_of_p(small, vae):
    image = small[2].dataset.splits["test"].image[:1]
    mean, logvar = vae.encode(image)
    z = vae.encode(np.repeat(image, 3000, axis=0), draw=True)
    np.testing.assert_allclose(z.mean(axis=0), mean[0], atol=0.08)  # four standard errors
    np.testing.assert_allclose(z.std(axis=0), np.exp(logvar[0] / 2), rtol=0.06)
    pixels = vae.decode(np.repeat(mean, 3000, axis=0), pixels=True)
    np.testing.assert_allclose(pixels.mean(axis=0), vae.decode(mean)[0], atol=0.09)
    np.testing.assert_allclose(pixels.std(axis=0), 1, rtol=0.07)  # the likelihood's
    for draws in (z, pixels):
        assert len(np.unique(draws.reshape(3000, -1)[:, 0])) > 2900  # no batch repeats another's noise
    np.testing.assert_allclose(z[:5], vae.encode(np.repeat(image, 5, axis=0), draw=True), atol=1e-5)
    assert np.abs(z[0] - vae.encode(image, draw=True, seed=1)).min() > 1e-4
    assert np.abs(pixels[0] - vae.decode(mean, pixels=True, seed=1)).max() > 1e-4


IMAGE, Z = np.zeros((2, 28, 28)), np.zeros((3, 20))


@pytest.mark.parametrize(
    "use,message",
    [
        (lambda vae: vae.encode(IMAGE[..., 1:]), r"images have shape \(2, 28, 27, 1\), but must be \[n, 28, 28, 1\]"),
        (lambda vae: vae.encode(IMAGE[0]), r"images have shape \(28, 28\)"),
        (lambda vae: vae.encode(IMAGE[:0]), r"images have shape \(0, 28, 28, 1\)"),
        (lambda vae: vae.encode(IMAGE.astype(int)), "images are int64, but must be uint8, or float in"),
        (lambda vae: vae.encode(IMAGE + 255), r"images has the value 255.0, but must lie in \[0, 1\]"),
        (lambda vae: vae.encode(IMAGE - 0.5), r"images has the value -0.5, but must lie in \[0, 1\]"),
        (lambda vae: vae.encode(IMAGE + np.inf), "images has the value inf"),
        (lambda vae: vae.encode(IMAGE + np.nan), "images has the value nan, but must lie in"),
        (lambda vae: vae.encode(np.ma.masked_array(IMAGE, mask=True)), "images is a masked array"),
        (lambda vae: vae.decode(Z[:, 1:]), r"z has shape \(3, 19\), but must be \[n, 20\]"),
        (lambda vae: vae.decode(Z + np.nan), r"z has the value nan, but must lie in \[-10000, 10000\]"),
        (lambda vae: vae.decode(Z + 1e300), r"z has the value 1e\+300"),
        (lambda vae: vae.decode(Z.astype(complex)), "z is complex128, but must be real numbers"),
        (lambda vae: vae.decode(np.full((1, 20), "a")), "z is <U1, but must be real numbers"),
        (lambda vae: vae.decode(np.ma.masked_array(Z)), "z is a masked array"),
        (lambda vae: vae.sample(0), "count is 0, but must be an integer from 1 to 1000000"),
        (lambda vae: vae.sample(True), "count is True, but must be an integer"),
        (lambda vae: vae.sample(2 * 10**9), "count is 2000000000, but must be an integer from 1 to 1000000"),
        (lambda vae: vae.sample(2, seed=2**32), "seed is 4294967296, but must be an integer from 0 to 4294967295"),
        (lambda vae: check_integer("seed", "0", 0, 9), "seed is '0', but must be an integer from 0 to 9"),
        (lambda vae: check_integer("seed", 1.0, 0, 9), "seed is 1.0, but must be an integer"),
    ],
)
def test_bad_arguments(vae, use, message):
    with pytest.raises(ValueError, match=message) as error:
        use(vae)
    assert "\n" not in str(error.value)


def test_a_shell_shows_a_few_lines_and_a_notebook_16_samples(vae):
    assert str(vae).splitlines() == [
        "<VAE on digits: step 10, 12,325 parameters",
        "  images of 28x28x1, 20 latents, decoder_features [4, 4], encoder_features [4, 4]>",
    ]
    before, _, after = vae._repr_html_().partition("data:image/png;base64,")
    assert before.startswith("<div><pre>&lt;VAE on digits: step 10") and '<img alt="16 generated images"' in before
    with Image.open(io.BytesIO(base64.b64decode(after.partition('"')[0]))) as file:
        pixels = np.asarray(file) / 255
    assert pixels.shape == (2 * 30, 8 * 30)
    np.testing.assert_allclose(pixels[32:60, 32:60], vae.sample(16)[9, ..., 0], atol=1 / 255)
    assert (pixels[::30] == 1).all() and (pixels[:, ::30] == 1).all()


def test_a_notebook_shows_what_a_model_generates_by_itself():
    """A classifier generates nothing, a completing model needs an image, and a model of labels gets each label in turn."""
    assert "<img" not in vae_jax.load("mnist-classifier")._repr_html_()
    for condition, pictures in (("label", 1), ("quadrant1", 0)):
        config = conditional.get_config("smoke").to_dict()
        config["model"] |= {"condition": condition, "encoder_features": (2,), "decoder_features": (2,)}
        metadata = {"config": config, "step": 0, "data": {}, "image_shape": [8, 8, 1], "num_classes": 3}
        model = Pretrained(metadata, {}).model
        untrained = Pretrained(metadata, jax.jit(model.init)(jax.random.key(0)))
        assert untrained._repr_html_().count("<img") == pictures


def test_a_config_shows_what_is_no_default():
    config = conditional.get_config("smoke")
    assert repr(config) == (
        "<config of conditional: batch_size=512, best='bound', data.name='digits', epochs=1, "
        "optimizer.learning_rate=0.004, optimizer.schedule='onecycle', optimizer.warmup=0.3, run.likelihood_samples=0; "
        "other fields have their defaults>"
    )
    assert "learn_scale: false" in str(config) and copy.deepcopy(config).to_dict() == config.to_dict()


def test_remote_runs_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"vae_jax.load takes a run on this machine: copy gs://b/x here .* name the copy"
    ):
        vae_jax.load("gs://b/x")


@pytest.mark.slow
def test_seeds(tmp_path):
    job, config = small_job({"seeds": 2, "seed": 5})
    state, _ = run_job(job, config, tmp_path)
    for seed, position in [(None, 0), (5, 0), (6, 1)]:
        variables = vae_jax.load(str(tmp_path), seed=seed).variables
        expected = jax.tree.map(lambda leaf: leaf[position], state.eval_variables)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, variables, expected)
    with pytest.raises(ValueError, match="seed 7 was not trained in .*: give 5 to 6"):
        vae_jax.load(str(tmp_path), seed=7)


def test_a_model_of_a_seed_has_that_seeds_noise(vae):
    """It binarizes and draws as the evaluation of that seed does; what the run logged are means over its seeds."""
    metadata = vae.metadata | {"config": vae.config | {"seed": 5, "seeds": 3}, "metrics": {"test/loss": 1.0}}
    variables = jax.tree.map(lambda leaf: np.stack([leaf, leaf, leaf]), vae.variables)
    found = of_seed("runs/three", metadata, variables, 6)
    assert (found.config["seed"], found.config["seeds"], found.metadata["metrics"]) == (6, 1, {})
    jax.tree.map(np.testing.assert_array_equal, found.variables, vae.variables)


def test_another_prior_is_not_lost_silently(vae):
    narrow = vae.with_prior(vae.model.prior._replace(sample=lambda variables, key, count: jnp.zeros((count, 20))))
    np.testing.assert_array_equal(narrow.sample(2), vae.decode(np.zeros((2, 20))))
    for use in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ValueError, match="a model with another prior cannot be pickled"):
            use(narrow)


def test_what_a_family_lacks_is_named(vae):
    image = np.zeros((2, 28, 28), np.uint8)
    for use in (vae.predict, vae.probabilities):
        with pytest.raises(ValueError, match="a model of the family vae has no classes"):
            use(image)
    model = classifier.make((28, 28, 1), 10, features=(2,))
    config = {
        "model": {"name": "classifier", "features": [2]},
        "data": {"name": "digits", "binarize": "none"},
        "seed": 0,
    }
    metadata = {"config": config, "step": 0, "data": {}, "image_shape": [28, 28, 1], "num_classes": 10}
    digits = Pretrained(metadata, jax.jit(model.init)(jax.random.key(0)))
    label, probability = digits.predict(image)
    assert label.shape == probability.shape == (2,)
    np.testing.assert_array_equal(probability, digits.probabilities(image).max(axis=1))
    for use, what in [
        (lambda: digits.encode(image), "encoder"),
        (lambda: digits.reconstruct(image), "encoder"),
        (lambda: digits.decode(np.zeros((2, 20))), "decoder"),
        (lambda: digits.sample(2), "decoder"),
    ]:
        with pytest.raises(ValueError, match=f"a model of the family classifier has no {what}") as error:
            use()
        assert "\n" not in str(error.value)


def test_a_run_of_the_old_format_is_refused(small, tmp_path):
    copy = shutil.copytree(small[1].path, tmp_path / "old")
    checkpoint = copy / "checkpoints" / "10"
    (checkpoint / "metadata").rename(checkpoint / "about")
    (checkpoint / "sha256.json").unlink()
    message = "checkpoint 10 in .* was written by an earlier format of vae_jax, which commit af11a1a reads"
    with pytest.raises(ValueError, match=message) as error:
        vae_jax.load(str(copy))
    assert "\n" not in str(error.value)


def test_no_run(tmp_path, small):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        vae_jax.load(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(
        ValueError,
        match="there is no checkpoint '3' in .*: give latest, best, or one of 10",
    ):
        vae_jax.load(str(small[1].path), checkpoint="3")


def test_loading_needs_neither_config_nor_training_set(small):
    code = f"""
import sys, vae_jax
vae_jax.load({str(small[1].path)!r}).sample(2)
names = ("ml_collections", "tensorflow_datasets", "sklearn", "matplotlib", "absl.flags", "tqdm")
print(*(name for name in names if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() in (
        [],
        ["absl.flags"],
    )  # which Orbax imports for itself
    assert result.stderr == ""
