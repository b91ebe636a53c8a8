"""Whether an optimizer step may move anything: decided on the device, by all ranks alike, and read by nobody until later.

    loss' = loss · (1 or NaN)      NaN where the loss is not finite: the gradients carry it to all ranks, in their reduction
    ok    = isfinite(‖gradient‖)   of the reduced gradient, so the same on all ranks
    found_inf = 1 − ok             a fused Adam then leaves weights, moments and its count of steps alone

After more bad steps than are allowed every loss is made NaN: nothing moves any more, however late the host looks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer


class Gate:
    """Holds back the steps whose loss or gradient is not finite.

    Attributes:
        allowed: bad steps after which others still count; 0 is the policy `stop`.
        skipped: bad steps so far in this run, int64 of shape () on the device.
        ok: whether the last step counted, bool of shape () on the device.
    """

    def __init__(self) -> None:
        self.allowed = 0
        self.skipped = torch.zeros((), dtype=torch.int64)
        self.ok = torch.ones((), dtype=torch.bool)

    def mark(self, loss: Tensor) -> Tensor:
        """The mean loss of a micro-batch as it is, or NaN if it is not finite or too many steps were bad."""
        self.skipped = self.skipped.to(loss.device)
        good = loss.detach().isfinite() & (self.skipped <= self.allowed)
        return loss * torch.where(good, 1.0, math.nan)

    def decide(self, norm: Tensor, optimizer: Optimizer, scaler: Any = None) -> None:
        """Hold the coming step back if the gradient's norm is not finite.

        Args:
            norm: of the reduced gradient, unscaled; of shape ().
            optimizer: whose step is coming. A fused Adam or AdamW is told on the device, any other costs a host read.
            scaler: of 16-mixed precision. It skips such steps itself, and does so in health while it looks for its scale:
                they are bad only when that has come down to 1.
        """
        self.ok = norm.isfinite()
        bad = ~self.ok
        if scaler is not None:
            bad = bad & (scaler._get_scale_async() <= 1)
        elif isinstance(optimizer, Adam) and all(group["fused"] for group in optimizer.param_groups):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # GradScaler's way of telling it
        elif bad:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
        self.skipped = self.skipped + bad
