"""The condition of a batch: the one type that networks, data and diffusion share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NULL_LABEL = -1


@dataclass(frozen=True)
class Condition:
    """What a batch of samples is conditioned on.

    Args:
        label: class labels, int64 of shape (B,); `NULL_LABEL` means "no class". None where the data has no classes.
    """

    label: Tensor | None = None

    def drop(self, mask: Tensor) -> Condition:
        """The condition with the samples of `mask` (bool, shape (B,)) set to null."""
        if self.label is None:
            return self
        return Condition(label=self.label.masked_fill(mask, NULL_LABEL))

    def null(self) -> Condition:
        """The unconditional counterpart: every label null."""
        if self.label is None:
            return self
        return Condition(label=torch.full_like(self.label, NULL_LABEL))

    def to(self, device: torch.device | str) -> Condition:
        """The condition on another device."""
        return self if self.label is None else Condition(label=self.label.to(device, non_blocking=True))

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """The conditions of several batches, one after the other."""
        labels = [c.label for c in conditions if c.label is not None]
        assert len(labels) in (0, len(conditions)), "labelled and unlabelled batches do not mix"
        return Condition(label=torch.cat(labels) if labels else None)


def height_width(resolution: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels of a resolution given as one number or as [height, width].

    Raises:
        ValueError: if it is neither, or a side is below 1.
    """
    sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(sides) != 2 or not all(isinstance(s, int) and s >= 1 for s in sides):
        raise ValueError(f"resolution={resolution}: must be one positive integer or [height, width]")
    return sides[0], sides[1]
