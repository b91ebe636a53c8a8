"""Extractors whose weights are published: local files, held to the published hash, never fetched while a run runs."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from denoiselab.condition import height_width
from denoiselab.evaluation.features import Extractor, Features
from denoiselab.runs.weights import load_weights

TENSORFLOW_RESIZE = "bilinear to {0}x{0} as in TensorFlow 1 (torch-fidelity), no antialiasing"


class Download(NamedTuple):
    """Something that can be fetched.

    Args:
        url: from where.
        path: to where; for a ZIP, the folder that it is unpacked into.
        sha256: the first hex digits of the file's SHA-256, or all of them; None if there is nothing to hold it to.
    """

    url: str
    path: Path
    sha256: str | None


class Published(Extractor):
    """An extractor of RGB or grey images whose weights are a published file.

    Args:
        weights: the file; None looks for `file` in torch.hub's cache.
        allow_other_weights: whether a file other than the published one is accepted, which marks every number.
        url: of the published file.
        file: its name in the cache.
        sha256: the first hex digits of its SHA-256, or all of them; None if none is known.
    """

    num_classes = None  # logits, where there are any, are of other classes than the data's
    published_label: str
    family: str

    def __init__(
        self, *, weights: str | None, allow_other_weights: bool, url: str, file: str, sha256: str | None
    ) -> None:
        super().__init__()
        self.weights = Path(weights) if weights is not None else Path(torch.hub.get_dir(), "checkpoints", file)
        self.allow_other_weights, self.url, self.sha256 = allow_other_weights, url, sha256

    @abstractmethod
    def _load(self) -> nn.Module:
        """torch-fidelity's network with the weights: RGB images to a tuple of features and perhaps logits."""

    @property
    def published(self) -> bool:
        """Whether the weights are the published ones."""
        return self.sha256 is not None and self.weights_sha256.startswith(self.sha256)

    @property
    def label(self) -> str:
        """See `Extractor.label`."""
        return self.published_label if self.published else f"{self.family}_unpublished_{self.weights_sha256[:8]}"

    def downloads(self) -> list[Download]:
        """What the extractor needs, for `denoiselab-prefetch`."""
        return [Download(self.url, self.weights, self.sha256)]

    def check(self, *, channels: int, resolution: int | list[int]) -> None:
        """See `Extractor.check`."""
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: the {self.name} extractor takes grey or RGB images, 1 or 3")
        height_width(resolution)
        self.check_files()
        if not self.published:
            _ = self._network  # a file of something else shows now, not after the training

    def check_files(self) -> None:
        """See to it that the files are there and are the published ones, or are taken knowingly.

        Raises:
            ValueError: otherwise, in one line with the file, where it is to be had and where to put it.
        """
        if not self.weights.is_file():
            raise ValueError(
                f"weights={self.weights}: no such file; denoiselab-prefetch fetches it, or fetch {self.url} and put it "
                "there, or give the path of your copy"
            )
        if not self.published and not self.allow_other_weights:
            expected = f"{self.sha256[:8]}, as the published file's" if self.sha256 else "what is known nowhere"
            raise ValueError(
                f"weights={self.weights}: SHA-256 must begin with {expected}, not {self.weights_sha256[:8]} "
                "(allow_other_weights=true takes this file and marks every number)"
            )

    def _read(self) -> dict[str, Tensor]:
        """The tensors in the file; nothing in it is run."""
        return load_weights(self.weights)

    def _build(self) -> nn.Module:
        self.check_files()
        try:
            self._read()  # torch-fidelity would unpickle whatever the file holds
        except Exception as error:  # torch and pickle raise many kinds
            raise ValueError(f"weights={self.weights}: must be a state dict of plain tensors") from error
        try:
            with warnings.catch_warnings():  # of torch.jit being old, and of xFormers missing
                warnings.simplefilter("ignore")
                return self._wrap(self._load())
        except Exception as error:  # what misfits raise differs
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"weights={self.weights}: not for {self.name} ({reason})") from error

    def _wrap(self, network: nn.Module) -> nn.Module:
        return TorchFidelityNetwork(network)


class TorchFidelityNetwork(nn.Module):
    """A network of torch-fidelity's that takes grey images for RGB ones and returns Features.

    Args:
        network: uint8 images to a tuple of features and perhaps logits.
        channels: that it takes.
        spatial: a module of it whose first seven channels of output are the spatial features; None for none.
    """

    def __init__(self, network: nn.Module, *, channels: int = 3, spatial: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.channels = network, channels
        self._seen: list[Tensor] = []
        if spatial is not None:
            spatial.register_forward_hook(lambda module, inputs, output: self._seen.append(output[:, :7]))

    def forward(self, images: Tensor) -> Features:
        """Features of images, uint8 of shape (N, 1 or channels, H, W)."""
        found = Features(*self.network(images.expand(-1, self.channels, -1, -1)))
        if not self._seen:
            return found
        return replace(found, spatial=self._seen.pop().permute(0, 2, 3, 1).flatten(1))  # as ADM: row, column, channel
