"""Features and statistics of the real images, kept on disk under a key that says what they were made of."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from denoiselab.evaluation.distances import Statistics, statistics
from denoiselab.evaluation.features import Extractor, Features

SCHEMA = 1  # of the cache files; part of their key
Split = Literal["train", "test"]
log = logging.getLogger(__name__)


class Images(Protocol):
    """Labelled images, one split of a data set."""

    def __len__(self) -> int:
        """The number of images."""

    def image(self, index: int) -> Tensor:
        """Image `index`: uint8 of shape (C, H, W)."""

    def label(self, index: int) -> int:
        """Its class, -1 where there are none."""


class Data(Protocol):
    """A data set as evaluation sees it: datamodules are of this kind."""

    num_classes: int

    def train_set(self) -> Images:
        """The training images."""

    def test_set(self) -> Images:
        """The test images."""

    def fingerprint(self, split: Split) -> str:
        """A hash of the pixels and labels of a split."""


@dataclass(frozen=True)
class Reference:
    """What an extractor finds in one split.

    Args:
        features: float32, shape (N, D).
        logits: float32, shape (N, K); None if the extractor gives none.
        labels: int64, shape (N,); -1 where there are no classes.
        statistics: mean and covariance of the features.
    """

    features: Tensor
    logits: Tensor | None
    labels: Tensor
    statistics: Statistics


def cache_folder() -> Path:
    """Where references are kept unless told otherwise: DENOISELAB_CACHE, or ~/.cache/denoiselab."""
    return Path(os.environ.get("DENOISELAB_CACHE") or Path.home() / ".cache" / "denoiselab")


def cache_key(fingerprint: str, extractor_hash: str, split: Split) -> str:
    """The name of a reference: SHA-256 (hex) over all that it depends on."""
    return hashlib.sha256(f"{SCHEMA} {split} {fingerprint} {extractor_hash}".encode()).hexdigest()


def reference(
    data: Data, split: Split, extractor: Extractor, *, cache: Path | None = None, batch_size: int = 250
) -> Reference:
    """The reference of a split, from the cache or computed and put there.

    A damaged file is computed again, with a warning; a folder that cannot be written to costs a warning too.

    Args:
        data: the data set.
        split: "train" or "test", at least 2 images.
        extractor: what to compute features with.
        cache: folder; None takes `cache_folder()`.
        batch_size: images per pass of the extractor.
    """
    path = (cache or cache_folder()) / f"{cache_key(data.fingerprint(split), extractor.hash, split)}.safetensors"
    if path.exists():
        try:
            return _unpack(_read(path))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            log.warning("the reference statistics in %s are damaged (%s): computed again", path, error)
    tensors = _compute(data.train_set() if split == "train" else data.test_set(), extractor, batch_size)
    try:
        _write(tensors, path)
    except (SafetensorError, OSError) as error:
        log.warning("the reference statistics were not kept: %s", error)
    return _unpack(tensors)


def _compute(images: Images, extractor: Extractor, batch_size: int) -> dict[str, Tensor]:
    found: list[Features] = []
    for start in range(0, len(images), batch_size):
        batch = [images.image(i) for i in range(start, min(start + batch_size, len(images)))]
        found.append(extractor(torch.stack(batch), batch_size))
    tensors = {
        "features": torch.cat([f.features for f in found]),
        "labels": torch.tensor([images.label(i) for i in range(len(images))]),
    }
    logits = [f.logits for f in found if f.logits is not None]
    if logits:
        tensors["logits"] = torch.cat(logits)
    mean, covariance = statistics(tensors["features"])
    return tensors | {"mean": torch.from_numpy(mean), "covariance": torch.from_numpy(covariance)}


def _unpack(tensors: dict[str, Tensor]) -> Reference:
    return Reference(
        features=tensors["features"],
        logits=tensors.get("logits"),
        labels=tensors["labels"],
        statistics=Statistics(tensors["mean"].numpy(), tensors["covariance"].numpy()),
    )


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].numpy().data)
    return total.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (file.metadata() or {}).get("sha256") != _checksum(tensors):
            raise ValueError("wrong checksum")
    return tensors


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Several processes may do this at once: each writes its own file, and the last rename stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, temporary, metadata={"sha256": _checksum(tensors)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
