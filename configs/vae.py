"""The post's convolutional VAE (its Tables 1-3), 262,761 parameters: test loss, and time on two quiet CPU cores.

python -m vae_jax.main --config=configs/vae.py          18.49, 25 min: MNIST, the post's training, shuffled
python -m vae_jax.main --config=configs/vae.py:best     18.16, for a GPU: the same network and epochs, trained better
python -m vae_jax.main --config=configs/vae.py:matlab   18.58: MATLAB's recipe to the letter, not shuffled
python -m vae_jax.main --config=configs/vae.py:digits   11.08, 72 s: scikit-learn's bundled digits
python -m vae_jax.main --config=configs/vae.py:pooling  max pooling instead of strides, which the post says fails;
                                                        :latent2, :latent5 and :latent10 have fewer latents
python -m vae_jax.main --config=configs/vae.py:smoke    two steps on the bundled digits, for tests
"""

from vae_jax.run.config import make_config


def get_config(variant: str = "default"):
    return make_config("vae", BASE, VARIANTS, variant)


BASE = {"epochs": 50, "batch_size": 512, "best": "bound"}
VARIANTS = {
    "default": {},
    "matlab": {"data.shuffle": False},
    "best": {
        "batch_size": 128,
        "optimizer.learning_rate": 0.004,
        "optimizer.schedule": "onecycle",
        "optimizer.warmup": 0.3,
    },
    "pooling": {"model.pooling": True},
    "latent2": {"model.latent_dim": 2},
    "latent5": {"model.latent_dim": 5},
    "latent10": {"model.latent_dim": 10},
    "digits": {
        "data.name": "digits",
        "epochs": 100,
        "batch_size": 64,
        "optimizer.learning_rate": 0.002,
        "optimizer.schedule": "cosine",
        "run.figures_every": 25,
    },
    "smoke": {"data.name": "digits", "epochs": 1, "batch_size": 512},
}
