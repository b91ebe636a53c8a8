"""Which noise goes with which image."""

from __future__ import annotations

from abc import ABC, abstractmethod

from denoiselab.diffusion.denoiser import Images
from denoiselab.diffusion.noise import NoiseSource


class Coupling(ABC):
    """A joint distribution of (x0, ε) whose ε is standard normal."""

    @abstractmethod
    def __call__(self, x0: Images, noise: NoiseSource) -> Images:
        """The noise for each image of the batch."""


class Independent(Coupling):
    """ε drawn without looking at x0."""

    def __call__(self, x0: Images, noise: NoiseSource) -> Images:
        """Standard normal."""
        return noise.normal("epsilon", x0.shape[1:], x0.dtype)
