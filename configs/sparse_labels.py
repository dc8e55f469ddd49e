"""A VAE that also classifies, trained with few labels (Berkhahn et al. 2019): the post's networks, or dense ones.

python -m vae_jax.main --config=configs/sparse_labels.py          MNIST, 1,000 labels, 32 of each batch of 128 labelled
python -m vae_jax.main --config=configs/sparse_labels.py:published  the published loss, without the cost of the label
python -m vae_jax.main --config=configs/sparse_labels.py:dense    dense networks, Bernoulli on binarized images
python -m vae_jax.main --config=configs/sparse_labels.py:digits   scikit-learn's bundled digits, 100 labels
python -m vae_jax.main --config=configs/sparse_labels.py:smoke    two steps on the bundled digits, for tests
"""

from vae_jax.run.config import make_config
from vae_jax.run.presets import load_preset

semisupervised, vae = map(load_preset, ("semisupervised", "vae"))


def get_config(variant: str = "default"):
    return make_config("sparse_labels", BASE, VARIANTS, variant)


BASE = vae.BASE | {"batch_size": 128, "epochs": 20, "data.labelled": 1000, "data.labelled_per_batch": 32}
VARIANTS = {
    "default": {},
    "published": {"objective.charge": False},
    "dense": vae.BINARY | semisupervised.DENSE,
    "digits": vae.VARIANTS["digits"] | semisupervised.FEW,
    "smoke": vae.VARIANTS["smoke"] | semisupervised.FEW,
}
