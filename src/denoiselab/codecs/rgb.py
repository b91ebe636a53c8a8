"""Pixels as they are: uint8 images to [−1, 1] and back."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


class RGB:
    """The codec of pixel-space models, for grey and colour images alike."""

    def shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees of such images: the same."""
        return channels, height, width

    def encode(self, images: UInt8[Tensor, "B C H W"], noise: object = None) -> Float[Tensor, "B C H W"]:
        """0 … 255 to −1 … 1, float32; nothing is random about it."""
        return images.float() / 127.5 - 1

    def decode(self, x: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        """The nearest grey levels; values outside [−1, 1] are clipped."""
        return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
