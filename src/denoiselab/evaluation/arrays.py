"""Tensors on disk, with a checksum: a file is complete and right, or an error."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote.

    Raises:
        ValueError: if the file is damaged.
        OSError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if found != _checksum(tensors):
        raise ValueError("wrong checksum")
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write CPU tensors; several processes may do this at once: each has a file of its own, the last rename stays.

    Raises:
        OSError: if that cannot be done; nothing is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"sha256": _checksum(tensors)})
        mask = os.umask(0o077)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # a cache may be shared; safetensors makes its files private
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].contiguous().numpy().data)
    return total.hexdigest()
