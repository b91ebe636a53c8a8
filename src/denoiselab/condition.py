"""The condition of a batch: the one type that networks, data and diffusion share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NULL_LABEL = -1


@dataclass(frozen=True)
class Condition:
    """What a batch of samples is conditioned on.

    Args:
        label: class labels, int64 of shape (B,); `NULL_LABEL` means "no class". None where the data has no classes.
        augment: how the images were augmented, float32 of shape (B, K), zeros for "not at all". None where nothing is
            augmented, as always in sampling: a network that knows augmentation takes None for zeros.
    """

    label: Tensor | None = None
    augment: Tensor | None = None

    def drop(self, mask: Tensor) -> Condition:
        """The condition with the labels of the samples of `mask` (bool, shape (B,)) set to null."""
        if self.label is None:
            return self
        return replace(self, label=self.label.masked_fill(mask, NULL_LABEL))

    def null(self) -> Condition:
        """The unconditional counterpart: every label null."""
        if self.label is None:
            return self
        return replace(self, label=torch.full_like(self.label, NULL_LABEL))

    def to(self, device: torch.device | str) -> Condition:
        """The condition on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        """The condition of some of the samples."""
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(*(None if tensor is None else change(tensor) for tensor in (self.label, self.augment)))

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """The conditions of several batches, one after the other."""
        columns = zip(*((c.label, c.augment) for c in conditions), strict=True)
        return Condition(*(_cat(column) for column in columns))


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    assert len(present) in (0, len(tensors)), "conditions with and without a part do not mix"
    return torch.cat(present) if present else None


def height_width(resolution: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels of a resolution given as one number or as [height, width].

    Raises:
        ValueError: if it is neither, or a side is below 1.
    """
    sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(sides) != 2 or not all(isinstance(s, int) and s >= 1 for s in sides):
        raise ValueError(f"resolution={resolution}: must be one positive integer or [height, width]")
    return sides[0], sides[1]
