"""The post's convolutional classifier (its Table 4), 21,690 parameters: test accuracy, and time on two CPU cores.

python -m vae_jax.main --config=configs/classifier.py          99.33 %, 1 min: all 60,000 images of MNIST, not augmented
python -m vae_jax.main --config=configs/classifier.py:best     99.52 %, for a GPU: the same network, 160 epochs, random
                                                               shifts and rotations, label smoothing
python -m vae_jax.main --config=configs/classifier.py:digits   scikit-learn's bundled digits
python -m vae_jax.main --config=configs/classifier.py:smoke    two steps on the bundled digits, for tests

Accuracies are means over five seeds. The post reaches 99.21 % and does not describe its training.
"""

from vae_jax.run.config import make_config


def get_config(variant: str = "default"):
    return make_config("classifier", BASE, VARIANTS, variant)


BASE = {
    "epochs": 10,
    "batch_size": 128,
    "best": "accuracy",
    "optimizer.learning_rate": 0.01,
    "optimizer.schedule": "onecycle",
    "optimizer.warmup": 0.3,
    "optimizer.weight_decay": 0.01,
}
VARIANTS = {
    "default": {},
    "best": {
        "epochs": 160,
        "objective.shift": 2,
        "objective.rotation": 8.0,
        "objective.label_smoothing": 0.05,
    },
    "digits": {
        "data.name": "digits",
        "epochs": 30,
        "batch_size": 32,
        "objective.shift": 2,
        "objective.rotation": 10.0,
    },
    "smoke": {"data.name": "digits", "epochs": 1, "batch_size": 512},
}
