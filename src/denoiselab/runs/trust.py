"""What a file from elsewhere may name: the config of a checkpoint or a run folder is checked before any of it is built.

A `_target_` is admitted if what it leads to is a class that is *defined* in one of the packages below, by whatever way it was
reached, or one of the functions below; such classes were looked at, and do nothing outside the process when they are built.
Nothing outside these packages is imported to find out. Packages of one's own come in by the command line alone, with
`trust=[mypackage]`; a `trust` that stands in the file is not asked.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from typing import Any

from denoiselab.runs.checks import show
from denoiselab.runs.errors import ConfigError

ROOMS = tuple(f"denoiselab.{room}" for room in ("backbones", "codecs", "data", "diffusion", "evaluation", "training"))
# The project's functions that its own YAML files name, and whether they do so with _partial_: true only. The others in
# these packages do things: load_checkpoint, write_npz, start_wandb. A logger called at once would start a W&B run.
FUNCTIONS = {
    "denoiselab.diffusion.guidance.chain": True,
    "denoiselab.diffusion.guidance.unguided": True,
    "denoiselab.diffusion.paths.wrappers.resolution_shifted": False,
    "denoiselab.training.ema.half_life_ema": False,
    "denoiselab.training.logs.no_logger": True,
    "denoiselab.training.logs.tensorboard_logger": True,
    "denoiselab.training.logs.wandb_logger": True,
}
# Names are followed below these, and where other people's classes may be defined. Those of torchmetrics that work on images
# or text fetch a network when they are built. The layers of torch.nn are not among them: they make what they are told, of any
# size, and torch.nn.parallel starts talking to other processes; trust=[torch.nn] takes them.
WAYS = (*ROOMS, "torch.optim", "torchmetrics", "lightning.pytorch.callbacks")
LIBRARIES = (
    "torch.optim",
    "torchmetrics.aggregation",
    "torchmetrics.classification",
    "torchmetrics.regression",
)
# Of Lightning's callbacks those that write no files: ModelCheckpoint(dirpath=...), SpikeDetection(...) and others do.
CALLBACKS = (
    "DeviceStatsMonitor",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LearningRateMonitor",
    "ModelSummary",
    "RichModelSummary",
    "RichProgressBar",
    "StochasticWeightAveraging",
    "Timer",
    "TQDMProgressBar",
)
SAID = "denoiselab's parts, torch.optim, torchmetrics, Lightning's callbacks"

# No config comes near these; a file that goes beyond them wants to fill the memory, or the terminal.
DEEPEST, MOST, LONGEST, LARGEST = 40, 100_000, 20_000, 2**63
LONGEST_LIST = 2000  # or dict


def check_targets(node: Any, trust: Iterable[str], path: str = "") -> None:
    """Refuse what is no plain data, and targets that are not admitted, before anything of a foreign config is built.

    Args:
        node: config of a checkpoint or a run folder, whatever it holds.
        trust: further packages, from the command line.
        path: of the node, for messages.

    Raises:
        ConfigError: naming the first one.
    """
    names = list(trust)
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"trust=[{show(name)}]: must be names of packages")
    _check(node, names, path)


def check_plain(node: Any, path: str = "") -> None:
    """Refuse what is no plain data, or too much of it, in a foreign config of which nothing is to be built.

    Args:
        node: config of a checkpoint, whatever it holds.
        path: of the node, for messages.

    Raises:
        ConfigError: naming the first one.
    """
    _check(node, None, path)


def _check(node: Any, trust: list[str] | None, path: str) -> None:
    left, waiting = MOST, [(node, path, 0)]
    while waiting:
        value, where, depth = waiting.pop()
        # Exactly: a checkpoint can hold dicts and lists of other classes, and Hydra builds what is in them.
        kind = type(value)
        inside: list[tuple[Any, str]] = []
        if kind in (dict, list):
            left -= len(value)
            if left < 0 or depth == DEEPEST:
                problem = "holds too much" if left < 0 else "is nested too deep"
                raise ConfigError(f"{show(where)}: {problem} for a config")
            if len(value) > LONGEST_LIST:
                raise ConfigError(f"{show(where)}: must hold at most {LONGEST_LIST} values, not {len(value)}")
        if kind is dict:
            if trust is not None and "_target_" in value:
                _check_target(value, trust, where)
            for key in value:
                _check_key(key, where)
            inside = [(part, f"{where}.{key}" if where else key) for key, part in value.items()]
        elif kind is list:
            inside = [(part, f"{where}[{i}]") for i, part in enumerate(value)]
        else:
            _check_leaf(value, where)
        waiting += [(part, path, depth + 1) for part, path in reversed(inside)]


def _check_key(key: Any, path: str) -> None:
    if type(key) is not str or not key.isprintable() or len(key) > 200:
        given = show(key) if type(key) is str else f"of type {type(key).__name__}"
        raise ConfigError(f"{show(path)}: its key {given} must be a short text")
    if key in ("_args_", "_convert_", "_recursive_"):
        raise ConfigError(f"{show(path)}.{key}: is not allowed in a stored config")


def _check_leaf(value: Any, path: str) -> None:
    where = show(path)
    if type(value) is str:
        if len(value) > LONGEST:
            raise ConfigError(f"{where}={show(value)}: must be at most {LONGEST} characters")
        if "${" in value:  # Hydra would resolve it, to a node to be built for example
            raise ConfigError(f"{where}={show(value)}: must be resolved")
        if value == "???":
            raise ConfigError(f"{where}=???: is missing")
    elif type(value) is int:
        if not -LARGEST <= value < LARGEST:
            raise ConfigError(f"{where}: must be an integer of 64 bits")
    elif value is not None and type(value) not in (bool, float):
        raise ConfigError(f"{where}: must be plain data, not {type(value).__name__}")


def _check_target(node: dict[str, Any], trust: list[str], path: str) -> None:
    target, partial = node["_target_"], node.get("_partial_", False)
    if type(partial) is not bool:
        raise ConfigError(f"{show(path)}._partial_: must be true or false")
    if type(target) is not str:
        raise ConfigError(f"{show(path)}._target_: must be the full name of a class, not {type(target).__name__}")
    problem = _problem(target, partial, trust)
    if problem:
        raise ConfigError(f"{show(path)}._target_={show(target)}: {problem}")


def _problem(target: str, partial: bool, trust: list[str]) -> str:
    """Why a target is not admitted; empty if it is."""
    refused = f"is not trusted; allowed are {SAID}, and what trust=[...] adds"
    own = _below(target, trust)
    if not (own or _below(target, WAYS)):
        return refused
    try:
        found = resolve(target)
    except Exception as error:  # somebody's package may raise anything
        return f"cannot be imported ({show(error)})"
    if own:
        return "" if callable(found) and _below(str(getattr(found, "__module__", "")), trust) else refused
    name = _full_name(found)
    if not inspect.isclass(found):
        return refused if name not in FUNCTIONS else "needs _partial_: true" if FUNCTIONS[name] > partial else ""
    from_lightning = _below(name, WAYS[-1:]) and found.__name__ in CALLBACKS
    return "" if from_lightning or _below(name, (*ROOMS, *LIBRARIES)) else refused


def _below(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _full_name(found: Any) -> str:
    """Where something is defined, not where it was found; empty for what is neither a class nor a function."""
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return ""
    name = f"{found.__module__}.{found.__qualname__}"
    return name if getattr(sys.modules.get(found.__module__), found.__qualname__, None) is found else ""


def resolve(target: str) -> Any:
    """What a full name leads to, through modules alone and under their own names, so that nothing else is imported.

    Raises:
        ImportError: if a part of it is not there, or is another module under that name or no module at all.
    """
    first, *others = target.split(".")
    found, name = importlib.import_module(first), first
    for part in others:
        if not inspect.ismodule(found) or found.__name__ != name:
            raise ImportError(f"{name} is no module of its own")
        name = f"{name}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(name)
    return found
