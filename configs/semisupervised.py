"""M2 (Kingma et al. 2014): dense networks of 500 units, 50 latents, binarized images, few labels.

python -m vae_jax.main --config=configs/semisupervised.py           MNIST, 100 labels, 16 of each batch of 128 labelled; 35 min
python -m vae_jax.main --config=configs/semisupervised.py:digits    scikit-learn's bundled digits, 100 labels
python -m vae_jax.main --config=configs/semisupervised.py:smoke     two steps on the bundled digits, for tests
"""

from vae_jax.run.config import make_config
from vae_jax.run.presets import load_preset

vae = load_preset("vae")


def get_config(variant: str = "default"):
    return make_config("semisupervised", BASE, VARIANTS, variant)


DENSE = {"model.network": "mlp", "model.hidden": (500,), "model.latent_dim": 50}
FEW = {"data.labelled": 100, "data.labelled_per_batch": 16}
BASE = vae.BASE | vae.BINARY | DENSE | FEW | {"batch_size": 128}
VARIANTS = {"default": {}, "digits": vae.VARIANTS["digits"], "smoke": vae.VARIANTS["smoke"]}
