"""CIFAR-10 (Krizhevsky 2009): 60,000 RGB images of 32x32 in 10 classes, as Python batches or as EDM's ZIP."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoiselab.data.datamodule import ImageDataModule, Split
from denoiselab.data.dataset import InMemoryImages

FOLDER = "cifar-10-batches-py"
FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
COUNTS = {"train": 50_000, "test": 10_000}
PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
WAYS = f"unpack cifar-10-python.tar.gz of {PAGE} there, or set download=true; or give EDM's cifar10-32x32.zip as root"


class Cifar10(ImageDataModule):
    """CIFAR-10: channels 3, resolution 32, 10 classes, 50,000 training and 10,000 test images.

    Args:
        root: the folder that holds torchvision's `cifar-10-batches-py` (or that folder itself), or the ZIP that EDM's
            dataset_tool.py makes, which holds the training images only.
        test_root: where the test images are, in either form; None takes them from root, which a ZIP lacks.
        download: let torchvision download into `root` what is not there.
        channels: 3.
        resolution: 32.
        num_classes: 10, or 0 to train without labels.
        batch_size, seed, num_workers, flip, eval_batch_size: as in `ImageDataModule`.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        *,
        root: str | None,
        test_root: str | None,
        download: bool,
        channels: int,
        resolution: int | list[int],
        num_classes: int,
        batch_size: int,
        seed: int,
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
        if download and (root is None or _is_zip(root)):
            raise ValueError(f"root={root or 'null'}: with download=true, give the folder to download into")
        self.root, self.test_root, self.download = root, test_root, download

    def check(self) -> None:
        """See to it that the files are there, unless they are to be downloaded, and fit what is declared.

        Raises:
            ValueError: otherwise, in one line.
        """
        if self._is_to_be_downloaded():
            self._expect_shape()
        else:
            super().check()

    def prepare_data(self) -> None:
        """Download what is missing, if so configured; Lightning calls this once per machine.

        Raises:
            ValueError: if the download fails.
        """
        if not self._is_to_be_downloaded():
            return
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import download_and_extract_archive

        try:
            download_and_extract_archive(CIFAR10.url, str(self.root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"download=true: torchvision could not download CIFAR-10 ({reason}); without a network, unpack "
                f"cifar-10-python.tar.gz of {PAGE} into root={self.root} and set download=false"
            ) from error

    def load(self, split: Split) -> InMemoryImages:
        """Read one split.

        Raises:
            ValueError: if the files are missing, broken or not of the declared shape.
        """
        self._expect_shape()
        self.prepare_data()
        key, root = ("root", self.root) if split == "train" or self.test_root is None else ("test_root", self.test_root)
        if root is None:
            raise ValueError(f"root=null: give the folder that holds {FOLDER}: {WAYS}")
        if _is_zip(root):
            if split == "test" and key == "root":
                raise ValueError(
                    f"test_root=null: root={root} holds the training images only; give the folder that holds {FOLDER}"
                )
            images, labels = _read(key, root, Path(root), lambda path: read_zip(path, labelled=self.num_classes > 0))
        else:
            folder = _folder(root)
            if folder is None:
                raise ValueError(f"{key}={root}: holds no {FOLDER}: {WAYS}")
            parts = [_read(key, root, folder / name, read_batch) for name in FILES[split]]
            images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if len(images) != COUNTS[split]:
            raise ValueError(f"{key}={root}: holds {len(images):,} {split} images, not {COUNTS[split]:,}")
        return self._in_memory(split, images, labels)

    def _is_to_be_downloaded(self) -> bool:
        return self.download and _folder(str(self.root)) is None

    def _expect_shape(self) -> None:
        self._expect("the CIFAR-10 images", channels=3, size=(32, 32), num_classes=10)


def _is_zip(root: str) -> bool:
    return root.lower().endswith(".zip")


def _folder(root: str) -> Path | None:
    """Where the batches lie; None if they are not there."""
    candidates = [Path(root, FOLDER), Path(root)]
    names = (*FILES["train"], *FILES["test"])
    return next((f for f in candidates if all((f / name).is_file() for name in names)), None)


def _read(key: str, root: str, path: Path, reader: Callable[[Path], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What the reader finds in a file of root.

    Raises:
        ValueError: in one line, if it is missing, broken or of something else.
    """
    try:
        images, labels = reader(path)
    except Exception as error:  # foreign bytes make pickle, zipfile, json and Pillow raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{key}={root}: cannot read {path.name} ({reason})") from error
    fits = images.shape[1:] == (3, 32, 32) and labels.shape == images.shape[:1] and labels.dtype == torch.int64
    if not (fits and bool(((labels >= 0) & (labels < 10)).all())):
        raise ValueError(
            f"{key}={root}: {path.name} holds images {list(images.shape)} and labels {list(labels.shape)}, "
            "not N images of 3x32x32 with N labels below 10"
        )
    return images, labels


class _Kind:
    """Stands for numpy's dtype, whose state could turn bytes into pointers: here a plain type, whatever the state says."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        name = code.decode() if isinstance(code, bytes) else code
        if name not in ("u1", "i1", "i2", "i4", "i8"):
            raise pickle.UnpicklingError(f"it holds an array of {name}, not of uint8 or integers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for numpy's array, and for the function that makes one: bytes of a `_Kind`, in as many numbers as there are."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Kind) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("it holds an array that is not made of bytes")
        self.values = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C").copy()


class _ArraysOnly(pickle._Unpickler):
    """Unpickles plain data and numpy's arrays; any other class or function, which could do anything, is refused.

    It is the one in Python, whose memo grows with what is put into it: the other makes room for the largest number named.
    """

    dispatch: ClassVar = {op: load for op, load in pickle._Unpickler.dispatch.items() if op != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Array if name == "ndarray" else _Kind
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 needs")


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """The images, uint8 of shape (N, 3, 32, 32), and labels, int64 of shape (N,), of one of the Python batches.

    Raises:
        Exception: of many kinds, if the file is not such a batch; nothing in it is run.
    """
    with path.open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()  # written by Python 2: text is bytes
    pixels, labels = (_values(batch[name]) for name in (b"data", b"labels"))
    if pixels.dtype != np.uint8 or labels.dtype.kind not in "iu":
        raise ValueError(f"its pixels are {pixels.dtype} and its labels {labels.dtype}, not uint8 and integers")
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64))


def _values(found: Any) -> np.ndarray:
    """Of an array, or of a list of whole numbers: of lists in lists a short file could hold more than there is room for."""
    if isinstance(found, _Array):
        return found.values
    if not isinstance(found, list) or not all(type(number) is int for number in found):
        raise ValueError("it holds something else than lists of whole numbers and arrays")
    return np.array(found)


def read_zip(path: Path, *, labelled: bool) -> tuple[Tensor, Tensor]:
    """The images, uint8 of shape (N, 3, H, W), and labels, int64 of shape (N,), of a ZIP of EDM's dataset_tool.py.

    Args:
        path: of a ZIP with PNG files, taken in the order of their names, and with `dataset.json`, which pairs each name
            with its label.
        labelled: whether labels are asked for; else they are all 0.

    Raises:
        Exception: of many kinds, if the file is not such a ZIP.
    """
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith(".png"))
        if not names:
            raise ValueError("it holds no PNG files")
        images = [_pixels(archive, name) for name in names]
        pairs = json.loads(archive.read("dataset.json"))["labels"] if labelled else [(name, 0) for name in names]
    if pairs is None:
        raise ValueError("it has no labels; num_classes=0 trains without")
    labels = dict(pairs)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor([labels[n] for n in names])


def _pixels(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file, Image.open(file, formats=["PNG"]) as image:
        if image.mode != "RGB" or image.size != (32, 32):  # seen before it is decoded
            raise ValueError(f"{name} is {image.mode} of {image.width}x{image.height}, not RGB of 32x32")
        return np.asarray(image)
