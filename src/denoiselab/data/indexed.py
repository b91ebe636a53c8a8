"""Class folders with a million image files: listed once, decoded when asked for."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from denoiselab.data.dataset import ImageDataset
from denoiselab.data.decoding import BrokenImageError, Crop, OnCorrupt, decode
from denoiselab.data.image_folder import EXTENSIONS, report_broken, report_others
from denoiselab.data.recorded import Recorded, lost

SCHEMA = 2  # of the cache files
PROBES = 1000  # files whose sizes are compared with a list that was kept
BLOCK = 10_000  # files that are handed to the threads at a time
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
        others: the number of files with other extensions.
        first_other: its class folder and name, bytes; empty if there is none.
    """

    names: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    others: int
    first_other: bytes


def list_files(root: Path, classes: Sequence[str], cache: Path) -> Index:
    """The image files in the class folders of root, from the cache if none of the folders has changed since.

    A folder changes when files are added, removed, renamed or replaced by others; not when one is written to in place,
    so the sizes of `PROBES` files are looked at too. A cache that is damaged, or cannot be written, costs time only.

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
            known = Index(**{field: kept[field] for field in Index._fields})
            known = known._replace(others=int(known.others), first_other=kept["first_other"].item())
            if kept["key"].item() == key and _sizes_hold(root, classes, known):
                return known
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        pass
    with ThreadPoolExecutor(16) as pool:  # a network file system answers slowly, but many at once
        listed = list(pool.map(_list, [root / name for name in classes]))
    passed = [os.fsencode(c) + b"/" + o for c, (_, others) in zip(classes, listed, strict=True) for o in others]
    found = Index(
        names=np.array([name for files, _ in listed for name, _ in files], dtype=np.bytes_),
        sizes=np.array([size for files, _ in listed for _, size in files], dtype=np.int64),
        labels=np.repeat(np.arange(len(classes)), [len(files) for files, _ in listed]),
        others=len(passed),
        first_other=passed[0] if passed else b"",
    )
    _keep(path, key, found)
    return found


def _list(folder: Path) -> tuple[list[tuple[bytes, int]], list[bytes]]:
    """The images with their sizes, and the names of what is none."""
    with os.scandir(os.fsencode(folder)) as entries:
        shown = [e for e in entries if not e.name.startswith(b".")]
        images = sorted((e.name, _size(e)) for e in shown if e.name.lower().endswith(_ENDINGS))
        return images, sorted(e.name for e in shown if not e.name.lower().endswith(_ENDINGS) and e.is_file())


def _size(file: os.PathLike[bytes] | os.PathLike[str]) -> int:
    """In bytes; 0 also where there is no such file, or a link leads nowhere."""
    try:
        return os.stat(file).st_size
    except OSError:
        return 0


def _sizes_hold(root: Path, classes: Sequence[str], known: Index) -> bool:
    """Whether `PROBES` of the files, evenly spaced, have the sizes that are known."""
    probes = np.linspace(0, len(known.names) - 1, min(PROBES, len(known.names))).astype(int).tolist()

    def holds(i: int) -> bool:
        return _size(root / classes[known.labels[i]] / os.fsdecode(known.names[i])) == int(known.sizes[i])

    with ThreadPoolExecutor(16) as pool:
        return all(pool.map(holds, probes))


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

    What stands for an image in a fingerprint is its file's name and size, since to read a million files takes long: a
    byte that changes within a file is not seen, nor that a file is broken. With `verify` it is the pixels.

    Args:
        root: the folder of class folders.
        classes: their names; the place of each is its label.
        cache: the folder where the list of files is kept.
        channels: 1 (grey) or 3 (RGB).
        size: (height, width) in pixels.
        crop: how `decode` scales and cuts.
        on_corrupt: whether files that are found broken are refused ("fail") or only named ("skip"): that a file is empty,
            its size tells.
        verify: decode every file once, to find the broken ones and to know the pixels.
        recorded: what the folder held when the run began: what is lost since stays in the index; see `ImageDataModule.recall`.

    Raises:
        ValueError: if a class folder holds no images, or files are broken and not to be skipped.
    """

    def __init__(
        self,
        root: Path,
        classes: Sequence[str],
        *,
        cache: Path,
        channels: int,
        size: tuple[int, int],
        crop: Crop,
        on_corrupt: OnCorrupt = "fail",
        verify: bool = False,
        recorded: Recorded | None = None,
    ) -> None:
        super().__init__()
        self.root, self.classes = root, list(classes)
        self.channels, self.size, self.crop = channels, size, crop
        self.index = list_files(root, classes, cache)
        if self.index.others:
            report_others(self.index.others, str(root / os.fsdecode(self.index.first_other)))
        if recorded is None:
            self._check_classes()
        found = self._decode(np.arange(len(self)) if verify else np.flatnonzero(self.index.sizes == 0))
        self.digests = b"".join(d if isinstance(d, bytes) else bytes(32) for d in found) if verify else None
        broken = [line for line in found if isinstance(line, str)]
        if recorded is not None and on_corrupt == "skip":
            broken = self._restore(recorded) or broken
        self._check_classes()
        if broken:
            report_broken(broken, len(self), on_corrupt, "others of their class stand in")

    def _check_classes(self) -> None:
        empty = np.bincount(self.index.labels, minlength=len(self.classes)) == 0
        if empty.any():
            name = self.classes[int(empty.argmax())]
            raise ValueError(f"{self.root / name} holds no images ({' '.join(EXTENSIONS)})")

    def record(self) -> dict[str, Any]:
        """The files with their hashes or sizes, as plain data; see `Recorded`."""
        names = [os.fsdecode(name) for name in self.index.names.tolist()]
        return Recorded(names, self.index.labels.tolist(), self._marks())._asdict()

    def _marks(self) -> list[str]:
        """What is known of the content of each file, as text; "" of a broken one."""
        if self.digests is None:
            return [str(size) if size else "" for size in self.index.sizes.tolist()]
        found = (self.digests[start : start + 32] for start in range(0, len(self.digests), 32))
        return [digest.hex() if any(digest) else "" for digest in found]

    def _restore(self, recorded: Recorded) -> list[str]:
        """Take the files for what was recorded, if nothing but losses has befallen them; a line about each that is lost."""
        places = zip(self.index.labels.tolist(), self.index.names.tolist(), strict=True)
        now = dict(zip(places, self._marks(), strict=True))
        names = [os.fsencode(name) for name in recorded.names]
        known = dict(zip(zip(recorded.labels, names, strict=True), recorded.marks, strict=True))
        if known == now or not set(recorded.labels) <= set(range(len(self.classes))):
            return []

        def good(place: tuple[int, bytes]) -> bool:
            return bool(now[place]) if self.digests is not None else not self._flaw(*place)

        if (gone := lost(known, now, good)) is None:
            return []
        sizes = [int(mark or 0) if self.digests is None else 0 for mark in recorded.marks]
        self.index = self.index._replace(
            names=np.array(names, np.bytes_),
            sizes=np.array(sizes, np.int64),
            labels=np.array(recorded.labels, np.int64),
        )
        if self.digests is not None:
            self.digests = b"".join(bytes.fromhex(mark or "00" * 32) for mark in recorded.marks)
        suspect = sorted(gone | {place for place, mark in known.items() if not mark})
        return [line for place in suspect if (line := self._flaw(*place))]

    def _flaw(self, label: int, name: bytes) -> str:
        """Why a file cannot be decoded; "" if it can."""
        try:
            self._read(self.root / self.classes[label] / os.fsdecode(name))
        except BrokenImageError as error:
            return str(error)
        return ""

    def _read(self, path: Path) -> Tensor:
        return decode(path, channels=self.channels, size=self.size, crop=self.crop)

    @property
    def labels(self) -> np.ndarray:
        """The classes of all images, int64 of shape (N,)."""
        return self.index.labels

    def __len__(self) -> int:
        """The number of images."""
        return len(self.index.names)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / self.classes[self.label(index)] / os.fsdecode(self.index.names[index])

    def image(self, index: int) -> Tensor:
        """Image `index`: uint8 of shape (C, H, W).

        Raises:
            BrokenImageError: if its file cannot be decoded.
        """
        return self._read(self.path(index))

    def label(self, index: int) -> int:
        """The class of image `index`."""
        return int(self.index.labels[index])

    def digest(self, index: int) -> bytes:
        """SHA-256 of the pixels if they were verified, else of the file's name and size and of what is made of it."""
        if self.digests is not None:
            return self.digests[32 * index : 32 * index + 32]
        name, size = self.index.names[index], self.index.sizes[index]
        return hashlib.sha256(f"{name} {size} {self.channels} {self.size} {self.crop}".encode()).digest()

    def _decode(self, indices: np.ndarray) -> list[bytes | str]:
        """The SHA-256 of each one's pixels, or in a line why it has none."""

        def one(index: int) -> bytes | str:
            try:
                return hashlib.sha256(self.image(index).numpy().tobytes()).digest()
            except BrokenImageError as error:
                return str(error)

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            blocks = [indices[start : start + BLOCK].tolist() for start in range(0, len(indices), BLOCK)]
            return [found for block in blocks for found in pool.map(one, block)]
