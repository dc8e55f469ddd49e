"""Variational autoencoders in JAX and Flax: pure steps, a command line, numbers checked against closed forms."""

from importlib import import_module, metadata

_MODULES = (
    "augment",
    "batch",
    "evaluation",
    "families",
    "figures",
    "generate",
    "likelihoods",
    "model",
    "nn",
    "objectives",
    "optimizers",
    "priors",
    "steps",
)


def __getattr__(name):
    if name == "load":  # imported on demand, so that importing the steps alone stays light
        return import_module("vae_jax.pretrained").load
    if name == "__version__":
        return metadata.version("vae_jax")
    if name in _MODULES:
        return import_module(f"vae_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return ["__version__", "load", *_MODULES]
