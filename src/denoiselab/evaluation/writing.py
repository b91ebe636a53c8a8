"""Samples on disk, as they are drawn: npz shards or one PNG each, beside the protocol that they were drawn by.

Whatever has its final name is whole, so drawing can be interrupted anywhere and goes on from what is there.
"""

from __future__ import annotations

import json
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from denoiselab.evaluation.generate import Source
from denoiselab.evaluation.pictures import PROTOCOL, to_pil
from denoiselab.runs.checks import show
from denoiselab.runs.files import read_json

PARTIAL = ".partial"
Advance = Callable[[int], None]


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A file that gets its name once it is whole; if that fails, nothing is left of it.

    Args:
        path: final name.
        sync: whether it must be on the disk by then, whatever happens to the machine; slow for many small files.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with beside.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def shards(count: int, size: int) -> list[range]:
    """The numbers 0 to count − 1 in turns of `size`; the last has what is left."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def shard_path(folder: Path, numbers: range) -> Path:
    """The file of a shard, which sorts by its numbers: 000000-004999.npz."""
    return folder / f"{numbers.start:06d}-{numbers.stop - 1:06d}.npz"


def picture_path(folder: Path, number: int, label: int | None) -> Path:
    """The PNG of a sample: 000012.png, in a subfolder per class so that `datamodule=image_folder` reads it back."""
    return (folder if label is None else folder / f"{label:03d}") / f"{number:06d}.png"


def write_npz(
    path: Path, source: Source, numbers: Sequence[int], labels: Int64[Tensor, " N"] | None, advance: Advance
) -> None:
    """Draw samples into one npz with `images` (uint8, N×H×W×C) and `labels` (-1 without), one batch in memory at a time.

    Args:
        path: of the file.
        source: draws them, in order.
        numbers: which samples, at least one.
        labels: of every sample, indexed by its number.
        advance: told how many images were just finished.
    """
    asked = np.full(len(numbers), -1) if labels is None else labels[list(numbers)].numpy()
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:  # stored: pixels hardly shrink
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, asked)
        with archive.open("images.npy", "w", force_zip64=True) as member:
            for i, (drawn, images) in enumerate(source(numbers)):
                pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                if i == 0:
                    shape = (len(numbers), *pixels.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(pixels.data)
                advance(len(drawn))


def write_pngs(
    folder: Path, source: Source, numbers: Sequence[int], labels: Int64[Tensor, " N"] | None, advance: Advance
) -> None:
    """Draw samples into one PNG each; the arguments are those of `write_npz`."""
    for drawn, images in source(numbers):
        for number, pixels in zip(drawn.tolist(), images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            path = picture_path(folder, number, None if labels is None else int(labels[number]))
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as file:
                to_pil(pixels).save(file, format="png")
        advance(len(drawn))


def check_folder(folder: Path, protocol: dict[str, Any]) -> None:
    """Make sure that what a folder holds already, if anything, was drawn by the same protocol.

    Args:
        folder: may be missing.
        protocol: plain values; where the checkpoint lies is no part of the comparison, since its weights' hash is.

    Raises:
        ValueError: naming the first field that differs.
    """
    path = folder / PROTOCOL
    if not path.exists():
        if any(next(folder.rglob(f"*.{kind}"), None) for kind in ("png", "npz")):
            raise ValueError(f"output={folder}: holds images, but no {PROTOCOL} that says how they were drawn")
        return
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise ValueError(f"output={folder}: its {PROTOCOL} cannot be read ({error})") from error
    wanted = json.loads(json.dumps(protocol, default=str))
    field = difference(wanted | {"checkpoint": None}, found | {"checkpoint": None})
    if field is not None:
        raise ValueError(
            f"output={folder}: holds samples that were drawn otherwise: {show(field[0])} is {show(json.dumps(field[2]))} "
            f"there, here it is {show(json.dumps(field[1]))}; give another folder"
        )


def difference(a: Any, b: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Where two plain values differ first, by its dotted name, and what they have there; None if they are alike."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            found = difference(a.get(key), b.get(key), f"{path}.{key}" if path else key)
            if found is not None:
                return found
        return None
    return None if a == b else (path, a, b)


def remove_partial(folder: Path) -> None:
    """Remove what a job that was killed has left half-written."""
    for path in folder.rglob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


def shards_left(folder: Path, count: int, size: int) -> list[range]:
    """The shards that are not there."""
    return [numbers for numbers in shards(count, size) if not shard_path(folder, numbers).exists()]


def pictures_left(folder: Path, count: int) -> list[int]:
    """The numbers of the PNG files that are not there."""
    there = {path.stem for path in folder.rglob("*.png")}
    return [number for number in range(count) if f"{number:06d}" not in there]
