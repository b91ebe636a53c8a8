"""What a study is given and what it hands back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.data.datamodule import ImageDataModule
from denoiselab.diffusion.denoiser import Denoiser
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.samplers import Sampler
from denoiselab.evaluation.generate import balanced_labels, generate
from denoiselab.reports.studies.claims import Claim

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Codec(Protocol):
    """Both halves of a codec."""

    def encode(self, images: Tensor, noise: Any = None) -> Tensor:
        """What the network sees of uint8 images."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """The uint8 images of what the network draws."""
        ...


@dataclass(frozen=True)
class Model:
    """A trained network, to be asked and to be compared with its data.

    Args:
        denoiser: without guidance.
        sampler: the run's own.
        data: that it was trained on.
        codec: between images and what the network sees.
        shape: (C, H, W) of what the network sees.
        device: where the network is.
        knows_null: whether it was trained without labels at times, so that it can be guided.
        facts: what identifies it, plain values for the page.
    """

    denoiser: Denoiser
    sampler: Sampler
    data: ImageDataModule
    codec: Codec
    shape: tuple[int, int, int]
    device: torch.device
    knows_null: bool
    facts: dict[str, Any]

    @torch.no_grad()
    def latents(self, sampler: Sampler, *, steps: int | None, count: int, seed: int, batch_size: int) -> Tensor:
        """Samples 0 to count − 1 as the network draws them, float32 on the CPU, classes in turn.

        Args:
            sampler: without guidance.
            steps: of the sampler; None: what its own budget allows.
            count: how many samples.
            seed: of the noise.
            batch_size: samples per network call.
        """
        points = sampler.plan(self.denoiser)[0] if steps is None else sampler.points(self.denoiser.path, steps)
        labels, parts = balanced_labels(count, self.data.num_classes), list[Tensor]()
        for index in torch.arange(count).split(batch_size):
            condition = Condition(label=None if labels is None else labels[index]).to(self.device)
            noise = NoiseSource(seed=seed, index=index.to(self.device))
            parts.append(sampler.sample(self.denoiser, self.shape, condition, noise, points).float().cpu())
        return torch.cat(parts)

    def images(
        self, sampler: Sampler, *, count: int, seed: int, batch_size: int, denoiser: Denoiser | None = None
    ) -> Tensor:
        """Samples 0 to count − 1 with a sampler's own budget, uint8 on the CPU, classes in turn; None: without guidance."""
        return generate(
            denoiser or self.denoiser,
            sampler,
            indices=range(count),
            labels=balanced_labels(count, self.data.num_classes),
            shape=self.shape,
            codec=self.codec,
            seed=seed,
            batch_size=batch_size,
            device=self.device,
        )


def real_images(data: ImageDataModule, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, uint8 of shape (N, C, H, W), and their labels, int64 of shape (N,)."""
    images = data.train_set() if split == "train" else data.test_set()
    labels = torch.tensor([images.label(i) for i in range(len(images))], dtype=torch.int64)
    return torch.stack([images.image(i) for i in range(len(images))]), labels


@dataclass(frozen=True)
class Laboratory:
    """What a study may ask for.

    Args:
        run: the trained run that was named, or the newest one.
        plan: checks a run to be trained for the study, given its name and the overrides of `train.py`, and returns what
            trains it; one of like config that has been trained before is taken instead.
        say: tells the person who waits how far it is.
    """

    run: Callable[[], Model]
    plan: Callable[[str, Sequence[str]], Callable[[], Model]]
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Picture:
    """A figure of matplotlib, the name of its file, and what is to be seen."""

    file: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Findings:
    """What a study found.

    Args:
        title: of the page.
        about: what was measured and how, paragraphs in Markdown.
        claims: each with its verdict.
        rows: of table.csv, plain values, all with the same keys.
        tables: of the page, by title: headings, then lines.
        pictures: of the page.
        facts: the protocol: what was measured, on which model, with which settings.
    """

    title: str
    about: str
    claims: Sequence[Claim]
    rows: Sequence[dict[str, Any]]
    tables: dict[str, Sequence[Sequence[str]]]
    pictures: Sequence[Picture]
    facts: dict[str, Any]


class Study(ABC):
    """One of the studies; its constructor takes the settings of conf/study/<name>.yaml."""

    @abstractmethod
    def check(self, laboratory: Laboratory) -> None:
        """See to it that it can be measured.

        Raises:
            ValueError: if the run is not fit for the study, in one line.
        """

    @abstractmethod
    def measure(self, laboratory: Laboratory) -> Findings:
        """Measure; `check` has been passed."""


def at_least(bounds: dict[str, tuple[int, int]]) -> None:
    """Refuse values below their bounds, given as name: (value, lowest)."""
    for name, (value, lowest) in bounds.items():
        if value < lowest:
            raise ValueError(f"{name}={value}: must be at least {lowest}")


def increasing(name: str, values: Sequence[float], lowest: float) -> None:
    """Refuse a list that is not two or more increasing numbers from `lowest` on."""
    if len(values) < 2 or values[0] < lowest or any(b <= a for a, b in pairwise(values)):
        raise ValueError(
            f"{name}={list(values)}: must be at least two increasing numbers, the first at least {lowest:g}"
        )
