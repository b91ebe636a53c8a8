"""The learning rate over a run, as a factor on the optimizer's own."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Schedule:
    """Linear warm-up, then constant or a half cosine down to `final`.

    Args:
        decay: "constant" or "cosine".
        steps: optimizer steps of the whole run, at least 1.
        warmup_steps: steps until the full rate, at least 0.
        final: factor at the end of the cosine, in [0, 1].
    """

    def __init__(
        self, *, decay: Literal["constant", "cosine"], steps: int, warmup_steps: int = 0, final: float = 0.0
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}: must be at least 1")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: must be at least 0")
        if not 0 <= final <= 1:
            raise ValueError(f"final={final}: must be in [0, 1]")
        self.decay, self.steps, self.warmup_steps, self.final = decay, steps, warmup_steps, final

    def factor(self, step: int) -> float:
        """The factor for the update after `step` finished ones."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2

    def __call__(self, optimizer: Optimizer) -> LambdaLR:
        """The scheduler of an optimizer; step it once per optimizer step."""
        return LambdaLR(optimizer, self.factor)
