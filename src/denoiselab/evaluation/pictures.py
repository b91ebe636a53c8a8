"""Images as pictures: grids, and images read from files."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from denoiselab.data.decoding import KINDS
from denoiselab.evaluation.generate import Source
from denoiselab.runs.checks import show
from denoiselab.runs.files import read_json

PROTOCOL = "protocol.json"  # in a folder of samples: how they were drawn, and how many
DRAWN = ("sampler", "guidance", "nfe", "weights", "weights_sha256", "step", "seed")  # of it, for a number
DAMAGE = (OSError, EOFError, LookupError, SyntaxError, TypeError, ValueError)  # what Pillow and numpy raise
Fetch = Callable[[int], np.ndarray]  # the uint8 pixels (H, W, C) of an image by its number


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


def read_images(source: Path, channels: int) -> tuple[UInt8[Tensor, "N C H W"], Int64[Tensor, " N"]]:
    """All images and labels that `stored_images` finds, in memory; the arguments are the same."""
    images, labels = stored_images(source, channels, batch_size=500)
    return torch.cat([batch for _, batch in images(range(len(labels)))]), labels


def stored_images(source: Path, channels: int, *, batch_size: int) -> tuple[Source, Int64[Tensor, " N"]]:
    """Images of an npz (`images`, `labels`), or of a folder of npz or of PNG files, as `denoiselab-sample` writes them.

    Of several npz files no more than one is in memory at a time. The files of a folder are taken in the order of their
    names, whatever their subfolder; subfolders in the order of their names are the classes of PNG files.

    Args:
        source: file or folder.
        channels: 1 (grey) or 3 (RGB).
        batch_size: images that the source yields at a time.

    Returns:
        A source of the images by number, and their labels: int64, -1 without classes.

    Raises:
        ValueError: if there are no images, not of one size, not all that the folder is to hold, or a file is damaged; of
            pixels, the source finds that out.
    """
    shards = [source] if source.is_file() and source.suffix == ".npz" else sorted(source.glob("*.npz"))
    pictures = sorted(source.rglob("*.png"), key=lambda file: (file.name, file))
    if not shards and not pictures:
        raise ValueError(f"images={source}: no npz, and no folder with npz or PNG files")
    if shards and pictures:
        raise ValueError(f"images={source}: has npz and PNG files; must have one kind")
    fetch, labels = _shards(shards, channels) if shards else _pictures(source, pictures, channels)
    _check_complete(source, len(labels))

    def images(numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(numbers), batch_size):
            index = torch.as_tensor(numbers[start : start + batch_size])
            pixels = np.stack([fetch(number) for number in index.tolist()])
            yield index, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    return images, torch.from_numpy(labels)


def stored_protocol(source: Path) -> dict[str, Any]:
    """What the protocol says of stored images: the hash of the files, and how they were drawn, where that lies beside them.

    Args:
        source: as `stored_images` takes it.
    """
    files = [source] if source.is_file() else sorted([*source.glob("*.npz"), *source.rglob("*.png")])
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(f"{file.relative_to(source)} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    beside = source.with_name(f"{source.name}.json") if source.is_file() else source / PROTOCOL
    try:
        found = read_json(beside)
    except (OSError, ValueError):
        found = {}
    drawn = found if isinstance(found, dict) else {}
    known = {key: drawn[key] for key in DRAWN if key in drawn}
    if drawn.get("class") is not None:  # else all classes in turn, as in every other measurement
        known["class"] = drawn["class"]
    return {"images_sha256": total.hexdigest()} | known


def _shards(files: Sequence[Path], channels: int) -> tuple[Fetch, np.ndarray]:
    shapes, labels = [], []
    for file in files:
        with _reading(file), np.load(file) as arrays:
            names = arrays.files
            if "images" in names:
                with arrays.zip.open("images.npy") as member:
                    old = np.lib.format.read_magic(member) == (1, 0)
                    read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read_header(member)
                asked = arrays["labels"] if "labels" in names else np.full(shape[:1], -1)
        if "images" not in names:
            raise ValueError(f"images={file}: has no array `images`")
        if dtype.hasobject:
            raise ValueError(f"images={file}: must hold numbers, not Python objects")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != channels:
            raise ValueError(f"images={file}: must be uint8 of shape (N, H, W, {channels}), not {dtype} {shape}")
        if asked.shape != shape[:1]:
            raise ValueError(f"images={file}: has {shape[0]} images, but labels of shape {asked.shape}")
        shapes.append(shape)
        labels.append(asked.astype(np.int64))
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"images={files[0].parent}: must all be of one size")
    starts = np.cumsum([0, *(shape[0] for shape in shapes)])
    held: tuple[int, np.ndarray] | None = None

    def fetch(number: int) -> np.ndarray:
        nonlocal held
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        if held is None or held[0] != shard:
            held = None  # before the next one is read, so that there is one at a time
            with _reading(files[shard]), np.load(files[shard]) as arrays:
                held = (shard, arrays["images"])
        return held[1][number - starts[shard]]

    return fetch, np.concatenate(labels)


def _pictures(folder: Path, files: Sequence[Path], channels: int) -> tuple[Fetch, np.ndarray]:
    sizes = set()
    for file in files:
        with _reading(file), Image.open(file, formats=KINDS) as picture:
            sizes.add(picture.size)
    if len(sizes) > 1:
        raise ValueError(f"images={folder}: must all be of one size")
    width, height = sizes.pop()
    mode = "L" if channels == 1 else "RGB"

    def fetch(number: int) -> np.ndarray:
        with _reading(files[number]), Image.open(files[number], formats=KINDS) as picture:
            return np.asarray(picture.convert(mode)).reshape(height, width, channels)

    names = sorted({str(file.parent.relative_to(folder)) for file in files} - {"."})
    # denoiselab-sample writes the class itself; other names are numbered in their order
    number = {name: int(name) if all(n.isdigit() for n in names) else i for i, name in enumerate(names)}
    labels = [number[str(f.parent.relative_to(folder))] if f.parent != folder else -1 for f in files]
    return fetch, np.array(labels, dtype=np.int64)


def _check_complete(source: Path, count: int) -> None:
    """Refuse a folder that `denoiselab-sample` has not finished: a part of the samples is another set."""
    path = source / PROTOCOL
    if not path.is_file():
        return
    with _reading(path):
        wanted = read_json(path)["num_samples"]
    if count != wanted:
        raise ValueError(
            f"images={source}: has {count} of the {show(wanted)} images of its {PROTOCOL}; finish drawing them"
        )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Say in one line which file is damaged."""
    try:
        yield
    except (*DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"images={file}: cannot be read ({reason or type(error).__name__})") from error
