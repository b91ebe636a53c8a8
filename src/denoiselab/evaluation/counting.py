"""What solvers that choose their own steps really spend."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser, Images, Posterior
from denoiselab.evaluation.collect import broadcast, gather


class Counting:
    """A denoiser that counts what each sample really asks, for solvers that choose their steps.

    A sample that is asked the same again waits for others of its batch, or has just landed: that is not counted, so the
    count does not depend on the batch.

    Args:
        denoiser: what answers.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.path, self.consistent = denoiser, denoiser.path, denoiser.consistent
        self.remembers = getattr(denoiser, "remembers", False)
        ends = torch.linspace(self.path.t_min, self.path.t_max, 200, dtype=torch.float64).tolist()
        self.costs = {denoiser.evaluations(t) for t in ends}  # more than one where guidance has an interval
        self.spent: list[Tensor] = []
        self.samples = 0
        self.last: tuple[Images, Tensor] | None = None

    def __call__(self, x: Images, t: Tensor, condition: Condition) -> Posterior:
        """The answer; counted."""
        times = t.expand(len(x))
        fresh = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if self.last is None:
            self.samples += len(x)
        else:
            fresh = (x != self.last[0]).flatten(1).any(1) | (times != self.last[1]).to(x.device)
        self.last = x, times
        if len(self.costs) == 1:
            self.spent.append(fresh.sum() * min(self.costs))
        else:
            self.spent.append(torch.tensor(sum(self.evaluations(time) for time in times[fresh].tolist())))
        return self.denoiser(x, t, condition)

    def mean(self) -> float | None:
        """Network evaluations per sample, over the samples of all ranks; None without one. To be called on every rank."""
        spent = torch.tensor([sum(int(spent) for spent in self.spent)])
        parts = gather({"spent": spent, "samples": torch.tensor([self.samples])})
        samples = sum(int(part["samples"]) for part in parts)
        return broadcast(sum(int(part["spent"]) for part in parts) / samples if samples else None)

    def evaluations(self, t: float) -> int:
        """As many as what it wraps."""
        return self.denoiser.evaluations(t)

    def fresh(self) -> Self:
        """Itself, with a new batch before it."""
        self.denoiser, self.last = self.denoiser.fresh(), None
        return self
