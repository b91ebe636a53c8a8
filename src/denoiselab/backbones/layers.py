"""Pieces that several backbones share: time and label embeddings, group counts, the levels of a U-Net."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from denoiselab.condition import NULL_LABEL, Condition, height_width


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
        """The vectors of the labels of a condition, of shape (B, dim)."""
        return super().forward(label_rows(condition, self.num_classes))


def label_rows(condition: Condition, num_classes: int) -> Tensor:
    """The labels of a condition, of shape (B,), with the null label as the number after the last class.

    Raises:
        ValueError: if the condition has no labels.
    """
    if condition.label is None:
        raise ValueError(f"label=None: must be given to a network of {num_classes} classes (-1 = null)")
    return condition.label.masked_fill(condition.label == NULL_LABEL, num_classes)


def group_count(channels: int) -> int:
    """The largest divisor of the channels that is at most 32 and leaves four channels a group; at least 1.

    From 128 channels on these are the 32 groups of DDPM. With one channel a group, as in 32 groups
    of 32 channels, the norm would remove what is constant over the image: all of an added time embedding.
    """
    most = min(32, max(1, channels // 4))
    return next(g for g in range(most, 0, -1) if channels % g == 0)


def check_unet(
    *, channels: int, num_classes: int, width: int, multipliers: list[int], blocks: int, dropout: float
) -> None:
    """Refuse values that no U-Net has.

    Raises:
        ValueError: if one is out of its range.
    """
    if channels < 1:
        raise ValueError(f"channels={channels}: must be at least 1")
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes}: must be at least 0")
    if width < 4 or width % 2:
        raise ValueError(f"width={width}: must be even and at least 4")
    if width > 2**16:
        raise ValueError(f"width={width}: must be at most {2**16:,}")
    if not multipliers or min(multipliers) < 1:
        raise ValueError(f"multipliers={list(multipliers)}: must be one or more integers of at least 1")
    if blocks < 1:
        raise ValueError(f"blocks={blocks}: must be at least 1")
    if blocks > 100:
        raise ValueError(f"blocks={blocks}: must be at most 100")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be in [0, 1)")


def level_sides(resolution: int | list[int], levels: int) -> list[int]:
    """The longer side, in pixels, of each level of a U-Net whose levels halve the resolution.

    Raises:
        ValueError: if a side cannot be halved so often.
    """
    sides = height_width(resolution)
    factor = 2 ** (levels - 1)
    if any(side % factor for side in sides):
        raise ValueError(f"resolution={resolution}: must be divisible by {factor} for {levels} levels")
    return [max(sides) >> level for level in range(levels)]


def levels_with_attention(attention_resolutions: list[int] | Literal["lowest"], sides: list[int]) -> list[bool]:
    """Which levels have attention: those whose longer side is named, or the last.

    Raises:
        ValueError: if a named side is none of the levels'.
    """
    if attention_resolutions == "lowest":
        attention_resolutions = sides[-1:]
    if isinstance(attention_resolutions, str) or not set(attention_resolutions) <= set(sides):
        raise ValueError(
            f"attention_resolutions={list(attention_resolutions)}: "
            f"must be among the longer sides of the levels, {sides}"
        )
    return [side in attention_resolutions for side in sides]
