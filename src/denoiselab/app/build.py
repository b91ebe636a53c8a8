"""What a run is made of, checked for what does not fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from denoiselab.app.nodes import GROUPS, Parts, check_keys, check_network, make, make_network, make_node, refuse
from denoiselab.app.weights import check_weights, initial_weights, read_weights
from denoiselab.condition import Condition
from denoiselab.data.augmentation import NoAugmentation
from denoiselab.data.datamodule import ImageDataModule
from denoiselab.data.order import micro_batch_size
from denoiselab.diffusion.denoiser import Denoiser
from denoiselab.diffusion.guidance import chain
from denoiselab.evaluation.metrics import Metrics
from denoiselab.runs.checks import check_kind, check_types, check_value, show
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import DATA
from denoiselab.runs.trust import check_targets
from denoiselab.training.checkpoint import digest
from denoiselab.training.ema import EMA
from denoiselab.training.module import DiffusionModule
from denoiselab.training.schedule import Schedule
from denoiselab.training.trainer import TrainerSettings

TRAIN_KEYS: dict[str, Any] = {
    "seed": int,
    "name": str | None,
    "runs": str,
    "run": str | None,
    "resume": str,
    "allow": list[str],
    "init_from": str | None,
    "init_weights": str | None,
    "compile": bool,
    "trust": list[str],
}


def make_parts(config: dict[str, Any], trust: Sequence[str] = ()) -> Parts:
    """Build and check what training, sampling and measuring share.

    Args:
        config: of the run, plain data with checked types.
        trust: packages whose classes the checkpoint of a guide may name.

    Raises:
        ConfigError: if a value is refused, or two choices do not fit together.
    """
    parts = Parts(
        data=make(config, "datamodule"),
        codec=make(config, "codec"),
        augmentation=make(config, "augmentation") if "augmentation" in config else NoAugmentation(dim=0),
        objective=make(config, "objective"),
        sampler=make(config, "sampler"),
        guidance=make(config, "guidance"),
        metrics=make(config, "metrics"),
    )
    layers = {path: _with_guide(layer, path, parts, config, trust) for path, layer in _layers(parts.guidance).items()}
    guided = _check_guidance(parts, layers)
    try:
        parts.sampler.plan(guided)
    except ValueError as error:
        raise ConfigError(f"sampler.{error}") from error
    return replace(parts, guidance=partial(chain, parts=layers))


def _layers(guidance: Any, path: str = "guidance") -> dict[str, Any]:
    """Each guidance of a chain in order, by where it stands in the config."""
    if not callable(guidance):
        raise ConfigError(f"{path}={show(guidance)}: must be a guidance, or null")
    if not (isinstance(guidance, partial) and guidance.func is chain):
        return {path: guidance}
    if "parts" not in guidance.keywords:
        raise ConfigError(f"{path}.parts: is missing; a chain needs it")
    layers: dict[str, Any] = {}
    for key, part in guidance.keywords["parts"].items():
        layers |= {} if part is None else _layers(part, f"{path}.parts.{key}")
    return layers


def _check_guidance(parts: Parts, layers: dict[str, Any]) -> Denoiser:
    """The guided denoiser, without a network.

    Raises:
        ConfigError: if a layer is refused, or asks without labels what was not trained so.
    """
    guided: Any = parts.objective.denoiser(nn.Identity())
    for path, layer in layers.items():
        try:
            guided = layer(guided)
        except ValueError as error:
            raise ConfigError(f"{path}.{error}") from error
        if getattr(guided, "needs_null", False):
            given = f"{path}.scale={guided.scale}" if hasattr(guided, "scale") else path
            if parts.data.num_classes == 0:
                raise ConfigError(f"{given}: the data has no class labels to guide by; use guidance=none")
            if parts.objective.label_dropout == 0:
                raise ConfigError(
                    f"{given}: needs a network trained without labels at times; set objective.label_dropout above 0"
                )
    return guided


class _OnDemand:
    """A frozen network that follows its input from device to device."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network.to(x.device)(x, t, condition)


def _with_guide(layer: Any, path: str, parts: Parts, config: dict[str, Any], trust: Sequence[str]) -> Any:
    """A layer of guidance in which the network of a second run stands for the name of that run."""
    given = layer.keywords if isinstance(layer, partial) else {}
    source = given.get("guide")
    if not isinstance(source, str):
        return layer
    loaded, state = read_weights(source, given.get("guide_weights"), f"{path}.guide", f"{path}.guide_weights")
    theirs = loaded["config"]
    missing = [g for g in ("objective", "backbone", "codec") if not isinstance(theirs.get(g), dict)]
    missing += [] if isinstance(theirs.get("seed"), int) else ["seed"]
    if missing:
        raise ConfigError(f"{path}.guide={source}: its config has no {missing[0]}; it is not a run's")
    try:
        check_targets(theirs, trust)
        check_types({key: theirs[key] for key in ("objective", "backbone")})
        if theirs["codec"] != config["codec"]:
            raise ConfigError(f"codec={show(theirs['codec'])}: this run has {show(config['codec'])}")
        objective = make(theirs, "objective")
        bare = check_network(theirs, replace(parts, objective=objective))
        check_weights(state, bare, "it does not fit its own config", "its weights")
        network = make_network(theirs)
    except ConfigError as error:
        raise ConfigError(f"{path}.guide={source}: its network does not fit: {error}") from error
    except Exception as error:  # whoever wrote the file may have written anything
        reason = f"{type(error).__name__}: {show(error)}"
        raise ConfigError(f"{path}.guide={source}: its config cannot be used ({reason})") from error
    found = digest(state)
    if given.get("guide_sha256") not in (None, found):
        raise ConfigError(f"{path}.guide_sha256={given['guide_sha256']}: the weights of {source} have {found}")
    node = config
    for key in path.split("."):
        node = node[key]
    node["guide_sha256"] = found  # the config is what numbers and checkpoints carry
    network.load_state_dict(state)
    others = {key: value for key, value in given.items() if not key.startswith("guide")}
    return partial(layer.func, **others, guide=objective.denoiser(_OnDemand(network)))


@dataclass(frozen=True)
class Training:
    """The objects of a training run beside `Parts`."""

    settings: TrainerSettings
    optimizer: Any
    schedule: Schedule
    ema: EMA
    callbacks: dict[str, Any]
    initial: dict[str, Tensor] | None


def make_training(config: dict[str, Any], recorded: Any = None) -> tuple[Parts, Training]:
    """Everything a training run needs, built and checked; nothing is created.

    Args:
        config: of the run.
        recorded: what the data was when the run began; None takes it as it is.

    Raises:
        ConfigError: for the first mistake, in one line.
    """
    check_keys(config, TRAIN_KEYS)
    for group in GROUPS:
        if not isinstance(config.get(group), dict):
            raise ConfigError(f"{group}={show(config.get(group))}: must be chosen, for example with {group}=...")
    parts = make_parts(config, config["trust"])
    check_value(config.get("callbacks"), dict | None, "callbacks")
    nodes = {key: node for key, node in (config.get("callbacks") or {}).items() if node is not None}
    for key, node in nodes.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise ConfigError(f"callbacks.{key}={show(node)}: must have a _target_; null leaves it out")
        check_kind(node, Callback, f"callbacks.{key}")
    callbacks = {key: make_node(node, f"callbacks.{key}") for key, node in nodes.items()}
    training = Training(
        settings=make(config, "trainer"),
        optimizer=make(config, "optimizer"),
        schedule=make(config, "schedule"),
        ema=make(config, "ema"),
        callbacks=callbacks,
        initial=None,
    )
    network = check_network(config, parts)
    settings = training.settings
    _check_optimizer(config["optimizer"], training.optimizer)
    refuse("datamodule.", lambda: parts.data.check_batch(settings.world_size, settings.accumulate))
    micro_batch = micro_batch_size(parts.data.batch_size, settings.world_size, settings.accumulate)
    refuse("objective.coupling.", lambda: parts.objective.coupling.check(micro_batch))
    if parts.augmentation.dim and parts.data.flip:
        raise ConfigError("datamodule.flip=true: the augmentation mirrors images itself; use datamodule.flip=false")
    if parts.augmentation.dim and parts.shape != (parts.data.channels, *parts.data.size):
        raise ConfigError(
            f"augmentation.dim={parts.augmentation.dim}: changes pixels, and this codec has none; use codec=rgb"
        )
    if recorded is not None:
        refuse(f"{DATA}: ", lambda: parts.data.recall(recorded))
    refuse("datamodule.", parts.data.check)
    check_metrics(config, parts.metrics, parts.data)
    for name in parts.metrics.weights or ():
        if name not in training.ema.names:
            raise ConfigError(f"metrics.weights={name}: must be among {', '.join(training.ema.names)}")
    if config["init_from"] is None and config["init_weights"] is not None:
        raise ConfigError(
            f"init_weights={config['init_weights']}: needs init_from, the run whose weights to start from"
        )
    if config["init_from"] is not None:
        initial = initial_weights(config["init_from"], config["init_weights"], network)
        training = Training(**{**vars(training), "initial": initial})
    return parts, training


def make_module(
    config: dict[str, Any], parts: Parts, training: Training, network: nn.Module, data: dict[str, str]
) -> DiffusionModule:
    """The LightningModule of a run, on data of these fingerprints."""
    return DiffusionModule(
        network=network,
        objective=parts.objective,
        codec=parts.codec,
        augmentation=parts.augmentation,
        sampler=parts.sampler,
        guidance=parts.guidance,
        optimizer=training.optimizer,
        schedule=training.schedule,
        ema=training.ema,
        seed=config["seed"],
        batch_size=parts.data.batch_size,
        shape=parts.shape,
        num_classes=parts.data.num_classes,
        config=config,
        data=data,
    )


def check_metrics(config: dict[str, Any], metrics: Metrics, data: ImageDataModule) -> None:
    """See to it that the metrics can be measured on the data.

    Raises:
        ConfigError: otherwise.
    """
    try:
        metrics.check(channels=data.channels, resolution=data.resolution, num_classes=data.num_classes)
    except ValueError as error:
        path = "datamodule" if str(error).partition("=")[0] in config["datamodule"] else "metrics"
        raise ConfigError(f"{path}.{error}; or choose other metrics (metrics=none measures nothing)") from error


def _check_optimizer(node: dict[str, Any], optimizer: Any) -> None:
    """Name the key whose value the optimizer refuses; torch names the value only."""
    try:
        optimizer([nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        reason, _, value = str(error).partition(": ")
        refused = [key for key, v in node.items() if value in map(str, [v, *v] if isinstance(v, list) else [v])]
        if not refused:
            raise ConfigError(f"optimizer: {error}") from error
        key, allowed = refused[0], "in [0, 1)" if refused[0] == "betas" else "at least 0"
        raise ConfigError(f"optimizer.{key}={show(node[key])}: must be {allowed} ({reason.lower()})") from error
