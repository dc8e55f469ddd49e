"""M1 + M2 (Kingma et al. 2014): a dense VAE of binarized images, and the semi-supervised model of its codes.

python -m vae_jax.main --config=configs/stacked.py           MNIST, 100 labels, 16 of each batch of 128 labelled
python -m vae_jax.main --config=configs/stacked.py:digits    scikit-learn's bundled digits, 100 labels
python -m vae_jax.main --config=configs/stacked.py:smoke     two steps on the bundled digits, for tests
"""

from vae_jax.run.config import make_config
from vae_jax.run.presets import load_preset

semisupervised, vae = map(load_preset, ("semisupervised", "vae"))


def get_config(variant: str = "default"):
    return make_config("stacked", BASE, VARIANTS, variant)


BASE = semisupervised.BASE
VARIANTS = {"default": {}, "digits": vae.VARIANTS["digits"], "smoke": vae.VARIANTS["smoke"]}
