"""Whether a run can go on from a checkpoint: all that Lightning and the optimizer would take from it as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

from denoiselab.app.weights import misfit
from denoiselab.runs.checks import show
from denoiselab.runs.errors import ConfigError
from denoiselab.training.checkpoint import LARGEST_COUNT
from denoiselab.training.module import DiffusionModule


def check_run(loaded: dict[str, Any], module: DiffusionModule, callbacks: Iterable[Callback], source: str) -> None:
    """See to it that a run can go on from a checkpoint, whoever wrote it; nothing is changed but the callbacks' states.

    Args:
        loaded: as `load_run` gives it.
        module: that would go on; its network may be on "meta".
        callbacks: that would go on; each takes its state over.
        source: where the checkpoint is from, for the message.

    Raises:
        ConfigError: with the first thing that is not as such a run would have written it.
    """
    flaw = (
        _flaw_of_version(loaded["pytorch-lightning_version"])
        or _flaw_of_weights(loaded, module)
        or _flaw_of_optimizer(loaded["optimizer_states"], loaded["lr_schedulers"], module)
        or _flaw_of_callbacks(loaded.get("callbacks", {}), callbacks)
    )
    if flaw:
        raise ConfigError(f"{source}: {flaw}; a run cannot go on from it")


def _flaw_of_version(version: str) -> str:
    try:
        same = len(version) < 50 and Version(version).major == Version(lightning.__version__).major
    except InvalidVersion:
        same = False
    return "" if same else f"it says it is of Lightning {show(version)}, and this is {lightning.__version__}"


def _flaw_of_weights(loaded: dict[str, Any], module: DiffusionModule) -> str:
    parameters = dict(module.network.named_parameters())
    states = {"the network": (loaded["state_dict"], module.state_dict(keep_vars=True))}
    states |= {f"the average {name}": (average, parameters) for name, average in loaded["ema"].items()}
    for what, (state, wanted) in states.items():
        differs = misfit(state, wanted)
        if differs:
            return f"{what} differs: {differs}"
        for key in parameters:
            value = state[key if state is not loaded["state_dict"] else f"network.{key}"]
            if state is not loaded["state_dict"] and not _is_dense(value):
                return f"{what} differs: {key} is no dense tensor"
            if not torch.isfinite(value).all():
                return f"{what}: {key} holds values that are not finite"
    return ""


def _flaw_of_optimizer(states: list[Any], schedules: list[Any], module: DiffusionModule) -> str:
    """Compare with what the optimizer makes in a first step of parameters that are small and of as many dimensions."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    small = [nn.Parameter(torch.ones([2] * p.dim(), dtype=p.dtype)) for p in parameters]
    for p in small:
        p.grad = torch.ones_like(p)
    try:
        optimizer = module.make_optimizer(small)
        schedule = module.schedule(optimizer)
        for group in optimizer.param_groups:
            group.update(
                {"capturable": False} if "capturable" in group else {}
            )  # which needs a GPU, and changes no state
        optimizer.step()
    except Exception as error:  # somebody's optimizer may raise anything
        return f"what it holds of the optimizer cannot be checked ({type(error).__name__}: {show(error)})"
    if len(states) != 1 or len(schedules) != 1:
        return "it must hold the states of one optimizer and one schedule"
    made, state = optimizer.state_dict(), states[0]
    if (
        not isinstance(state, dict)
        or type(state.get("state")) is not dict
        or type(state.get("param_groups")) is not list
    ):
        return "what it holds of the optimizer is no optimizer's state"
    for group in state["param_groups"]:
        plain = isinstance(group, dict) and all(key == "params" or _is_plain(value) for key, value in group.items())
        if not plain or group.get("params") != made["param_groups"][0]["params"]:
            return "its optimizer has other parameters, or settings that are no plain data"
    if len(state["param_groups"]) != len(made["param_groups"]):
        return f"its optimizer has {len(state['param_groups'])} groups of parameters, not {len(made['param_groups'])}"
    for index, entries in state["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or type(entries) is not dict:
            return f"its optimizer knows a parameter {show(index)}, of {len(parameters)}"
        wanted = made["state"].get(index, {})
        if entries.keys() != wanted.keys():
            return f"its optimizer has {_names(entries)} of a parameter, and this one {_names(wanted)}"
        for key, value in entries.items():
            if not _stands_for(value, wanted[key], parameters[index]):
                return f"its optimizer's {key} of parameter {index} is not of the parameter's shape and kind"
            if isinstance(value, Tensor) and value.isnan().any():
                return f"its optimizer's {key} of parameter {index} holds what is not a number"
    return (
        "" if _is_like(schedules[0], schedule.state_dict()) else "what it holds of the schedule is no schedule's state"
    )


def _names(entries: dict[Any, Any]) -> str:
    return show(", ".join(str(key) for key in entries if type(key) is str) or "nothing")


def _stands_for(value: Any, small: Any, parameter: Tensor) -> bool:
    """Whether a value can be of a parameter what another is of a small one with 2 in every dimension."""
    if not isinstance(small, Tensor):
        return not isinstance(value, Tensor) and _is_plain(value)
    shape = list(small.shape)
    if small.dim() == parameter.dim():
        shape = [there if two == 2 else two for two, there in zip(small.shape, parameter.shape, strict=True)]
    return isinstance(value, Tensor) and _is_dense(value) and value.dtype == small.dtype and list(value.shape) == shape


def _is_dense(value: Tensor) -> bool:
    """Whether each number of a tensor has a place of its own: what updates it in place may not count strides."""
    if value.layout != torch.strided:
        return False
    return value.is_contiguous() or (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))


def _is_plain(value: Any) -> bool:
    """Whether a setting is a number, a switch, a short text, or a few of them."""
    if isinstance(value, list | tuple):
        return (
            len(value) <= 10
            and not any(isinstance(part, list | tuple) for part in value)
            and all(map(_is_plain, value))
        )
    if type(value) is int:
        return abs(value) < LARGEST_COUNT
    return value is None or type(value) in (bool, float) or (type(value) is str and len(value) < 100)


def _is_like(value: Any, example: Any) -> bool:
    """Whether plain data is built like an example, with other numbers in it; private entries come and go with torch."""
    if isinstance(example, dict):
        if type(value) is not dict or not {k for k in example if k[:1] != "_"} <= value.keys() <= example.keys():
            return False
        return all(_is_like(value[key], example[key]) for key in value)
    if isinstance(example, list):
        return type(value) is list and len(value) == len(example) and all(map(_is_like, value, example))
    if type(example) is int:
        return type(value) is int and 0 <= value < LARGEST_COUNT
    return type(value) is type(example) or {type(value), type(example)} == {int, float}


def _flaw_of_callbacks(states: Any, callbacks: Iterable[Callback]) -> str:
    if not isinstance(states, dict) or not all(type(k) is str and isinstance(v, dict) for k, v in states.items()):
        return "what it holds of the callbacks is no dict of their states"
    for callback in callbacks:
        state = states.get(callback.state_key)
        try:
            if state:
                callback.load_state_dict(copy.deepcopy(state))
        except Exception as error:  # somebody's callback may raise anything of what is not its own
            return (
                f"its state of {type(callback).__name__} cannot be taken over ({type(error).__name__}: {show(error)})"
            )
    return ""
