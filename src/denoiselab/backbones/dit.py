"""The diffusion transformer DiT with adaLN-Zero blocks (Peebles & Xie 2023, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoiselab.backbones.layers import LabelEmbedding, sinusoidal_embedding
from denoiselab.condition import Condition, height_width

TIME_FREQUENCIES = 256

normal_ = partial(nn.init.normal_, std=0.02)


def initialized(
    layer: nn.Linear | nn.Conv2d, weight_: Callable[[Tensor], Tensor] = nn.init.xavier_uniform_
) -> nn.Module:
    """The layer with its weight, taken as a matrix, filled by `weight_`, and a bias of zero."""
    weight_(layer.weight.flatten(1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens (B, N, D) scaled and shifted by vectors (B, D); zeros leave them as they are."""
    return x * (1 + scale[:, None]) + shift[:, None]


def position_embedding(dim: int, height: int, width: int) -> Tensor:
    """Embedding of the places of a grid, row by row: the column in the first half, the row in the second.

    Args:
        dim: length of an embedding, a multiple of 4.
        height: rows of the grid.
        width: columns of the grid.

    Returns:
        A float32 tensor of shape (1, height·width, dim).
    """
    columns = torch.arange(width).repeat(height)  # (height·width,)
    rows = torch.arange(height).repeat_interleave(width)
    halves = [sinusoidal_embedding(axis, dim // 2, order="sin_cos", frequency_shift=0) for axis in (columns, rows)]
    return torch.cat(halves, dim=1)[None]


class Block(nn.Module):
    """Attention and MLP, each modulated before and gated after by the embedding (adaLN-Zero, figure 3)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        mlp_size = int(mlp_ratio * hidden_size)
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.qkv = initialized(nn.Linear(hidden_size, 3 * hidden_size))
        self.out = initialized(nn.Linear(hidden_size, hidden_size))
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            initialized(nn.Linear(hidden_size, mlp_size)),
            nn.GELU(approximate="tanh"),
            initialized(nn.Linear(mlp_size, hidden_size)),
        )
        self.modulation = initialized(nn.Linear(hidden_size, 6 * hidden_size), nn.init.zeros_)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Tokens (B, N, D) and the embedding (B, D) to tokens (B, N, D)."""
        modulation = self.modulation(F.silu(emb))  # (B, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (B, N, D)

    def attention(self, x: Tensor) -> Tensor:
        """Self-attention among the tokens (B, N, D) of a sample."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D/heads) each
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches, modulated by the embedding."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.modulation = initialized(nn.Linear(hidden_size, 2 * hidden_size), nn.init.zeros_)
        self.linear = initialized(nn.Linear(hidden_size, out_size), nn.init.zeros_)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Tokens (B, N, D) and the embedding (B, D) to patches (B, N, p·p·C)."""
        shift, scale = self.modulation(F.silu(emb)).chunk(2, dim=1)  # (B, D) each
        return self.linear(modulate(self.norm(x), shift, scale))  # (B, N, p·p·C)


class DiT(nn.Module):
    """Transformer over image patches, conditioned by adaptive layer norm (Peebles & Xie 2023, section 3).

    The layout (layers, embeddings, patches) is that of the published weights, so that these load by renaming
    keys; they have a learned variance.

    Args:
        channels: channels of the input and of the prediction.
        resolution: side of the input in pixels, or [height, width].
        num_classes: number of classes; 0 for an unconditional network.
        patch_size: side of a patch in pixels.
        hidden_size: length of a token, a multiple of num_heads and of 4.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden size of a block's MLP as a multiple of hidden_size.
        frequency_shift: of the time embedding, whose frequency i is 10000^(−i/(128 − shift)): 0 in the paper's code, 1 in
            diffusers' DiTTransformer2DModel.
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
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        frequency_shift: Literal[0, 1] = 0,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels}: must be at least 1")
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: must be at least 0")
        if depth < 1:
            raise ValueError(f"depth={depth}: must be at least 1")
        if depth > 300:
            raise ValueError(f"depth={depth}: must be at most 300")
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads}: must be at least 1")
        if mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio={mlp_ratio}: must be above 0")
        if frequency_shift not in (0, 1):
            raise ValueError(f"frequency_shift={frequency_shift}: must be 0 or 1")
        height, width = height_width(resolution)
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"patch_size={patch_size}: must divide the resolution {height}x{width}")
        if hidden_size < 1 or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size}: must be a multiple of num_heads={num_heads} and of 4")
        if hidden_size > 2**16:
            raise ValueError(f"hidden_size={hidden_size}: must be at most {2**16:,}")
        if not (mlp_ratio <= 1000 and int(mlp_ratio * hidden_size)):
            raise ValueError(f"mlp_ratio={mlp_ratio}: must be at most 1000, and give a hidden size of at least 1")

        self.grid = (height // patch_size, width // patch_size)
        self.patch_size, self.frequency_shift = patch_size, frequency_shift
        self.patches = initialized(nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size))
        self.positions: Tensor
        self.register_buffer("positions", position_embedding(hidden_size, *self.grid), persistent=False)
        self.time_mlp = nn.Sequential(
            initialized(nn.Linear(TIME_FREQUENCIES, hidden_size), normal_),
            nn.SiLU(),
            initialized(nn.Linear(hidden_size, hidden_size), normal_),
        )
        self.label_embedding = LabelEmbedding(num_classes=num_classes, dim=hidden_size) if num_classes else None
        if self.label_embedding is not None:
            normal_(self.label_embedding.weight)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final = FinalLayer(hidden_size, patch_size**2 * channels * (1 + learned_variance))

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
        emb = sinusoidal_embedding(
            t, TIME_FREQUENCIES, order="cos_sin", frequency_shift=self.frequency_shift
        )  # (B, 256)
        emb = self.time_mlp(emb.to(x.dtype))  # (B, D)
        if self.label_embedding is not None:
            emb = emb + self.label_embedding(condition)

        x = self.patches(x)  # (B, D, H/p, W/p)
        assert x.shape[2:] == self.grid, f"the network is built for a grid of {self.grid} patches"
        x = x.flatten(2).transpose(1, 2) + self.positions  # (B, N, D)
        for block in self.blocks:
            x = block(x, emb)
        x = self.final(x, emb)  # (B, N, p·p·C), here and below 2 C with a learned variance
        x = x.unflatten(2, (self.patch_size, self.patch_size, -1))  # (B, N, p, p, C)
        x = x.unflatten(1, self.grid)  # (B, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
