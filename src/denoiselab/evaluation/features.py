"""Feature extractors: uint8 images in, features out, with a name and a hash for the protocol."""

from __future__ import annotations

import hashlib
import pickle
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from denoiselab.condition import height_width

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"  # the published file carries the first digits of its SHA-256 in its name


class Features(NamedTuple):
    """What an extractor finds in N images.

    Args:
        features: float32 of shape (N, D).
        logits: float32 of shape (N, K); None if it gives none.
    """

    features: Tensor
    logits: Tensor | None


class Extractor(ABC):
    """A feature extractor: light to build, its weights are read at the first use.

    It holds a module but is none, so it never enters a state_dict or a checkpoint.

    Attributes:
        name: of the extractor, for the protocol.
        resize: what is done to the images before the network sees them, for the protocol.
        num_classes: of its logits; None where it has none that are meant to be read.
        weights: path of the weights file.
    """

    name: str
    resize: str
    num_classes: int | None
    weights: Path

    @property
    @abstractmethod
    def prefix(self) -> str:
        """The first part of a distance's name; "fid" for the published Inception weights alone."""

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
        """The network: uint8 images of shape (N, C, H, W) to a tuple of features and, where read, logits."""

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
        """Features of images, in float32 whatever the precision around the call.

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
        with torch.autocast(self._device.type, enabled=False):
            batches = [self._network(batch.to(self._device)) for batch in images.split(batch_size)]
        found = [torch.cat([part.float().cpu() for part in parts]) for parts in zip(*batches, strict=True)]
        return Features(found[0], found[1] if len(found) > 1 else None)


class DigitsExtractor(Extractor):
    """The penultimate features (64) and the logits (10) of the digits classifier, for 8x8 grey images.

    Args:
        weights: a file written by `scripts/make_digits_classifier.py`; None takes the one that is shipped.
    """

    name = "digits"
    resize = "none (8x8)"
    num_classes = 10
    prefix = "fd_digits"

    def __init__(self, *, weights: str | None = None) -> None:
        super().__init__()
        shipped = Path(__file__).parent / "assets" / "digits_classifier.safetensors"
        self.weights = Path(weights) if weights is not None else shipped

    def check(self, *, channels: int, resolution: int | list[int]) -> None:
        """See `Extractor.check`."""
        if channels != 1:
            raise ValueError(f"channels={channels}: the digits extractor takes grey images, 1")
        if height_width(resolution) != (8, 8):
            raise ValueError(f"resolution={resolution}: the digits extractor takes 8")
        if not self.weights.is_file():
            raise ValueError(f"weights={self.weights}: no such file; null takes the one that comes with denoiselab")

    def _build(self) -> nn.Module:
        from denoiselab.evaluation.digits_classifier import NAME, DigitsFeatureExtractor

        return DigitsFeatureExtractor(NAME, ["penultimate", "logits"], str(self.weights))


class InceptionExtractor(Extractor):
    """The features of FID: Inception-v3's last pooling (2048), through torch-fidelity, for RGB or grey.

    Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium",
    section 3; the published weights are those of the TensorFlow graph of 2015-12-05.

    Args:
        weights: a state dict for torch-fidelity's Inception; None looks in torch.hub's cache, where
            torch-fidelity itself would put the published file.
        allow_other_weights: whether a file other than the published one is accepted; its distances are then
            called `fd_inception_other`, never FID.
    """

    name = "inception-v3-compat"
    resize = "bilinear to 299x299 as in TensorFlow 1 (torch-fidelity), no antialiasing"
    num_classes = None  # its logits are ImageNet's

    def __init__(self, *, weights: str | None = None, allow_other_weights: bool = False) -> None:
        super().__init__()
        cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        self.weights = Path(weights) if weights is not None else cached
        self.allow_other_weights = allow_other_weights

    @property
    def published(self) -> bool:
        """Whether the weights are the published ones."""
        return self.weights_sha256.startswith(INCEPTION_SHA256)

    @property
    def prefix(self) -> str:
        """The first part of a distance's name: "fid" for the published weights, else "fd_inception_other"."""
        return "fid" if self.published else "fd_inception_other"

    def check(self, *, channels: int, resolution: int | list[int]) -> None:
        """See `Extractor.check`."""
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: Inception takes grey or RGB images, 1 or 3")
        height_width(resolution)
        self._check_weights()

    def _check_weights(self) -> None:
        if not self.weights.is_file():
            raise ValueError(
                f"weights={self.weights}: no such file; fetch {INCEPTION_URL} and put it there, "
                "or give the path of your copy"
            )
        if self.published:
            return
        if not self.allow_other_weights:
            raise ValueError(
                f"weights={self.weights}: SHA-256 must begin with {INCEPTION_SHA256}, the published file's, "
                f"not {self.weights_sha256[:8]} (allow_other_weights=true takes it, but not as FID)"
            )
        try:  # torch-fidelity would unpickle whatever the file holds
            torch.load(self.weights, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"weights={self.weights}: must be a state dict of plain tensors") from error

    def _build(self) -> nn.Module:
        from torch_fidelity import FeatureExtractorInceptionV3

        self._check_weights()
        return _FromGrey(FeatureExtractorInceptionV3(self.name, ["2048"], str(self.weights)))


class _FromGrey(nn.Module):
    """An RGB network that takes grey images too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
