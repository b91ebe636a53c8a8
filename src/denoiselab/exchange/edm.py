"""EDM's SongUNet (DDPM++ and NCSN++): its arguments read off the names and shapes of its tensors."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from denoiselab.exchange.unet import learned_variance

PREFIX = "model."  # of the network inside EDM's preconditioning
FILTER = ".resample_filter"


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the network, also where it is that of its preconditioning."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def from_edm(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of our SongUNet for EDM's weights. Dropout, which weights do not tell, is 0.

    Raises:
        ValueError: listing the tensors that are needed for this and missing, or if there is no such network of ours.
    """
    state = without_prefix(state)
    found = [m for name in state if (m := re.match(r"enc\.(\d+)x\d+_block(\d+)\.conv1\.weight", name))]
    if not found:
        raise ValueError("keys: no enc.<side>x<side>_block<number>.conv1.weight is there; this is no SongUNet of EDM")
    sides = sorted({int(m[1]) for m in found}, reverse=True)
    levels = [f"{side}x{side}" for side in sides]
    needed = (f"enc.{levels[0]}_conv.weight", f"dec.{levels[0]}_aux_conv.weight", "map_layer0.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"keys: {len(missing)} missing ({', '.join(missing)})")
    width, channels = state[needed[0]].shape[:2]
    return {
        "channels": channels,
        "resolution": sides[0],
        "num_classes": state["map_label.weight"].shape[1] if "map_label.weight" in state else 0,
        "augment_dim": state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
        "width": width,
        "multipliers": [len(state[f"enc.{level}_block0.conv1.weight"]) // width for level in levels],
        "blocks": sum(int(m[1]) == sides[0] for m in found),
        "attention_resolutions": [
            s for s, level in zip(sides, levels, strict=True) if f"enc.{level}_block0.qkv.weight" in state
        ],
        "dropout": 0.0,
        "time_embedding": "fourier" if "map_noise.freqs" in state else "positional",
        "time_multiplier": state[needed[2]].shape[1] // width,
        "encoder": "residual" if any("_aux_residual." in name for name in state) else "standard",
        "resample_filter": _taps(state),
        "learned_variance": learned_variance(channels, len(state[needed[1]])),
    }


def filters(state: dict[str, Tensor], taps: list[int]) -> dict[str, Tensor]:
    """What the buffers of resampling must be, by their names."""
    line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    square = torch.outer(line, line)[None, None]
    return {name: square for name in state if name.endswith(FILTER)}


def _taps(state: dict[str, Tensor]) -> list[int]:
    """The filter along one axis, in whole numbers."""
    buffer = next((tensor for name, tensor in state.items() if name.endswith(FILTER)), None)
    if buffer is None:
        return [1, 1]
    line = buffer.float().squeeze().sum(1)
    return [round(tap) for tap in (line / line.min()).tolist()]
