"""Pieces that several backbones share: time and label embeddings, and group normalisation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from denoiselab.condition import NULL_LABEL, Condition


def sinusoidal_embedding(
    t: Tensor,
    dim: int,
    *,
    order: Literal["sin_cos", "cos_sin"],
    frequency_shift: int,
    max_period: float = 10000.0,
) -> Tensor:
    """Sines and cosines of t at dim/2 geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    Frequency i is max_period ** (-i / (dim/2 - frequency_shift)). Trained weights depend on the layout: DDPM
    has "sin_cos" with shift 1 (the lowest frequency is exactly 1/max_period), DiT "cos_sin" with shift 0.

    Args:
        t: values to embed, of shape (B,).
        dim: length of an embedding; even, and above 2 * frequency_shift.
        order: which half comes first.
        frequency_shift: 0 or 1, as above.
        max_period: the longest period, divided by 2π.

    Returns:
        The embeddings, float32 whatever the type of t, of shape (B, dim).
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * steps / (half - frequency_shift))  # (dim/2,)
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    halves = [angles.sin(), angles.cos()] if order == "sin_cos" else [angles.cos(), angles.sin()]
    return torch.cat(halves, dim=1)  # (B, dim)


class LabelEmbedding(nn.Embedding):
    """One learned vector a class and, as the last row, one for the null label.

    Args:
        num_classes: number of classes, at least 1.
        dim: length of an embedding.
    """

    def __init__(self, *, num_classes: int, dim: int) -> None:
        super().__init__(num_classes + 1, dim)
        self.num_classes = num_classes

    def forward(self, condition: Condition) -> Tensor:  # type: ignore[override]
        """The vectors of the labels of a condition, of shape (B, dim).

        Raises:
            ValueError: if the condition has no labels.
        """
        label = condition.label
        if label is None:
            raise ValueError(f"label=None: must be given to a network of {self.num_classes} classes (-1 = null)")
        return super().forward(torch.where(label == NULL_LABEL, self.num_classes, label))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of as many groups as divide the channels, at most 32 and with at least four channels each.

    From 128 channels on these are the 32 groups of DDPM. With one channel a group, as in 32 groups
    of 32 channels, the norm would remove what is constant over the image: all of an added time embedding.
    """
    most = min(32, max(1, channels // 4))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)
