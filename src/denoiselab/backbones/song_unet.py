"""The U-Nets DDPM++ and NCSN++ (Song et al. 2021, appendix H) as EDM trains them (Karras et al. 2022, appendix F)."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoiselab.backbones.layers import (
    check_unet,
    group_count,
    label_rows,
    level_sides,
    levels_with_attention,
    sinusoidal_embedding,
)
from denoiselab.condition import Condition

SUM_SCALE = math.sqrt(0.5)  # of the sum of two branches, so that its variance is theirs
NEARLY_ZERO = 1e-5  # gain of the last layer of a branch, which begins as almost nothing


def initialized(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Module:
    """The layer with uniform weights after Glorot & Bengio 2010 and a bias of zero."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def conv(in_channels: int, out_channels: int, size: int, *, gain: float = 1.0, more_padding: int = 0) -> nn.Module:
    """A convolution that keeps height and width, unless there is more padding."""
    return initialized(nn.Conv2d(in_channels, out_channels, size, padding=size // 2 + more_padding), gain)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation; unlike in the other U-Net each layer has its own number of groups."""
    return nn.GroupNorm(group_count(channels), channels, eps=1e-6)


class FourierEmbedding(nn.Module):
    """Sines and cosines of t at random frequencies, which are drawn once and belong to the weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 16 * torch.randn(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        """Values (B,) to embeddings (B, dim)."""
        angles = t[:, None] * (2 * math.pi * self.frequencies)  # (B, dim/2)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class OneHotEmbedding(nn.Linear):
    """A linear layer on one-hot labels scaled to a mean square of 1; the null label is the zero vector."""

    def __init__(self, *, num_classes: int, dim: int) -> None:
        super().__init__(num_classes, dim)
        initialized(self)

    def forward(self, condition: Condition) -> Tensor:  # type: ignore[override]
        """The embeddings of the labels of a condition, of shape (B, dim)."""
        rows = label_rows(condition, self.in_features)
        one_hot = F.one_hot(rows, self.in_features + 1)[:, :-1]  # (B, num_classes)
        return super().forward(one_hot.to(self.weight.dtype) * math.sqrt(self.in_features))


class Resample(nn.Module):
    """Halves or doubles height and width with a separable filter of an even number of taps, whose scale does not matter.

    With its zero padding the size is exactly half or double; not `padded`, the convolution before it had more padding.
    """

    def __init__(self, direction: Literal["down", "up"], taps: list[int], *, padded: bool = True) -> None:
        super().__init__()
        self.up = direction == "up"
        self.padding = len(taps) // 2 - 1 if padded else 0
        line = torch.tensor(list(taps), dtype=torch.float32) / sum(taps)
        self.filter: Tensor
        self.register_buffer("filter", torch.outer(line, line), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, C, H/2, W/2) or (B, C, 2H, 2W)."""
        channels = x.shape[1]
        weight = self.filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.up:  # only one in four of the pixels under the filter is not a zero put in between
            return F.conv_transpose2d(x, 4 * weight, stride=2, padding=self.padding, groups=channels)
        return F.conv2d(x, weight, stride=2, padding=self.padding, groups=channels)


class Attention(nn.Module):
    """Residual self-attention over the pixels, with a single head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = conv(channels, 3 * channels, 1, gain=math.sqrt(0.2))
        self.out = conv(channels, channels, 1, gain=NEARLY_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to features of the same shape."""
        qkv = self.qkv(self.norm(x)).flatten(2)  # (B, 3 C, HW): q, k and v of a channel stand side by side
        q, k, v = qkv.unflatten(1, (1, -1, 3)).permute(3, 0, 1, 4, 2).contiguous()  # (B, 1, HW, C) each
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)  # (B, C, HW)
        return (x + self.out(h.unflatten(2, x.shape[2:]))) * SUM_SCALE


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut, with the embedding added in between, then attention if asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_dim: int,
        dropout: float,
        attention: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        same = in_channels == out_channels and resample is None
        self.resample = nn.Identity() if resample is None else resample
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.embedding = initialized(nn.Linear(embedding_dim, out_channels))
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, 3, gain=NEARLY_ZERO)
        self.shortcut = nn.Identity() if same else conv(in_channels, out_channels, 1)
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features (B, C_in, H, W) and the embedding (B, E) to features (B, C_out, H', W')."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))  # (B, C_out, H', W')
        h = h + self.embedding(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention((self.shortcut(self.resample(x)) + h) * SUM_SCALE)


class SongUNet(nn.Module):
    """DDPM++ or NCSN++: residual blocks that also resample, sums scaled by 1/√2, labels of class and augmentation.

    The layout is that of EDM's published weights, and so is each tensor: they load by renaming keys (`edm_names`).
    DDPM++ has a "positional" time embedding of 1 width, a "standard" encoder and the filter [1, 1]; NCSN++ has
    "fourier" of 2 widths, "residual" and [1, 3, 3, 1].

    Args:
        channels: channels of the input and of the prediction.
        resolution: side of the input in pixels, or [height, width].
        num_classes: number of classes; 0 for an unconditional network.
        augment_dim: length of the augmentation labels; 0 for a network that does not look at them.
        width: channels of the first convolution.
        multipliers: channels of each level as multiples of width; each level halves the resolution.
        blocks: residual blocks a level on the way down; the way up has one more.
        attention_resolutions: longer sides in pixels of the levels with attention, or "lowest" for the last level,
            whatever the resolution; on the way up only a level's last block has it; the middle always has it.
        dropout: probability of dropout before the second convolution of a block, in [0, 1).
        time_embedding: whether its frequencies are geometrically spaced ("positional") or random ("fourier").
        time_multiplier: length of the time embedding as a multiple of width.
        encoder: whether the downsampled image is added to the features at each level ("residual").
        resample_filter: the filter of down- and upsampling along one axis, of even length.
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
        augment_dim: int,
        width: int,
        multipliers: list[int],
        blocks: int,
        attention_resolutions: list[int] | Literal["lowest"],
        dropout: float,
        time_embedding: Literal["positional", "fourier"],
        time_multiplier: int,
        encoder: Literal["standard", "residual"],
        resample_filter: list[int],
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
        if augment_dim < 0:
            raise ValueError(f"augment_dim={augment_dim}: must be at least 0")
        if time_multiplier < 1:
            raise ValueError(f"time_multiplier={time_multiplier}: must be at least 1")
        taps = list(resample_filter)
        if len(taps) % 2 or sum(taps) <= 0:
            raise ValueError(f"resample_filter={taps}: must be an even number of taps with a positive sum")
        self.sides = level_sides(resolution, len(multipliers))
        self.blocks = blocks
        self.augment_dim = augment_dim
        has_attention = levels_with_attention(attention_resolutions, self.sides)
        levels = list(enumerate(width * multiplier for multiplier in multipliers))
        time_dim, embedding_dim = width * time_multiplier, 4 * width
        block = partial(ResidualBlock, embedding_dim=embedding_dim, dropout=dropout)

        self.time_embedding = (
            FourierEmbedding(time_dim)
            if time_embedding == "fourier"
            else partial(sinusoidal_embedding, dim=time_dim, order="sin_cos", frequency_shift=1)
        )
        self.label_embedding = OneHotEmbedding(num_classes=num_classes, dim=time_dim) if num_classes else None
        self.augment_embedding = initialized(nn.Linear(augment_dim, time_dim, bias=False)) if augment_dim else None
        self.embedding_mlp = nn.Sequential(
            initialized(nn.Linear(time_dim, embedding_dim)),
            nn.SiLU(),
            initialized(nn.Linear(embedding_dim, embedding_dim)),
            nn.SiLU(),
        )

        self.conv_in = conv(channels, width, 3)
        self.down, self.image_path = nn.ModuleList(), nn.ModuleList()
        current, image_channels, skip_widths = width, channels, [width]
        for level, out in levels:
            if level > 0:
                self.down.append(block(current, current, resample=Resample("down", taps)))
                skip_widths.append(current)
                if encoder == "residual":
                    image_conv = conv(image_channels, current, 3, more_padding=len(taps) // 2 - 1)
                    self.image_path.append(nn.Sequential(image_conv, Resample("down", taps, padded=False)))
                    image_channels = current
            for _ in range(blocks):
                self.down.append(block(current, out, attention=has_attention[level]))
                skip_widths.append(out)
                current = out

        self.middle = nn.ModuleList([block(current, current, attention=True), block(current, current)])

        self.up = nn.ModuleList()
        for level, out in reversed(levels):
            for i in range(blocks + 1):
                attention = has_attention[level] and i == blocks
                self.up.append(block(current + skip_widths.pop(), out, attention=attention))
                current = out
            if level > 0:
                self.up.append(block(current, current, resample=Resample("up", taps)))

        self.norm_out = group_norm(current)
        self.conv_out = conv(current, channels * (1 + learned_variance), 3, gain=NEARLY_ZERO)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output.

        Args:
            x: input of shape (B, C, H, W), in the type of the weights.
            t: c_noise, of shape (B,); (ln σ)/4 for the weights of EDM.
            condition: labels of shape (B,), not looked at by an unconditional network, and augmentation labels of shape
                (B, augment_dim), or None for zeros.

        Returns:
            A tensor like x; with a learned variance of shape (B, 2 C, H, W).

        Raises:
            ValueError: if the network has classes and the condition no labels.
        """
        emb = self.time_embedding(t).to(x.dtype)  # (B, time_dim)
        if self.label_embedding is not None:
            emb = emb + self.label_embedding(condition)
        if self.augment_embedding is not None:
            # Zeros go through the layer too: without a gradient its weights would make plain DDP wait for ever.
            augment = x.new_zeros(len(x), self.augment_dim) if condition.augment is None else condition.augment
            emb = emb + self.augment_embedding(augment.to(x.dtype))
        emb = self.embedding_mlp(emb)  # (B, 4 width)

        image, image_path = x, iter(self.image_path)
        x = self.conv_in(x)  # (B, width, H, W)
        skips = [x]
        for block in self.down:
            x = block(x, emb)
            if isinstance(block.resample, Resample) and self.image_path:
                x = image = (x + next(image_path)(image)) * SUM_SCALE
            skips.append(x)
        for block in self.middle:
            x = block(x, emb)
        for block in self.up:
            x = block(x if isinstance(block.resample, Resample) else torch.cat([x, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, C or 2 C, H, W)


EDM_PARTS = {
    "time_embedding.frequencies": "map_noise.freqs",
    "label_embedding.": "map_label.",
    "augment_embedding.": "map_augment.",
    "embedding_mlp.0.": "map_layer0.",
    "embedding_mlp.2.": "map_layer1.",
    ".norm1.": ".norm0.",
    ".norm2.": ".norm1.",
    ".conv1.": ".conv0.",
    ".conv2.": ".conv1.",
    ".embedding.": ".affine.",
    ".shortcut.": ".skip.",
    ".attention.norm.": ".norm2.",
    ".attention.qkv.": ".qkv.",
    ".attention.out.": ".proj.",
}


def edm_names(network: SongUNet) -> dict[str, str]:
    """For each name of a network's state dict that of the same tensor, unchanged, in EDM's published networks.

    EDM's buffers `*.resample_filter` have no counterpart: they follow from the config.
    """
    levels = [f"{side}x{side}" for side in network.sides]
    places = {
        "conv_in.": f"enc.{levels[0]}_conv.",
        "middle.0.": f"dec.{levels[-1]}_in0.",
        "middle.1.": f"dec.{levels[-1]}_in1.",
        "norm_out.": f"dec.{levels[0]}_aux_norm.",
        "conv_out.": f"dec.{levels[0]}_aux_conv.",
    }
    places |= {f"image_path.{i}.0.": f"enc.{level}_aux_residual." for i, level in enumerate(levels[1:])}
    # The levels are downsampling and blocks, where conv_in stands for the first downsampling, then upsampling and blocks,
    # where the middle stands for the first upsampling.
    for i in range(len(network.down)):
        level, place = divmod(i + 1, network.blocks + 1)
        places[f"down.{i}."] = f"enc.{levels[level]}_" + (f"block{place - 1}." if place else "down.")
    for i in range(len(network.up)):
        level, place = divmod(i + 1, network.blocks + 2)
        places[f"up.{i}."] = f"dec.{levels[-1 - level]}_" + (f"block{place - 1}." if place else "up.")

    names = {}
    for name in network.state_dict():
        theirs = name
        for ours, edm in (places | EDM_PARTS).items():
            theirs = theirs.replace(ours, edm)
        names[name] = theirs
    return names
