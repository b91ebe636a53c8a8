"""`denoiselab-study`: a prediction of introductory texts on diffusion, measured; ends in a page with claims and verdicts."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from denoiselab.app.build import make_training
from denoiselab.app.compose import composition_message, config_folder
from denoiselab.app.nodes import check_keys, make_node
from denoiselab.app.sample import run_folder
from denoiselab.app.train import train
from denoiselab.app.trained import load_trained
from denoiselab.reports.studies.page import PAGE, print_claims, write_page
from denoiselab.reports.studies.study import Laboratory, Model, Study
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import prepare_folder, read_json
from denoiselab.runs.folder import CONFIG, SUMMARY, command_line
from denoiselab.training.trainer import free_cores

STUDY_KEYS: dict[str, Any] = {
    "study": dict[str, Any],
    "run": str | None,
    "checkpoint": str | None,
    "runs": str,
    "weights": str | None,
    "output": str | None,
    "device": str,
    "trust": list[str],
}


def study(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Measure, print the verdicts and write the page.

    Raises:
        ConfigError: if the run or an option is wrong; nothing is written then.
    """
    check_keys(options, STUDY_KEYS)
    started, console, name = time.perf_counter(), Console(), choices["study"]
    torch.set_num_threads(free_cores())
    found: Study = make_node(options["study"], "study")
    folder = Path(options["output"] or f"studies/{name}")
    laboratory = Laboratory(
        run=cache(lambda: _load(options)),
        plan=lambda label, changes: _plan(folder / "runs", label, changes, options),
        say=lambda line: print(f"{name}: {line}", file=sys.stderr),
    )
    try:
        found.check(laboratory)
        prepare_folder(folder)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"study={name}: {error}") from error
    findings = found.measure(laboratory)
    program, *arguments = command_line()
    start = ["python", f"scripts/{program}"] if program.endswith(".py") else [program]
    write_page(findings, folder, shlex.join([*start, *arguments]), options["study"])
    print_claims(console, findings.claims)
    console.print(f"{folder / PAGE}, {time.perf_counter() - started:.0f} s", highlight=False, soft_wrap=True)


def _load(options: dict[str, Any]) -> Model:
    """A trained run for a study; what it was measured by while it trained does not matter.

    Raises:
        ConfigError: if there is none, or its data is not there.
    """
    measured_by = _composed(["metrics=none"])["metrics"]
    trained = load_trained(options | {"nfe": None, "steps": None, "metrics": measured_by}, ("metrics",))
    parts = trained.parts
    try:
        parts.data.check()
    except ValueError as error:
        raise ConfigError(f"datamodule.{error}") from error
    return Model(
        denoiser=parts.objective.denoiser(trained.network),
        sampler=parts.sampler,
        data=parts.data,
        codec=parts.codec,
        shape=parts.shape,
        device=trained.device,
        knows_null=parts.data.num_classes > 0 and parts.objective.label_dropout > 0,
        facts={
            "run": run_folder(trained.checkpoint).name,
            "step": trained.step,
            "weights": trained.weights,
            "weights_sha256": trained.weights_sha256,
            "sampler": trained.config["sampler"],
            "train_fingerprint": parts.data.fingerprint("train"),
            "test_fingerprint": parts.data.fingerprint("test"),
        },
    )


def _composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved config of a training run.

    Raises:
        ConfigError: if it cannot be composed.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return OmegaConf.to_container(compose("train", list(overrides)), resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(composition_message(error, list(overrides))) from error


def _plan(root: Path, name: str, changes: Sequence[str], options: dict[str, Any]) -> Callable[[], Model]:
    """A run to be trained for the study, checked; a finished one of like config is taken instead."""
    config = _composed(changes) | {"name": name, "runs": str(root)}
    make_training(config)

    def model() -> Model:
        folder = _finished(root, config)
        if folder is None:
            with contextlib.redirect_stdout(sys.stderr):
                train(config, {}, list(changes))
            folder = _finished(root, config)
            assert folder is not None
        return _load(options | {"run": str(folder), "checkpoint": None, "weights": None})

    return model


def _finished(root: Path, config: dict[str, Any]) -> Path | None:
    """A finished run of this config, wherever it was started."""
    wanted = json.loads(json.dumps(config | {"runs": None}))
    for path in sorted(root.glob(f"*/{SUMMARY}")):
        given, summary = read_json(path.parent / CONFIG), read_json(path)
        if not isinstance(given, dict) or not isinstance(summary, dict):
            continue
        if given | {"runs": None} == wanted and summary.get("status") == "finished":
            return path.parent
    return None
