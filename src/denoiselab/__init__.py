"""denoiselab: compose, train, sample and measure diffusion models."""

__version__ = "0.1.0"
