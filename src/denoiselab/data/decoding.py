"""From an image file to pixels of one shape."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Crop = Literal["fit", "adm"]


def check_crop(crop: Crop, size: tuple[int, int]) -> None:
    """See to it that images of `size` (height, width) can be cut in that way.

    Raises:
        ValueError: otherwise.
    """
    if crop not in ("fit", "adm"):
        raise ValueError(f"crop={crop}: must be fit or adm")
    if crop == "adm" and size[0] != size[1]:
        raise ValueError(f"crop=adm: cuts squares, not {size[0]}x{size[1]}; use crop=fit")


def to_grey_or_rgb(image: Image.Image, channels: int) -> Image.Image:
    """The image upright (EXIF orientation) in 8-bit grey (channels 1, luma of ITU-R 601) or RGB (channels 3).

    Transparency is composited on white; 16-bit grey is scaled to 8 bits; palettes, CMYK and the rest go
    through RGB.

    Raises:
        ValueError: if the pixels have no fixed range (32-bit integers or floats).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image so that it covers `size` (height, width) and cut out the centre, in one go.

    Pillow's bicubic filter antialiases when it shrinks; an image that has the size already is left as it is.
    """
    if image.size == size[::-1]:
        return image
    return ImageOps.fit(image, size[::-1], method=Image.Resampling.BICUBIC)


def adm_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The same as Dhariwal & Nichol 2021 do it for ImageNet (`center_crop_arr` of the code of ADM, used by DiT and SiT).

    While it stays as large, the image is halved by averaging 2x2 pixels; then its shorter side is scaled to that of the
    square with the bicubic filter, to whole pixels, and the centre is cut out.
    """
    side = size[0]
    assert size == (side, side)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def decode(path: Path, *, channels: int, size: tuple[int, int], crop: Crop = "fit") -> Tensor:
    """Read an image file, scale it so that it covers `size` and cut out the centre.

    Args:
        path: of the file.
        channels: 1 (grey) or 3 (RGB).
        size: (height, width) in pixels.
        crop: how to scale and cut: `fit` or, for a square, `adm_crop`.

    Returns:
        uint8 of shape (channels, height, width).

    Raises:
        Exception: of Pillow's many kinds, if the file is not a whole image.
    """
    with Image.open(path) as image:
        image.load()
        plain = to_grey_or_rgb(image, channels)
    plain = (adm_crop if crop == "adm" else fit)(plain, size)
    return torch.from_numpy(np.array(plain)).reshape(*size, channels).permute(2, 0, 1).contiguous()
