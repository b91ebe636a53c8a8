"""What a point of a frontier costs: seconds per image."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median

import torch
from torch import Tensor

from denoiselab.evaluation.generate import Source


def timed(source: Source, spent: list[tuple[int, float]]) -> Source:
    """A source that notes for each batch how many images it has and the seconds that they took."""

    def draw(numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        batches = source(numbers)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if batch[1].is_cuda:
                torch.cuda.synchronize(batch[1].device)
            spent.append((len(batch[1]), time.perf_counter() - began))
            yield batch

    return draw


def typical(spent: Sequence[tuple[int, float]]) -> float:
    """Seconds per image: the median over the largest batches."""
    largest = max(size for size, _ in spent)
    return median(seconds / size for size, seconds in spent if size == largest)
