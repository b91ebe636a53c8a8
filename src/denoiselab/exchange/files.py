"""Weights in files: safetensors, torch's own format read as plain data, and folders as diffusers writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from denoiselab.runs.weights import load_weights

WEIGHTS = "diffusion_pytorch_model"
TIMES = 2  # what tensors may take, in sizes of their file: some are one under two names, but views can be of any size


@dataclass(frozen=True)
class Source:
    """What was read.

    Args:
        state: tensors by the names that they have there.
        model: config.json of a diffusers model; empty where there is none.
        scheduler: its scheduler_config.json; empty where there is none.
        pipeline: its model_index.json; empty where there is none.
    """

    state: dict[str, Tensor]
    model: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Source:
    """Read a file of weights, or a diffusers pipeline or model folder.

    Raises:
        ValueError: if there is nothing to read, or not as plain data.
    """
    if path.is_dir():
        return read_folder(path)
    return Source(read_tensors(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU. Of a training checkpoint with several, "ema" or else "model".

    Raises:
        ValueError: if the file is missing, holds anything but plain data, or no state dict.
    """
    if not path.is_file():
        raise ValueError(f"source={path}: no such file or folder")
    if path.suffix == ".pkl":
        raise ValueError(
            f"source={path}: is a pickle, which runs code when it is read; in the environment of its own project (EDM's) "
            "do torch.save(pickle.load(open('net.pkl', 'rb'))['ema'].state_dict(), 'net.pt'), then source=net.pt"
        )
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"source={path}: must be a .safetensors, .pt, .pth or .bin file, or a diffusers folder")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        loaded = load_weights(path)
    except ValueError as error:
        raise ValueError(f"source={path}: {error}") from error
    for key in ("ema", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"source={path}: holds no state dict, which is names and tensors")
    if sum(v.numel() * v.element_size() for v in loaded.values()) > TIMES * path.stat().st_size:
        raise ValueError(f"source={path}: holds tensors that are larger than the file")
    return loaded


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # of many kinds
        raise ValueError(f"source={path}: cannot be read as plain data; it is damaged, or holds code") from error


def read_folder(path: Path) -> Source:
    """A diffusers pipeline, or one model of it.

    Raises:
        ValueError: if there is no model in it.
    """
    models = [folder for folder in (path / "unet", path / "transformer", path) if (folder / "config.json").is_file()]
    if not models:
        raise ValueError(f"source={path}: has no config.json, nor in unet/ or transformer/; it is no diffusers folder")
    root = path.parent if models[0] == path and path.name in ("unet", "transformer") else path
    schedulers = (root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json")
    return Source(
        state=_read_weights(models[0]),
        model=_read_json(models[0] / "config.json"),
        scheduler=next((_read_json(file) for file in schedulers if file.is_file()), {}),
        pipeline=_read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {},
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for ending in ("safetensors", "bin"):
        file = folder / f"{WEIGHTS}.{ending}"
        if file.is_file():
            return read_tensors(file)
        index = folder / f"{WEIGHTS}.{ending}.index.json"
        if index.is_file():  # in several files, each tensor in one of them
            state: dict[str, Tensor] = {}
            for name in _parts(index):
                state |= read_tensors(folder / name)
            return state
    raise ValueError(f"source={folder}: has no {WEIGHTS}.safetensors or .bin")


def _parts(index: Path) -> list[str]:
    """The names of the files that an index names, which lie beside it."""
    found = _read_json(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"source={index}: must have a weight_map of the names of files beside it")
    return sorted(set(names))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"source={path}: cannot be read as JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"source={path}: must hold a JSON object")
    return value


def write_safetensors(path: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a state dict, and beside it, as <name>.json, what it is."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
