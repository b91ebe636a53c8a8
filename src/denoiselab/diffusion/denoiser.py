"""A denoiser answers one question: given x_t, t and the condition, what are x0 and ε?

It binds a network to a path and a prediction. Guidance is a denoiser that wraps a denoiser, and a sampler only ever asks a
denoiser: any trained objective can be sampled by any sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.paths import Path, Time
from denoiselab.diffusion.prediction import Prediction

Images = Float[Tensor, "B C H W"]
Network = Callable[[Tensor, Tensor, Condition], Tensor]


class Posterior(NamedTuple):
    """The best guess of both ends of the path; x_t = α·x0 + σ·ε holds exactly where the denoiser is `consistent`.

    Args:
        x0: the clean end.
        eps: the noise end.
        share: of networks with a learned variance: where the variance of an ancestral step lies between the small one
            (0) and the large one (1), in its logarithm (Nichol & Dhariwal 2021, eq. 15).
    """

    x0: Images
    eps: Images
    share: Images | None = None


class Denoiser(Protocol):
    """What samplers and guidance ask of a denoiser."""

    path: Path
    consistent: bool

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """x0 and ε at x_t = `x`, t float64 of shape () or (B,)."""
        ...

    def evaluations(self, t: float) -> int:
        """Network evaluations per sample that one call at t costs."""
        ...

    def fresh(self) -> Denoiser:
        """The denoiser for a new batch of samples, without memory of earlier ones."""
        ...


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape () or (B,) in the type and on the device of x, shaped to multiply it."""
    coefficient = coefficient.to(device=x.device, dtype=x.dtype)
    return coefficient.reshape(-1, *(1,) * (x.ndim - 1)) if coefficient.ndim else coefficient


class NetworkDenoiser:
    """The denoiser of a network that was trained with a prediction on a path.

    Args:
        network: `network(c_in·x_t, c_noise, condition)` with c_noise float32 of shape (B,).
        path: the path it was trained on.
        prediction: what its output means.
        learned_variance: whether a second half of the output's channels, in [−1, 1], is the variance share.
    """

    consistent = True

    def __init__(self, *, network: Network, path: Path, prediction: Prediction, learned_variance: bool = False) -> None:
        self.network, self.path, self.prediction = network, path, prediction
        self.learned_variance = learned_variance

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """x0 and ε by the two-by-two solve of `prediction.py`."""
        output, share = ask(self.network, self.path, self.prediction, x, t, condition), None
        if self.learned_variance:
            output, raw = output.chunk(2, dim=1)
            share = (raw + 1) / 2
        pair = self.prediction.pair(self.path, t)
        det = pair.det
        x0 = per_sample(pair.b / det, x) * x - per_sample(pair.sigma / det, x) * output
        eps = per_sample(pair.alpha / det, x) * output - per_sample(pair.a / det, x) * x
        return Posterior(x0, eps, share)

    def evaluations(self, t: float) -> int:
        """One."""
        return 1

    def fresh(self) -> NetworkDenoiser:
        """Itself: it has no memory."""
        return self


def ask(network: Network, path: Path, prediction: Prediction, x: Images, t: Time, condition: Condition) -> Images:
    """The network's output F at x_t, with its input scaled and its time embedded as the prediction says."""
    c_in = per_sample(prediction.c_in(path, t), x)
    # float32 at least: bfloat16 cannot tell 999 from 1000.
    c_noise = prediction.c_noise(path, t).to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return network(c_in * x, c_noise.expand(len(x)), condition).to(x.dtype)
