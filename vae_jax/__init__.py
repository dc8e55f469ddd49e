"""Variational autoencoders in JAX and Flax: pure steps, a command line, numbers checked against closed forms."""
