"""Nodes of a plain config built into objects: types first, then ranges; the network with a trial call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from denoiselab.condition import Condition, height_width
from denoiselab.data.augmentation import EDMAugmentation, NoAugmentation
from denoiselab.data.datamodule import ImageDataModule
from denoiselab.diffusion.denoiser import Denoiser
from denoiselab.diffusion.noise import hash64
from denoiselab.diffusion.objective import Objective
from denoiselab.diffusion.samplers import Sampler
from denoiselab.evaluation.metrics import Metrics
from denoiselab.runs.checks import check_kind, check_types, check_value, show
from denoiselab.runs.errors import ConfigError
from denoiselab.training.ema import EMA
from denoiselab.training.module import Augmentation, Codec
from denoiselab.training.schedule import Schedule
from denoiselab.training.trainer import TrainerSettings

MOST = 100_000_000  # samples in one go
GROUPS: dict[str, Any] = {  # and what each is built into
    "datamodule": ImageDataModule,
    "backbone": nn.Module,
    "objective": Objective,
    "sampler": Sampler,
    "guidance": Callable[..., Denoiser],
    "optimizer": Callable[..., Optimizer],
    "schedule": Schedule,
    "ema": EMA,
    "metrics": Metrics,
    "codec": Codec,
    "augmentation": Augmentation,
    "trainer": TrainerSettings,
    "logger": Callable[..., list[Logger]],
}


def make(config: dict[str, Any], group: str) -> Any:
    """Build what a group of the config describes.

    Raises:
        ConfigError: if it is of another kind, or a constructor refuses a value; the message gets the path of the node.
    """
    node = config[group]
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{group}={show(node)}: must be chosen, for example with {group}=...")
    check_kind(node, GROUPS[group], group)
    return make_node(node, group)


def make_node(node: dict[str, Any], path: str) -> Any:
    """Build what a node of the config describes; `path` is where it stands, for messages.

    Raises:
        ConfigError: if a constructor refuses a value.
    """
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        # Hydra names the node that failed, relative to the group, in the last line of its message.
        last = str(error).strip().splitlines()[-1]
        inner = last.removeprefix("full_key: ") if last.startswith("full_key: ") else ""
        where, cause = f"{path}.{inner}" if inner else path, error.__cause__ or error
        if isinstance(cause, ValueError):
            raise ConfigError(f"{where}.{str(cause).replace('=None', '=null')}") from error
        raise ConfigError(f"{where}: cannot be built ({type(cause).__name__}: {show(cause)})") from error


def check_keys(config: dict[str, Any], keys: dict[str, Any]) -> None:
    """Check the types of the keys outside any group, and then of every node.

    Raises:
        ConfigError: for the first value of another type.
    """
    for key, annotation in keys.items():
        if key not in config:
            raise ConfigError(f"{key}: is missing")
        check_value(config[key], annotation, key)
    for key in config:
        if key not in (*keys, *GROUPS, "callbacks", "imported"):
            raise ConfigError(
                f"{key}={show(config[key])}: no such key (allowed: {', '.join(sorted(keys))}, and the groups)"
            )
    if "seed" in config and not 0 <= config["seed"] < 2**63:
        raise ConfigError(f"seed={config['seed']}: must be from 0 to 2^63 - 1")
    for key in ("num_samples", "batch_size"):
        if key in keys and config[key] < 1:
            raise ConfigError(f"{key}={config[key]}: must be at least 1")
        if key in keys and config[key] > MOST:
            raise ConfigError(f"{key}={config[key]}: must be at most {MOST:,}")
    check_types(config)


@dataclass(frozen=True)
class Parts:
    """The objects of a run, without the network."""

    data: ImageDataModule
    codec: Codec
    augmentation: NoAugmentation | EDMAugmentation
    objective: Objective
    sampler: Sampler
    guidance: Any
    metrics: Metrics

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees.

        Raises:
            ConfigError: if the codec is not for such images.
        """
        try:
            return self.codec.shape(self.data.channels, *self.data.size)
        except ValueError as error:
            raise ConfigError(f"datamodule.{error}") from error


def make_network(config: dict[str, Any], *, device: str | None = None) -> nn.Module:
    """The backbone with its initial weights, which depend on the seed alone; "meta" builds it without numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash64(config["seed"], "weights"))
        if device is None:
            return make(config, "backbone")
        with torch.device(device):
            return make(config, "backbone")


def refuse(prefix: str, check: Callable[[], Any]) -> Any:
    """What a check gives.

    Raises:
        ConfigError: with the prefix, where it raises a ValueError.
    """
    try:
        return check()
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def check_network(config: dict[str, Any], parts: Parts) -> nn.Module:
    """The network without numbers, after a trial call.

    Raises:
        ConfigError: if the backbone does not fit the data.
    """
    node, knows = config["backbone"], config["backbone"].get("augment_dim", 0)
    for key, value in (("num_classes", parts.data.num_classes), ("channels", parts.shape[0])):
        if key in node and node[key] != value:
            raise ConfigError(f"backbone.{key}={show(node[key])}: the data has {value}")
    if node.get("learned_variance", False) != parts.objective.learned_variance:
        raise ConfigError(
            f"backbone.learned_variance={show(node.get('learned_variance', False))}: the objective has "
            f"{show(parts.objective.learned_variance)}"
        )
    if "resolution" in node and refuse("backbone.", lambda: height_width(node["resolution"])) != parts.shape[1:]:
        height, width = parts.shape[1:]
        raise ConfigError(f"backbone.resolution={show(node['resolution'])}: the data has {height}x{width} for it")
    if parts.augmentation.dim not in (0, knows):
        raise ConfigError(
            f"augmentation.dim={parts.augmentation.dim}: the backbone is told {knows} numbers of how images were changed, and "
            "samples would look changed too; use augmentation=none or a backbone with that augment_dim"
        )
    network = make_network(config, device="meta")
    with torch.device("meta"):
        x, t, label = torch.zeros(2, *parts.shape), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        try:
            output = network(x, t, Condition(label=label if parts.data.num_classes else None))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"backbone: cannot take images of shape {parts.shape} ({error})") from error
    channels, learned = parts.shape[0], parts.objective.learned_variance
    if output.shape != (2, channels * (2 if learned else 1), *parts.shape[1:]):
        wanted = " and a learned variance" if learned else ""
        raise ConfigError(f"backbone: makes {tuple(output.shape[1:])} of images of shape {parts.shape}{wanted}")
    return network
