"""`denoiselab-evaluate`: the numbers of a trained run, or of images."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from denoiselab.app.build import check_metrics
from denoiselab.app.nodes import check_keys, make
from denoiselab.app.processes import agree, choose_devices, run_processes
from denoiselab.app.sample import SAMPLE_KEYS, run_folder
from denoiselab.app.trained import Trained, choose_device, load_trained
from denoiselab.codecs.rgb import RGB
from denoiselab.data.datamodule import ImageDataModule
from denoiselab.diffusion.noise import hash64
from denoiselab.evaluation.collect import ranks
from denoiselab.evaluation.counting import Counting
from denoiselab.evaluation.generate import Source, balanced_labels, drawing
from denoiselab.evaluation.metrics import PAIRS, Measured, Metrics
from denoiselab.evaluation.pictures import image_grid, stored_images, stored_protocol
from denoiselab.evaluation.records import sampling_protocol
from denoiselab.reports.console import print_results, progress, sampler_line, time_line
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import check_own, prepare_folder, write_json
from denoiselab.runs.launch import launched_from_outside

SHARED = (
    "run",
    "checkpoint",
    "runs",
    "weights",
    "seed",
    "nfe",
    "steps",
    "batch_size",
    "output",
    "device",
    "devices",
    "trust",
)
EVALUATE_KEYS = {k: v for k, v in SAMPLE_KEYS.items() if k in SHARED} | {
    "images": str | None,
    "counts": list[int] | None,
}


def evaluate(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Measure a run or images, print a table and write the numbers with their protocols as JSON.

    Raises:
        ConfigError: if the run, the images or an option is wrong; nothing is written then.
        RankError: if one of several processes failed.
    """
    check_keys(options, EVALUATE_KEYS)
    if options["images"] is None:
        _evaluate_run(options)
    else:
        _evaluate_images(options)


def _check(config: dict[str, Any], metrics: Metrics, data: ImageDataModule) -> None:
    if metrics.num_samples == 0 and metrics.bits_per_dim is None:
        raise ConfigError("metrics=none: nothing to measure; name metrics=digits, metrics=fid or metrics=bits_per_dim")
    try:
        data.check()
    except ValueError as error:
        raise ConfigError(f"datamodule.{error}") from error
    check_metrics(config, metrics, data)


@dataclass(frozen=True)
class Stored:
    """Images to be measured, with what they are measured by."""

    metrics: Metrics
    data: ImageDataModule
    source: Source
    labels: Tensor


def _evaluate_images(options: dict[str, Any]) -> None:
    for group in ("datamodule", "metrics"):
        if options.get(group) is None:
            raise ConfigError(f"{group}=null: images are compared with data; name one, for example {group}=digits")
    if options["counts"] is not None:
        options["metrics"] = options["metrics"] | {"counts": options["counts"]}
    devices = choose_devices(options["devices"], options["device"])
    stored = _stored(options)
    output = None if options["output"] is None else Path(options["output"])
    if output is not None:
        _prepare(output.parent)
    measured = run_processes(_measure_images, (options,), options["devices"], options["device"], ready=(stored,))
    if measured is None:  # rank 0 tells
        return
    facts: dict[str, Any] = {
        "images": f"{len(stored.labels):,} from {options['images']}",
        "time": f"{time_line(measured.seconds)}; processes: {devices}",
    }
    if output is not None:
        _write(output, measured)
        facts["output"] = output
    print_results(Console(), facts, measured.numbers)


def _stored(options: dict[str, Any]) -> Stored:
    """The images, checked for what is to be measured."""
    data, metrics = make(options, "datamodule"), make(options, "metrics")
    _check(options, metrics, data)
    if not metrics.extractors:
        raise ConfigError("metrics=bits_per_dim: is of a run; images are measured with metrics=digits or metrics=fid")
    try:
        source, labels = stored_images(Path(options["images"]), data.channels, batch_size=options["batch_size"])
        size = tuple(next(source([0]))[1].shape[2:])
        if size != data.size:
            raise ValueError(f"images={options['images']}: are {size}, the data is {data.size}")
        if int(labels.max()) >= max(data.num_classes, 1):
            allowed = f"from 0 to {data.num_classes - 1}, or -1" if data.num_classes else "-1: the data has no classes"
            raise ValueError(f"images={options['images']}: labels must be {allowed}, not {int(labels.max())}")
        if len(labels) < metrics.num_samples:
            given = f"metrics.counts={metrics.counts}"
            raise ValueError(f"{given}: must be at most {len(labels)}, the number of images; give others with counts=")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Stored(metrics, data, source, labels)


def _measure_images(options: dict[str, Any], stored: Stored | None = None) -> Measured:
    """What the processes do together; None reads the images."""
    stored = stored or _stored(options)
    metrics = stored.metrics
    for extractor in metrics.extractors.values():
        extractor.to(choose_device(options["device"]))
    with progress(metrics.num_samples, "images") as advance:
        protocol = {"images": options["images"], **stored_protocol(Path(options["images"]))}
        try:
            return metrics.measure(stored.source, stored.labels, stored.data, protocol, advance=advance)
        except ValueError as error:  # a damaged file
            raise ConfigError(str(error)) from error


def _evaluate_run(options: dict[str, Any]) -> None:
    devices = choose_devices(options["devices"], options["device"])
    elsewhere = devices > 1 and not launched_from_outside()  # then this process only checks
    trained = _load(options | ({"device": "cpu"} if elsewhere else {}))
    options = options | {"run": None, "checkpoint": str(trained.checkpoint)}  # the newest one may be another, later
    parts, metrics = trained.parts, trained.parts.metrics
    folder = run_folder(trained.checkpoint) / "evaluations"
    check_own(folder.parent, folder.name)
    _prepare(Path(options["output"]).parent if options["output"] else folder)
    protocol = _protocol(trained)
    wanted: dict[str, Any] = {name: extractor.hash for name, extractor in metrics.extractors.items()}
    wanted |= {key: trained.config[key] for key in ("metrics", "objective", "codec", "backbone")}
    wanted |= {split: parts.data.fingerprint(split) for split in ("train", "test")}
    key = f"{hash64(json.dumps([protocol, wanted], sort_keys=True)):016x}"[:8]
    shards = folder / f".features_{key}"
    arguments = (options, str(shards))
    measured = run_processes(_measure, arguments, options["devices"], options["device"], ready=(trained,))
    if measured is None:  # rank 0 tells
        return
    name = f"step_{trained.step:07d}_{trained.weights}_{key}.json"
    output = Path(options["output"]) if options["output"] else folder / name
    _write(output, measured)
    facts: dict[str, Any] = {
        "checkpoint": trained.checkpoint,
        "weights": f"{trained.weights}, step {trained.step}",
        "sampler": sampler_line(parts.sampler, protocol["nfe"]),
        "time": f"{time_line(measured.seconds)}; processes: {devices}",
        "output": output,
    }
    if measured.images is not None:
        facts["closest"] = output.with_name(f"{output.stem}_closest.png")
        image_grid(measured.images, PAIRS).save(facts["closest"])
    shutil.rmtree(shards, ignore_errors=True)  # numbers are written: the features behind them have served
    print_results(Console(), facts, measured.numbers)


def _prepare(folder: Path) -> None:
    try:
        prepare_folder(folder)
    except ValueError as error:
        raise ConfigError(f"output: {error}") from error


def _load(options: dict[str, Any]) -> Trained:
    """The run, checked for what is to be measured."""
    trained = load_trained(options, ("sampler", "guidance", "metrics", "datamodule"), counts=options["counts"])
    _check(trained.config, trained.parts.metrics, trained.parts.data)
    if trained.parts.metrics.bits_per_dim is not None and not isinstance(trained.parts.codec, RGB):
        raise ConfigError("metrics.bits_per_dim: is of pixels, and this codec has none; use metrics.bits_per_dim=null")
    return trained


def _protocol(trained: Trained) -> dict[str, Any]:
    return sampling_protocol(
        trained.config,
        weights=trained.weights,
        weights_sha256=trained.weights_sha256,
        step=trained.step,
        seed=trained.parts.metrics.seed,
        nfe=trained.parts.sampler.plan(trained.denoiser)[1],
    )


def _measure(options: dict[str, Any], shards: str, trained: Trained | None = None) -> Measured:
    """What the processes do together, each with a copy of the run; None loads it."""
    trained = trained or _load(options)
    agree(trained.weights_sha256, "weights_sha256")
    parts, metrics, protocol = trained.parts, trained.parts.metrics, _protocol(trained)
    measured, count = Measured([], {}, []), metrics.num_samples
    if count:
        labels = balanced_labels(count, parts.data.num_classes)
        for extractor in metrics.extractors.values():
            extractor.to(trained.device)
        counting = Counting(trained.denoiser) if protocol["nfe"] is None else None
        source = drawing(
            counting or trained.denoiser,
            parts.sampler,
            labels=labels,
            shape=parts.shape,
            codec=parts.codec,
            seed=metrics.seed,
            batch_size=options["batch_size"],
            device=trained.device,
        )
        asked = torch.full((count,), -1) if labels is None else labels
        with progress(count, "images") as advance:
            measured = metrics.measure(
                source, asked, parts.data, protocol, shards=Path(shards), advance=advance, counting=counting
            )
    if metrics.bits_per_dim is not None and ranks()[0] == 0:
        solver = {key: protocol[key] for key in ("guidance", "weights", "weights_sha256", "step")}
        bits = metrics.bits_per_dim
        try:
            number = bits.measure(trained.denoiser, parts.codec, parts.data, trained.device, solver)
        except ValueError as error:
            raise ConfigError(f"metrics.bits_per_dim: {error}") from error
        measured = replace(measured, numbers=[*measured.numbers, number])
    return measured


def _write(output: Path, measured: Measured) -> None:
    numbers = [number.to_dict() for number in measured.numbers]
    closest = [pair._asdict() for pair in measured.closest]
    write_json(output, {"numbers": numbers, "seconds": measured.seconds, "closest": closest})
