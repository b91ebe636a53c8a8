"""Augmentation that does not leak: geometric changes that the network is told about (Karras et al. 2022, appendix F.2).

The network sees, beside the changed image, nine labels that say what was done to it. Samples are drawn with all labels
zero, which means "nothing", so what was done in training does not show in them (Karras et al. 2020, "Training generative
adversarial networks with limited data", whose resampling this is; Jun et al. 2020 for the labels).

An output pixel at c, counted from the centre with y down, is read at A·(c − t), where

    A = S(2^(−0.2·w)) · R(θ) · R(−φ) · diag(2^(−0.2·v), 2^(0.2·v)) · R(φ),    t = (0.125·W·τ_x, 0.125·H·τ_y),

so that w and v are standard normal log₂ scales, θ and φ are angles and τ is standard normal. Between pixels the image is
read in a grid twice as fine: zeros are put between the pixels and sym6, an orthonormal wavelet's low pass, filters them; its
adjoint leads back. Whole-pixel shifts are exact for this reason, and there is little aliasing. Outside, the image goes on
mirrored. All of it is a function of one image and its own numbers alone, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# The low-pass filter of sym6 (Daubechies 1992, "Ten lectures on wavelets", table 6.3), in the order of convolution.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
BORDER = len(SYM6) // 4  # pixels around the image that the way back from the fine grid needs
SCALE_STD = STRETCH_STD = 0.2  # in octaves
SHIFT_STD = 0.125  # of the side of the image
TURNED = 0.5  # the part of the stretches whose axes are turned


class Noise(Protocol):
    """Where the randomness of a batch of B samples comes from: a `NoiseSource`, for example."""

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform on (0, 1), of shape (B, *shape)."""
        ...

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, of shape (B, *shape)."""
        ...


class Change(NamedTuple):
    """What is done to each image of a batch; all zeros for nothing.

    Args:
        xflip: whether it is mirrored left to right, bool, shape (B,).
        yflip: whether it is mirrored top to bottom, bool, shape (B,).
        scale: w of the module's formula: 1 enlarges by 2^0.2, float, shape (B,).
        angle: θ: the turn on the screen, anticlockwise, radians, shape (B,).
        stretch: v: 1 enlarges by 2^0.2 along an axis and shrinks as much across it, float, shape (B,).
        axis: φ: the direction of that axis, from x towards the top of the screen, radians, shape (B,).
        shift: τ: moves to the right and down, in units of 0.125 of the side, float, shape (B, 2).
    """

    xflip: Tensor
    yflip: Tensor
    scale: Tensor
    angle: Tensor
    stretch: Tensor
    axis: Tensor
    shift: Tensor

    def labels(self) -> Tensor:
        """The nine labels, float32 of shape (B, 9), in the order that EDM's published weights know."""
        columns = (
            self.xflip,
            self.yflip,
            self.scale,
            self.angle.cos() - 1,
            self.angle.sin(),
            self.stretch * self.axis.cos(),
            self.stretch * self.axis.sin(),
            *self.shift.unbind(1),
        )
        return torch.stack([column.float() for column in columns], dim=1)

    def matrix(self) -> Tensor:
        """A of the module's formula, of shape (B, 2, 2)."""
        shrink, squeeze = torch.exp2(-SCALE_STD * self.scale), torch.exp2(-STRETCH_STD * self.stretch)
        axes = torch.diag_embed(torch.stack((squeeze, 1 / squeeze), dim=-1))
        return shrink[:, None, None] * (_rotation(self.angle - self.axis) @ axes @ _rotation(self.axis))

    def is_geometric(self) -> Tensor:
        """Which images are read between pixels: bool of shape (B,)."""
        return (self.scale != 0) | (self.angle != 0) | (self.stretch != 0) | (self.shift != 0).any(dim=1)


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.stack((cos, -sin), dim=-1), torch.stack((sin, cos), dim=-1)), dim=-2)  # (B, 2, 2)


def apply(change: Change, images: Tensor) -> Tensor:
    """The changed images.

    Args:
        change: what to do to each.
        images: float32 of shape (B, C, H, W) with H, W ≥ 2.
    """
    images = torch.where(change.xflip[:, None, None, None], images.flip(3), images)
    images = torch.where(change.yflip[:, None, None, None], images.flip(2), images)
    # An image that is only mirrored stays exact.
    return torch.where(change.is_geometric()[:, None, None, None], _resample(change, images), images)


def _resample(change: Change, images: Tensor) -> Tensor:
    """The images read at A·(c − t), through the fine grid."""
    height, width = images.shape[2:]
    # As much as reflection can give: less where it is enough would be faster, but then what the filter sees at the rim
    # of the padding would depend on how far the other images of the batch reach out.
    padded = F.pad(images, (width - 1, width - 1, height - 1, height - 1), mode="reflect")
    fine = _filter(_filter(padded, 3, up=True), 2, up=True)
    # The low pass peaks at its tap 5, which puts pixel j on the fine grid's 2j: at 2c − 1/2, counted from its centre.
    ends = height + 2 * BORDER, width + 2 * BORDER
    y, x = (torch.arange(1 - end, 1 + end, device=images.device) / 2 for end in ends)
    c = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (2(H + 6), 2(W + 6), 2)
    sides = images.new_tensor([width, height])
    moved = c - (SHIFT_STD * sides * change.shift)[:, None, None]  # (B, 2(H + 6), 2(W + 6), 2)
    read = torch.einsum("bij,bhwj->bhwi", change.matrix(), moved)
    grid = (2 * read - 0.5) / (3 * sides - 2)  # -1 and 1 are the rims of the fine grid, of 2(3W − 2) columns
    coarse = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    back = _filter(_filter(coarse, 3, up=False), 2, up=False)
    return back[:, :, BORDER:-BORDER, BORDER:-BORDER]


def _filter(images: Tensor, dim: int, *, up: bool) -> Tensor:
    """Twice as fine along a dimension of the images, or back: the adjoint of it."""
    weight = images.new_tensor(SYM6).reshape((1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1))
    stride, padding = ((2, 1), (5, 0)) if dim == 2 else ((1, 2), (0, 5))
    planes = images.flatten(0, 1).unsqueeze(1)  # (BC, 1, H, W)
    convolve = F.conv_transpose2d if up else F.conv2d
    return convolve(planes, weight, stride=stride, padding=padding).unflatten(0, images.shape[:2]).squeeze(2)


class NoAugmentation:
    """Images as they are, and no labels.

    Args:
        dim: numbers in the labels of an image: 0.

    Raises:
        ValueError: if dim is another.
    """

    def __init__(self, *, dim: int) -> None:
        if dim != 0:
            raise ValueError(f"dim={dim}: must be 0, there is no augmentation")
        self.dim = dim

    def __call__(self, images: Tensor, noise: Noise) -> tuple[Tensor, None]:
        """The images, and None."""
        return images, None


class EDMAugmentation:
    """The pipeline with which EDM trains on CIFAR-10, FFHQ and AFHQv2 (Karras et al. 2022, appendix F.2, table 6).

    Args:
        dim: numbers in the labels of an image: 9.
        p: probability of each change, in [0, 1]: mirroring top to bottom (then a fair coin decides), scale, turn, stretch
            and shift.
        p_xflip: probability that mirroring left to right is drawn (then a fair coin decides), in [0, 1].

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, *, dim: int, p: float, p_xflip: float) -> None:
        if dim != 9:
            raise ValueError(f"dim={dim}: must be 9, the labels of this augmentation")
        for key, value in (("p", p), ("p_xflip", p_xflip)):
            if not 0 <= value <= 1:
                raise ValueError(f"{key}={value}: must be from 0 to 1")
        self.dim, self.p, self.p_xflip = dim, p, p_xflip

    def draw(self, noise: Noise) -> Change:
        """What to do to each image of a batch."""
        normal = noise.normal("augmentation, normal", (4,))
        uniform = noise.uniform("augmentation, uniform", (9,)).to(normal.dtype)
        scaled, turned, stretched, shifted = (uniform[:, 2:6] < self.p).unbind(1)
        angle, axis = (math.pi * (2 * uniform[:, 6:8] - 1)).unbind(1)
        return Change(
            xflip=uniform[:, 0] < self.p_xflip / 2,
            yflip=uniform[:, 1] < self.p / 2,
            scale=normal[:, 0] * scaled,
            angle=angle * turned,
            stretch=normal[:, 1] * stretched,
            axis=axis * (uniform[:, 8] < TURNED),
            shift=normal[:, 2:] * shifted[:, None],
        )

    def __call__(self, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """The changed images and their labels.

        Args:
            images: float32 of shape (B, C, H, W) with 0 in the middle of the range.
            noise: of these B samples.

        Returns:
            images of the same shape, and labels, float32 of shape (B, 9).
        """
        change = self.draw(noise)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return apply(change, images), change.labels()
