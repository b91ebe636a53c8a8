"""`denoiselab-replay`: train a run again from what is in its folder, and say where the losses differ, if they do.

A run's draws are a function of its seed, its config and its data, so on the same machine every loss comes out equal to the
last bit, and on another one equal to rounding. What was changed since, in the data, the packages or the code, is said first.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from denoiselab.app.build import TRAIN_KEYS, Training, make_module, make_training
from denoiselab.app.job import Job, first_step, set_up
from denoiselab.app.nodes import Parts, check_keys, make_network
from denoiselab.app.resumable import check_run
from denoiselab.app.train import start_logging
from denoiselab.app.trained import without_consent
from denoiselab.reports.console import print_results
from denoiselab.runs.changes import differences
from denoiselab.runs.checks import show
from denoiselab.runs.errors import ConfigError, RankError
from denoiselab.runs.files import from_json, read_json, read_small
from denoiselab.runs.folder import CONFIG, STARTS, newest_run, versions
from denoiselab.runs.launch import launch, launched_from_outside
from denoiselab.runs.trust import check_targets
from denoiselab.training.checkpoint import (
    FOLDER,
    checkpoints_of,
    digest,
    load_checkpoint,
    network_weights,
    step_name,
    step_of,
)
from denoiselab.training.checkpoint import verify as flaw_of
from denoiselab.training.checkpoint_io import load_run
from denoiselab.training.ema import RAW
from denoiselab.training.history import TRACE, read_rows

REPLAY_KEYS: dict[str, Any] = {
    "run": str | None,
    "runs": str,
    "checkpoint": str | None,
    "steps": int | None,
    "tolerance": float,
    "trust": list[str],
}
SHAPE = ("accelerator", "devices", "num_nodes", "threads")  # what another trainer may change
COLUMNS = ("loss", "grad_norm", "samples")  # of the trace, that are compared
SILENT = {"_target_": "denoiselab.training.logs.no_logger", "_partial_": True}


def replay(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Train a run again and print the verdict.

    Args:
        options: resolved, plain data.
        choices: the choice of each group.
        overrides: as given on the command line.

    Raises:
        ConfigError: if the run cannot be trained again: a part is missing, or its data has changed.
        RankError: if a loss differs by more than the tolerance, or other samples were drawn.
    """
    check_keys(options, REPLAY_KEYS)
    if launched_from_outside():
        raise ConfigError("replay: starts its processes itself; trainer=ddp trainer.devices=<n> says how many")
    for key in ("steps", "tolerance"):
        if options[key] is not None and options[key] < (1 if key == "steps" else 0):
            raise ConfigError(f"{key}={options[key]}: must be at least {1 if key == 'steps' else 0}")
    try:
        folder = newest_run(Path(options["runs"])) if options["run"] is None else Path(options["run"])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config, started = _recorded(folder)
    recorded = read_rows(folder / TRACE)
    if not recorded:
        raise ConfigError(f"run={folder}: has no {TRACE}; there is nothing to compare with")
    if missing := [column for column in COLUMNS if column not in recorded[0]]:
        raise ConfigError(f"run={folder}: its {TRACE} has no column {missing[0]}; there is nothing to compare with")
    begin = _begin(folder, options["checkpoint"])
    first, last, before = first_step(begin), int(recorded[-1]["step"]), int(recorded[0]["step"]) - 1
    if first < before:
        raise ConfigError(
            f"run={folder}: began at step {before}, on from another run: replay it from there with "
            f"checkpoint={folder / FOLDER / step_name(before)}"
        )
    if options["steps"] is not None:
        last = min(last, first + options["steps"])
    if last <= first:
        raise ConfigError(f"checkpoint={begin}: the run has recorded {last} steps, so none is left to make again")

    check_targets(config, options["trust"])
    config = _to_replay(without_consent(config), options.get("trainer"), last) | {"trust": options["trust"]}
    parts, training = make_training(config)
    try:
        data = {split: parts.data.fingerprint(split) for split in ("train", "test")}
    except ValueError as error:
        raise ConfigError(f"datamodule.{error}") from error
    for split, now in data.items():
        then = started["data"][split]
        if now != then:
            raise ConfigError(
                f"datamodule: the {split} data has changed since (fingerprint {now[:8]}, then {then[:8]}); nothing was trained"
            )
    if begin is not None:
        module = make_module(config, parts, training, make_network(config, device="meta"), data)
        check_run(_loaded(begin), module, training.callbacks.values(), f"checkpoint={begin}")
    changed = differences(_versions(started), _versions(versions()))
    environment = [f"{key} {then} → {now}" for key, (then, now) in changed.items()]
    threads = training.settings.choose_threads(started.get("threads"))
    if started.get("threads", threads) != threads:
        environment.append(f"threads {show(started['threads'])} → {threads}")
    console = Console()
    facts: dict[str, Any] = {"run": folder, "steps": f"{first + 1} to {last}", "data": "as recorded"}
    if not parts.data.knows_pixels:
        facts["data"] += (
            ", by the names and sizes of its files; their pixels were not compared (datamodule.verify=false)"
        )
    facts["versions"] = "as recorded" if not environment else "; ".join(environment)
    print_results(console, facts, [])
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(
            config=config,
            folder=scratch,
            threads=threads,
            checkpoint=None if begin is None else str(begin.resolve()),
            data=data,
            notes=(),
        )
        if training.settings.devices == 1:
            weights = replay_here(job, parts, training)
        else:
            weights = launch(replay_rank, (job,), training.settings.devices)
        verdict = compare(
            [row for row in recorded if first < int(row["step"]) <= last], read_rows(Path(scratch) / TRACE)
        )
    facts = {"losses": verdict.line(), "weights": _weights_line(folder, last, weights)}
    print_results(console, facts, [])
    if verdict.other_samples is not None or not verdict.largest <= options["tolerance"]:
        raise RankError(f"run={folder}: the replay differs, {verdict.line()}")


def _recorded(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a run, and how it was last started."""
    try:
        config = read_json(folder / CONFIG)
        started = from_json(read_small(folder / STARTS).splitlines()[-1])
        if not isinstance(config, dict) or not _is_start(started):
            raise ValueError
    except FileNotFoundError as error:
        raise ConfigError(
            f"run={folder}: has no {Path(str(error.filename)).name}; it is no run that can be replayed"
        ) from error
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"run={folder}: its {CONFIG} or {STARTS} cannot be read") from error
    return config, started


def _is_start(started: Any) -> bool:
    """Whether a line of starts.jsonl says what data a run was started with, and in what environment."""
    if not isinstance(started, dict) or not isinstance(started.get("data"), dict):
        return False
    git = started.get("git") or {}
    return (
        all(isinstance(started["data"].get(split), str) for split in ("train", "test"))
        and isinstance(started.get("packages", {}), dict)
        and isinstance(git, dict)
        and isinstance(git.get("changed_files") or [], list)
    )


def _begin(folder: Path, checkpoint: str | None) -> Path | None:
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if not path.is_file() or path.resolve().parent != (folder / FOLDER).resolve():
        raise ConfigError(f"checkpoint={checkpoint}: must be a file in {folder / FOLDER}")
    flaw = flaw_of(path)
    if flaw:
        raise ConfigError(f"checkpoint={checkpoint}: {flaw}")
    return path


def _loaded(checkpoint: Path) -> dict[str, Any]:
    try:
        return load_run(checkpoint)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _to_replay(config: dict[str, Any], trainer: dict[str, Any] | None, last: int) -> dict[str, Any]:
    """The config of the same steps, with nothing measured, drawn, logged or saved beside them."""
    check_keys(config, TRAIN_KEYS)
    shape = {key: trainer[key] for key in SHAPE if key in trainer} if trainer else {}
    monitor = config["callbacks"].get("monitor")
    if monitor is None:
        raise ConfigError("callbacks.monitor=null: the run has recorded no losses")
    return config | {
        "trainer": config["trainer"] | shape | {"max_steps": last, "val_every": last + 1},
        "callbacks": {"monitor": monitor, "health": config["callbacks"].get("health")},
        "logger": SILENT,
        "metrics": config["metrics"]
        | {"counts": [], "every": None, "extractors": {}, "measures": {}, "references": {}},
    }


def _versions(recorded: dict[str, Any]) -> dict[str, Any]:
    """What can make a run come out otherwise, of all that is recorded of its environment."""
    git = recorded.get("git") or {}
    code = {key: str(git.get(key))[:12] for key in ("commit", "changes_sha256")}
    return {"python": recorded.get("python"), "code": code, **recorded.get("packages", {})}


@record
def replay_rank(job: Job) -> dict[str, str]:
    """Train again in a process that was started for this."""
    return replay_here(job, *make_training(job.config))


def replay_here(job: Job, parts: Parts, training: Training) -> dict[str, str]:
    """Train again in this process; the digests of the weights at the end, by name."""
    start_logging(Path(job.folder))
    trainer, module = set_up(job, parts, training, [], list(training.callbacks.values()))
    trainer.fit(module, datamodule=parts.data, ckpt_path=job.checkpoint, weights_only=True)
    raw = module.network.state_dict()
    return {RAW: digest(raw)} | {name: digest({**raw, **average}) for name, average in module.ema.averages.items()}


def _weights_line(folder: Path, step: int, weights: dict[str, str]) -> str:
    """Whether the weights are those of the run's checkpoint of the same step."""
    path = next((path for path in checkpoints_of(folder / FOLDER) if step_of(path) == step), None)
    if path is None or flaw_of(path):
        return f"the run has no good checkpoint of step {step} to compare with"
    loaded = load_checkpoint(path)
    other = [name for name, found in weights.items() if digest(network_weights(loaded, name)) != found]
    return (
        f"not bit for bit those of {path.name}: {', '.join(other)}"
        if other
        else f"identical to {path.name}: {', '.join(weights)}"
    )


class Verdict(NamedTuple):
    """How two traces compare.

    Args:
        steps: compared.
        other_samples: the first step that saw other samples, or saw them at other places.
        differs: the first step whose loss or gradient norm is not the same to the last bit.
        largest: relative difference of a loss.
        at: the step of that loss, with both losses.
    """

    steps: int
    other_samples: int | None
    differs: int | None
    largest: float
    at: tuple[int, str, str]

    def line(self) -> str:
        """The verdict in words."""
        if self.other_samples is not None:
            return f"step {self.other_samples} saw other samples than recorded"
        if self.differs is None:
            return f"identical: {self.steps} losses, gradient norms and samples, to the last bit"
        step, then, now = self.at
        return (
            f"equal within {self.largest:.1e} of the loss (most at step {step}: {now}, recorded {then}); the first step that "
            f"differs at all is {self.differs}"
        )


def compare(recorded: Sequence[dict[str, str]], found: Sequence[dict[str, str]]) -> Verdict:
    """Two traces of the same steps, row by row.

    Raises:
        RankError: if they are not of the same steps.
    """
    if [row["step"] for row in recorded] != [row["step"] for row in found]:
        raise RankError(f"the replay made {len(found)} steps, and {len(recorded)} are recorded")
    pairs = list(zip(recorded, found, strict=True))
    other = next((int(a["step"]) for a, b in pairs if a["samples"] != b["samples"]), None)
    differs = next(
        (int(a["step"]) for a, b in pairs if (a["loss"], a["grad_norm"]) != (b["loss"], b["grad_norm"])), None
    )
    gaps = [(_gap(a["loss"], b["loss"]), int(a["step"]), a["loss"], b["loss"]) for a, b in pairs]
    largest, step, then, now = max(gaps, key=lambda gap: gap[0])
    return Verdict(len(pairs), other, differs, largest, (step, then, now))


def _gap(then: str, now: str) -> float:
    """The relative difference of two numbers; infinite if only one of them is a number."""
    if then == now:
        return 0.0
    a, b = (float(text or "nan") for text in (then, now))
    gap = abs(a - b) / (max(abs(a), abs(b)) or 1)
    return gap if math.isfinite(gap) else math.inf
