"""`denoiselab-sample`: images from a trained run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from denoiselab.app.nodes import check_keys
from denoiselab.app.processes import agree, choose_devices, run_processes
from denoiselab.app.trained import Trained, load_trained
from denoiselab.evaluation.collect import broadcast, ranks
from denoiselab.evaluation.generate import Source, balanced_labels, drawing
from denoiselab.evaluation.pictures import PROTOCOL, image_grid
from denoiselab.evaluation.records import sampling_protocol
from denoiselab.evaluation.writing import (
    check_folder,
    pictures_left,
    remove_partial,
    replacing,
    shard_path,
    shards_left,
    write_npz,
    write_pngs,
)
from denoiselab.reports.console import print_results, progress, sampler_line
from denoiselab.runs.errors import ConfigError, RankError
from denoiselab.runs.files import check_own, prepare_folder, write_json
from denoiselab.runs.launch import launched_from_outside
from denoiselab.training.checkpoint import FOLDER

SAMPLE_KEYS: dict[str, Any] = {
    "run": str | None,
    "checkpoint": str | None,
    "runs": str,
    "weights": str | None,
    "num_samples": int,
    "seed": int,
    "class": int | list[int] | None,
    "nfe": int | None,
    "steps": int | None,
    "batch_size": int,
    "output": str | None,
    "format": Literal["npz", "png"] | None,
    "shard": int,
    "device": str,
    "devices": int | Literal["auto"],
    "trust": list[str],
}
REPLACED = ("sampler", "guidance")
LARGEST_GRID = 1000


def sample(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Draw samples of a run and write them as npz, grid or PNG files, with how they were made beside them.

    Raises:
        ConfigError: if the run or an option is wrong; nothing is written then.
        RankError: if one of several processes failed, or a file cannot be written.
    """
    check_keys(options, SAMPLE_KEYS)
    devices = choose_devices(options["devices"], options["device"])
    elsewhere = devices > 1 and not launched_from_outside()  # then this process only checks
    trained = load_trained(options | ({"device": "cpu"} if elsewhere else {}), REPLACED)
    options = options | {"run": None, "checkpoint": str(trained.checkpoint)}  # the newest one may be another, later
    output = _output(options, devices)
    protocol = _protocol(options, trained, output)
    try:
        prepare_folder(output.parent if output.suffix else output)
        if not output.suffix:
            check_folder(output, protocol)
    except ValueError as error:
        reason = str(error)
        raise ConfigError(reason if reason.startswith("output=") else f"output={output}: {reason}") from error
    arguments = (options, output, protocol)
    try:
        drawn = run_processes(draw_samples, arguments, options["devices"], options["device"], ready=(trained,))
    except OSError as error:  # a full disk
        raise RankError(f"output={output}: {error}") from error
    if drawn is None:  # rank 0 tells
        return
    count, (fresh, seconds) = options["num_samples"], drawn
    found = f", {count - fresh:,} of them found there" if fresh < count else ""
    shown = {
        "checkpoint": trained.checkpoint,
        "weights": f"{trained.weights}, step {trained.step}",
        "sampler": sampler_line(trained.parts.sampler, protocol["nfe"]),
        "samples": f"{count:,}, seed {options['seed']}{found}",
        "time": f"{seconds:,.1f} s, {fresh / seconds:,.1f} images/s, processes: {devices}",
        "output": output,
    }
    print_results(Console(), shown, [])


def draw_samples(
    options: dict[str, Any], output: Path, protocol: dict[str, Any], trained: Trained | None = None
) -> tuple[int, float]:
    """Draw and write what is not there yet, on every rank of the job.

    Args:
        options: the composed config of `sample`, with the checkpoint.
        output: file or folder.
        protocol: to be written beside the samples.
        trained: the run; None loads it.

    Returns:
        How many samples all ranks have drawn, and the seconds of this rank.
    """
    trained = trained or load_trained(options, REPLACED)
    agree(trained.weights_sha256, "weights_sha256")
    parts, count, (rank, size) = trained.parts, options["num_samples"], ranks()
    labels = balanced_labels(count, parts.data.num_classes, protocol["class"])
    source = drawing(
        trained.denoiser,
        parts.sampler,
        labels=labels,
        shape=parts.shape,
        codec=parts.codec,
        seed=options["seed"],
        batch_size=options["batch_size"],
        device=trained.device,
    )
    began = time.monotonic()
    if output.suffix:
        with progress(count, "images") as advance:
            if output.suffix == ".npz":
                write_npz(output, source, range(count), labels, advance)
            else:
                turn = len(protocol["class"] or range(parts.data.num_classes))
                _write_grid(output, source, count, turn if 1 < turn <= 20 else max(1, round(count**0.5)), advance)
        write_json(output.with_name(output.name + ".json"), protocol)
        return count, time.monotonic() - began
    if rank == 0:
        remove_partial(output)
        write_json(output / PROTOCOL, protocol)
    if protocol["format"] == "npz":
        shards = broadcast(shards_left(output, count, options["shard"]) if rank == 0 else None)
        mine, left = shards[rank::size], sum(map(len, shards))
        with progress(left, "images", share=sum(map(len, mine))) as advance:
            for shard in mine:
                write_npz(shard_path(output, shard), source, shard, labels, advance)
    else:
        pictures = broadcast(pictures_left(output, count) if rank == 0 else None)
        left = len(pictures)
        with progress(left, "images") as advance:
            write_pngs(output, source, pictures[rank::size], labels, advance)
    return left, time.monotonic() - began


def _write_grid(output: Path, source: Source, count: int, columns: int, advance: Callable[[int], None]) -> None:
    drawn = []
    for numbers, images in source(range(count)):
        drawn.append(images.cpu())
        advance(len(numbers))
    with replacing(output) as file:
        image_grid(torch.cat(drawn), columns).save(file, format="png")


def _output(options: dict[str, Any], devices: int) -> Path:
    """Where to write; a file's name tells its format.

    Raises:
        ConfigError: if the options do not go together.
    """
    count = options["num_samples"]
    if options["output"] is None:
        run = run_folder(Path(options["checkpoint"]))
        check_own(run, "samples")
        output = run / "samples" / f"drawn_{count}_seed_{options['seed']}.png"
    else:
        output = Path(options["output"])
    if output.suffix not in ("", ".npz", ".png"):
        raise ConfigError(f"output={output}: must be FILE.npz, FILE.png or a folder")
    if output.suffix and options["format"] not in (None, output.suffix[1:]):
        raise ConfigError(f"format={options['format']}: is for a folder, and output={output} is one file")
    if output.suffix and devices > 1:
        raise ConfigError(f"devices={options['devices']}: one file is written by one process; give a folder as output")
    if output.suffix == ".png" and count > LARGEST_GRID:
        raise ConfigError(
            f"num_samples={count}: a grid shows at most {LARGEST_GRID}; give FILE.npz or a folder as output"
        )
    if options["shard"] < 1:
        raise ConfigError(f"shard={options['shard']}: must be at least 1")
    return output


def _protocol(options: dict[str, Any], trained: Trained, output: Path) -> dict[str, Any]:
    """All that fixes the samples and their files.

    Raises:
        ConfigError: if a class is asked for that the data does not have.
    """
    classes = [options["class"]] if isinstance(options["class"], int) else options["class"]
    try:
        balanced_labels(1, trained.parts.data.num_classes, classes)
    except ValueError as error:
        raise ConfigError(str(error).replace("classes=", "class=", 1)) from error
    protocol = {"checkpoint": str(trained.checkpoint)} | sampling_protocol(
        trained.config,
        weights=trained.weights,
        weights_sha256=trained.weights_sha256,
        step=trained.step,
        seed=options["seed"],
        nfe=trained.parts.sampler.plan(trained.denoiser)[1],
    )
    protocol |= {key: trained.config[key] for key in ("objective", "codec")}
    protocol |= {"class": classes, "num_samples": options["num_samples"]}
    protocol["format"] = output.suffix[1:] or options["format"] or "png"
    if not output.suffix and protocol["format"] == "npz":
        protocol["shard"] = options["shard"]
    return protocol


def run_folder(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, or the folder that a stray checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == FOLDER else checkpoint.parent
