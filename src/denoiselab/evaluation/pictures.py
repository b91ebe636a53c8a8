"""Images as pictures: grids and PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor


def image_grid(images: UInt8[Tensor, "N C H W"], columns: int, border: int = 2) -> Image.Image:
    """The images row by row on white, magnified by whole pixels until an image is at least 48 pixels high.

    Args:
        images: grey or RGB.
        columns: images per row.
        border: white pixels around each image.
    """
    count, channels, height, width = images.shape
    zoom = max(1, -(-48 // height))
    cell_h, cell_w = height * zoom + border, width * zoom + border
    rows = -(-count // columns)
    canvas = np.full((rows * cell_h + border, min(columns, count) * cell_w + border, channels), 255, np.uint8)
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = border + i // columns * cell_h, border + i % columns * cell_w
        large = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
        canvas[top : top + height * zoom, left : left + width * zoom] = large
    return to_pil(canvas)


def to_pil(pixels: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """A uint8 array with one or three channels as a picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_images(images: UInt8[Tensor, "N C H W"], labels: Tensor | None, folder: Path) -> None:
    """One PNG a sample: 000000.png, or in a subfolder per class so that `datamodule=image_folder` reads it back."""
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        target = folder if labels is None else folder / f"{int(labels[i]):03d}"
        target.mkdir(parents=True, exist_ok=True)
        to_pil(pixels).save(target / f"{i:06d}.png")


def read_images(source: Path, channels: int) -> tuple[UInt8[Tensor, "N C H W"], Tensor]:
    """Images and labels of an npz (`images`, `labels`) or a folder of PNG files, as `denoiselab-sample` writes them.

    Files of a folder are taken in the order of their names, whatever their subfolder; subfolders in the order of their
    names are the classes. Labels are int64, -1 without classes.

    Args:
        source: file or folder.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        ValueError: if there are no images, or not of one size.
    """
    if source.suffix == ".npz" and source.is_file():
        with np.load(source) as arrays:
            if "images" not in arrays:
                raise ValueError(f"images={source}: has no array `images`")
            pixels = arrays["images"]
            labels = arrays["labels"] if "labels" in arrays else np.full(len(pixels), -1)
    else:
        files = sorted(source.rglob("*.png"), key=lambda file: (file.name, file))
        if not files:
            raise ValueError(f"images={source}: no npz, and no folder with PNG files")
        names = sorted({str(file.parent.relative_to(source)) for file in files} - {"."})
        mode = "L" if channels == 1 else "RGB"
        arrays_ = [np.asarray(Image.open(file).convert(mode)) for file in files]
        if len({a.shape for a in arrays_}) > 1:
            raise ValueError(f"images={source}: must all be of one size")
        pixels = np.stack(arrays_).reshape(len(files), *arrays_[0].shape[:2], channels)
        # save_images writes the class itself; other names are numbered in their order
        number = {name: int(name) if all(n.isdigit() for n in names) else i for i, name in enumerate(names)}
        labels = np.array([number[str(f.parent.relative_to(source))] if f.parent != source else -1 for f in files])
    if labels.shape != pixels.shape[:1]:
        raise ValueError(f"images={source}: has {len(pixels)} images, but labels of shape {labels.shape}")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != channels:
        raise ValueError(
            f"images={source}: must be uint8 of shape (N, H, W, {channels}), not {pixels.dtype} {pixels.shape}"
        )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))
