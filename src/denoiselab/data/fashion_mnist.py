"""Fashion-MNIST (Xiao et al. 2017): 70,000 grey images of 28x28 in 10 classes, as IDX files."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from denoiselab.data.datamodule import ImageDataModule, Split
from denoiselab.data.dataset import InMemoryImages

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


class FashionMnist(ImageDataModule):
    """Fashion-MNIST: channels 1, resolution 28, 10 classes, 60,000 training and 10,000 test images.

    Args:
        root: a folder with the four IDX files, plain or gzipped, or torchvision's folder
            (`root/FashionMNIST/raw`); None looks where Debian's package dataset-fashion-mnist puts them.
        download: let torchvision download into `root` what is not there.
        channels: 1.
        resolution: 28.
        num_classes: 10, or 0 to train without labels.
        batch_size, seed, num_workers, flip, eval_batch_size: as in `ImageDataModule`.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        *,
        root: str | None,
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
        if download and root is None:
            raise ValueError("root=null: with download=true, give the folder to download into")
        self.root, self.download = root, download

    def folder(self) -> Path | None:
        """Where the four files lie; None if they are not there."""
        root = None if self.root is None else Path(self.root)
        candidates = [DEBIAN_FOLDER] if root is None else [root / "FashionMNIST" / "raw", root]
        return next((f for f in candidates if all(_find(f, name) for name in FILES)), None)

    def check(self) -> None:
        """See to it that the files are there, unless they are to be downloaded, and fit what is declared.

        Raises:
            ValueError: otherwise, in one line.
        """
        if self.download and self.folder() is None:
            self._expect_shape()
        else:
            super().check()

    def prepare_data(self) -> None:
        """Download what is missing, if so configured; Lightning calls this once per machine.

        Raises:
            ValueError: if the download fails.
        """
        if not self.download or self.folder() is not None:
            return
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(str(self.root), download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"download=true: torchvision could not download Fashion-MNIST ({reason}); without a network, "
                "install Debian's package dataset-fashion-mnist and set root=null, download=false"
            ) from error

    def load(self, split: Split) -> InMemoryImages:
        """Read one split.

        Raises:
            ValueError: if the files are missing, broken or not of the declared shape.
        """
        from torchvision.datasets.mnist import read_image_file, read_label_file

        self._expect_shape()
        self.prepare_data()
        folder = self.folder()
        if folder is None:
            raise ValueError(
                f"root={self.root or 'null'}: the Fashion-MNIST files are not there; install Debian's "
                "package dataset-fashion-mnist and leave root=null, or give a folder and download=true"
            )
        part = "train" if split == "train" else "t10k"
        images = _read(folder, f"{part}-images-idx3-ubyte", read_image_file)
        labels = _read(folder, f"{part}-labels-idx1-ubyte", read_label_file)
        if not (len(images) == len(labels) > 0 and images.shape[1:] == (28, 28) and int(labels.max()) < 10):
            raise ValueError(
                f"root={folder}: the {part} files hold images {list(images.shape)} and labels "
                f"{list(labels.shape)}, not N images of 28x28 with N labels below 10"
            )
        return self._in_memory(split, images.unsqueeze(1), labels)

    def _expect_shape(self) -> None:
        self._expect("the Fashion-MNIST images", channels=1, size=(28, 28), num_classes=10)


def _find(folder: Path, name: str) -> Path | None:
    """The file of that name, plain or gzipped."""
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _read(folder: Path, name: str, reader: Callable[[str], Tensor]) -> Tensor:
    """What torchvision's reader finds in the file; a gzipped file is unpacked aside first."""
    path = _find(folder, name)
    assert path is not None
    try:
        if path.suffix != ".gz":
            return reader(str(path))
        with tempfile.NamedTemporaryFile() as plain, gzip.open(path) as packed:
            shutil.copyfileobj(packed, plain)
            plain.flush()
            return reader(plain.name)
    except Exception as error:  # torchvision asserts, gzip and torch have errors of their own: all mean a broken file
        reason = " ".join(str(error).split())
        raise ValueError(f"root={folder}: cannot read {path.name} ({reason or type(error).__name__})") from error
