"""Feature extractors: uint8 images in, features out, with a name and a hash for the protocol."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """What an extractor finds in N images.

    Args:
        features: float32 of shape (N, D).
        logits: float32 of shape (N, K); None if it gives none.
        spatial: features that know where things are, of sFID, float32 of shape (N, S); None if it gives none.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {field.name: part for field in fields(self) if (part := getattr(self, field.name)) is not None}

    @staticmethod
    def joined(batches: Sequence[Features]) -> Features:
        """The images of all batches, in order."""
        return Features(**{name: torch.cat([b.tensors()[name] for b in batches]) for name in batches[0].tensors()})


@dataclass(frozen=True)
class FeatureSet:
    """Images as the measures see them: what an extractor found in them, and their classes.

    Args:
        features: float32 of shape (N, D).
        labels: the classes that were asked for, or the true ones, int64 of shape (N,); -1 is none.
        logits: float32 of shape (N, K), or None.
        spatial: float32 of shape (N, S), or None.
        classes: how many classes the logits are of, where these are the labels' classes; else None.
    """

    features: Tensor
    labels: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None
    classes: int | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def take(self, which: slice | Tensor) -> FeatureSet:
        """Some of the images."""
        logits, spatial = (None if part is None else part[which] for part in (self.logits, self.spatial))
        return FeatureSet(self.features[which], self.labels[which], logits, spatial, self.classes)


class Extractor(ABC):
    """A feature extractor: light to build, its weights are read at the first use.

    It holds a module but is none, so it never enters a state_dict or a checkpoint.

    Attributes:
        name: of the extractor, for the protocol.
        resize: what is done to the images before the network sees them, for the protocol.
        num_classes: of its logits; None where it has none that are meant to be read.
        weights: path of the weights file.
        spatial: whether it gives the features of sFID too.
    """

    name: str
    resize: str
    num_classes: int | None
    weights: Path
    spatial: bool = False

    @property
    @abstractmethod
    def label(self) -> str:
        """What marks every number's name: "" for the published Inception weights alone, else for example "digits"."""

    @abstractmethod
    def check(self, *, channels: int, resolution: int | list[int]) -> None:
        """See to it that the weights are there and right, and that such images are accepted.

        Args:
            channels: of the images.
            resolution: of the images, one number or [height, width].

        Raises:
            ValueError: otherwise, in one line.
        """

    @abstractmethod
    def _build(self) -> nn.Module:
        """The network: uint8 images of shape (N, C, H, W) to Features."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")

    @cached_property
    def _network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read: keep that to itself
            return self._build().eval().requires_grad_(False).to(self._device)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 (hex) of the weights file."""
        with self.weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over the weights file and the preprocessing: equal hashes give equal features."""
        return hashlib.sha256(f"{self.name} {self.weights_sha256} {self.resize}".encode()).hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """Compute on another device from now on."""
        self._device = torch.device(device)
        if "_network" in self.__dict__:  # built already
            self._network.to(self._device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 250) -> Features:
        """Features of images, in float32 whatever the precision around the call, TF32 included.

        Args:
            images: uint8 of shape (N, C, H, W), N at least 1, on any device.
            batch_size: images per pass.

        Returns:
            Features on the CPU.

        Raises:
            ValueError: if the images are not uint8 of shape (N, C, H, W).
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(f"images={images.dtype} of shape {tuple(images.shape)}: must be uint8, (N, C, H, W)")
        found: list[Features] = []
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.autocast(self._device.type, enabled=False), exact, _exact_products():
            for batch in images.split(batch_size):
                # Grey images from files have the strides of channels-last, whose convolutions round differently.
                batch = batch.flatten().view(batch.shape)
                parts: dict[str, Tensor] = self._network(batch.to(self._device)).tensors()
                found.append(Features(**{name: part.float().cpu() for name, part in parts.items()}))
        joined = Features.joined(found)
        if not all(part.isfinite().all() for part in joined.tensors().values()):
            raise ValueError(f"extractor={self.name}: its features are not finite")
        return joined


@contextmanager
def _exact_products() -> Iterator[None]:
    """Matrix products in full float32, whatever precision training asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
