"""`denoiselab-convert`: weights from elsewhere into a run, and a run into what others can read."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from denoiselab.app.build import make_parts
from denoiselab.app.nodes import Parts, check_keys, check_network, make, make_network
from denoiselab.app.sample import run_folder
from denoiselab.app.trained import load_trained
from denoiselab.diffusion.samplers import HeunT
from denoiselab.exchange import programs
from denoiselab.exchange.files import read, write_safetensors
from denoiselab.exchange.networks import Imported, import_network
from denoiselab.exchange.schedulers import from_scheduler, sampling_notes, scheduler_for
from denoiselab.exchange.to_diffusers import make_pipeline, save_pipeline
from denoiselab.reports.console import print_results
from denoiselab.runs.errors import ConfigError, RankError
from denoiselab.runs.files import check_own, prepare_folder, write_json
from denoiselab.runs.folder import COMMAND, CONFIG, VERSIONS, command_line, make_run_folder, versions
from denoiselab.training.checkpoint import FOLDER, SCHEMA, environment, step_name
from denoiselab.training.checkpoint_io import write_checkpoint
from denoiselab.training.trainer import free_cores

CONVERT_KEYS: dict[str, Any] = {
    "source": str | None,
    "format": Literal["auto", "diffusers", "dit", "edm"],
    "arguments": dict[str, Any] | None,
    "name": str | None,
    "run": str | None,
    "checkpoint": str | None,
    "runs": str,
    "weights": str | None,
    "to": Literal["diffusers", "torch_export", "torchscript", "safetensors", "run"] | None,
    "output": str | None,
    "seed": int,
    "trust": list[str],
}
DEFAULT_STEPS = 50
ENDINGS = {"diffusers": "", "torch_export": ".pt2", "torchscript": ".pt", "safetensors": ".safetensors"}


@dataclass(frozen=True)
class Model:
    """A network with its weights and the objects that go with it.

    Args:
        network: in evaluation mode, on the CPU.
        config: of the run.
        parts: None where nobody asked for more than the network.
        facts: what it is and what one should know, for the terminal.
        folder: of the run; None for an import.
    """

    network: nn.Module
    config: dict[str, Any]
    parts: Parts | None
    facts: dict[str, Any]
    folder: Path | None


def convert(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Import weights, or export a run.

    Raises:
        ConfigError: if something is wrong with the source, the run or an option; nothing is written then.
        RankError: if what was written does not compute what the network computes; it is removed.
    """
    check_keys(options, CONVERT_KEYS)
    torch.set_num_threads(free_cores())
    given = [f"{key}={options[key]}" for key in ("source", "run", "checkpoint") if options[key] is not None]
    if options["source"] is not None and len(given) > 1:
        raise ConfigError(f"{given[0]}: give either a source to import or a run to export ({given[1]})")
    to = options["to"] or ("run" if options["source"] is not None else None)
    if to is None or (to == "run" and options["source"] is None):
        raise ConfigError(f"to={to or 'null'}: must be one of {', '.join(ENDINGS)} for a run, whose weights to export")
    model = _exported_run(options) if options["source"] is None else _imported(options, to)
    if to == "run":
        facts = _write_run(model, options, overrides)
    else:
        output = _output(options, model, to)
        facts = {"diffusers": _to_diffusers, "safetensors": _to_safetensors}.get(to, _to_program)(model, output)
    print_results(Console(), model.facts | facts, [])


def _exported_run(options: dict[str, Any]) -> Model:
    for key in ("datamodule", "codec", "objective", "arguments"):
        if options.get(key) is not None:
            given = _class(options[key]) if "_target_" in options[key] else options[key]
            raise ConfigError(f"{key}={given}: is for imports; a run has its own")
    trained = load_trained(options | {"nfe": None, "steps": None, "device": "cpu"}, ("sampler",))
    facts = {"checkpoint": trained.checkpoint, "weights": f"{trained.weights}, step {trained.step}"}
    return Model(trained.network, trained.config, trained.parts, facts, run_folder(trained.checkpoint))


def _imported(options: dict[str, Any], to: str) -> Model:
    """The network of a source with the config that a run of it would have."""
    try:
        source = read(Path(options["source"]))
        found = import_network(source, options["format"], options["arguments"])
    except ValueError as error:
        raise ConfigError(_named(str(error), options["source"])) from error
    defaults = options["imported"]
    config: dict[str, Any] = {key: options[key] for key in ("seed", "name", "runs")}
    config |= {key: options.get(key) or defaults[key] for key in ("codec", "sampler")}
    config |= {key: defaults[key] for key in ("guidance", "metrics")} | {"backbone": found.backbone}
    network, parts = _filled(found, config), None
    facts = {
        "source": f"{options['source']} ({found.format})",
        "network": f"{type(network).__name__}, {sum(p.numel() for p in network.parameters()):,} parameters",
    }
    if to != "safetensors":
        config["objective"] = _objective(options, found, source.scheduler)
        config["datamodule"] = options.get("datamodule") or _datamodule(
            defaults["datamodule"], config, options["source"]
        )
        parts = make_parts(config)
        check_network(config, parts)
        facts["objective"] = " on ".join(_class(config["objective"][key]) for key in ("prediction", "path"))
    notes = (*found.notes, *sampling_notes(source.scheduler))
    return Model(network, config, parts, facts | ({"note": "; ".join(notes)} if notes else {}), None)


def _filled(found: Imported, config: dict[str, Any]) -> nn.Module:
    network = make_network(config)
    network.load_state_dict(found.state)
    return network.eval().requires_grad_(False)


def _named(message: str, source: str) -> str:
    """A message with the source in front, unless it begins with what was typed."""
    return message if message.startswith(("source=", "arguments.")) else f"source={source}: {message}"


def _class(node: dict[str, Any]) -> str:
    return node["_target_"].rpartition(".")[2]


def _objective(options: dict[str, Any], found: Imported, scheduler: dict[str, Any]) -> dict[str, Any]:
    """The objective that the source was trained with, as far as sampling needs it."""
    learned = {"learned_variance": found.backbone.get("learned_variance", False)}
    if options.get("objective") is not None:
        return options["objective"] | learned
    if found.format == "edm":
        return options["imported"]["edm"] | learned
    if found.format == "dit":
        return options["imported"]["objective"] | learned  # the linear betas and ε of the original code
    try:
        if not scheduler:
            raise ValueError("has no scheduler_config.json, which tells path and prediction")
        path, prediction = from_scheduler(scheduler)
    except ValueError as error:
        raise ConfigError(
            f"source={options['source']}: {error}; name an objective, such as objective=epsilon"
        ) from error
    return options["imported"]["objective"] | {"path": path, "prediction": prediction} | learned


def _datamodule(node: dict[str, Any], config: dict[str, Any], source: str) -> dict[str, Any]:
    """A datamodule of images as the network takes them, without the images."""
    backbone, codec = config["backbone"], make(config, "codec")
    factor, resolution = getattr(codec, "factor", 1), backbone["resolution"]
    if factor == 1 and backbone["channels"] not in (1, 3):
        raise ConfigError(
            f"source={source}: its network takes {backbone['channels']} channels, no pixels; choose the codec that makes "
            "them (codec=sd_vae codec.weights=...), or convert the weights alone (to=safetensors)"
        )
    return node | {
        "channels": backbone["channels"] if factor == 1 else 3,
        "resolution": [factor * s for s in resolution] if isinstance(resolution, list) else factor * resolution,
        "num_classes": backbone["num_classes"],
    }


# --- writing ---


def _write_run(model: Model, options: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A run folder at step 0 that sample, evaluate and init_from= take."""
    stem = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", Path(options["source"]).resolve().stem)
    if options["output"] is None:
        try:
            folder = make_run_folder(Path(options["runs"]), options["name"] or f"imported-{stem}"[:100])
        except ValueError as error:
            raise ConfigError(str(error)) from error
    else:
        folder = _free(Path(options["output"]))
    try:
        checkpoint = {
            "schema": SCHEMA,
            "config": model.config,
            "state_dict": {f"network.{key}": value for key, value in model.network.state_dict().items()},
            "ema": {},
            "ema_updates": 0,
            "global_step": 0,
            "environment": environment(),
        }
        write_checkpoint(checkpoint, folder / FOLDER / step_name(0))
        write_json(folder / CONFIG, model.config)
        write_json(folder / COMMAND, {"command": command_line(), "overrides": overrides, "choices": {}})
        write_json(folder / VERSIONS, versions())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"run": folder, "sample with": f"denoiselab-sample run={folder}"}


def _free(path: Path) -> Path:
    if path.exists():
        raise ConfigError(f"output={path}: exists already")
    return path


def _output(options: dict[str, Any], model: Model, to: str) -> Path:
    """Where to write an export, a place that is free."""
    if options["output"] is not None:
        output = Path(options["output"])
        if output.suffix != ENDINGS[to] and ENDINGS[to]:
            raise ConfigError(f"output={output}: must end in {ENDINGS[to]} for to={to}")
        if to == "safetensors":
            _free(output.with_suffix(".json"))
        return _free(output)
    if model.folder is None:
        raise ConfigError(f"output=null: must be given for to={to} of a source")
    check_own(model.folder, "exports")
    return _free(model.folder / "exports" / f"{'pipeline' if to == 'diffusers' else 'denoiser'}{ENDINGS[to]}")


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A place beside the output to write to; what is complete there takes the output's name."""
    try:
        prepare_folder(output.absolute().parent)
    except ValueError as error:
        raise ConfigError(f"output={output}: {error}") from error
    parent = output.absolute().parent
    with tempfile.TemporaryDirectory(dir=parent, prefix=".convert-") as scratch:
        yield Path(scratch) / output.name
        for path in Path(scratch).iterdir():
            path.replace(output.parent / path.name)


def _to_diffusers(model: Model, output: Path) -> dict[str, Any]:
    parts, node = _parts(model), model.config["backbone"]
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ConfigError("to=diffusers: needs the package diffusers (pip install diffusers)") from error
    if parts.shape != (parts.data.channels, *parts.data.size):
        raise ConfigError(
            f"to=diffusers: exports networks on pixels; this one takes {parts.shape} of codec={_class(model.config['codec'])}"
        )
    denoiser, heun = parts.objective.denoiser(model.network), isinstance(parts.sampler, HeunT)
    points, nfe = parts.sampler.plan(parts.guidance(denoiser))
    try:
        scheduler = scheduler_for(denoiser.path, denoiser.prediction, heun=heun)
        steps = DEFAULT_STEPS if nfe is None else len(points) - 1  # None: the sampler takes as many as it needs
        pipeline = make_pipeline(node, model.network.state_dict(), scheduler, steps)
    except ValueError as error:
        raise ConfigError(f"to=diffusers: {error}") from error
    with _beside(output) as place:
        custom = save_pipeline(pipeline, place)
    twin = "ddim" if scheduler.name == "DDIMScheduler" else "heun_t" if heun else "euler_t"
    trust = ", trust_remote_code=True" if custom else ""
    whole = ", for N that divide 1000" if twin == "ddim" else ""
    return {
        "output": output,
        "load with": f'diffusers.DiffusionPipeline.from_pretrained("{output}"{trust})',
        "draws as": f"sampler={twin} sampler/grid=uniform steps=N{whole}, guidance=none",
    }


def _to_safetensors(model: Model, output: Path) -> dict[str, Any]:
    with _beside(output) as place:
        facts = {key: str(value) for key, value in model.facts.items()}
        write_safetensors(place, model.network.state_dict(), {"facts": facts, "config": model.config})
    return {"output": output, "config": output.with_suffix(".json")}


def _to_program(model: Model, output: Path) -> dict[str, Any]:
    parts = _parts(model)
    program = programs.DenoiserProgram(
        denoiser=parts.objective.denoiser(model.network), labelled=parts.data.num_classes > 0
    ).eval()
    save: Callable[..., Any] = programs.save_torch_export if output.suffix == ".pt2" else programs.save_torchscript
    with _beside(output) as place:
        try:
            saved = save(program, parts.shape, place)
        except ValueError as error:
            raise ConfigError(f"to=torch_export: {error}; to=torchscript may") from error
        off = programs.difference(program, saved, parts.shape)
        if not off <= programs.TOLERANCE:
            raise RankError(
                f"output={output}: computes something else (off by {off:.1g} of the largest value); not kept"
            )
    return {
        "output": output,
        "takes": "x, t" + (", label" if program.labelled else "") + " (see denoiselab.exchange.programs), gives x0",
        "differs by": f"{off:.1g} of the largest value",
    }


def _parts(model: Model) -> Parts:
    assert model.parts is not None
    return model.parts
