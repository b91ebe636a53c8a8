"""ImageNet (Deng et al. 2009; ILSVRC 2012): 1.28 million images in 1,000 classes, as class folders or as npz files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from denoiselab.condition import NULL_LABEL
from denoiselab.data.datamodule import ImageDataModule, Split
from denoiselab.data.dataset import ImageDataset, LazyImages
from denoiselab.data.decoding import Crop, OnCorrupt, check_crop, check_on_corrupt
from denoiselab.data.indexed import IndexedFiles, cache_folder
from denoiselab.data.npz import NpzImages
from denoiselab.data.order import permutation

SPLIT_SEED = 2012  # part of the data set: a run's seed does not touch it
WAYS = (
    "a folder with train/n01440764/*.JPEG and so on (val/ likewise, if there is one), one with train_data_batch_*.npz "
    "(and val_data.npz) of downsampled ImageNet, or one npz file"
)


class Chosen(LazyImages):
    """Some of the images of another data set; what stands in for a broken one is among them.

    Args:
        images: the others, with all `labels`.
        rows: which of them, int64 of shape (N,).
        labelled: whether the labels are theirs; else they are null.
        flip: whether the draws of training are mirrored left to right with probability 1/2.
        seed: keys the mirroring.
        on_corrupt: what to do about an image that cannot be decoded.
    """

    def __init__(
        self,
        images: IndexedFiles | NpzImages,
        rows: np.ndarray,
        *,
        labelled: bool,
        flip: bool,
        seed: int,
        on_corrupt: OnCorrupt,
    ) -> None:
        super().__init__(flip=flip, seed=seed, on_corrupt=on_corrupt)
        self.images, self.rows, self.labelled = images, rows, labelled

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)

    def path(self, index: int) -> Path:
        """The file that holds image `index`."""
        return self.images.path(int(self.rows[index]))

    def read(self, index: int) -> Tensor:
        """Image `index` itself: uint8 of shape (C, H, W)."""
        return self.images.image(int(self.rows[index]))

    def peers(self, index: int) -> Sequence[int]:
        """The images that have the class of image `index`, whether labels are asked for or not."""
        labels = self.images.labels[self.rows]
        return np.flatnonzero(labels == labels[index]).tolist()

    def label(self, index: int) -> int:
        """The class of image `index`; `NULL_LABEL` where there are no classes."""
        return self.images.label(int(self.rows[index])) if self.labelled else NULL_LABEL

    def digest(self, index: int) -> bytes:
        """What stands for the pixels of image `index`."""
        return self.images.digest(int(self.rows[index]))


class ImageNet(ImageDataModule):
    """ImageNet, or anything in its layout, read from the disk image by image.

    Class folders are labelled in the order of their names, as torchvision, DiT and ADM do it; the list of files is kept
    in the cache folder until a class folder changes. The npz files of downsampled ImageNet (Chrabaszcz et al. 2017) have
    an order of classes of their own (their `map_clsloc.txt`): networks and samples of the two do not mix. ADM's npz
    files (`arr_0`, `arr_1`) are read too; what is not compressed stays on the disk.

    Args:
        root: the folder with `train` and perhaps `val`, each with a folder per class, or with npz files whose names
            begin with train and val, or one npz file.
        test_root: a folder of class folders, or an npz file, with the images for testing; None takes those of root or, if
            it has none, a fixed part of the training images.
        test_fraction: that part, in (0, 1).
        on_corrupt: what to do about a file that cannot be decoded, or is gone, when it is drawn: "fail" ends the run with
            its name, "skip" shows another one of its class and says so, see `LazyImages`. Empty files are found, and
            refused or named, at the start.
        verify: decode every file once at the start, in threads: so the broken ones are found before training, and the
            fingerprint is that of the pixels and not of the files' names and sizes. npz files always are read for it.
        crop: how files are scaled and cut: "adm" as ADM, DiT and SiT do it, to a square, or "fit" in one go.
        channels: 1 (grey) or 3 (RGB): what files are converted to.
        resolution: in pixels, one number or [height, width]: what files are scaled and cut to.
        num_classes: number of classes; 0 trains without labels.
        batch_size, seed, num_workers, flip, eval_batch_size: as in `ImageDataModule`; the split depends on none of them.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        *,
        root: str | None,
        test_root: str | None,
        test_fraction: float,
        crop: Crop,
        channels: int,
        resolution: int | list[int],
        num_classes: int,
        batch_size: int,
        seed: int,
        on_corrupt: OnCorrupt = "fail",
        verify: bool = False,
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
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction}: must be above 0 and below 1")
        check_crop(crop, self.size)
        check_on_corrupt(on_corrupt)
        self.on_corrupt, self.verify = on_corrupt, verify
        self.root, self.test_root, self.test_fraction, self.crop = root, test_root, test_fraction, crop
        self._opened: dict[Path, IndexedFiles | NpzImages] = {}

    def check(self) -> None:
        """See to it that both splits are there and that the first image of each can be read.

        Raises:
            ValueError: otherwise, in one line.
        """
        super().check()
        for samples in (self.train_set(), self.test_set()):
            try:
                samples.image(0)
            except ValueError as error:
                raise ValueError(f"root={self.root}: {error}") from error

    def load(self, split: Split) -> ImageDataset:
        """List the images of one split; none is read yet.

        Raises:
            ValueError: if they are missing or do not fit what is declared.
        """
        if self.root is None:
            raise ValueError(f"root=null: give {WAYS}")
        train, test = find(Path(self.root), "train"), find(Path(self.root), "val")
        if not train:
            raise ValueError(f"root={self.root}: must be {WAYS}")
        if self.test_root is not None:
            test = [Path(self.test_root)]
        images = self._open("train", train)
        rows = np.arange(len(images))
        if not test:
            order = permutation(len(images), SPLIT_SEED)
            count = min(max(1, round(len(images) * self.test_fraction)), len(images) - 1)
            rows = np.sort(order[:count] if split == "test" else order[count:])
        elif split == "test":
            images = self._open("test", test)
            rows = np.arange(len(images))
        if not len(rows):
            raise ValueError(f"root={self.root}: one image is not enough for two splits")
        flip = self.flip and split == "train"
        labelled = self.num_classes > 0
        return Chosen(images, rows, labelled=labelled, flip=flip, seed=self.seed, on_corrupt=self.on_corrupt)

    @property
    def knows_pixels(self) -> bool:
        """Whether the fingerprints are of the pixels: those of npz files are, those of folders with `verify` only."""
        return not any(isinstance(i, IndexedFiles) and i.digests is None for i in self._opened.values())

    def record(self) -> dict[str, Any] | None:
        """The class folders' files, with their sizes or the hashes of their pixels; those of npz files have none."""
        self.test_set()  # which opens the training images first; it may be a part of them
        files = {s: i for s, i in zip(("train", "test"), self._opened.values()) if isinstance(i, IndexedFiles)}  # noqa: B905
        return {split: images.record() for split, images in files.items()} or None

    def _open(self, split: Split, paths: list[Path]) -> IndexedFiles | NpzImages:
        """The images of a folder of class folders, or of npz files."""
        if paths[0] not in self._opened:
            try:
                images = self._files(split, paths[0]) if paths[0].is_dir() else self._npz(paths)
            except (ValueError, OSError) as error:
                key = "test_root" if split == "test" and self.test_root is not None else "root"
                raise ValueError(f"{key}={getattr(self, key)}: {error}") from error
            self._opened[paths[0]] = images
        return self._opened[paths[0]]

    def _npz(self, paths: list[Path]) -> NpzImages:
        return NpzImages(paths, channels=self.channels, size=self.size, num_classes=self.num_classes)

    def _files(self, split: Split, folder: Path) -> IndexedFiles:
        return IndexedFiles(
            folder,
            self._classes(folder),
            cache=cache_folder(),
            channels=self.channels,
            size=self.size,
            crop=self.crop,
            on_corrupt=self.on_corrupt,
            verify=self.verify,
            recorded=self.recorded.get(split),
        )

    def _classes(self, folder: Path) -> list[str]:
        """The class folders in a folder."""
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes or self.num_classes not in (0, len(classes)):
            raise ValueError(f"{folder} has {len(classes)} class folders, not num_classes={self.num_classes}")
        for other, images in self._opened.items():
            if isinstance(images, IndexedFiles) and images.classes != classes:
                raise ValueError(f"{folder} must have the same class folders as {other}")
        return classes


def find(root: Path, name: str) -> list[Path]:
    """The folder of that name in root, or the npz files that begin with it; an npz file by itself is all of train."""
    if root.suffix == ".npz":
        return [root] if name == "train" else []
    if (root / name).is_dir():
        return [root / name]
    return sorted(root.glob(f"{name}*.npz"), key=lambda path: (len(path.name), path.name))  # 10 comes after 9
