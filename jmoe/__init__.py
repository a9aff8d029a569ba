"""jmoe: Mixture-of-Experts language models in JAX, where the accelerator is too small for them."""

__version__ = "0.1.0.dev0"
