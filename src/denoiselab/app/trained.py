"""A trained run, to sample from, to measure or to export."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from denoiselab.app.build import make_parts
from denoiselab.app.nodes import Parts, check_network, make_network
from denoiselab.app.resume import key_of
from denoiselab.app.weights import check_weights, find_checkpoint, read_checkpoint
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.runs.checks import check_types, show
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.trust import check_targets
from denoiselab.training.checkpoint import digest, network_weights


@dataclass(frozen=True)
class Trained:
    """A trained network with all that is needed to sample from it."""

    network: nn.Module
    parts: Parts
    config: dict[str, Any]
    weights: str
    checkpoint: Path
    step: int
    device: torch.device

    @property
    def denoiser(self) -> Any:
        """The guided denoiser."""
        bare: NetworkDenoiser = self.parts.objective.denoiser(self.network)
        return self.parts.guidance(bare)

    @cached_property
    def weights_sha256(self) -> str:
        """The hash of the weights, for the protocol."""
        return digest(self.network.state_dict())


def load_trained(options: dict[str, Any], replace: tuple[str, ...], *, counts: list[int] | None = None) -> Trained:
    """A run's network and parts, with the groups that the command line chose in place of the run's own.

    Args:
        options: the composed config of `sample` or `evaluate`.
        replace: groups that may be replaced.
        counts: sample counts of the metrics; None leaves the config's.

    Raises:
        ConfigError: if there is no such run, it is damaged, or an option does not fit it.
    """
    path = find_checkpoint(options["run"], options["checkpoint"], options["runs"])
    try:
        loaded = read_checkpoint(path)
        weights = options["weights"] or next(iter(loaded["ema"]), "raw")
        state = network_weights(loaded, weights)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    device, source = choose_device(options["device"]), f"checkpoint={path}"
    try:
        config = _config(loaded["config"], options, replace, counts, path)
        parts = make_parts(config, options["trust"])
        check_weights(state, check_network(config, parts), f"{source}: does not fit its own config", source)
        network = make_network(config)
    except ConfigError:
        raise
    except Exception as error:  # whoever wrote the file may have written anything
        reason = f"{type(error).__name__}: {show(error)}"
        raise ConfigError(f"{source}: its config cannot be used ({reason})") from error
    network.load_state_dict(state)
    network = network.to(device).eval().requires_grad_(False)
    return Trained(network, parts, config, weights, path, loaded["global_step"], device)


def _config(
    config: dict[str, Any], options: dict[str, Any], replace: tuple[str, ...], counts: list[int] | None, path: Path
) -> dict[str, Any]:
    """A checkpoint's config, checked, with what the command line chose."""
    check_targets(config, options["trust"])
    for group in ("datamodule", "backbone", "objective", "sampler", "guidance", "metrics", "codec"):
        if not isinstance(config.get(group), dict) or "_target_" not in config[group]:
            raise ConfigError(f"checkpoint={path}: its config has no {group}; it is not a run's")
    if type(config.get("seed")) is not int or config["seed"] < 0:
        raise ConfigError(f"checkpoint={path}: its config has no seed; it is not a run's")
    for group in replace:
        if options.get(group) is not None and "_target_" not in options[group]:
            raise ConfigError(f"{group}: only a part of it is given; name the whole with {group}=<choice>")
    config = without_consent(config)
    config |= {group: options[group] for group in replace if options.get(group) is not None}
    if options["nfe"] is not None and options["steps"] is not None:
        raise ConfigError(f"nfe={options['nfe']}: give either nfe or steps (steps={options['steps']})")
    if options["nfe"] is not None or options["steps"] is not None:
        if "nfe" not in config["sampler"]:
            given = next(f"{key}={options[key]}" for key in ("nfe", "steps") if options[key] is not None)
            raise ConfigError(f"{given}: this sampler chooses its own steps; leave nfe and steps out")
        config["sampler"] = config["sampler"] | {"nfe": options["nfe"], "steps": options["steps"]}
    if counts is not None:
        config["metrics"] = config["metrics"] | {"counts": counts}
    check_types(config)
    return config


def without_consent(node: Any, typed: Sequence[str] = (), path: str = "") -> Any:
    """A config without what a file may not ask for by itself.

    That is to fetch data, to take another program for CLIP's, and to occupy more of this machine than it has: processes and
    threads are no more than its cores, which no number depends on.

    Args:
        node: config, plain data.
        typed: overrides that somebody typed now, which stand as they are.
        path: of the node, to know them by.
    """
    if isinstance(node, list):
        return [without_consent(value, typed, path) for value in node]
    if not isinstance(node, dict):
        return node
    cores, bounded = os.cpu_count() or 1, {}
    for key, value in node.items():
        where = f"{path}.{key}" if path else key
        if any(key_of(override) == where for override in typed):
            bounded[key] = value
        elif key in ("download", "allow_other_weights") and value is True:
            bounded[key] = False
        elif key in ("num_workers", "threads") and type(value) is int:
            bounded[key] = min(value, cores)
        else:
            bounded[key] = without_consent(value, typed, where)
    return bounded


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        ConfigError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: must be one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no GPU")
    return torch.device(name)
