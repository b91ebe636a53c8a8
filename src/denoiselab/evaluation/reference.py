"""What an extractor finds in real images, kept on disk under a key that says what it was made of."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from denoiselab.data.npz import check_unpacked_size
from denoiselab.evaluation.arrays import read_tensors, write_tensors
from denoiselab.evaluation.collect import broadcast, gather, ranks
from denoiselab.evaluation.distances import Moments, Statistics
from denoiselab.evaluation.features import Extractor, Features, FeatureSet
from denoiselab.runs.folder import cache_folder

SCHEMA = 2  # of the cache files; part of their key
LIMIT = 50_000  # so many real images at most are kept one by one, for measures of neighbours and kernels
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
    """Real images as the measures see them.

    Args:
        moments: mean and covariance of the features of all images.
        spatial: the same of the spatial features; None if the extractor gives none.
        sample: at most `LIMIT` of the images one by one, evenly spaced; None for published statistics.
        numbers: which images of the split these are, shape (M,).
        facts: what the protocol says of them.
    """

    moments: Statistics
    spatial: Statistics | None
    sample: FeatureSet | None
    numbers: Tensor
    facts: dict[str, Any]


def cache_key(fingerprint: str, extractor: Extractor, split: Split) -> str:
    """The name of a reference: SHA-256 (hex) over all that it depends on."""
    parts = SCHEMA, LIMIT, split, fingerprint, extractor.hash, extractor.spatial
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def reference(
    data: Data, split: Split, extractor: Extractor, *, cache: Path | None = None, batch_size: int = 250
) -> Reference | None:
    """The reference of a split, from the cache or computed by all ranks together and put there.

    A damaged file is computed again, with a warning; a folder that cannot be written to costs a warning too.

    Args:
        data: the data set.
        split: "train" or "test", at least 2 images.
        extractor: what to compute features with.
        cache: folder; None takes `cache_folder()`.
        batch_size: images per pass of the extractor.

    Returns:
        The reference on rank 0, None on the others.
    """
    rank, _ = ranks()
    fingerprint = data.fingerprint(split)
    path = (cache or cache_folder()) / f"{cache_key(fingerprint, extractor, split)}.safetensors"
    tensors = _cached(path) if rank == 0 else None
    if broadcast(tensors is None):
        images = data.train_set() if split == "train" else data.test_set()
        tensors = _compute(images, extractor, batch_size)
        if rank == 0:
            try:
                write_tensors(path, tensors)
            except OSError as error:
                log.warning("the reference statistics were not kept: %s", error)
    if rank != 0:
        return None
    assert tensors is not None
    facts = {"reference": split, "reference_hash": fingerprint, "reference_count": int(tensors["count"])}
    return _unpack(tensors, facts, extractor.num_classes)


def published(path: Path) -> Reference:
    """The reference of a published npz, as ADM, EDM and pytorch-fid have them: `mu`, `sigma`, of sFID `mu_s`, `sigma_s`.

    Args:
        path: of the file.

    Raises:
        ValueError: if there is no such file, or it is not of this kind.
    """
    kind = "ADM's, EDM's and pytorch-fid's published statistics are"
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError(f"{path}: no such file; {kind}")
    try:
        check_unpacked_size(path)
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key].astype(np.float64) for key in ("mu", "sigma", "mu_s", "sigma_s") if key in arrays}
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        raise ValueError(f"{path}: must be an npz with the arrays mu and sigma; {kind}") from error
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mu in found) != (sigma in found) or (mu == "mu" and mu not in found):
            raise ValueError(f"{path}: must hold the arrays mu and sigma, not {', '.join(found) or 'none of them'}")
        if mu in found and found[sigma].shape != (2 * found[mu].shape):
            raise ValueError(f"{path}: {sigma} has shape {found[sigma].shape}, {mu} {found[mu].shape}")
        if mu in found and not (np.isfinite(found[mu]).all() and np.isfinite(found[sigma]).all()):
            raise ValueError(f"{path}: {mu} and {sigma} must be finite")
    with path.open("rb") as file:
        hashed = hashlib.file_digest(file, "sha256").hexdigest()
    return Reference(
        moments=Statistics(found["mu"], found["sigma"]),
        spatial=Statistics(found["mu_s"], found["sigma_s"]) if "mu_s" in found else None,
        sample=None,
        numbers=torch.zeros(0, dtype=torch.int64),
        facts={
            "reference": "published",
            "reference_hash": hashed,
            "reference_count": None,
            "reference_file": path.name,
        },
    )


def reading(images: Images, batch_size: int) -> Any:
    """A source (see `generate.Source`) of the images of a split."""

    def read(numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(numbers), batch_size):
            index = torch.as_tensor(numbers[start : start + batch_size])
            yield index, torch.stack([images.image(i) for i in index.tolist()])

    return read


def _cached(path: Path) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        tensors = read_tensors(path)
        if not {"count", "numbers", "labels", "features", "features/mean", "features/covariance"} <= set(tensors):
            raise ValueError("tensors are missing")
    except (ValueError, OSError) as error:
        log.warning("the reference statistics in %s are damaged (%s): computed again", path, error)
        return None
    return tensors


def _compute(images: Images, extractor: Extractor, batch_size: int) -> dict[str, Tensor]:
    """The tensors of a reference on rank 0; moments are of all images, features of those that are evenly spaced."""
    rank, size = ranks()
    stride = -(-len(images) // LIMIT)
    moments: dict[str, Moments] = {}
    kept: list[tuple[Tensor, Features]] = []
    for numbers, batch in reading(images, batch_size)(range(rank, len(images), size)):
        found = extractor(batch, batch_size)
        for name, part in found.tensors().items():
            if name != "logits":
                moments.setdefault(name, Moments()).add(part)
        which = numbers % stride == 0
        if which.any():
            kept.append(
                (numbers[which], Features(**{k: v[which] for k, v in found.tensors().items() if k != "spatial"}))
            )
    mine = (
        {"numbers": torch.cat([n for n, _ in kept]), **Features.joined([f for _, f in kept]).tensors()} if kept else {}
    )
    parts, shares = gather(mine), [moments]
    if size > 1:
        shares = [{}] * size
        dist.all_gather_object(shares, moments)
    if rank != 0:
        return {}
    order = torch.cat([part["numbers"] for part in parts]).argsort()
    tensors = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
    for name in moments:
        total = Moments()
        for share in shares:
            if name in share:
                total.merge(share[name])
        mean, covariance = total.statistics()
        tensors |= {f"{name}/mean": torch.from_numpy(mean), f"{name}/covariance": torch.from_numpy(covariance)}
    labels = torch.tensor([images.label(i) for i in tensors["numbers"].tolist()])
    return tensors | {"labels": labels, "count": torch.tensor(len(images))}


def _unpack(tensors: dict[str, Tensor], facts: dict[str, Any], classes: int | None) -> Reference:
    def statistics(name: str) -> Statistics:
        return Statistics(tensors[f"{name}/mean"].numpy(), tensors[f"{name}/covariance"].numpy())

    return Reference(
        moments=statistics("features"),
        spatial=statistics("spatial") if "spatial/mean" in tensors else None,
        sample=FeatureSet(tensors["features"], tensors["labels"], tensors.get("logits"), classes=classes),
        numbers=tensors["numbers"],
        facts=facts,
    )
