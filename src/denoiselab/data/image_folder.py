"""Any folder of images, with or without one subfolder per class."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from denoiselab.condition import NULL_LABEL
from denoiselab.data.datamodule import ImageDataModule, Split
from denoiselab.data.dataset import ImageDataset, LazyImages
from denoiselab.data.decoding import BrokenImageError, Crop, OnCorrupt, check_crop, check_on_corrupt, decode
from denoiselab.data.recorded import lost

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
NAMED = 3  # broken files that a message names

log = logging.getLogger(__name__)


class File(NamedTuple):
    """An image file: its path, its path below the root with forward slashes, and its label."""

    path: Path
    name: str
    label: int


def list_images(root: Path, below: str) -> tuple[list[str], list[str]]:
    """The files in the subfolder `below` of root, hidden ones left out: sorted, relative to root; images, then all others.

    Links to folders are followed, but no folder is gone into twice: a link may lead back to where it is.
    """
    names: list[str] = []
    others: list[str] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(root / below, followlinks=True):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))  # in an order that is the same everywhere
        for f in files:
            if not f.startswith("."):
                kind = names if f.lower().endswith(EXTENSIONS) else others
                kind.append((Path(parent) / f).relative_to(root).as_posix())
    return sorted(names), sorted(others)


def report_others(count: int, first: str) -> None:
    """Warn of so many files, at least one, that are passed over for their extensions."""
    known = " ".join(EXTENSIONS)
    rank_zero_only(log.warning)(f"files passed over, whose names end in none of {known}: {count}, the first {first}")


def report_broken(broken: Sequence[str], total: int, on_corrupt: OnCorrupt, instead: str) -> None:
    """Refuse the broken files of a folder, or warn of them once: how many of how many, and the first few by name.

    Args:
        broken: a line about each, at least one.
        total: files that were looked at.
        on_corrupt: the way to treat them.
        instead: what is done if they are skipped.

    Raises:
        ValueError: if they are not to be skipped.
    """
    line = f"on_corrupt={on_corrupt}: {len(broken)} of {total} files cannot be decoded: {', '.join(broken[:NAMED])}"
    line += ", ..." if len(broken) > NAMED else ""
    if on_corrupt == "fail":
        raise ValueError(f"{line}; repair or remove them, or set on_corrupt=skip")
    rank_zero_only(log.warning)(f"{line}; {instead}")


def choose_test(files: Sequence[File], fraction: float) -> set[str]:
    """The names of the files for testing: of each class, the given part with the lowest hash of the name.

    At least one file of each class is left for training and, of two or more, at least one chosen. A file
    that is added moves at most one other across, since each one's hash is its own.
    """
    classes: dict[int, list[str]] = {}
    for file in files:
        classes.setdefault(file.label, []).append(file.name)
    chosen: set[str] = set()
    for names in classes.values():
        count = min(max(1, round(len(names) * fraction)), len(names) - 1)
        by_hash = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        chosen.update(by_hash[:count])
    return chosen


class ImageFiles(LazyImages):
    """Images that are decoded when they are asked for.

    Args:
        files: the files, with their labels.
        digests: SHA-256 of each one's pixels.
        pixels: of the images that are in memory already, by index.
        channels: 1 (grey) or 3 (RGB).
        size: (height, width) in pixels.
        crop: how `decode` scales and cuts.
        flip: whether the draws of training are mirrored left to right with probability 1/2.
        seed: keys the mirroring.
        on_corrupt: what to do about files that are broken later, or gone.
    """

    def __init__(
        self,
        files: Sequence[File],
        digests: Sequence[bytes],
        *,
        pixels: Mapping[int, Tensor],
        channels: int,
        size: tuple[int, int],
        crop: Crop = "fit",
        flip: bool = False,
        seed: int = 0,
        on_corrupt: OnCorrupt = "fail",
    ) -> None:
        super().__init__(flip=flip, seed=seed, on_corrupt=on_corrupt)
        self.files, self.digests, self.pixels = files, digests, pixels
        self.channels, self.size, self.crop = channels, size, crop

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.files[index].path

    def read(self, index: int) -> Tensor:
        """Image `index` itself: uint8 of shape (C, H, W)."""
        if index in self.pixels:
            return self.pixels[index]
        return decode(self.files[index].path, channels=self.channels, size=self.size, crop=self.crop)

    def peers(self, index: int) -> Sequence[int]:
        """The images that have the class of image `index`."""
        label = self.label(index)
        return [other for other, file in enumerate(self.files) if file.label == label]

    def label(self, index: int) -> int:
        """The class of image `index`; `NULL_LABEL` where there are no classes."""
        return self.files[index].label

    def digest(self, index: int) -> bytes:
        """SHA-256 of the pixels of image `index`, as they were when the folder was scanned."""
        return self.digests[index]


class ImageFolder(ImageDataModule):
    """A folder of images of any size and kind, scaled and cut to one shape.

    Every file is decoded once, in threads, when a split is first asked for or checked, and the fingerprint is
    that of the pixels of the files that can be. Hidden files are ignored; files with other extensions than
    `EXTENSIONS` too, with a warning that says how many.

    Args:
        root: the folder. With classes, each of its subfolders is one, in the order of their names, and
            images that lie in none are ignored; without, images are looked for at any depth.
        test_root: a folder of test images with the same subfolders; None takes a fixed, stratified part of
            root.
        test_fraction: the part of root that is for testing if there is no test_root, in (0, 1).
        on_corrupt: what to do about files that cannot be decoded: "fail" refuses the folder, "skip" leaves
            them out and says so in one warning; for a file that breaks or vanishes later (without `cache`),
            another one of its class stands in.
        cache: keep the decoded pixels in memory instead of decoding each image whenever it is drawn.
        channels: 1 (grey) or 3 (RGB): what the images are converted to.
        resolution: in pixels, one number or [height, width]: what the images are scaled and cut to.
        num_classes: number of subfolders; 0 ignores them and trains without labels.
        crop: how they are scaled and cut: "fit" in one go, "adm" as ADM, DiT and SiT do it, to a square.
        batch_size, seed, num_workers, flip, eval_batch_size: as in `ImageDataModule`; the split depends on
            none of them.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        *,
        root: str | None,
        test_root: str | None,
        test_fraction: float,
        on_corrupt: OnCorrupt,
        cache: bool,
        channels: int,
        resolution: int | list[int],
        num_classes: int,
        batch_size: int,
        seed: int,
        crop: Crop = "fit",
        num_workers: int = 0,
        flip: bool = False,
        eval_batch_size: int = 500,
    ) -> None:
        super().__init__(
            channels=channels,
            resolution=resolution,
            num_classes=num_classes,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            flip=flip,
            eval_batch_size=eval_batch_size,
        )
        if root is None:
            raise ValueError("root=null: give a folder of images, datamodule.root=/path/to/images")
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction}: must be above 0 and below 1")
        check_on_corrupt(on_corrupt)
        self.root, self.test_root, self.test_fraction = root, test_root, test_fraction
        check_crop(crop, self.size)
        self.on_corrupt, self.cache, self.crop = on_corrupt, cache, crop
        self._scanned: dict[Split, ImageDataset] = {}
        self._marks: dict[Split, dict[File, str]] = {}  # the hash of each file's pixels; "" of a broken one

    def load(self, split: Split) -> ImageDataset:
        """Read one split; the first call scans both.

        Raises:
            ValueError: if the folder is missing or empty, has other classes than declared, or holds broken
                files that are not to be skipped.
        """
        if not self._scanned:
            self._scanned = self._scan()
        return self._scanned[split]

    def record(self) -> dict[str, Any]:
        """The files of both splits, those that are left out among them, with the hashes of their pixels."""
        self.train_set()
        return {
            split: {
                "names": [f.name for f in marks],
                "labels": [f.label for f in marks],
                "marks": list(marks.values()),
            }
            for split, marks in self._marks.items()
        }

    def _scan(self) -> dict[Split, ImageDataset]:
        """Decode every file once, deal with the broken ones and make both splits of the others."""
        splits = self._files()
        files = splits["train"] + splits["test"]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            results = dict(zip(files, pool.map(self._decode, files), strict=True))
        found = {f: "" if isinstance(r, str) else r[0].hex() for f, r in results.items()}
        self._marks, gone = self._as_recorded(found) or (
            {s: {f: found[f] for f in m} for s, m in splits.items()},
            set(),
        )
        broken = [r for f, r in results.items() if isinstance(r, str) and f not in gone]
        if broken:
            report_broken(broken, len(files), self.on_corrupt, "left out")
        if gone:
            lines = [str(results.get(f, f"{f.path} is missing")) for f in sorted(gone)]
            report_broken(lines, sum(map(len, self._marks.values())), self.on_corrupt, "others of their class stand in")
        sets: dict[Split, ImageDataset] = {}
        for split, marks in self._marks.items():
            members = [f for f, mark in marks.items() if mark]
            good = {i: r for i, f in enumerate(members) if not isinstance(r := results.get(f, ""), str)}
            if not good:
                raise ValueError(f"root={self.root}: the {split} split holds no image that can be decoded")
            pixels = {i: r[1] for i, r in good.items() if r[1] is not None}
            if len(pixels) == len(members):
                labels = torch.tensor([f.label for f in members])
                sets[split] = self._in_memory(split, torch.stack(list(pixels.values())), labels)
            else:
                sets[split] = ImageFiles(
                    members,
                    [bytes.fromhex(marks[f]) for f in members],
                    pixels=pixels,
                    channels=self.channels,
                    size=self.size,
                    crop=self.crop,
                    flip=self.flip and split == "train",
                    seed=self.seed,
                    on_corrupt=self.on_corrupt,
                )
        return sets

    def _as_recorded(self, found: dict[File, str]) -> tuple[dict[Split, dict[File, str]], set[File]] | None:
        """The marks of both splits as they were recorded, and the files lost since; None without a record that still fits."""
        if self.on_corrupt != "skip" or self.recorded.keys() != {"train", "test"}:
            return None
        marks: dict[Split, dict[File, str]] = {}
        folders: dict[Split, str] = {"train": self.root, "test": self.test_root or self.root}
        for split, folder in folders.items():
            rows = zip(*self.recorded[split], strict=True)
            marks[split] = {File(Path(folder, name), name, label): mark for name, label, mark in rows}
        gone = lost(marks["train"] | marks["test"], found, lambda file: bool(found[file]))
        return None if gone is None else (marks, gone)

    def _decode(self, file: File) -> tuple[bytes, Tensor | None] | str:
        """The hash of a file's pixels and, if they are kept, the pixels; or in one line why it has none."""
        try:
            pixels = decode(file.path, channels=self.channels, size=self.size, crop=self.crop)
        except BrokenImageError as error:
            return str(error)
        digest = hashlib.sha256(pixels.numpy().tobytes()).digest()
        return digest, pixels if self.cache else None

    def _files(self) -> dict[Split, list[File]]:
        """The files of each split, broken ones among them: repairing a file moves no other."""
        classes = self._classes("root", self.root)
        files = self._list("root", self.root, classes)
        if self.test_root is None:
            chosen = choose_test(files, self.test_fraction)
            return {
                "train": [f for f in files if f.name not in chosen],
                "test": [f for f in files if f.name in chosen],
            }
        if self._classes("test_root", self.test_root) != classes:
            raise ValueError(f"test_root={self.test_root}: must have the same class folders as root={self.root}")
        one, other = Path(self.root).resolve(), Path(self.test_root).resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise ValueError(f"test_root={self.test_root}: must lie outside of root={self.root} and not around it")
        return {"train": files, "test": self._list("test_root", self.test_root, classes)}

    def _classes(self, key: str, folder: str) -> list[str]:
        """The names of the class folders, sorted; none if no classes are declared."""
        if not Path(folder).is_dir():
            raise ValueError(f"{key}={folder}: no such folder")
        if self.num_classes == 0:
            return []
        names = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(names) != self.num_classes:
            raise ValueError(f"num_classes={self.num_classes}: {key} has {len(names)} class folders")
        return names

    def _list(self, key: str, folder: str, classes: Sequence[str]) -> list[File]:
        """The image files below `folder` or, with classes, below its class folders."""
        files: list[File] = []
        others: list[str] = []
        for label, name in enumerate(classes) if classes else [(NULL_LABEL, "")]:
            below, more = list_images(Path(folder), name)
            others += more
            if not below and not any(label in known.labels for known in self.recorded.values()):
                raise ValueError(f"{key}={Path(folder, name)}: holds no images ({' '.join(EXTENSIONS)})")
            files += [File(Path(folder, path), path, label) for path in below]
        if others:
            report_others(len(others), str(Path(folder, others[0])))
        return files
