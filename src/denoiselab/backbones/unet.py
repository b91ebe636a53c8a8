"""The convolutional U-Net of DDPM (Ho et al. 2020, appendix B), with the scale-shift option of ADM."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoiselab.backbones.layers import (
    LabelEmbedding,
    check_unet,
    group_count,
    level_sides,
    levels_with_attention,
    sinusoidal_embedding,
)
from denoiselab.condition import Condition


def zero_init(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """The layer with weights and bias zero: a residual branch that begins as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut; the embedding enters between them, added or as scale and shift."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_dim: int,
        groups: int,
        dropout: float,
        scale_shift: bool,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features (B, C_in, H, W) and the embedding (B, E) to features (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        e = self.embedding(F.silu(emb))[:, :, None, None]  # (B, C_out or 2 C_out, 1, 1)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Residual self-attention over the pixels; heads of `head_channels` channels, None for a single head."""

    def __init__(self, channels: int, *, groups: int, head_channels: int | None) -> None:
        super().__init__()
        self.heads = 1 if head_channels is None else channels // head_channels
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to features of the same shape."""
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (
            layer(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, HW, C/heads)
            for layer in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        return x + self.out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halves height and width with a strided convolution, padded to the right and below only as in DDPM."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownLevel(nn.Module):
    """The blocks of one resolution on the way down."""

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.downsample = downsample

    def forward(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Every feature map that the way up will use, in order; the last one goes on down."""
        features = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x, emb))
            features.append(x)
        if self.downsample is not None:
            features.append(self.downsample(x))
        return features


class UpLevel(nn.Module):
    """The blocks of one resolution on the way up."""

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module], upsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.upsample = upsample

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """The features one level up; each block takes the last feature map off `skips`."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(torch.cat([x, skips.pop()], dim=1), emb))
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, block1: nn.Module, attention: nn.Module, block2: nn.Module) -> None:
        super().__init__()
        self.block1 = block1
        self.attention = attention
        self.block2 = block2

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features (B, C, H, W) to features of the same shape."""
        return self.block2(self.attention(self.block1(x, emb)), emb)


class UNet(nn.Module):
    """U-Net of residual blocks with self-attention at chosen resolutions (Ho et al. 2020, appendix B).

    The layout (layers, time embedding) is that of the published weights, so that these load by renaming keys.
    `scale_shift` is the adaptive group normalisation of Dhariwal & Nichol 2021, section 3.1.

    Args:
        channels: channels of the input and of the prediction.
        resolution: side of the input in pixels, or [height, width].
        num_classes: number of classes; 0 for an unconditional network.
        width: channels of the first level.
        multipliers: channels of each level as multiples of width; each level halves the resolution.
        blocks: residual blocks a level on the way down; the way up has one more.
        attention_resolutions: longer sides in pixels of the levels with attention, or "lowest" for the last level,
            whatever the resolution; the middle always has it.
        head_channels: channels of an attention head; None for a single head.
        dropout: probability of dropout before the second convolution of a block, in [0, 1).
        scale_shift: whether the embedding scales and shifts the normalised features instead of being added.
        learned_variance: whether the output has 2·channels channels, first the prediction, then the share of the
            variance (Nichol & Dhariwal 2021, eq. 15).

    Raises:
        ValueError: if a value is out of its range or does not fit the others.
    """

    def __init__(
        self,
        *,
        channels: int,
        resolution: int | list[int],
        num_classes: int,
        width: int,
        multipliers: list[int],
        blocks: int,
        attention_resolutions: list[int] | Literal["lowest"],
        head_channels: int | None,
        dropout: float,
        scale_shift: bool,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        check_unet(
            channels=channels,
            num_classes=num_classes,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            dropout=dropout,
        )
        sides = level_sides(resolution, len(multipliers))
        has_attention = levels_with_attention(attention_resolutions, sides)
        widths = [width * multiplier for multiplier in multipliers]
        attended = {w for w, here in zip(widths, has_attention, strict=True) if here} | {widths[-1]}
        if head_channels is not None and (head_channels < 1 or any(w % head_channels for w in attended)):
            raise ValueError(
                f"head_channels={head_channels}: must divide the channels of the levels with attention, "
                f"{sorted(attended)}"
            )

        self.width = width
        embedding_dim = 4 * width
        groups = group_count(width)  # one number for all layers: their channels are multiples of width
        block = partial(
            ResidualBlock, embedding_dim=embedding_dim, groups=groups, dropout=dropout, scale_shift=scale_shift
        )
        attention = partial(Attention, groups=groups, head_channels=head_channels)

        self.time_mlp = nn.Sequential(
            nn.Linear(width, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.label_embedding = LabelEmbedding(num_classes=num_classes, dim=embedding_dim) if num_classes else None
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)

        last = len(widths) - 1
        skip_widths = [width]
        current = width
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            ins = [current] + [out] * (blocks - 1)
            self.down.append(
                DownLevel(
                    blocks=[block(i, out) for i in ins],
                    attentions=[attention(out) if has_attention[level] else nn.Identity() for _ in ins],
                    downsample=Downsample(out) if level < last else None,
                )
            )
            skip_widths += [out] * (blocks + (level < last))
            current = out

        self.middle = Middle(block(current, current), attention(current), block(current, current))

        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            ins = [previous + skip_widths.pop() for previous in [current] + [out] * blocks]
            self.up.append(
                UpLevel(
                    blocks=[block(i, out) for i in ins],
                    attentions=[attention(out) if has_attention[level] else nn.Identity() for _ in ins],
                    upsample=Upsample(out) if level > 0 else None,
                )
            )
            current = out

        self.norm_out = nn.GroupNorm(groups, current, eps=1e-6)
        self.conv_out = zero_init(nn.Conv2d(current, channels * (1 + learned_variance), 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output.

        Args:
            x: input of shape (B, C, H, W), in the type of the weights.
            t: c_noise, about 1000 times the path time, of shape (B,).
            condition: labels of shape (B,); not looked at by an unconditional network.

        Returns:
            A tensor like x; with a learned variance of shape (B, 2 C, H, W).

        Raises:
            ValueError: if the network has classes and the condition no labels.
        """
        emb = sinusoidal_embedding(t, self.width, order="sin_cos", frequency_shift=1)  # (B, width), float32
        emb = self.time_mlp(emb.to(x.dtype))  # (B, 4 width)
        if self.label_embedding is not None:
            emb = emb + self.label_embedding(condition)

        x = self.conv_in(x)  # (B, width, H, W)
        skips = [x]
        for level in self.down:
            skips += level(skips[-1], emb)
        x = self.middle(skips[-1], emb)
        for level in self.up:
            x = level(x, skips, emb)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, C or 2 C, H, W)
