"""Samples for pictures and for measurement: sample i is a function of (weights, seed, i) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from jaxtyping import Int64, UInt8
from torch import Tensor

from denoiselab.condition import NULL_LABEL, Condition
from denoiselab.diffusion.denoiser import Denoiser
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.samplers import Sampler


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


@torch.no_grad()
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
    """The samples `indices` as uint8 images on the CPU.

    Args:
        denoiser: what the sampler asks.
        sampler: how to sample.
        indices: which samples, any subset in any order.
        labels: the label of every sample, indexed by its number; None for unconditional data.
        shape: (C, H, W) of what the network draws.
        codec: makes images of it.
        seed: of the noise.
        batch_size: samples per network call.
        device: where the network is.
    """
    images, points = [], sampler.plan(denoiser)[0]
    for start in range(0, len(indices), batch_size):
        index = torch.as_tensor(indices[start : start + batch_size])
        condition = Condition(label=None if labels is None else labels[index]).to(device)
        noise = NoiseSource(seed=seed, index=index.to(device))
        images.append(codec.decode(sampler.sample(denoiser, shape, condition, noise, points)).cpu())
    return torch.cat(images)


def draw(
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    count: int,
    num_classes: int,
    shape: Sequence[int],
    codec: Decoder,
    seed: int,
    batch_size: int,
    device: torch.device | str,
) -> tuple[UInt8[Tensor, "N C H W"], Int64[Tensor, " N"]]:
    """Samples 0 to count − 1, drawn by all ranks together, and their labels (balanced; -1 without classes).

    Rank r draws the samples r, r + ranks, …; every rank gets them all, in order. The arguments are those of `generate`.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    labels = balanced_labels(count, num_classes)
    mine = range(rank, count, ranks)
    images = torch.zeros(-(-count // ranks), *codec.decode(torch.zeros(1, *shape)).shape[1:], dtype=torch.uint8)
    if mine:
        images[: len(mine)] = generate(
            denoiser,
            sampler,
            indices=mine,
            labels=labels,
            shape=shape,
            codec=codec,
            seed=seed,
            batch_size=batch_size,
            device=device,
        )
    if ranks > 1:
        padded = images.to(device)
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded)
        images = torch.stack(parts, dim=1).flatten(0, 1)[:count].cpu()
    return images, torch.full((count,), NULL_LABEL) if labels is None else labels
