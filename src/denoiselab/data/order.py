"""The order in which training draws its samples: a function of (seed, global step, rank) alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One sample that training asks for.

    Args:
        index: which sample of the data set.
        step: the global step (optimizer step) that uses it.
        place: its place in that step's global batch, in [0, batch_size).
        epoch: how many times the data set has been gone through before.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks for here
    step: int
    place: int
    epoch: int


def permutation(size: int, *key: int) -> np.ndarray:
    """A random order of range(size), int64 of shape (size,), that depends on the key (integers >= 0) alone.

    The raw output of a bit generator is fixed for good; that of `Generator.permutation` may change with
    NumPy.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(raw, kind="stable")


def micro_batch_size(batch_size: int, world_size: int, accumulate: int) -> int:
    """Samples that one rank handles in one forward pass.

    Args:
        batch_size: samples per optimizer step, over all ranks and accumulated micro-batches.
        world_size: number of ranks.
        accumulate: micro-batches per optimizer step.

    Raises:
        ValueError: if the batch does not divide evenly.
    """
    size, left = divmod(batch_size, world_size * accumulate)
    if left:
        raise ValueError(
            f"batch_size={batch_size}: must be divisible by {world_size} ranks x {accumulate} accumulated micro-batches"
        )
    return size


class GlobalBatchSampler(Sampler[list[Draw]]):
    """The endless sequence of one rank's micro-batches.

    All epochs' permutations, one after the other, make one stream of positions; global batch g takes the
    `batch_size` positions from g * batch_size on, so a batch may straddle epochs and no sample is ever left
    out. Micro-batch k of rank r takes the m places from (k * world_size + r) * m on, m = batch_size /
    (world_size * accumulate).
    There is no length: Lightning takes the loader as one endless epoch.

    Args:
        size: number of samples of the data set, at least 1.
        batch_size: samples per optimizer step, over all ranks and accumulated micro-batches.
        seed: keys the permutations, at least 0.
        rank: this process, in [0, world_size).
        world_size: number of ranks.
        accumulate: micro-batches per optimizer step.
        start_step: the global step to begin at.

    Raises:
        ValueError: if the batch does not divide evenly.
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        accumulate: int,
        start_step: int,
    ) -> None:
        assert size >= 1
        assert 0 <= rank < world_size
        self.micro_batch = micro_batch_size(batch_size, world_size, accumulate)
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[Draw]]:
        step, epoch, order = self.start_step, -1, np.empty(0, dtype=np.int64)
        while True:
            for k in range(self.accumulate):
                first = (k * self.world_size + self.rank) * self.micro_batch
                draws = []
                for place in range(first, first + self.micro_batch):
                    wanted, offset = divmod(step * self.batch_size + place, self.size)
                    if wanted != epoch:  # positions only grow: one permutation at a time is enough
                        epoch, order = wanted, permutation(self.size, self.seed, wanted)
                    draws.append(Draw(int(order[offset]), step, place, epoch))
                yield draws
            step += 1
