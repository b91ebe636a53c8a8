"""Weights of other runs: which checkpoint is meant, whether it fits, and its digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import newest_run
from denoiselab.training.checkpoint import load_checkpoint, network_weights, newest_checkpoint


def find_checkpoint(run: str | None, checkpoint: str | None, runs: str) -> Path:
    """The checkpoint file that `run=`, `checkpoint=` or neither asks for.

    Raises:
        ConfigError: if there is none.
    """
    try:
        if checkpoint is not None:
            return Path(checkpoint)
        folder = newest_run(Path(runs)) if run is None else Path(run)
        if not folder.is_dir():
            raise ValueError(f"run={run}: no such folder")
        return newest_checkpoint(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_weights(
    source: str, weights: str | None, source_key: str, weights_key: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint, given as run folder or file, and its weights of a name (None: the first average); keys for messages."""
    path = Path(source)
    try:
        loaded = load_checkpoint(newest_checkpoint(path) if path.is_dir() else path)
        return loaded, network_weights(loaded, weights or next(iter(loaded["ema"]), "raw"))
    except ValueError as error:
        key, _, reason = str(error).partition(": ")
        given = f"{weights_key}={weights}" if key.startswith("weights=") else f"{source_key}={source}"
        raise ConfigError(f"{given}: {reason}") from error


def initial_weights(source: str, weights: str | None, network: nn.Module) -> dict[str, Tensor]:
    """The weights of another run, if they fit the network."""
    _, state = read_weights(source, weights, "init_from", "init_weights")
    misfits = fit(state, network)
    if misfits:
        raise ConfigError(f"init_from={source}: the network differs: {misfits}")
    return state


def fit(state: dict[str, Tensor], network: nn.Module) -> str:
    """What keeps a state dict from fitting a network, in a few words; empty if it fits."""
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    misfits = [f"{key} is missing" for key in wanted if key not in given]
    misfits += [f"{key} is unknown" for key in given if key not in wanted]
    misfits += [
        f"{key} is {given[key]}, not {wanted[key]}" for key in wanted if key in given and given[key] != wanted[key]
    ]
    return ", ".join(misfits[:3]) + (f" and {len(misfits) - 3} more" if len(misfits) > 3 else "")
