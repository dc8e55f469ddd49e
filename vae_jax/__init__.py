"""Variational autoencoders in JAX and Flax: pure steps, a command line, numbers checked against closed forms."""


def __getattr__(name):
    if name == "load":  # only now, so that importing the steps alone stays light
        from vae_jax.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
