"""The post's convolutional VAE (its Tables 1-3), 262,761 parameters: test loss, and time on two quiet CPU cores.

python -m vae_jax.main --config=configs/vae.py          18.49, 25 min: MNIST, the post's training, shuffled
python -m vae_jax.main --config=configs/vae.py:best     18.16, for a GPU: the same network and epochs, trained better
python -m vae_jax.main --config=configs/vae.py:quick    19.02, 2 min 18 s: a first look at MNIST, 5 epochs
python -m vae_jax.main --config=configs/vae.py:matlab   18.58: MATLAB's recipe to the letter, not shuffled
python -m vae_jax.main --config=configs/vae.py:digits   11.08, 72 s: scikit-learn's bundled digits
python -m vae_jax.main --config=configs/vae.py:pooling  max pooling instead of strides, which the post says fails;
                                                        :latent2, :latent5 and :latent10 have fewer latents
python -m vae_jax.main --config=configs/vae.py:bernoulli    the same network on binarized MNIST, trained as :best;
                                                        :iwae has five samples
python -m vae_jax.main --config=configs/vae.py:sigma    a Gaussian with the optimal variance, trained as :best; likewise
                                                        :continuous_bernoulli and :logistic (256 grey levels)
python -m vae_jax.main --config=configs/vae.py:iwae_paper   the dense network, data and schedule of Burda et al. 2016, five
                                                        samples; Adam starts its second moment at 0, theirs at 1, and
                                                        the 400 images held out are random, theirs the last ones
python -m vae_jax.main --config=configs/vae.py:own --config.data.name=photos/   your own images of any size, at least ten
python -m vae_jax.main --config=configs/vae.py:smoke    two steps on the bundled digits, for tests
"""

import itertools

from vae_jax.run.config import make_config


def get_config(variant: str = "default"):
    return make_config("vae", BASE, VARIANTS, variant)


BASE = {"epochs": 50, "batch_size": 512, "best": "bound"}
BEST = {
    "batch_size": 128,
    "optimizer.learning_rate": 0.004,
    "optimizer.schedule": "onecycle",
    "optimizer.warmup": 0.3,
}
BINARY = {"model.likelihood": "bernoulli", "data.binarize": "dynamic"}
STAGES = [3**i for i in range(8)]  # epochs of each learning rate in Burda et al. 2016, section 5: 3,280 in all
RATES = [10, 7.2, 5.2, 3.7, 2.7, 1.9, 1.4, 1.0]
VARIANTS = {
    "default": {},
    "matlab": {"data.shuffle": False},
    "best": BEST,
    "quick": BEST | {"epochs": 5, "run.figures_every": 1},
    "bernoulli": BEST | BINARY,
    "iwae": BEST | BINARY | {"objective.samples": 5},
    "sigma": BEST | {"model.likelihood": "optimal_gaussian"},
    "continuous_bernoulli": BEST | {"model.likelihood": "continuous_bernoulli"},
    "logistic": BEST | {"model.likelihood": "discretised_logistic", "model.scale": 0.1, "model.learn_scale": True},
    "iwae_paper": BINARY
    | {
        "epochs": sum(STAGES),
        "batch_size": 20,
        "data.shuffle": False,
        "data.validation": 400,
        "model.network": "mlp",
        "model.latent_dim": 50,
        "objective.samples": 5,
        "optimizer.learning_rate": 0.001,
        "optimizer.schedule": "piecewise",
        "optimizer.boundaries": tuple(sum(STAGES[:i]) / sum(STAGES) for i in range(1, 8)),
        "optimizer.factors": tuple(after / before for before, after in itertools.pairwise(RATES)),
        "optimizer.beta1": 0.99,
        "optimizer.eps": 1e-4,
        "run.figures_every": 100,
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
    "own": {
        "data.name": "",
        "data.size": 64,
        "epochs": 300,
        "batch_size": 0,
        "optimizer.learning_rate": 0.002,
        "optimizer.schedule": "cosine",
        "run.figures_every": 50,
    },
    "smoke": {"data.name": "digits", "epochs": 1, "batch_size": 512, "run.likelihood_samples": 0},
}
