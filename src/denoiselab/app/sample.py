"""`denoiselab-sample`: images from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from denoiselab.app.nodes import check_keys
from denoiselab.app.trained import load_trained
from denoiselab.evaluation.generate import balanced_labels, generate
from denoiselab.evaluation.pictures import image_grid, save_images
from denoiselab.reports.console import print_results, sampler_line
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import prepare_folder, write_json
from denoiselab.training.checkpoint import FOLDER
from denoiselab.training.trainer import free_cores

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
    "device": str,
    "trust": list[str],
}


def sample(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Draw samples of a run and write them as npz, grid or PNG files, with how they were made beside them.

    Raises:
        ConfigError: if the run or an option is wrong; nothing is written then.
    """
    check_keys(options, SAMPLE_KEYS)
    torch.set_num_threads(free_cores())
    trained = load_trained(options, ("sampler", "guidance"))
    parts, count = trained.parts, options["num_samples"]
    classes = [options["class"]] if isinstance(options["class"], int) else options["class"]
    try:
        labels = balanced_labels(count, parts.data.num_classes, classes)
    except ValueError as error:
        raise ConfigError(str(error).replace("classes=", "class=", 1)) from error
    output = _output(options, trained.checkpoint)
    try:
        prepare_folder(output.parent if output.suffix else output)
    except ValueError as error:
        raise ConfigError(f"output={output}: {error}") from error
    images = generate(
        trained.denoiser,
        parts.sampler,
        indices=range(count),
        labels=labels,
        shape=parts.shape,
        codec=parts.codec,
        seed=options["seed"],
        batch_size=options["batch_size"],
        device=trained.device,
    )
    if output.suffix == ".npz":
        pixels = images.permute(0, 2, 3, 1).numpy()
        asked = np.full(count, -1) if labels is None else labels.numpy()
        np.savez_compressed(output, images=pixels, labels=asked)
    elif output.suffix == ".png":
        turn = len(classes) if classes else parts.data.num_classes
        image_grid(images, columns=turn if 1 < turn <= 20 else max(1, round(count**0.5))).save(output)
    else:
        save_images(images, labels, output)
    facts = {
        "checkpoint": trained.checkpoint,
        "weights": trained.weights,
        "step": trained.step,
        "sampler": trained.config["sampler"],
        "guidance": trained.config["guidance"],
        "nfe": parts.sampler.plan(trained.denoiser)[1],
        "num_samples": count,
        "seed": options["seed"],
        "class": classes,
    }
    write_json(output.with_name(output.name + ".json"), facts)
    shown = {
        "checkpoint": trained.checkpoint,
        "weights": f"{trained.weights}, step {trained.step}",
        "sampler": sampler_line(parts.sampler, facts["nfe"]),
        "samples": f"{count}, seed {options['seed']}",
        "output": output,
    }
    print_results(Console(), shown, [])


def _output(options: dict[str, Any], checkpoint: Path) -> Path:
    """Where to write."""
    if options["output"] is not None:
        output = Path(options["output"])
        if output.suffix not in ("", ".npz", ".png"):
            raise ConfigError(f"output={output}: must be FILE.npz, FILE.png or a folder")
        return output
    return run_folder(checkpoint) / "samples" / f"drawn_{options['num_samples']}_seed_{options['seed']}.png"


def run_folder(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, or the folder that a stray checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == FOLDER else checkpoint.parent
