"""Class folders with a million image files: listed once, decoded when asked for."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from denoiselab.data.dataset import ImageDataset
from denoiselab.data.decoding import Crop, decode
from denoiselab.data.image_folder import EXTENSIONS

SCHEMA = 1  # of the cache files
_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)


def cache_folder() -> Path:
    """Where lists of files are kept: DENOISELAB_CACHE, or ~/.cache/denoiselab."""
    return Path(os.environ.get("DENOISELAB_CACHE") or Path.home() / ".cache" / "denoiselab")


class Index(NamedTuple):
    """The image files of class folders, class by class, in the order of their names.

    Args:
        names: file names without the folder, bytes of shape (N,).
        sizes: of the files in bytes, int64 of shape (N,).
        labels: which of the classes, int64 of shape (N,).
    """

    names: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def list_files(root: Path, classes: Sequence[str], cache: Path) -> Index:
    """The image files in the class folders of root, from the cache if none of the folders has changed since.

    A cache that is damaged, or cannot be written, costs time only.

    Args:
        root: the folder of class folders.
        classes: their names.
        cache: the folder where the list is kept.
    """
    changed = [(name, (root / name).stat().st_mtime_ns) for name in classes]
    key = hashlib.sha256(f"{SCHEMA} {changed}".encode()).hexdigest()
    path = cache / f"files-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"
    try:
        with np.load(path) as kept:
            if kept["key"].item() == key:
                return Index(kept["names"], kept["sizes"], kept["labels"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        pass
    with ThreadPoolExecutor(16) as pool:  # a network file system answers slowly, but many at once
        listed = list(pool.map(_list, [root / name for name in classes]))
    found = Index(
        names=np.array([name for files in listed for name, _ in files], dtype=np.bytes_),
        sizes=np.array([size for files in listed for _, size in files], dtype=np.int64),
        labels=np.repeat(np.arange(len(classes)), [len(files) for files in listed]),
    )
    _keep(path, key, found)
    return found


def _list(folder: Path) -> list[tuple[bytes, int]]:
    with os.scandir(os.fsencode(folder)) as entries:
        named = [e for e in entries if not e.name.startswith(b".") and e.name.lower().endswith(_ENDINGS)]
        return sorted((e.name, e.stat().st_size) for e in named)


def _keep(path: Path, key: str, found: Index) -> None:
    """Write the cache whole or not at all: other processes may be reading it."""
    beside = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(beside, key=np.array(key), **found._asdict())
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()


class IndexedFiles(ImageDataset):
    """The images of class folders, decoded when they are asked for.

    Args:
        root: the folder of class folders.
        classes: their names; the place of each is its label.
        cache: the folder where the list of files is kept.
        channels: 1 (grey) or 3 (RGB).
        size: (height, width) in pixels.
        crop: how `decode` scales and cuts.

    Raises:
        ValueError: if a class folder holds no images.
    """

    def __init__(
        self, root: Path, classes: Sequence[str], *, cache: Path, channels: int, size: tuple[int, int], crop: Crop
    ) -> None:
        super().__init__()
        self.root, self.classes = root, list(classes)
        self.index = list_files(root, classes, cache)
        empty = np.bincount(self.index.labels, minlength=len(classes)) == 0
        if empty.any():
            raise ValueError(f"{root / classes[int(empty.argmax())]} holds no images ({' '.join(EXTENSIONS)})")
        self.channels, self.size, self.crop = channels, size, crop

    def __len__(self) -> int:
        """The number of images."""
        return len(self.index.names)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / self.classes[self.label(index)] / os.fsdecode(self.index.names[index])

    def image(self, index: int) -> Tensor:
        """Image `index`: uint8 of shape (C, H, W).

        Raises:
            ValueError: if its file cannot be decoded.
        """
        path = self.path(index)
        try:
            return decode(path, channels=self.channels, size=self.size, crop=self.crop)
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(
                f"cannot decode {path} ({' '.join(str(error).split()) or type(error).__name__})"
            ) from error

    def label(self, index: int) -> int:
        """The class of image `index`."""
        return int(self.index.labels[index])

    def digest(self, index: int) -> bytes:
        """SHA-256 of the name and size of file `index` and of what is made of it: to read a million files takes hours."""
        name, size = self.index.names[index], self.index.sizes[index]
        return hashlib.sha256(f"{name} {size} {self.channels} {self.size} {self.crop}".encode()).digest()
