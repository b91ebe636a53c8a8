"""`denoiselab-train`: one run, from a composed config to a folder."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import time
import warnings
from contextlib import ExitStack, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from denoiselab.app.build import Training, make_training
from denoiselab.app.compose import cause
from denoiselab.app.job import Job, agree, open_job, set_up
from denoiselab.app.local_sweep import check_nodes
from denoiselab.app.nodes import Parts, make
from denoiselab.app.processes import meet
from denoiselab.app.resume import read_data, recorded_data, restored
from denoiselab.app.trained import without_consent
from denoiselab.data.datamodule import naming_workers
from denoiselab.evaluation.records import protocol_id
from denoiselab.reports.console import print_results, progress, sampler_line, time_line
from denoiselab.runs.errors import ConfigError, RankError, Stopped
from denoiselab.runs.files import open_own, read_json, write_json
from denoiselab.runs.folder import RUNNING, SUMMARY, writing
from denoiselab.runs.launch import echoes_last, is_echo, launch, launched_from_outside
from denoiselab.runs.secrets import RedactingFormatter, redact_terminal, redact_text
from denoiselab.runs.signals import STOPPING, held_back
from denoiselab.runs.trust import check_targets
from denoiselab.training.checkpoint import FOLDER, checkpoints_of
from denoiselab.training.history import METRICS, CSVLogger, append_text, read_rows, surviving
from denoiselab.training.logs import finish
from denoiselab.training.measurement import Measurement
from denoiselab.training.module import DiffusionModule
from denoiselab.training.saving import Checkpoints
from denoiselab.training.signals import StopOnSignal, before_training

BATCH_SYSTEM = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # who can wait for what takes seconds; Ctrl-C cannot
ASKED = ".asked_to_stop"  # a file with the signals that the launcher of several ranks has handed on
LOG = "train.log"
ASKED_SECONDS = 0.5  # after which it is there, if they were

log = logging.getLogger("denoiselab")


def train(config: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Check the config, make the run folder or go on with one, and train.

    Args:
        config: resolved, plain data.
        choices: the choice of each group.
        overrides: as given on the command line, and those that a resumed run was started with.

    Raises:
        ConfigError: before anything is created.
        RankError: if one of several processes failed.
        Stopped: after a signal.
    """
    if restored:  # part of this config comes from a file
        check_targets(config, config["trust"])
        config = without_consent(config, [override for override in overrides if override not in restored])
    parts, training = check_run(config)
    given = int(os.environ.get("WORLD_SIZE", 1))
    if launched_from_outside() and given != training.settings.world_size:
        raise ConfigError(
            f"trainer.devices={training.settings.devices}: with trainer.num_nodes={training.settings.num_nodes} makes "
            f"{training.settings.world_size} processes, but the launcher has started {given}"
        )
    if not launched_from_outside():
        check_nodes(config)
    try:
        parts.data.prepare_data()  # a download, where the datamodule is told to make one
    except ValueError as error:
        raise ConfigError(f"datamodule.{error}") from error
    name = config["name"] or "-".join(choices[group] for group in ("datamodule", "backbone", "objective"))
    groups = {group: choice for group, choice in choices.items() if not group.startswith("hydra/")}
    outside = launched_from_outside()
    with before_training(training.callbacks.values()) if outside else nullcontext(), ExitStack() as lock:

        def prepare() -> Job:
            return open_job(parts, training, config, name, {"overrides": overrides, "choices": groups}, lock)

        if outside:
            meet("cuda" if training.settings.accelerator == "gpu" else "cpu")
        job = agree(prepare) if outside else prepare()
        try:
            if outside:
                with echoes_last():
                    record(train_here)(job, parts, training)
                return
            if training.settings.devices == 1:
                train_here(job, parts, training)
                return
            asked = Path(job.folder) / ASKED
            asked.unlink(missing_ok=True)
            stopped = launch(train_rank, (job,), training.settings.devices, hand_on=asked)
            asked.unlink(missing_ok=True)
            if stopped:
                raise Stopped(*stopped)
        except BaseException as error:
            if os.environ.get("RANK", "0") == "0":
                conclude(Path(job.folder), error)
            if isinstance(error, RankError) or (isinstance(error, Exception) and not is_echo(error)):
                log_cause(Path(job.folder), error)
            raise


def check_run(config: dict[str, Any]) -> tuple[Parts, Training]:
    """What a run is made of, built and checked; nothing is created.

    Raises:
        ConfigError: if it cannot be, or cannot be trained.
    """
    parts, training = make_training(config, recorded_data(config))
    if not parts.metrics.extractors and parts.metrics.bits_per_dim is not None:
        raise ConfigError(
            "metrics=bits_per_dim: is measured by evaluate.py, on the finished run; train with metrics=none"
        )
    if (images := config["logger"].get("images", 0)) < 0:
        raise ConfigError(f"logger.images={images}: must be at least 0")
    return parts, training


def conclude(run_dir: Path, error: BaseException) -> None:
    """Have the summary and the dashboard say how the run ended, where no process was left to do so."""
    with surviving(run_dir / SUMMARY), suppress(ConfigError):  # a disk that is gone must not hide the first cause
        if read_json(run_dir / SUMMARY) == RUNNING:
            status = error.status if isinstance(error, Stopped) else "failed"
            write_json(run_dir / SUMMARY, {"status": status, "error": str(error) or type(error).__name__})
            if status == "failed":
                from denoiselab.training.wandb_sync import end_killed

                with suppress(Exception):
                    end_killed(run_dir)


def log_cause(run_dir: Path, error: BaseException) -> None:
    """Have the last line of train.log say why the run failed; to be called when no process writes there any more."""
    line = f"{datetime.now():%Y-%m-%d %H:%M:%S} ERROR denoiselab: {redact_text(cause(error))}\n"
    with suppress(OSError):  # a disk that is gone must not hide the first cause
        append_text(run_dir / LOG, line)


@record
def train_rank(job: Job) -> tuple[int, str] | None:
    """Train in a process that was started for this; builds its own objects. Returns the signal that stopped it, if any."""
    parts, training = make_training(job.config, read_data(Path(job.folder)))
    if any(isinstance(callback, StopOnSignal) for callback in training.callbacks.values()):
        for number in STOPPING:
            signal.signal(number, lambda *_: None)  # what reaches us after training is too late
    stopped: Stopped | None = None
    try:
        with echoes_last(), before_training(training.callbacks.values()):
            train_here(job, parts, training, Path(job.folder) / ASKED)
    except Stopped as error:
        stopped = error
    launcher = multiprocessing.parent_process()
    if launcher is not None and not launcher.is_alive():
        os._exit(
            stopped.code if stopped else 0
        )  # it was killed, and the agent's code would wait for it to take the result
    return (stopped.number, stopped.message) if stopped else None


def train_here(job: Job, parts: Parts, training: Training, asked: Path | None = None) -> None:
    """Train in this process, which may be one of several; `asked` as in `as_stopped`."""
    run_dir, console = Path(job.folder), Console()
    start_logging(run_dir)
    measurement = Measurement(metrics=parts.metrics, progress=progress)
    loggers = [CSVLogger(run_dir), *make(job.config, "logger")(run_dir=run_dir, name=run_dir.name)]
    trainer, module = set_up(job, parts, training, loggers, [*training.callbacks.values(), measurement])
    if trainer.is_global_zero:
        network = module.network
        parameters = sum(p.numel() for p in network.parameters())
        nfe = parts.sampler.plan(parts.guidance(parts.objective.denoiser(network)))[1]
        facts = {
            "run": run_dir,
            "data": f"{len(parts.data.train_set()):,} training and {len(parts.data.test_set()):,} test images",
            "network": f"{type(network).__name__}, {parameters:,} parameters",
            "training": f"{trainer.max_steps:,} steps of {parts.data.batch_size} images; "
            f"processes: {trainer.world_size}, threads each: {job.threads}",
            "sampling": sampler_line(parts.sampler, nfe),
        }
        if job.checkpoint:
            facts["going on from"] = Path(job.checkpoint).name
        print_results(console, facts, [])
        log.info(" · ".join(f"{k}: {v}" for k, v in facts.items()))
        for note in job.notes:
            console.print(note, style="yellow", highlight=False, soft_wrap=True)
            log.warning(note)
        hyperparameters = {**job.config, "parameters": parameters, "nfe": nfe}
        for logger in trainer.loggers[1:]:
            logger.log_hyperparams(hyperparameters)
    with writing(run_dir) if trainer.is_global_zero else nullcontext():
        _fit(trainer, module, parts.data, measurement, console, job, asked)


def _fit(
    trainer: lightning.Trainer,
    module: DiffusionModule,
    data: lightning.LightningDataModule,
    measurement: Measurement,
    console: Console,
    job: Job,
    asked: Path | None,
) -> None:
    """Run the loop; whatever happens, the summary and the dashboard say how it ended."""
    run_dir, began, status, problem = Path(job.folder), time.time(), "failed", ""
    stopped: Stopped | None = None
    try:
        with naming_workers():
            trainer.fit(module, datamodule=data, ckpt_path=job.checkpoint, weights_only=True)
        status = "finished" if trainer.global_step >= trainer.max_steps else "stopped"
    except BaseException as error:
        stopped = as_stopped(error, asked)
        if stopped is None:
            other = "another process of the job failed"
            problem = other if isinstance(error, Stopped) else cause(error)
            log.exception("the run ended early")
            raise
        status, problem = stopped.status, str(stopped)
        log.warning("%s at step %d", problem, trainer.global_step)
    finally:
        if trainer.is_global_zero:
            seconds = round(time.time() - began, 1)
            with held_back(BATCH_SYSTEM):
                summary = summarise(trainer, module, measurement, run_dir, status, problem, seconds)
                with surviving(run_dir / SUMMARY):
                    write_json(run_dir / SUMMARY, summary)
                finish(trainer, summary["metrics"], status)
            facts = {"run": run_dir, "status": status, "steps": trainer.global_step, "seconds": seconds}
            if measurement.seconds:
                facts["measuring"] = time_line(measurement.seconds)
            losses = {
                key: "not finite" if value is None else f"{value:,.4g}" for key, value in summary["losses"].items()
            }
            print_results(console, facts | losses, measurement.numbers)
    if stopped is not None:
        raise Stopped(stopped.number, how_to_go_on(trainer, run_dir))
    if status != "finished":
        raise RankError(f"stopped at step {trainer.global_step} of {trainer.max_steps}; see {run_dir / LOG}")


def as_stopped(error: BaseException, asked: Path | None) -> Stopped | None:
    """The signal that ended training, if one did, and not a failure.

    Args:
        error: that ended it.
        asked: is there if our launcher was asked to stop; else a SIGTERM is how it ends the others when a rank has failed.
    """
    interrupt = error.__context__ if isinstance(error, SystemExit) else error  # Lightning makes the one of the other
    if isinstance(interrupt, KeyboardInterrupt):
        return Stopped(signal.SIGINT)
    if not isinstance(error, Stopped):
        return None
    if asked is not None and error.number == signal.SIGTERM:
        time.sleep(ASKED_SECONDS)
        return error if asked.exists() else None
    return error


def how_to_go_on(trainer: lightning.Trainer, run_dir: Path) -> str:
    """What is saved, and the command that goes on from it."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    failed = [c.last_failure for c in callbacks if isinstance(c, Checkpoints) and c.last_failure is not None]
    saved = checkpoints_of(run_dir / FOLDER)
    what = "nothing was saved yet"
    if saved:
        what = f"the newest is {saved[-1].name}" if failed else f"saved {saved[-1].name}"
    what = "; ".join([*failed, what])
    return f"{what}; to go on: python scripts/train.py run={run_dir} resume=auto"


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
    for row in read_rows(run_dir / METRICS):  # which earlier starts of the run have written as well
        latest |= {key: float(value) for key, value in row.items() if value}
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
        "losses": {key: round(latest[key], 6) if math.isfinite(latest[key]) else None for key in keys if key in latest},
        "metrics": {number.name: number.value for number in numbers},
        "real": {number.name: number.floor for number in numbers if number.floor is not None},
        "protocols": {number.name: protocol_id(number.protocol) for number in numbers},
        "seconds_measuring": {name: round(value, 2) for name, value in measurement.seconds.items()},
        "checkpoint": str(saved[-1].relative_to(run_dir)) if saved else None,
    }


def start_logging(run_dir: Path) -> None:
    """Everything that is logged or warned goes to train.log; the terminal stays for what a person wants to see.

    What is said of checkpoints goes there too: train.log is on the disk that has no room for them, or has failed.
    """
    redact_terminal()
    handler = logging.FileHandler(run_dir / LOG, delay=True)
    handler.stream = open_own(run_dir / LOG, "a")  # type: ignore[assignment]
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = logging.StreamHandler()
    terminal.addFilter(logging.Filter(Checkpoints.__module__))
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    for new in (handler, terminal):
        new.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk costs lines of the log, no more
        root.addHandler(new)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for expected in (
        "does not have many workers",
        "exists and is not empty",
        "isinstance.*LeafSpec",
        "litlogger",
        "srun. command is available",
    ):
        warnings.filterwarnings("ignore", message=f".*{expected}.*")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
