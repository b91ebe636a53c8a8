"""Features of many images, batch after batch, by all ranks together: no image is kept.

Which rank draws which image leaves no trace: features come back in the order of the images' numbers. Finished parts can
be kept on disk, so that an interrupted measurement goes on, with another number of ranks if need be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from denoiselab.evaluation.arrays import read_tensors, write_tensors
from denoiselab.evaluation.features import Extractor, Features
from denoiselab.evaluation.generate import Source

SHARD = 500  # a part on disk has at least so many images, but for the last
log = logging.getLogger(__name__)


class Clock:
    """Seconds spent, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def collect(
    source: Source,
    extractors: dict[str, Extractor],
    count: int,
    *,
    batch_size: int,
    shards: Path | None = None,
    advance: Callable[[int], None] | None = None,
    clock: Clock | None = None,
) -> dict[str, Features]:
    """What each extractor finds in the images 0 to count − 1; to be called on every rank.

    Args:
        source: of the images.
        extractors: by name, at least one.
        count: how many images, at least 1.
        batch_size: images per pass of an extractor.
        shards: a folder for finished parts, whose name says what they depend on; None keeps none.
        advance: told how many images were just finished on this rank, or found finished.
        clock: of the seconds in "network" and "features" on this rank.

    Returns:
        Features by the extractor's name, in the order of the numbers, on rank 0; empty on the others.
    """
    clock, rank, size = clock or Clock(), *ranks()
    parts = _finished(shards, list(extractors), count) if rank == 0 else []
    done = broadcast(torch.cat([part["numbers"] for part in parts]).tolist() if parts else [])
    left = sorted(set(range(count)) - set(done))
    if advance is not None and done:
        advance(len(done) // size)
    mine, pending = source(left[rank::size]), list[dict[str, Tensor]]()
    fresh: list[dict[str, Tensor]] = []
    while True:
        with clock("network"):
            numbers, images = next(mine, (None, None))
            if images is not None and images.is_cuda:
                torch.cuda.synchronize(images.device)  # else the wait for the network is counted with the features
        if numbers is not None and images is not None:
            with clock("features"):
                found = {key: extractor(images, batch_size) for key, extractor in extractors.items()}
            flat = {f"{key}/{name}": t for key, f in found.items() for name, t in f.tensors().items()}
            pending.append({"numbers": numbers.cpu(), **flat})
            if advance is not None:
                advance(len(numbers))
        full = sum(len(part["numbers"]) for part in pending) >= SHARD
        if pending and (full or numbers is None):
            fresh.append(_joined(pending))
            pending = []
            if shards is not None:
                write_tensors(shards / f"{int(fresh[-1]['numbers'][0]):08d}.safetensors", fresh[-1])
        if numbers is None:
            break
    parts += gather(_joined(fresh) if fresh else {})
    if rank != 0:
        return {}
    everything = _joined(parts)
    order = everything["numbers"].argsort()
    assert everything["numbers"][order].tolist() == list(range(count))
    names = {key: [n for n in everything if n.startswith(f"{key}/")] for key in extractors}
    return {key: Features(**{n.partition("/")[2]: everything[n][order] for n in names[key]}) for key in extractors}


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every rank's tensors, as a list by rank, on rank 0; empty on the others.

    Args:
        tensors: CPU tensors with a common length, which may differ between ranks; empty where a rank has nothing.
    """
    rank, size = ranks()
    if size == 1:
        return [tensors] if tensors else []
    shapes: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{}] * size
    dist.all_gather_object(shapes, {name: (t.shape, t.dtype) for name, t in tensors.items()})
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    collected: list[dict[str, Tensor]] = [{} for _ in range(size)]
    for name, (shape, dtype) in next((s for s in shapes if s), {}).items():
        longest = max(s[name][0][0] for s in shapes if s)
        padded = torch.zeros(longest, *shape[1:], dtype=dtype, device=device)
        if tensors:
            padded[: len(tensors[name])] = tensors[name].to(device)
        all_padded = [torch.empty_like(padded) for _ in range(size)] if rank == 0 else None
        dist.gather(padded, all_padded, dst=0)
        for r, part in enumerate(all_padded or []):
            if shapes[r]:
                collected[r][name] = part[: shapes[r][name][0][0]].cpu()
    return [part for part in collected if part]


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _finished(shards: Path | None, keys: Sequence[str], count: int) -> list[dict[str, Tensor]]:
    """The parts on disk that are whole, each number once."""
    seen: set[int] = set()
    found: list[dict[str, Tensor]] = []
    for path in sorted(shards.glob("*.safetensors")) if shards is not None else ():
        try:
            part = read_tensors(path)
        except (ValueError, OSError) as error:
            log.warning("%s is damaged (%s): its images are drawn again", path, error)
            continue
        fresh = torch.tensor([n not in seen and n < count for n in part["numbers"].tolist()])
        if {name.partition("/")[0] for name in part} == {"numbers", *keys} and fresh.any():
            found.append({name: tensor[fresh] for name, tensor in part.items()})
            seen.update(found[-1]["numbers"].tolist())
    return found
