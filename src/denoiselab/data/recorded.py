"""What a set of image files was when a run began, so that files which break or vanish later keep their places in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

K = TypeVar("K")

_MARK = re.compile(r"[0-9a-f]{64}|[0-9]{0,18}")


class Recorded(NamedTuple):
    """The files of a set, in their order.

    Args:
        names: below the folder of the set.
        labels: of the files.
        marks: what stands for the content of each: the hash of its pixels or its size; "" of one that was broken.
    """

    names: list[str]
    labels: list[int]
    marks: list[str]


def read_recorded(node: Any) -> Recorded:
    """A record from plain data, which may be somebody else's.

    Raises:
        ValueError: if it is none, or names files outside the folder.
    """
    lists: list[Any] = [node.get(field) for field in Recorded._fields] if isinstance(node, dict) else []
    if not lists or not all(isinstance(x, list) for x in lists) or len({len(x) for x in lists}) != 1:
        raise ValueError("must hold names, labels and marks of files")
    found = Recorded(*lists)
    for name, label, mark in zip(*found, strict=True):
        if not (type(name) is str and type(label) is int and type(mark) is str):
            raise ValueError("must hold names, labels and marks of files")
        if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
            raise ValueError("names a file outside the folder")
        if not (-1 <= label < 2**31 and _MARK.fullmatch(mark)):
            raise ValueError("must hold names, labels and marks of files")
        os.fsencode(name)
    return found


def lost(known: Mapping[K, str], found: Mapping[K, str], good: Callable[[K], bool]) -> set[K] | None:
    """The files of a record that are broken or missing now; None if the set has changed otherwise.

    Args:
        known: the marks of the record.
        found: the marks now.
        good: whether a file that is there can be decoded; only those are asked about that are new or have another mark.
    """
    if any(file not in known and good(file) for file in found):
        return None
    other = [file for file, mark in known.items() if mark and found.get(file) != mark]
    return None if any(file in found and good(file) for file in other) else set(other)
