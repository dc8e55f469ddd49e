"""Conditional VAEs with the post's networks: images of a given label, or the rest of an image.

python -m vae_jax.main --config=configs/conditional.py            MNIST by label, trained as configs/vae.py:best
python -m vae_jax.main --config=configs/conditional.py:bernoulli  the same on binarized images, with a learned p(z | y)
python -m vae_jax.main --config=configs/conditional.py:dense      dense networks on binarized images
python -m vae_jax.main --config=configs/conditional.py:quadrant1  the rest of an image from its lower left quadrant, dense networks
                                                                  on grey pixels as in Pyro's tutorial; :quadrant2, :quadrant3
python -m vae_jax.main --config=configs/conditional.py:column     from its centre column (Doersch 2016)
python -m vae_jax.main --config=configs/conditional.py:digits     scikit-learn's bundled digits by label
python -m vae_jax.main --config=configs/conditional.py:smoke      two steps on the bundled digits, for tests
"""

from vae_jax.run.config import make_config
from vae_jax.run.presets import load_preset

vae = load_preset("vae")


def get_config(variant: str = "default"):
    return make_config("conditional", BASE, VARIANTS, variant)


BASE = vae.BASE | vae.BEST
PARTS = {
    "model.network": "mlp",
    "model.hidden": (500, 500),
    "model.latent_dim": 200,
    "model.condition_hidden": (500, 500),
    "model.likelihood": "bernoulli",
    "model.prior": "learned",
    "optimizer.learning_rate": 0.001,  # at 0.004 a training of :quadrant2 diverged
}
DENSE = vae.BINARY | {
    "model.network": "mlp",
    "model.hidden": (500, 500),
    "model.latent_dim": 50,
    "optimizer.learning_rate": 0.002,  # after 30 epochs the loss of 5,000 validation images is 92.6; 94.1 at 0.001
}
VARIANTS = {
    "default": {},
    "dense": DENSE,
    "bernoulli": vae.BINARY | {"model.prior": "learned"},
    **{name: PARTS | {"model.condition": name} for name in ("quadrant1", "quadrant2", "quadrant3", "column")},
    "digits": vae.VARIANTS["digits"] | {"optimizer.warmup": 0.0},
    "smoke": vae.VARIANTS["smoke"],
}
