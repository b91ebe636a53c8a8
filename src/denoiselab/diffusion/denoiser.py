"""A denoiser answers one question: given x_t, t and the condition, what are x0 and ε?

It binds a network to a path and a prediction. Guidance is a denoiser that wraps a denoiser, and a sampler only ever asks a
denoiser: any trained objective can be sampled by any sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, overload

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


Coefficient = Tensor | float


@overload
def per_sample(coefficient: Tensor, x: Tensor) -> Tensor: ...
@overload
def per_sample(coefficient: Coefficient, x: Tensor) -> Coefficient: ...
def per_sample(coefficient: Coefficient, x: Tensor) -> Coefficient:
    """A coefficient that is a number, or of shape () or (B,), in the type of x and shaped to multiply it.

    One without dimensions stays on its device: such numbers multiply tensors on any, and a copy would wait for a GPU.
    """
    if isinstance(coefficient, float):
        return coefficient
    if not coefficient.ndim:
        return coefficient.to(x.dtype)
    return coefficient.to(x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


class _Numbers(NamedTuple):
    """What a denoiser needs at a time: the network's inputs, and x0 = x0_x·x − x0_f·F, ε = eps_f·F − eps_x·x."""

    c_in: Coefficient
    c_noise: Coefficient
    x0_x: Coefficient
    x0_f: Coefficient
    eps_f: Coefficient
    eps_x: Coefficient


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
        self._known: dict[float, _Numbers] = {}

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """x0 and ε by the two-by-two solve of `prediction.py`."""
        numbers = self._numbers(t) if t.ndim else self._plain(float(t))
        output, share = ask(self.network, x, numbers.c_in, numbers.c_noise, condition), None
        if self.learned_variance:
            output, raw = output.chunk(2, dim=1)
            share = (raw + 1) / 2
        x0_x, x0_f, eps_f, eps_x = (per_sample(c, x) for c in numbers[2:])
        return Posterior(x0_x * x - x0_f * output, eps_f * output - eps_x * x, share)

    def _numbers(self, t: Time) -> _Numbers:
        c = self.path.coefficients(t)
        a, b = self.prediction.ab(c)
        det = c.alpha * b - c.sigma * a
        asked = self.prediction.c_in(c), self.prediction.c_noise(self.path, t)
        return _Numbers(*asked, b / det, c.sigma / det, c.alpha / det, a / det)

    def _plain(self, t: float) -> _Numbers:
        """The numbers of one time for the whole batch, as Python floats: a sampler asks at the same times batch by batch."""
        if t not in self._known:
            found = self._numbers(torch.tensor(t, dtype=torch.float64, device="cpu"))
            self._known[t] = _Numbers(*(float(number) for number in found))
        return self._known[t]

    def evaluations(self, t: float) -> int:
        """One."""
        return 1

    def fresh(self) -> NetworkDenoiser:
        """Itself: it has no memory."""
        return self


def ask(network: Network, x: Images, c_in: Coefficient, c_noise: Coefficient, condition: Condition) -> Images:
    """The network's output F at x_t, with its input scaled and its time embedded as the prediction says."""
    # float32 at least: bfloat16 cannot tell 999 from 1000.
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(c_noise, float):
        told = torch.full(x.shape[:1], c_noise, dtype=dtype, device=x.device)  # no copy between devices
    else:
        told = c_noise.to(x.device, dtype).expand(x.shape[0])
    return network(per_sample(c_in, x) * x, told, condition).to(x.dtype)
