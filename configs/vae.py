"""The post's convolutional VAE (its Tables 1-3): test loss, and quiet time on two CPU cores.

python -m vae_jax.main --config=configs/vae.py          18.49, 25 min: MNIST, the post's training, shuffled
python -m vae_jax.main --config=configs/vae.py:digits   11.08, 72 s: scikit-learn's bundled digits
python -m vae_jax.main --config=configs/vae.py:matlab   18.58: MATLAB's recipe to the letter, not shuffled
python -m vae_jax.main --config=configs/vae.py:best     18.16: the same network and epochs, trained better
python -m vae_jax.main --config=configs/vae.py:pooling  what the post says fails: pooling instead of strides, and
                                                        short latents, :latent2, :latent5 and :latent10
python -m vae_jax.main --config=configs/vae.py:smoke    two steps on the bundled digits, for tests
"""

from ml_collections import ConfigDict


def get_config(variant: str = "default") -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "seeds": 1,
            "epochs": 50,
            "batch_size": 512,
            "best": "loss",
            "data": {
                "name": "mnist",
                "manual_dir": "",
                "validation": 0,
                "shuffle": True,
            },
            "model": {
                "name": "vae",
                "latent_dim": 20,
                "encoder_features": (32, 64),
                "decoder_features": (64, 32),
                "pooling": False,
                "precision": "float32",
            },
            "objective": {"name": "elbo", "beta": 1.0},
            "optimizer": {
                "name": "adam",
                "learning_rate": 0.001,
                "base_batch_size": 0,
                "scaling": "sqrt",
                "schedule": "constant",
                "warmup": 0.0,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "average": 0.0,
            },
            "run": {
                "chunk": 20,
                "save_every": 500,
                "keep": 2,
                "figures_every": 10,
                "tensorboard": False,
                "profile": False,
                "compilation_cache": True,
            },
        }
    )
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/vae.py has no variant {variant!r}: there are {', '.join(VARIANTS)}"
        )
    config.update_from_flattened_dict(VARIANTS[variant])
    return config


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
