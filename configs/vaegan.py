"""VAE/GAN (Larsen et al. 2016): the post's networks, with a discriminator's features in place of the pixels.

python -m vae_jax.main --config=configs/vaegan.py          MNIST
python -m vae_jax.main --config=configs/vaegan.py:vae      the plain VAE of the same networks; :gan, the plain GAN
python -m vae_jax.main --config=configs/vaegan.py:digits   scikit-learn's bundled digits
python -m vae_jax.main --config=configs/vaegan.py:smoke    two steps on the bundled digits, for tests
"""

from vae_jax.run.config import make_config
from vae_jax.run.presets import load_preset

vae = load_preset("vae")


def get_config(variant: str = "default"):
    return make_config("vaegan", BASE, VARIANTS, variant)


BASE = {
    "epochs": 20,
    "batch_size": 64,
    "best": "bound",
    "objective.beta": 0.25,
    "optimizer.beta1": 0.5,
    "optimizer.ema_decay": 0.999,
}
CONTROLS = {method: {"objective.method": method, "objective.beta": 1.0} for method in ("vae", "gan")}
VARIANTS = {
    "default": {},
    **CONTROLS,
    "digits": {"data.name": "digits", "epochs": 100, "run.figures_every": 25},
    "smoke": vae.VARIANTS["smoke"],
}
