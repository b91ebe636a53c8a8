"""`denoiselab-train`: one run, from a composed config to a folder."""

from __future__ import annotations

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from denoiselab.app.build import Training, make_module, make_training
from denoiselab.app.nodes import Parts, make, make_network
from denoiselab.evaluation.records import protocol_id
from denoiselab.reports.console import print_results, progress, sampler_line, time_line
from denoiselab.runs.errors import ConfigError, RankError
from denoiselab.runs.folder import (
    COMMAND,
    CONFIG,
    SUMMARY,
    VERSIONS,
    command_line,
    make_run_folder,
    versions,
    write_json,
)
from denoiselab.runs.launch import launch, launched_from_outside
from denoiselab.training.checkpoint import checkpoints_of
from denoiselab.training.logs import csv_logger, finish
from denoiselab.training.measurement import Measurement
from denoiselab.training.module import DiffusionModule

log = logging.getLogger("denoiselab")


def train(config: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Check the config, make the run folder and train.

    Args:
        config: resolved, plain data.
        choices: the choice of each group.
        overrides: as given on the command line.

    Raises:
        ConfigError: before anything is created.
        RankError: if one of several processes failed.
    """
    parts, training = make_training(config)
    if not parts.metrics.extractors and parts.metrics.bits_per_dim is not None:
        raise ConfigError(
            "metrics=bits_per_dim: is measured by evaluate.py, on the finished run; train with metrics=none"
        )
    given = int(os.environ.get("WORLD_SIZE", 1))
    if launched_from_outside() and given != training.settings.world_size:
        raise ConfigError(
            f"trainer.devices={training.settings.devices}: with trainer.num_nodes={training.settings.num_nodes} makes "
            f"{training.settings.world_size} processes, but the launcher has started {given}"
        )
    try:
        parts.data.prepare_data()  # a download, where the datamodule is told to make one
    except ValueError as error:
        raise ConfigError(f"datamodule.{error}") from error
    name = config["name"] or "-".join(choices[group] for group in ("datamodule", "backbone", "objective"))

    def start_folder() -> str:
        try:
            folder = make_run_folder(Path(config["runs"]), name)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        groups = {group: choice for group, choice in choices.items() if not group.startswith("hydra/")}
        write_json(folder / CONFIG, config)
        write_json(folder / COMMAND, {"command": command_line(), "overrides": overrides, "choices": groups})
        write_json(folder / VERSIONS, versions())
        return str(folder)

    folder = agree(start_folder) if launched_from_outside() else start_folder()
    threads = training.settings.choose_threads()
    if training.settings.devices == 1 or launched_from_outside():
        train_here(config, folder, threads, parts, training)
    else:
        launch(train_rank, (config, folder, threads), training.settings.devices)


def agree(make_value: Any) -> str:
    """What rank 0 makes, on every rank that a launcher such as torchrun has started."""
    if not dist.is_initialized():
        dist.init_process_group()
    values = [make_value() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values)
    assert isinstance(values[0], str)
    return values[0]


@record
def train_rank(config: dict[str, Any], folder: str, threads: int) -> None:
    """Train in a process that was started for this; builds its own objects."""
    train_here(config, folder, threads, *make_training(config))


def train_here(config: dict[str, Any], folder: str, threads: int, parts: Parts, training: Training) -> None:
    """Train in this process, which may be one of several."""
    torch.set_num_threads(threads)
    run_dir = Path(folder)
    console = Console()
    start_logging(run_dir)
    network = make_network(config)
    if training.initial is not None:
        network.load_state_dict(training.initial)
    parameters = sum(p.numel() for p in network.parameters())
    if config["compile"]:
        network.compile()
    module = make_module(config, parts, training, network)
    measurement = Measurement(metrics=parts.metrics, progress=progress)
    callbacks = list(training.callbacks.values())
    loggers = [csv_logger(run_dir), *make(config, "logger")(run_dir=run_dir, name=run_dir.name)]
    trainer = training.settings.build(run_dir, loggers, [*callbacks, measurement])
    if trainer.is_global_zero:
        nfe = parts.sampler.plan(parts.guidance(parts.objective.denoiser(network)))[1]
        facts = {
            "run": run_dir,
            "data": f"{len(parts.data.train_set()):,} training and {len(parts.data.test_set()):,} test images",
            "network": f"{type(network).__name__}, {parameters:,} parameters",
            "training": f"{trainer.max_steps:,} steps of {parts.data.batch_size} images; "
            f"processes: {trainer.world_size}, threads each: {threads}",
            "sampling": sampler_line(parts.sampler, nfe),
        }
        print_results(console, facts, [])
        log.info(" · ".join(f"{k}: {v}" for k, v in facts.items()))
        hyperparameters = {**config, "parameters": parameters, "nfe": nfe}
        for logger in trainer.loggers[1:]:
            logger.log_hyperparams(hyperparameters)
    _fit(trainer, module, parts.data, measurement, console, run_dir)


def _fit(
    trainer: lightning.Trainer,
    module: DiffusionModule,
    data: lightning.LightningDataModule,
    measurement: Measurement,
    console: Console,
    run_dir: Path,
) -> None:
    """Run the loop; whatever happens, the summary and the dashboard say how it ended."""
    began, status, problem = time.time(), "failed", ""
    try:
        trainer.fit(module, datamodule=data)
        status = "finished" if trainer.global_step >= trainer.max_steps else "stopped"
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        status, problem = "interrupted" if interrupted else "failed", f"{type(error).__name__}: {error}"
        log.exception("the run ended early")
        if not interrupted:
            raise
    finally:
        if trainer.is_global_zero:
            seconds = round(time.time() - began, 1)
            summary = summarise(trainer, module, measurement, run_dir, status, problem, seconds)
            write_json(run_dir / SUMMARY, summary)
            finish(trainer, summary["metrics"] | {"status": status}, failed=status != "finished")
            facts = {"run": run_dir, "status": status, "steps": trainer.global_step, "seconds": seconds}
            if measurement.seconds:
                facts["measuring"] = time_line(measurement.seconds)
            losses = {key: f"{value:,.4g}" for key, value in summary["losses"].items()}
            print_results(console, facts | losses, measurement.numbers)
    if status != "finished":  # SIGTERM reaches us as a SystemExit without a code, which would end the process with 0
        raise RankError(f"stopped at step {trainer.global_step} of {trainer.max_steps}; see {run_dir / 'train.log'}")


def summarise(
    trainer: lightning.Trainer,
    module: DiffusionModule,
    measurement: Measurement,
    run_dir: Path,
    status: str,
    problem: str,
    seconds: float,
) -> dict[str, Any]:
    """What summary.json holds."""
    latest: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        latest |= getattr(callback, "latest", {})
    kind = (measurement.metrics.weights or [module.ema.default])[0]
    numbers = [number for number in measurement.numbers if number.protocol["weights"] == kind]
    keys = ("train/loss", "train/images_per_second", "val/x0_mse", "val/epsilon_mse")
    saved = checkpoints_of(run_dir / "checkpoints")
    return {
        "status": status,
        "error": problem or None,
        "steps": trainer.global_step,
        "seconds": seconds,
        "weights": kind,
        "losses": {key: round(latest[key], 6) for key in keys if key in latest},
        "metrics": {number.name: number.value for number in numbers},
        "real": {number.name: number.floor for number in numbers if number.floor is not None},
        "protocols": {number.name: protocol_id(number.protocol) for number in numbers},
        "seconds_measuring": {name: round(value, 2) for name, value in measurement.seconds.items()},
        "checkpoint": str(saved[-1].relative_to(run_dir)) if saved else None,
    }


def start_logging(run_dir: Path) -> None:
    """Everything that is logged or warned goes to train.log; the terminal stays for what a person wants to see."""
    handler = logging.FileHandler(run_dir / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for expected in (
        "does not have many workers",
        "exists and is not empty",
        "isinstance.*LeafSpec",
        "litlogger",
    ):
        warnings.filterwarnings("ignore", message=f".*{expected}.*")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
