"""Images in npz files, read row by row where they are not compressed."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from denoiselab.data.dataset import ImageDataset

RATIO = 100  # to which an npz file may unpack; of images it is about 2, of masks some 10
SLACK = 2**26  # bytes to which any file may unpack: labels that are all the same shrink to nothing


class Layout(NamedTuple):
    """How a kind of npz file names and lays out what it holds: the first class's number, and where the channels are."""

    images: str
    labels: str
    first_label: int
    flat: bool


LAYOUTS = (
    Layout("data", "labels", 1, True),  # downsampled ImageNet (Chrabaszcz et al. 2017): rows of C·H·W
    Layout("arr_0", "arr_1", 0, False),  # ADM's sample and reference batches: (N, H, W, C)
    Layout("images", "labels", 0, False),  # what denoiselab-sample writes
)


class StoredArray:
    """An array in an npz file: mapped into memory where it is stored as it is, loaded where it is compressed.

    It is opened when it is first asked for, in each process anew: a mapped array would travel to a worker as a copy.

    Args:
        path: of the npz file.
        name: of the array.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_array": None}

    @property
    def array(self) -> np.ndarray:
        """The array."""
        if self._array is None:
            self._array = _open(self.path, f"{self.name}.npy")
        return self._array


def check_unpacked_size(path: Path) -> None:
    """Refuse an npz file that is small and would unpack to very much.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is such a file.
        BadZipFile: if it is no ZIP file.
    """
    packed = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > max(SLACK, RATIO * packed):
        raise ValueError(f"it has {packed:,} bytes and would unpack to {unpacked:,}")


def _open(path: Path, member: str) -> np.ndarray:
    check_unpacked_size(path)
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        info = archive.getinfo(member)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        length = file.tell()
        if not dtype.hasobject and math.prod(shape) * dtype.itemsize != info.file_size - length:
            raise ValueError(f"its {member} has not as many bytes as {dtype} {list(shape)} takes")
        if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    with path.open("rb") as raw:  # the local header repeats the name and may have other extra fields than the directory
        raw.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", raw.read(4))
    offset = info.header_offset + 30 + name_length + extra_length + length
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


class NpzImages(ImageDataset):
    """The images of npz files, one after the other.

    Args:
        paths: of the files, all of one of the `LAYOUTS`.
        channels: of the images.
        size: (height, width) in pixels.
        num_classes: labels must be below it; 0 looks at no labels, and each is 0.

    Raises:
        ValueError: if a file is broken or of something else.
    """

    def __init__(self, paths: Sequence[Path], *, channels: int, size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.shape = (channels, *size)
        self.blocks: list[StoredArray] = []
        self.flat: list[bool] = []
        labels = []
        for path in paths:
            try:
                block, flat, numbers = self._read(path, num_classes)
            except Exception as error:  # zipfile, numpy and the checks raise many kinds
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"cannot read {path.name} ({reason})") from error
            self.blocks.append(block)
            self.flat.append(flat)
            labels.append(numbers)
        self.labels = np.concatenate(labels)
        self.ends = np.cumsum([len(numbers) for numbers in labels])

    def _read(self, path: Path, num_classes: int) -> tuple[StoredArray, bool, np.ndarray]:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        layout = next((layout for layout in LAYOUTS if layout.images in names), None)
        if layout is None:
            raise ValueError(f"it holds {', '.join(names) or 'nothing'}, not {' or '.join(x.images for x in LAYOUTS)}")
        block, (channels, height, width) = StoredArray(path, layout.images), self.shape
        expected = (channels * height * width,) if layout.flat else (height, width, channels)
        if block.array.dtype != np.uint8 or block.array.shape[1:] != expected or not len(block.array):
            found = f"{block.array.dtype} {list(block.array.shape)}"
            raise ValueError(f"its {layout.images} are {found}, not uint8 [N, {', '.join(map(str, expected))}]")
        if num_classes == 0:
            return block, layout.flat, np.zeros(len(block.array), np.int64)
        if layout.labels not in names:
            raise ValueError(f"it holds no {layout.labels}; num_classes=0 trains without")
        labels = np.asarray(StoredArray(path, layout.labels).array)
        if labels.dtype.kind not in "iu" or labels.shape != block.array.shape[:1]:
            raise ValueError(f"its {layout.labels} are {labels.dtype} {list(labels.shape)}, not one integer an image")
        labels = labels.astype(np.int64) - layout.first_label
        if not ((labels >= 0) & (labels < num_classes)).all():
            span = f"{layout.first_label} to {num_classes - 1 + layout.first_label}"
            raise ValueError(f"its {layout.labels} are not all from {span}")
        return block, layout.flat, labels

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file that holds image `index`."""
        return self.blocks[int(np.searchsorted(self.ends, index, side="right"))].path

    def image(self, index: int) -> Tensor:
        """Image `index`: uint8 of shape (C, H, W)."""
        block = int(np.searchsorted(self.ends, index, side="right"))
        row = self.blocks[block].array[index - int(self.ends[block])]  # counted from the block's end
        pixels = torch.from_numpy(np.array(row))
        return pixels.reshape(self.shape) if self.flat[block] else pixels.permute(2, 0, 1).contiguous()

    def label(self, index: int) -> int:
        """The class of image `index`."""
        return int(self.labels[index])
