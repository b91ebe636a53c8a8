"""`denoiselab-evaluate`: the numbers of a trained run, or of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from denoiselab.app.build import check_metrics
from denoiselab.app.nodes import check_keys, make
from denoiselab.app.sample import SAMPLE_KEYS, run_folder
from denoiselab.app.trained import load_trained
from denoiselab.codecs.rgb import RGB
from denoiselab.data.datamodule import ImageDataModule
from denoiselab.diffusion.noise import hash64
from denoiselab.evaluation.generate import draw
from denoiselab.evaluation.metrics import Metrics
from denoiselab.evaluation.pictures import read_images
from denoiselab.evaluation.records import Number, sampling_protocol
from denoiselab.reports.console import print_results, sampler_line
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import prepare_folder, write_json
from denoiselab.training.trainer import free_cores

EVALUATE_KEYS = {k: v for k, v in SAMPLE_KEYS.items() if k not in ("num_samples", "class")} | {"images": str | None}


def evaluate(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Measure a run or images, print a table and write the numbers with their protocols as JSON.

    Raises:
        ConfigError: if the run, the images or an option is wrong; nothing is written then.
    """
    check_keys(options, EVALUATE_KEYS)
    torch.set_num_threads(free_cores())
    facts: dict[str, Any]
    if options["images"] is not None:
        facts, numbers = _measure_images(options)
        output = options["output"]
    else:
        facts, numbers, default = _measure_run(options)
        output = options["output"] or default
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(output), {"numbers": [number.to_dict() for number in numbers]})
        facts["output"] = output
    print_results(Console(), facts, numbers)


def _check(config: dict[str, Any], metrics: Metrics, data: ImageDataModule) -> None:
    if metrics.num_samples == 0 and metrics.bits_per_dim is None:
        raise ConfigError("metrics=none: nothing to measure; name metrics=digits, metrics=fid or metrics=bits_per_dim")
    try:
        data.check()
    except ValueError as error:
        raise ConfigError(f"datamodule.{error}") from error
    check_metrics(config, metrics, data)


def _measure_images(options: dict[str, Any]) -> tuple[dict[str, Any], list[Number]]:
    for group in ("datamodule", "metrics"):
        if options.get(group) is None:
            raise ConfigError(f"{group}=null: images are compared with data; name one, for example {group}=digits")
    data, metrics = make(options, "datamodule"), make(options, "metrics")
    _check(options, metrics, data)
    if metrics.extractor is None:
        raise ConfigError("metrics=bits_per_dim: is of a run; images are measured with metrics=digits or metrics=fid")
    try:
        images, labels = read_images(Path(options["images"]), data.channels)
        if tuple(images.shape[2:]) != data.size:
            raise ValueError(f"images={options['images']}: are {tuple(images.shape[2:])}, the data is {data.size}")
        numbers = metrics.measure(images, labels, data, {"images": options["images"]})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {"images": f"{len(images)} from {options['images']}"}, numbers


def _measure_run(options: dict[str, Any]) -> tuple[dict[str, Any], list[Number], Path]:
    trained = load_trained(options, ("sampler", "guidance", "metrics", "datamodule"))
    parts, metrics = trained.parts, trained.parts.metrics
    _check(trained.config, metrics, parts.data)
    if metrics.bits_per_dim is not None and not isinstance(parts.codec, RGB):
        raise ConfigError("metrics.bits_per_dim: is of pixels, and this codec has none; use metrics.bits_per_dim=null")
    folder = run_folder(trained.checkpoint) / "evaluations"
    try:
        prepare_folder(Path(options["output"]).parent if options["output"] else folder)
    except ValueError as error:
        raise ConfigError(f"output: {error}") from error
    nfe = parts.sampler.plan(trained.denoiser)[1]
    protocol = sampling_protocol(trained.config, weights=trained.weights, seed=metrics.seed, nfe=nfe)
    protocol |= {"step": trained.step}
    numbers: list[Number] = []
    if metrics.extractor is not None:
        images, labels = draw(
            trained.denoiser,
            parts.sampler,
            count=metrics.num_samples,
            num_classes=parts.data.num_classes,
            shape=parts.shape,
            codec=parts.codec,
            seed=metrics.seed,
            batch_size=options["batch_size"],
            device=trained.device,
        )
        metrics.extractor.to(trained.device)
        numbers += metrics.measure(images, labels, parts.data, protocol)
    if metrics.bits_per_dim is not None:
        solver = {key: protocol[key] for key in ("guidance", "weights", "step")}
        bits = metrics.bits_per_dim
        try:
            numbers.append(bits.measure(trained.denoiser, parts.codec, parts.data, trained.device, solver))
        except ValueError as error:
            raise ConfigError(f"metrics.bits_per_dim: {error}") from error
    facts = {
        "checkpoint": trained.checkpoint,
        "weights": f"{trained.weights}, step {trained.step}",
        "sampler": sampler_line(parts.sampler, nfe),
    }
    name = f"step_{trained.step:07d}_{trained.weights}_{hash64(str(numbers[0].protocol)) & 0xFFFFFFFF:08x}.json"
    return facts, numbers, folder / name
