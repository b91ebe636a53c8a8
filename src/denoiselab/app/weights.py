"""Weights of other runs: which checkpoint is meant, whether it fits, and its digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.runs.checks import show
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import newest_run
from denoiselab.training.checkpoint import load_checkpoint, network_weights, newest_checkpoint
from denoiselab.training.ema import check_name


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
        loaded = read_checkpoint(newest_checkpoint(path) if path.is_dir() else path)
        return loaded, network_weights(loaded, weights or next(iter(loaded["ema"]), "raw"))
    except ValueError as error:
        key, _, reason = str(error).partition(": ")
        given = f"{weights_key}={weights}" if key.startswith("weights=") else f"{source_key}={source}"
        raise ConfigError(f"{given}: {reason}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as plain data, whose averages have names that may stand in file names.

    Raises:
        ValueError: if it is no good.
    """
    loaded = load_checkpoint(path)
    for name in loaded["ema"]:
        check_name(str(name), f"checkpoint={path}: its average {show(name)}")
    return loaded


def initial_weights(source: str, weights: str | None, network: nn.Module) -> dict[str, Tensor]:
    """The weights of another run, if they fit the network."""
    _, state = read_weights(source, weights, "init_from", "init_weights")
    check_weights(state, network, f"init_from={source}: the network differs", f"init_from={source}")
    return state


def check_weights(state: dict[str, Tensor], network: nn.Module, misfit: str, source: str) -> None:
    """See to it that weights from a file fit a network and are numbers.

    Args:
        state: the weights.
        network: it may be on "meta": nothing of its size is made before its weights are known to be there.
        misfit: what to say before the reasons why they do not fit.
        source: where they are from, for the message about numbers.

    Raises:
        ConfigError: otherwise.
    """
    reasons = fit(state, network)
    if reasons:
        raise ConfigError(f"{misfit}: {reasons}")
    for name, _ in network.named_parameters():  # buffers may well hold an infinity: the masks of attention do
        if not torch.isfinite(state[name]).all():
            raise ConfigError(f"{source}: {name} holds values that are not finite")


def fit(state: dict[str, Tensor], network: nn.Module) -> str:
    """What keeps a state dict from fitting a network, in a few words; empty if it fits."""
    return misfit(state, network.state_dict(keep_vars=True))


def misfit(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What keeps tensors from a file from standing for those wanted, in a few words; empty if they can."""
    misfits = [f"{key} is missing" for key in wanted if key not in state]
    misfits += [f"{show(key)} is unknown" for key in state if key not in wanted]
    for key, there in ((key, state[key]) for key in wanted if key in state):
        if not isinstance(there, Tensor):
            misfits.append(f"{key} is no tensor")
        elif there.shape != wanted[key].shape:
            misfits.append(f"{key} is {_shape(there)}, not {_shape(wanted[key])}")
        elif there.dtype != wanted[key].dtype:
            misfits.append(f"{key} is {_dtype(there)}, not {_dtype(wanted[key])}")
    if not misfits:  # a file of a few bytes can hold a tensor of any shape, whose numbers are all the same one
        given = {s._cdata: s.nbytes() for s in (value.untyped_storage() for value in state.values())}
        needed = {id(value): value.numel() * value.element_size() for value in wanted.values()}
        if sum(given.values()) < sum(needed.values()):
            misfits.append(f"they are {sum(given.values()):,} bytes, not {sum(needed.values()):,}")
    return ", ".join(misfits[:3]) + (f" and {len(misfits) - 3} more" if len(misfits) > 3 else "")


def _shape(value: Tensor) -> str:
    return show(tuple(value.shape))


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
