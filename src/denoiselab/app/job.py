"""A training job: where a run begins, whether it can, its folder, and what every process of it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from denoiselab.app.build import Training, make_module
from denoiselab.app.nodes import Parts, make_network
from denoiselab.app.resumable import check_run
from denoiselab.app.resume import Start, find_start
from denoiselab.app.weights import fit
from denoiselab.runs.changes import check_changes
from denoiselab.runs.errors import ConfigError, RankError
from denoiselab.runs.files import check_own, from_json, make_durably, read_small, write_json, write_text
from denoiselab.runs.folder import (
    COMMAND,
    CONFIG,
    DATA,
    RUNNING,
    STARTS,
    SUMMARY,
    VERSIONS,
    command_line,
    held,
    make_folder,
    make_run_folder,
    versions,
)
from denoiselab.runs.secrets import redact
from denoiselab.runs.trust import check_plain
from denoiselab.training.checkpoint import FOLDER, load_checkpoint, network_weights, step_name
from denoiselab.training.checkpoint_io import link_atomically, load_run
from denoiselab.training.history import append_text, rewind
from denoiselab.training.module import DiffusionModule
from denoiselab.training.saving import Checkpoints, check_space, checkpoint_bytes, written_bytes


@dataclass(frozen=True)
class Job:
    """What every process of a run is told.

    Args:
        config: resolved, plain data.
        folder: of the run.
        threads: per process.
        checkpoint: to go on from.
        data: the fingerprints of both splits.
        notes: about the start, for the log.
    """

    config: dict[str, Any]
    folder: str
    threads: int
    checkpoint: str | None
    data: dict[str, str]
    notes: tuple[str, ...]


def open_job(
    parts: Parts, training: Training, config: dict[str, Any], name: str, how: dict[str, Any], lock: ExitStack
) -> Job:
    """Decide where a run begins, check that it can, and open its folder.

    Args:
        parts: of the run.
        training: of the run.
        config: of the run.
        name: for a folder of its own.
        how: overrides and choices, for command.json.
        lock: holds the folder until it is closed.

    Raises:
        ConfigError: if the run cannot begin so.
    """
    start = find_start(config)
    if start.exists and start.folder is not None:
        check_own(start.folder)
        lock.enter_context(held(start.folder))
        start = find_start(config)  # another process may have gone on with it until now
    data = {split: parts.data.fingerprint(split) for split in ("train", "test")}
    changes = check_resumed(start.checkpoint, parts, training, config, data) if start.checkpoint else []
    parameters = sum(p.numel() for p in make_network(config, device="meta").parameters())
    files = sum(c.most_files for c in training.callbacks.values() if isinstance(c, Checkpoints))
    needed = files * checkpoint_bytes(parameters, len(training.ema.decays))
    if start.exists and start.folder is not None:
        needed -= written_bytes(start.folder / FOLDER)
    try:
        check_space(start.folder or Path(config["runs"]), needed)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    again = ["no checkpoint yet: begins again at step 0"] if start.exists and start.checkpoint is None else []
    threads = training.settings.choose_threads(_last_threads(start.folder) if start.exists else None)
    began = {"data": data, "threads": threads}
    folder = open_folder(start, config, name, how, began, parts.data.record(), lock)
    return Job(
        config=config,
        folder=str(folder),
        threads=threads,
        checkpoint=None if start.checkpoint is None else str(_as_own(start.checkpoint, folder / FOLDER)),
        data=data,
        notes=(
            *again,
            *(f"damaged, left alone: {line}" for line in start.damaged),
            *(f"changed: {line}" for line in changes),
        ),
    )


def check_resumed(
    checkpoint: Path, parts: Parts, training: Training, config: dict[str, Any], data: dict[str, str]
) -> list[str]:
    """See to it that a run can go on from a checkpoint under a config; the differences that are harmless or allowed.

    Args:
        checkpoint: a whole one.
        parts: of the run that goes on.
        training: of the run that goes on.
        config: to go on with.
        data: fingerprints of both splits now.

    Raises:
        ConfigError: if the network, the data or the meaning of the run has changed, or the checkpoint is no run's.
    """
    try:
        loaded = load_run(checkpoint)
        check_plain(loaded["config"])
    except ValueError as error:
        raise ConfigError(f"resume={checkpoint}: {str(error).removeprefix(f'checkpoint={checkpoint}: ')}") from error
    changes = check_changes(loaded["config"], config, config["allow"])
    module = make_module(config, parts, training, make_network(config, device="meta"), data)
    misfits = fit(network_weights(loaded, "raw"), module.network)
    if misfits:
        raise ConfigError(f"resume={checkpoint}: the network differs: {misfits}")
    check_run(loaded, module, training.callbacks.values(), f"resume={checkpoint}")
    recorded = loaded.get("data")
    for split, now in data.items():
        then = recorded.get(split) if isinstance(recorded, dict) else None
        then = then if isinstance(then, str) else "unknown"
        if now != then and "data" not in config["allow"]:
            raise ConfigError(
                f"datamodule: the {split} data is not what the run has trained with (fingerprint {now[:8]}, then {then[:8]}); "
                "allow=[data] goes on all the same"
            )
    return changes


def open_folder(
    start: Start,
    config: dict[str, Any],
    name: str,
    how: dict[str, Any],
    began: dict[str, Any],
    record: dict[str, Any] | None,
    lock: ExitStack,
) -> Path:
    """The folder of the run: made, or taken over; says in it how it was started, with the data and threads of `began`.

    Raises:
        ConfigError: if it cannot be made, or another process works in it.
    """
    begun, step = start.exists, first_step(start.checkpoint)
    try:
        folder = make_run_folder(Path(config["runs"]), name) if start.folder is None else make_folder(start.folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not begun:
        lock.enter_context(held(folder))
    began = {"time": datetime.now().isoformat(timespec="seconds"), "step": step, **began}
    began |= {"command": command_line()} | versions()
    try:
        if begun:
            rewind(folder, step)
        elif (folder / CONFIG).exists():
            raise ConfigError(f"run={folder}: another process has just begun a run there")
        elif start.checkpoint is not None:  # of another run: from here on, this one's own
            make_durably(folder / FOLDER)
            link_atomically(start.checkpoint, _as_own(start.checkpoint, folder / FOLDER))
        write_json(folder / COMMAND, {"command": command_line(), **how})
        write_json(folder / VERSIONS, versions())
        if record is not None:
            write_text(folder / DATA, json.dumps(record) + "\n")
        write_json(folder / CONFIG, config)  # last for a new run: what has a config is a run
        append_text(folder / STARTS, json.dumps(redact(began)) + "\n")
        write_json(folder / SUMMARY, RUNNING)
    except OSError as error:
        raise ConfigError(f"run={folder}: cannot be written to ({error.strerror or error})") from error
    return folder


def _last_threads(folder: Path | None) -> Any:
    """The threads of each process at the last start of a run, as its folder says; None if it does not."""
    try:
        return None if folder is None else from_json(read_small(folder / STARTS).splitlines()[-1]).get("threads")
    except (FileNotFoundError, ConfigError, ValueError, IndexError, AttributeError):
        return None


def _as_own(checkpoint: Path, own: Path) -> Path:
    """Where a checkpoint is among the run's own: a branch has its origin's under the name of its step."""
    return checkpoint if checkpoint.parent.resolve() == own.resolve() else own / step_name(first_step(checkpoint))


def first_step(checkpoint: Path | None) -> int:
    """The step that a run goes on from; 0 without a checkpoint."""
    return 0 if checkpoint is None else load_checkpoint(checkpoint)["global_step"]


def agree(prepare: Callable[[], Job]) -> Job:
    """The job as rank 0 prepares it, on every rank that a launcher such as torchrun has started.

    Raises:
        ConfigError: on all of them, if it cannot.
        RankError: on the others, if something else goes wrong.
    """
    box: list[Job | ConfigError | RankError | None] = [None]
    try:
        if dist.get_rank() == 0:
            box = [prepare()]
    except ConfigError as error:
        box = [error]
    except Exception as error:
        box = [RankError(f"rank 0 failed: {type(error).__name__}: {error}")]
        raise
    finally:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    assert box[0] is not None
    return box[0]


def set_up(
    job: Job, parts: Parts, training: Training, loggers: list[Logger], callbacks: list[Callback]
) -> tuple[lightning.Trainer, DiffusionModule]:
    """The trainer and the module of a run, in this process, which may be one of several."""
    config = job.config
    torch.set_num_threads(job.threads)
    network = make_network(config)
    if training.initial is not None:
        network.load_state_dict(training.initial)
    if config["compile"]:
        network.compile()
    module = make_module(config, parts, training, network, job.data)
    return training.settings.build(Path(job.folder), loggers, callbacks), module
