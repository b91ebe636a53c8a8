"""Samples for pictures and for measurement: sample i is a function of (weights, seed, i) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.samplers import Sampler

# Asked for samples by their numbers, it yields (numbers, uint8 images of shape (b, C, H, W)) batch after batch.
Source = Callable[[Sequence[int]], Iterator[tuple[Tensor, Tensor]]]


class Decoder(Protocol):
    """The half of a codec that makes images."""

    def decode(self, x: Tensor) -> Tensor:
        """What the network draws, as uint8 images."""
        ...


def balanced_labels(count: int, num_classes: int, classes: Sequence[int] | None = None) -> Tensor | None:
    """Label of sample i: the classes in turn, int64 of shape (count,); None where there are no classes.

    Args:
        count: number of samples.
        num_classes: classes of the data; 0 if it has none.
        classes: draw only these.

    Raises:
        ValueError: if a class is asked for that the data does not have.
    """
    if classes is not None and (not classes or not all(0 <= c < num_classes for c in classes)):
        allowed = f"must be among 0 to {num_classes - 1}" if num_classes else "the data has no classes"
        raise ValueError(f"classes={list(classes)}: {allowed}")
    if num_classes == 0:
        return None
    turn = torch.tensor(list(classes) if classes is not None else list(range(num_classes)))
    return turn[torch.arange(count) % len(turn)]


def drawing(
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    labels: Int64[Tensor, " N"] | None,
    shape: Sequence[int],
    codec: Decoder,
    seed: int,
    batch_size: int,
    device: torch.device | str,
) -> Source:
    """A source of samples, drawn as they are asked for.

    Args:
        denoiser: what the sampler asks.
        sampler: how to sample.
        labels: the label of every sample, indexed by its number; None for unconditional data.
        shape: (C, H, W) of what the network draws.
        codec: makes images of it.
        seed: of the noise.
        batch_size: samples per network call.
        device: where the network is; the images stay there.
    """
    points = sampler.plan(denoiser)[0]

    @torch.no_grad()
    def draw(numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(numbers), batch_size):
            index = torch.as_tensor(numbers[start : start + batch_size])
            condition = Condition(label=None if labels is None else labels[index]).to(device)
            noise = NoiseSource(seed=seed, index=index.to(device))
            yield index, codec.decode(sampler.sample(denoiser, shape, condition, noise, points))

    return draw


def generate(
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    indices: Sequence[int],
    labels: Int64[Tensor, " N"] | None,
    shape: Sequence[int],
    codec: Decoder,
    seed: int,
    batch_size: int,
    device: torch.device | str,
) -> UInt8[Tensor, "n C H W"]:
    """The samples `indices`, at least one, as uint8 images on the CPU; the other arguments are those of `drawing`."""
    source = drawing(
        denoiser, sampler, labels=labels, shape=shape, codec=codec, seed=seed, batch_size=batch_size, device=device
    )
    return torch.cat([images.cpu() for _, images in source(indices)])
