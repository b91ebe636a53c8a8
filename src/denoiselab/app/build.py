"""From a plain config to checked objects: types first, then ranges, then what does not fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from denoiselab.condition import Condition, height_width
from denoiselab.data.augmentation import EDMAugmentation, NoAugmentation
from denoiselab.data.datamodule import ImageDataModule
from denoiselab.data.order import micro_batch_size
from denoiselab.diffusion.denoiser import Denoiser, NetworkDenoiser
from denoiselab.diffusion.guidance import chain
from denoiselab.diffusion.noise import hash64
from denoiselab.diffusion.objective import Objective
from denoiselab.diffusion.samplers import Sampler
from denoiselab.evaluation.metrics import Metrics
from denoiselab.runs.checks import check_targets, check_types, check_value, show
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import newest_run
from denoiselab.training.checkpoint import load_checkpoint, network_weights, newest_checkpoint
from denoiselab.training.ema import EMA
from denoiselab.training.module import Codec, DiffusionModule
from denoiselab.training.schedule import Schedule
from denoiselab.training.trainer import TrainerSettings

TRAIN_KEYS: dict[str, Any] = {
    "seed": int,
    "name": str | None,
    "runs": str,
    "init_from": str | None,
    "init_weights": str | None,
    "compile": bool,
    "trust": list[str],
}

GROUPS = (
    "datamodule",
    "backbone",
    "objective",
    "sampler",
    "guidance",
    "optimizer",
    "schedule",
    "ema",
    "metrics",
    "codec",
    "augmentation",
    "trainer",
    "logger",
)


def make(config: dict[str, Any], group: str) -> Any:
    """Build what a group of the config describes.

    Raises:
        ConfigError: if a constructor refuses a value; its message gets the path of the node.
    """
    return make_node(config[group], group)


def make_node(node: dict[str, Any], path: str) -> Any:
    """Build what a node of the config describes; `path` is where it stands, for messages.

    Raises:
        ConfigError: if a constructor refuses a value.
    """
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError):
            raise (error.__cause__ or error) from None
        # Hydra names the node that failed, relative to the group, in the last line of its message.
        last = str(error).strip().splitlines()[-1]
        inner = last.removeprefix("full_key: ") if last.startswith("full_key: ") else ""
        cause = str(error.__cause__).replace("=None", "=null")
        raise ConfigError(f"{path}.{inner + '.' if inner else ''}{cause}") from error


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
    loaded, state = _read_weights(source, given.get("guide_weights"), f"{path}.guide", f"{path}.guide_weights")
    theirs = loaded["config"]
    missing = [g for g in ("objective", "backbone", "codec", "seed") if g not in theirs]
    if missing:
        raise ConfigError(f"{path}.guide={source}: its config has no {missing[0]}; it is not a run's")
    try:
        check_targets(theirs, trust)
        check_types({key: theirs[key] for key in ("objective", "backbone")})
        if theirs["codec"] != config["codec"]:
            raise ConfigError(f"codec={show(theirs['codec'])}: this run has {show(config['codec'])}")
        objective = make(theirs, "objective")
        check_network(theirs, replace(parts, objective=objective))
        network = make_network(theirs)
    except ConfigError as error:
        raise ConfigError(f"{path}.guide={source}: its network does not fit: {error}") from error
    misfits = fit(state, network)
    if misfits:
        raise ConfigError(f"{path}.guide={source}: does not fit its own config: {misfits}")
    digest = _digest(state)
    if given.get("guide_sha256") not in (None, digest):
        raise ConfigError(f"{path}.guide_sha256={given['guide_sha256']}: the weights of {source} have {digest}")
    node = config
    for key in path.split("."):
        node = node[key]
    node["guide_sha256"] = digest  # the config is what numbers and checkpoints carry
    network.load_state_dict(state)
    others = {key: value for key, value in given.items() if not key.startswith("guide")}
    return partial(layer.func, **others, guide=objective.denoiser(_OnDemand(network)))


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of weights: of their names, shapes and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_network(config: dict[str, Any], *, device: str | None = None) -> nn.Module:
    """The backbone with its initial weights, which depend on the seed alone; "meta" builds it without numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash64(config["seed"], "weights"))
        if device is None:
            return make(config, "backbone")
        with torch.device(device):
            return make(config, "backbone")


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
    if "resolution" in node and height_width(node["resolution"]) != parts.shape[1:]:
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


@dataclass(frozen=True)
class Training:
    """The objects of a training run beside `Parts`."""

    settings: TrainerSettings
    optimizer: Any
    schedule: Schedule
    ema: EMA
    callbacks: dict[str, Any]
    initial: dict[str, Tensor] | None


def make_training(config: dict[str, Any]) -> tuple[Parts, Training]:
    """Everything a training run needs, built and checked; nothing is created.

    Raises:
        ConfigError: for the first mistake, in one line.
    """
    check_keys(config, TRAIN_KEYS)
    for group in GROUPS:
        if not isinstance(config.get(group), dict):
            raise ConfigError(f"{group}={show(config.get(group))}: must be chosen, for example with {group}=...")
    parts = make_parts(config, config["trust"])
    nodes = {key: node for key, node in (config.get("callbacks") or {}).items() if node is not None}
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
    _refuse("datamodule.", lambda: parts.data.check_batch(settings.world_size, settings.accumulate))
    micro_batch = micro_batch_size(parts.data.batch_size, settings.world_size, settings.accumulate)
    _refuse("objective.coupling.", lambda: parts.objective.coupling.check(micro_batch))
    if parts.augmentation.dim and parts.data.flip:
        raise ConfigError("datamodule.flip=true: the augmentation mirrors images itself; use datamodule.flip=false")
    if parts.augmentation.dim and parts.shape != (parts.data.channels, *parts.data.size):
        raise ConfigError(
            f"augmentation.dim={parts.augmentation.dim}: changes pixels, and this codec has none; use codec=rgb"
        )
    _refuse("datamodule.", parts.data.check)
    check_metrics(config, parts.metrics, parts.data)
    if config["init_from"] is None and config["init_weights"] is not None:
        raise ConfigError(
            f"init_weights={config['init_weights']}: needs init_from, the run whose weights to start from"
        )
    if config["init_from"] is not None:
        initial = _initial_weights(config["init_from"], config["init_weights"], network)
        training = Training(**{**vars(training), "initial": initial})
    return parts, training


def make_module(config: dict[str, Any], parts: Parts, training: Training, network: nn.Module) -> DiffusionModule:
    """The LightningModule of a run."""
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
    )


def _refuse(prefix: str, check: Any) -> None:
    try:
        check()
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def check_metrics(config: dict[str, Any], metrics: Metrics, data: ImageDataModule) -> None:
    """See to it that the metrics can be measured on the data.

    Raises:
        ConfigError: otherwise.
    """
    try:
        metrics.check(channels=data.channels, resolution=data.resolution, num_classes=data.num_classes)
    except ValueError as error:
        path = "datamodule" if str(error).partition("=")[0] in config["datamodule"] else "metrics.extractor"
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


def _initial_weights(source: str, weights: str | None, network: nn.Module) -> dict[str, Tensor]:
    """The weights of another run, if they fit the network."""
    _, state = _read_weights(source, weights, "init_from", "init_weights")
    misfits = fit(state, network)
    if misfits:
        raise ConfigError(f"init_from={source}: the network differs: {misfits}")
    return state


def _read_weights(
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


def load_trained(options: dict[str, Any], replace: tuple[str, ...]) -> Trained:
    """A run's network and parts, with the groups that the command line chose in place of the run's own.

    Args:
        options: the composed config of `sample` or `evaluate`.
        replace: groups that may be replaced.

    Raises:
        ConfigError: if there is no such run, it is damaged, or an option does not fit it.
    """
    path = find_checkpoint(options["run"], options["checkpoint"], options["runs"])
    try:
        loaded = load_checkpoint(path)
        weights = options["weights"] or next(iter(loaded["ema"]), "raw")
        state = network_weights(loaded, weights)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config = loaded["config"]
    check_targets(config, options["trust"])
    for group in ("datamodule", "backbone", "objective", "sampler", "guidance", "metrics", "codec"):
        if not isinstance(config.get(group), dict) or "_target_" not in config[group]:
            raise ConfigError(f"checkpoint={path}: its config has no {group}; it is not a run's")
    config = config | {group: options[group] for group in replace if options.get(group) is not None}
    if options["nfe"] is not None and options["steps"] is not None:
        raise ConfigError(f"nfe={options['nfe']}: give either nfe or steps (steps={options['steps']})")
    if options["nfe"] is not None or options["steps"] is not None:
        if "nfe" not in config["sampler"]:
            given = next(f"{key}={options[key]}" for key in ("nfe", "steps") if options[key] is not None)
            raise ConfigError(f"{given}: this sampler chooses its own steps; leave nfe and steps out")
        config["sampler"] = config["sampler"] | {"nfe": options["nfe"], "steps": options["steps"]}
    check_types(config)
    if not isinstance(config.get("seed"), int):
        raise ConfigError(f"checkpoint={path}: its config has no seed; it is not a run's")
    parts = make_parts(config, options["trust"])
    check_network(config, parts)
    network = make_network(config)
    misfits = fit(state, network)
    if misfits:
        raise ConfigError(f"checkpoint={path}: does not fit its own config: {misfits}")
    network.load_state_dict(state)
    device = choose_device(options["device"])
    network = network.to(device).eval().requires_grad_(False)
    return Trained(network, parts, config, weights, path, loaded["global_step"], device)


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
