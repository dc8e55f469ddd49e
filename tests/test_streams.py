"""Random streams: a pure function of (root key, step, index, name), and independent of each other."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import vae_jax
from vae_jax.augment import augment
from vae_jax.batch import example_keys, named_key
from vae_jax.objectives import reparameterize

ROOT = jax.random.key(0)
NAMES = ("noise", "shift", "rotation", "binarize", "training", "evaluation", "init", "samples", "generate", "simulate")
NAMES += ("codes", "prior", "likelihood", "discriminator", "pixels")


def bits(keys):
    return np.asarray(jax.random.key_data(keys)).reshape(-1, 2)


def test_streams_share_no_key():
    """Of several examples, steps and names, in training and evaluation, and of the root itself."""
    index = jnp.arange(50)
    examples = [example_keys(ROOT, step, index) for step in (None, 0, 1, 2)]
    found = [bits(named_key(keys, name)) for keys in examples for name in ("noise", "shift", "rotation", "binarize")]
    found += [bits(named_key(ROOT, name)) for name in NAMES] + [bits(ROOT)]
    found = np.concatenate(found)
    assert len(np.unique(found, axis=0)) == len(found)


def test_every_name_in_the_package_is_used_once():
    """Two uses of one name would share their noise."""
    folder = Path(inspect.getfile(vae_jax)).parent
    text = "".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    names = re.findall(r"named_key\([^()]*(?:\([^()]*\))?[^()]*\"(\w+)\"\)", text)
    assert sorted(names) == sorted(set(names)) and set(names) == set(NAMES)


def test_a_stream_belongs_to_its_example():
    index = jnp.array([7, 3, 3])
    keys = bits(named_key(example_keys(ROOT, 5, index), "noise"))
    assert (keys[1] == keys[2]).all() and (keys[0] != keys[1]).any()
    alone = named_key(example_keys(ROOT, 5, index[:1])[0], "noise")
    np.testing.assert_array_equal(bits(alone)[0], keys[0])


def test_more_samples_leave_the_first_ones_unchanged():
    keys = example_keys(ROOT, 3, jnp.arange(6))
    zeros = jnp.zeros((6, 4))
    one, five = (reparameterize(zeros, zeros, keys, samples) for samples in (1, 5))
    np.testing.assert_array_equal(one[0], five[0])
    assert len(np.unique(np.asarray(five))) == five.size


def test_noise_and_augmentation_do_not_share_bits():
    """With one key for both, an image's shift would tell its latent noise."""
    n = 2000
    keys = example_keys(ROOT, 0, jnp.arange(n))
    noise = reparameterize(jnp.zeros((n, 1)), jnp.zeros((n, 1)), keys)[0, :, 0]
    image = jnp.zeros((n, 9, 9, 1)).at[:, 4, 4].set(1.0)
    _, row, _, _ = np.nonzero(np.asarray(augment(image, keys, 2, 0.0)))
    assert abs(np.corrcoef(noise, row)[0, 1]) < 4 / np.sqrt(n)
