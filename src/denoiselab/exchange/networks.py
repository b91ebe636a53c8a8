"""Networks under other names: into a config node and a state dict of ours, and from these into diffusers' models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.backbones.dit import DiT
from denoiselab.backbones.song_unet import SongUNet, edm_names
from denoiselab.backbones.unet import UNet
from denoiselab.exchange import dit, edm, unet
from denoiselab.exchange.files import Source
from denoiselab.exchange.keys import Origin, origins, renamed, to_ours, to_theirs
from denoiselab.runs.checks import check_types

NETWORKS = {f"{kind.__module__}.{kind.__name__}": kind for kind in (UNet, DiT, SongUNet)}


@dataclass(frozen=True)
class Imported:
    """A network from elsewhere.

    Args:
        backbone: config node: `_target_` and constructor arguments.
        state: its state dict, float32.
        format: what it was: diffusers, dit or edm.
        notes: what one should know of it.
    """

    backbone: dict[str, Any]
    state: dict[str, Tensor]
    format: str
    notes: list[str] = field(default_factory=list)


def import_network(source: Source, style: str = "auto", arguments: dict[str, Any] | None = None) -> Imported:
    """The network in a source.

    Args:
        source: what was read.
        style: "auto", or one of "diffusers", "dit" (the original names) and "edm".
        arguments: constructor arguments that the source does not tell, or that shall be others.

    Raises:
        ValueError: if the source is of no known kind, no network of ours expresses it, or keys are missing or unknown.
    """
    style = detect(source) if style == "auto" else style
    try:
        return _import(source, style, arguments or {})
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        # a side of 0 divides by zero, one of 2**40 overflows, and torch says so at length
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"config.json or tensors hold what no such network has ({type(error).__name__}: {reason})"
        ) from error


def _import(source: Source, style: str, given: dict[str, Any]) -> Imported:
    state = source.state
    if style == "edm":
        state = edm.without_prefix(state)
        found = edm.from_edm(state) | given
        return _take(SongUNet, found, style, state, edm.filters(state, found["resample_filter"]))
    if style == "dit":
        return _take(DiT, dit.from_original(state) | given, style, state, {})
    name = source.model.get("_class_name")
    if name == unet.CLASS:
        state = {renamed(key, unet.OLD_NAMES): value for key, value in state.items()}
        imported = _take(UNet, unet.from_diffusers(source.model) | given, style, state, {})
        if imported.backbone["num_classes"] and "num_classes" not in source.pipeline:  # which is in those that we write
            imported.notes.append(f"the last of {unet.CLASS}'s labels is taken for the one that means no class")
        return imported
    if name == dit.CLASS or (name == dit.OLD_CLASS and source.model.get("norm_type") == "ada_norm_zero"):
        found = dit.from_diffusers(source.model, source.pipeline, state) | given
        imported = _take(DiT, found, style, state, {})
        if "frequency_shift" not in given | source.pipeline:
            imported.notes.append(dit.NOTE)
        return imported
    raise ValueError(f"_class_name={name}: must be {unet.CLASS} or {dit.CLASS}")


def detect(source: Source) -> str:
    """What a source is.

    Raises:
        ValueError: if it is nothing that is known.
    """
    if source.model:
        return "diffusers"
    if "x_embedder.proj.weight" in source.state:
        return "dit"
    if any(name.startswith(("enc.", "model.enc.")) for name in source.state):
        return "edm"
    first = ", ".join(list(source.state)[:3])
    raise ValueError(f"the names are neither DiT's nor EDM's ({first} …), and there is no config.json of diffusers")


def _take(
    kind: type[nn.Module], arguments: dict[str, Any], style: str, state: dict[str, Tensor], constants: dict[str, Tensor]
) -> Imported:
    node = {**arguments, "_target_": f"{kind.__module__}.{kind.__name__}"}
    network = empty(node)
    if isinstance(network, DiT):
        name = dit.DIFFUSERS_POSITIONS if style == "diffusers" else dit.ORIGINAL_POSITIONS
        with torch.device("meta"):  # what a config.json claims may be huge: it is made if the file has as much
            table = dit.positions(arguments)
        if name in state and state[name].shape == table.shape:
            table = dit.positions(arguments)
        constants = constants | {name: table}
        if style == "diffusers" and not arguments["num_classes"]:
            constants |= dit.no_labels(arguments)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    return Imported(node, to_ours(state, names_of(network, style), shapes, constants), style)


def empty(node: dict[str, Any]) -> nn.Module:
    """The network of a config node, without numbers.

    Raises:
        ValueError: if an argument is missing, unknown, or refused.
    """
    for key, value in node.items():
        if isinstance(value, dict):  # a foreign file must not name anything to be imported or built
            raise ValueError(f"arguments.{key}={value}: must be a plain value")
    check_types(node, "arguments")
    with torch.device("meta"):
        return NETWORKS[node["_target_"]](**{key: value for key, value in node.items() if key != "_target_"})


def names_of(network: nn.Module, style: str) -> dict[str, Origin]:
    """Where each tensor of a network of ours is found elsewhere."""
    names = list(network.state_dict())
    if isinstance(network, SongUNet):
        return {ours: Origin((theirs,)) for ours, theirs in edm_names(network).items()}
    if isinstance(network, UNet):
        return origins(names, unet.DIFFUSERS_NAMES)
    assert isinstance(network, DiT)
    table = dit.DIFFUSERS_NAMES if style == "diffusers" else dit.ORIGINAL_NAMES
    return origins(names, table, copies=len(network.blocks))


def diffusers_model(node: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """The diffusers model, UNet2DModel or DiTTransformer2DModel, of a network of ours, in evaluation mode.

    Args:
        node: the network's config node.
        state: its state dict.

    Raises:
        ValueError: if diffusers has no such network.
    """
    import diffusers

    kind = NETWORKS.get(node["_target_"])
    if kind is UNet:
        model, constants = diffusers.UNet2DModel(**unet.to_diffusers(node)), {}
    elif kind is DiT:
        model = diffusers.DiTTransformer2DModel(**dit.to_diffusers(node))
        constants = {} if node["num_classes"] else dit.no_labels(node)
    else:
        raise ValueError(f"backbone={node['_target_'].rpartition('.')[2]}: diffusers has UNet and DiT of our networks")
    model.load_state_dict(to_theirs(state, names_of(empty(node), "diffusers")) | constants)
    return model.eval()
