"""`python -m vae_jax` is `python -m vae_jax.main`."""

from vae_jax.main import run

run()
