"""Weights of others, as torch.save wrote them: what a small file could blow up is refused before it is loaded.

`torch.load(weights_only=True)` runs nothing of a file, but it unpacks compressed archives, and it would make
`bytearray(10**12)`.
"""

from __future__ import annotations

import mmap
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

_ZIP = b"PK\x03\x04"  # torch.save wrote something else before its version 1.6
_ALLOCATES = b"\nbytearray\n"  # as pickles name it


def load_weights(path: Path) -> Any:
    """What torch.save wrote into a file, as plain data on the CPU.

    Args:
        path: of the file.

    Raises:
        ValueError: in a few words, if it is no file, is damaged, holds code, or unpacks to more than it is.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError("is no file")
    try:
        with path.open("rb") as file:  # opened once: what is looked at is what is loaded
            why = _flaw(file)
            file.seek(0)
            if why is None:
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, torch and pickle raise many kinds
        raise ValueError("cannot be read as plain data; it is damaged, or holds code") from error
    raise ValueError(why)


def _flaw(file: BinaryIO) -> str | None:
    """Why a file is not loaded; None if nothing speaks against it."""
    if file.read(len(_ZIP)) == _ZIP:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            return "is compressed, which torch.save does not do"
        if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
            return "has entries that are larger than the file"
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(_ALLOCATES) >= 0:
            return "holds a bytearray, which no weights need"
    return None
