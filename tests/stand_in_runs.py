"""Folders of runs with invented numbers, as training and evaluation leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from denoiselab.evaluation.records import Number

PROTOCOL: dict[str, Any] = {
    "sampler": {"grid": {"_target_": "lab.grids.Uniform"}, "_target_": "lab.samplers.HeunT", "nfe": 20},
    "guidance": {"_target_": "lab.guidance.unguided", "_partial_": True},
    "nfe": 19,
    "weights": "ema",
    "weights_sha256": "00",
    "step": 1600,
    "seed": 0,
    "extractor": "digits",
    "extractor_hash": "8be094e12dab",
    "count": 2000,
    "class_balance": "balanced",
    "reference": "train",
    "reference_hash": "21432cfd1066",
    "reference_count": 1297,
    "measure": {"name": "Frechet"},
}


def number(name: str, value: float, **given: Any) -> Number:
    """A number; `protocol` holds what differs from `PROTOCOL`, with the hash of weights that is always another."""
    protocol = PROTOCOL | {"weights_sha256": str(value)} | given.pop("protocol", {})
    return Number(name, value, given.pop("floor", None), protocol, **given)


def write_run(
    folder: Path,
    *numbers: Number,
    seed: int = 0,
    objective: str = "v",
    overrides: list[str] | None = None,
    **config: Any,
) -> Path:
    """A run folder with its config, command and metrics.jsonl."""
    folder.mkdir(parents=True)
    nodes = {"datamodule": {"_target_": "lab.Digits", "seed": seed}, "objective": {"_target_": f"lab.{objective}"}}
    (folder / "config.json").write_text(json.dumps(nodes | {"optimizer": {"lr": 1e-3}, "seed": seed} | config))
    command = {"choices": {"objective": objective, "trainer": "cpu"}, "overrides": overrides or []}
    (folder / "command.json").write_text(json.dumps(command))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(n.to_dict()) + "\n" for n in numbers))
    return folder
