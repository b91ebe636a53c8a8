"""A network of ours as a diffusers pipeline folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from denoiselab.exchange.networks import diffusers_model
from denoiselab.exchange.schedulers import STEPS, Scheduler

CUSTOM = Path(__file__).with_name("pipeline.py")


def make_pipeline(node: dict[str, Any], state: dict[str, Tensor], scheduler: Scheduler, steps: int) -> Any:
    """A diffusers pipeline: DDIMPipeline where that is enough, else the one of `pipeline.py`.

    Args:
        node: config node of the network.
        state: its state dict.
        scheduler: of its path and prediction.
        steps: that the latter takes unless it is told otherwise; with DDIM the next divisor of its timesteps, so that
            they are equally spaced.

    Raises:
        ValueError: if diffusers has no such network.
    """
    import diffusers

    from denoiselab.exchange.pipeline import DenoiselabPipeline

    model = diffusers_model(node, state)
    theirs = getattr(diffusers, scheduler.name)(**scheduler.options)
    unet = isinstance(model, diffusers.UNet2DModel)
    plain = scheduler.plain and node["num_classes"] == 0 and not node.get("learned_variance", False)
    if unet and plain and scheduler.name == "DDIMScheduler":
        return diffusers.DDIMPipeline(unet=model, scheduler=theirs)
    if scheduler.name == "DDIMScheduler":
        steps = next(n for n in range(min(steps, STEPS), STEPS + 1) if STEPS % n == 0)
    return DenoiselabPipeline(
        scheduler=theirs,
        **{"unet" if unet else "transformer": model},
        num_classes=node["num_classes"],
        time_scale=scheduler.time_scale,
        time_offset=scheduler.time_offset,
        start=scheduler.start,
        frequency_shift=node.get("frequency_shift", 0),
        num_inference_steps=steps,
    )


def save_pipeline(pipeline: Any, folder: Path) -> bool:
    """Write a pipeline; whether it is our own, which is loaded with trust_remote_code=True."""
    pipeline.save_pretrained(folder)
    if not type(pipeline).__module__.startswith("denoiselab."):
        return False
    shutil.copyfile(CUSTOM, folder / CUSTOM.name)
    index = folder / "model_index.json"
    config = json.loads(index.read_text())
    config["_class_name"] = [CUSTOM.stem, type(pipeline).__name__]  # the module beside it, and the class in it
    index.write_text(json.dumps(config, indent=2) + "\n")
    return True
