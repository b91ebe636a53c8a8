"""What every datamodule of images shares: the declared shape of the data, the loaders and the fingerprint."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from denoiselab.condition import height_width
from denoiselab.data.dataset import ImageDataset, InMemoryImages
from denoiselab.data.order import GlobalBatchSampler, micro_batch_size
from denoiselab.data.recorded import Recorded, read_recorded

Split = Literal["train", "test"]


def ignore_signals(worker_id: int) -> None:
    """Leave Ctrl-C and a batch system's signals, which reach every process, to the one that trains.

    SIGTERM is obeyed from that one alone: it is how a loader that closes ends a worker which hangs.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    waits = hasattr(signal, "sigwaitinfo")  # macOS has none
    signal.pthread_sigmask(signal.SIG_BLOCK if waits else signal.SIG_UNBLOCK, {signal.SIGTERM})
    if waits:
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler does it: another code would be reported as a crash


class _Loader(DataLoader[dict[str, Any]]):
    """A loader whose workers begin with these signals blocked: `ignore_signals` may come seconds after a worker's start."""

    def __iter__(self) -> Any:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class ImageDataModule(lightning.LightningDataModule):
    """Images of one declared shape, in a train and a test split.

    A subclass implements `load`. The batches are dicts of plain tensors: image (uint8, shape (B, C, H, W)),
    label (int64, shape (B,), -1 without classes), index, step, place and stand_in (int64, shape (B,)); see
    `ImageDataset`. The Trainer needs `use_distributed_sampler=False`, since the loaders share the samples out themselves.

    Args:
        channels: 1 (grey) or 3 (RGB).
        resolution: of the images in pixels, one number or [height, width].
        num_classes: number of classes; 0 trains without labels.
        batch_size: samples per optimizer step, over all ranks and accumulated micro-batches.
        seed: keys the order and the mirroring of the training samples, at least 0.
        num_workers: processes that load data, per rank; 0 loads in the process that trains.
        flip: whether training samples are mirrored left to right with probability 1/2.
        eval_batch_size: samples per batch and rank of the test split.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        *,
        channels: int,
        resolution: int | list[int],
        num_classes: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        flip: bool = False,
        eval_batch_size: int = 500,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: must be 1 (grey) or 3 (RGB)")
        for key, value, minimum in (
            ("num_classes", num_classes, 0),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            if value < minimum:
                raise ValueError(f"{key}={value}: must be at least {minimum}")
        self.size = height_width(resolution)
        self.channels, self.resolution, self.num_classes = channels, resolution, num_classes
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers, self.flip = seed, num_workers, flip
        self.recorded: dict[str, Recorded] = {}
        self._sets: dict[str, ImageDataset] = {}
        self._fingerprints: dict[str, str] = {}

    def load(self, split: Split) -> ImageDataset:
        """Read one split.

        Raises:
            ValueError: if its files are missing or do not fit the declared shape.
        """
        raise NotImplementedError

    def record(self) -> dict[str, Any] | None:
        """Which files the set is made of, as plain data for `recall`; None where no file of it can break by itself."""
        return None

    def recall(self, record: Any) -> None:
        """Take the set for what it was when a run began; to be called before anything is read.

        With `on_corrupt="skip"`, files that have broken or vanished since then stay in it, with what was known of them, and
        others stand in; files that were left out stay out. A set that has changed otherwise is taken as it is now.

        Args:
            record: of `record`.

        Raises:
            ValueError: if it is none.
        """
        if not isinstance(record, dict):
            raise ValueError("must hold the sets of a run")
        self.recorded = {split: read_recorded(node) for split, node in record.items()}

    def check(self) -> None:
        """See to it that the data is there and fits what is declared; creates nothing, keeps what it reads.

        Raises:
            ValueError: otherwise, in one line.
        """
        self.train_set()
        self.test_set()

    def check_batch(self, world_size: int, accumulate: int) -> None:
        """See to it that `batch_size` divides over so many ranks and accumulated micro-batches.

        Raises:
            ValueError: if it does not.
        """
        micro_batch_size(self.batch_size, world_size, accumulate)

    def train_set(self) -> ImageDataset:
        """The training samples, the same on every rank."""
        return self._set("train")

    def test_set(self) -> ImageDataset:
        """The test samples, the same on every rank."""
        return self._set("test")

    def _set(self, split: Split) -> ImageDataset:
        if split not in self._sets:
            self._sets[split] = self.load(split)
        return self._sets[split]

    @property
    def knows_pixels(self) -> bool:
        """Whether the fingerprints are of the pixels; else of files' names and sizes alone."""
        return True

    def fingerprint(self, split: Split) -> str:
        """SHA-256 (hex) over the pixels, shape and labels of a split as they reach a network, unmirrored.

        What stands for the pixels of an image is its `digest`, which `IndexedFiles` makes of less unless told to verify.
        """
        if split not in self._fingerprints:
            samples = self._set(split)
            total = hashlib.sha256(f"{len(samples)} {self.channels} {self.size}".encode())
            for index in range(len(samples)):
                total.update(samples.digest(index) + samples.label(index).to_bytes(4, "big", signed=True))
            self._fingerprints[split] = total.hexdigest()
        return self._fingerprints[split]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This rank's micro-batches from the trainer's global step on, without end.

        Raises:
            ValueError: if `batch_size` does not divide, or if the trainer would cut training into epochs,
                each of which would draw the same samples again.
        """
        trainer = self.trainer
        if trainer is not None and isinstance(trainer.limit_train_batches, int) and trainer.max_epochs != 1:
            limit = trainer.limit_train_batches
            raise ValueError(f"limit_train_batches={limit}: training is one endless epoch, set max_steps")
        samples = self.train_set()
        sampler = GlobalBatchSampler(
            size=len(samples),
            batch_size=self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            start_step=trainer.global_step if trainer else 0,
        )
        return self._loader(samples, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The test split in order, rank r taking the samples r, r + world_size, ...

        Nothing is padded or repeated, so ranks may differ in their number of samples and of batches: reduce
            sums and
        counts over the ranks, at the end of the loop.
        """
        samples, trainer = self.test_set(), self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        share = range(rank, len(samples), world_size)
        return self._loader(samples, sampler=share, batch_size=self.eval_batch_size)

    def _loader(self, samples: ImageDataset, **how: Any) -> DataLoader[dict[str, Any]]:
        return _Loader(
            samples,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=ignore_signals,
            # in a rank that was spawned, workers would be spawned too, and each would import everything again
            multiprocessing_context="fork" if self.num_workers > 0 and sys.platform == "linux" else None,
            # a loader draws its workers' seed when iteration begins: not from the global generator
            generator=torch.Generator().manual_seed(self.seed),
            **how,
        )

    def _in_memory(self, split: Split, images: Tensor, labels: Tensor) -> InMemoryImages:
        """A split held in memory: labelled if classes are declared, mirrored in training if asked for."""
        return InMemoryImages(
            images, labels if self.num_classes else None, flip=self.flip and split == "train", seed=self.seed
        )

    def _expect(self, what: str, *, channels: int, size: tuple[int, int], num_classes: int) -> None:
        """Raise a ValueError unless the declared shape is that of `what`; num_classes=0 always fits."""
        if self.channels != channels:
            raise ValueError(f"channels={self.channels}: {what} have {channels}")
        if self.size != size:
            raise ValueError(f"resolution={self.resolution}: {what} are {size[0]}x{size[1]}")
        if self.num_classes not in (0, num_classes):
            raise ValueError(f"num_classes={self.num_classes}: {what} have {num_classes} (0 trains without labels)")


@contextmanager
def naming_workers() -> Iterator[None]:
    """Inside, a worker that was killed is named as the cause, also where a connection to it breaks before that is seen.

    Raises:
        RuntimeError: then.
    """
    try:
        yield
    except (ConnectionError, EOFError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.filename.endswith(os.path.join("torch", "utils", "data", "dataloader.py")) for frame in frames):
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"a DataLoader worker has ended without a word (killed?): {what}") from error
        raise
