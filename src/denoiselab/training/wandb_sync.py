"""Sending runs to W&B that were trained without it: from the run folder, whose metrics.csv is rewound at every resume.

The transaction logs of the offline segments (wandb/offline-run-*) are not read: a run that was killed has written there what
its next start wrote again. The folder holds all that W&B is to show: rows, pictures, config, summary; only what the machine
did (its load, its memory) stays in the segments. W&B is asked how far it has come, so nothing is sent twice, whoever has
sent it; and what a call has sent is noted in wandb/sent.json, so that the next one asks nobody if there is nothing new.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import wandb

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import read_json
from denoiselab.runs.folder import CONFIG, ID, SUMMARY, run_id, sending
from denoiselab.runs.secrets import redact
from denoiselab.training.checkpoint import FOLDER, checkpoints_of, step_of
from denoiselab.training.history import METRICS, read_rows
from denoiselab.training.wandb_history import SENT, STEP, History, pictures_of, write_sent
from denoiselab.training.wandb_identity import WANDB, Identity, identify, last_step, read_identity, write_identity
from denoiselab.training.wandb_run import arrived, define_steps, end_limits, end_run, settings

WAITS = (0.0, 1.0, 3.0, 10.0)  # seconds before W&B is asked whether all has arrived
SENT_ALL, NOTHING_NEW, LEFT, FAILED = "sent", "nothing new", "left", "failed"


class LoggedOutError(RuntimeError):
    """There is something to send, and nobody is logged in."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        run: its folder.
        state: "sent", "nothing new", "left" or "failed".
        rows: that were sent.
        pictures: that were sent.
        step: up to which W&B has it.
        note: why, or where.
    """

    run: Path
    state: str
    rows: int = 0
    pictures: int = 0
    step: int | None = None
    note: str = ""


def send(run_dir: Path, *, again: bool = False, limits: dict[str, Any] | None = None) -> Outcome:
    """Send what W&B lacks of a run.

    Args:
        run_dir: the run folder.
        again: ask W&B even if nothing has changed since the last call.
        limits: as in `start_wandb`.

    Raises:
        LoggedOutError: if nobody is logged in.
    """
    try:
        if not (run_dir / CONFIG).exists():
            return Outcome(run_dir, LEFT, note="has not begun")
        identity = _identity(run_dir)
        if identity is None:
            return Outcome(run_dir, LEFT, note="was not logged to W&B")
        with sending(run_dir):
            return _send(run_dir, identity, again, limits or {})
    except ConfigError as error:
        return Outcome(run_dir, LEFT, note=str(error))
    except (wandb.errors.Error, OSError, ValueError) as error:
        return Outcome(run_dir, FAILED, note=" ".join(str(error).split()))


def end_killed(run_dir: Path) -> None:
    """End the W&B run of a run whose own process was killed, if that was online: W&B would only hear no more of it."""
    if (run_dir / WANDB / "latest-run").resolve().name.startswith("run-"):
        send(run_dir, limits=end_limits())


def _identity(run_dir: Path) -> Identity | None:
    """Of a run; one that was trained before identities were kept has its segments and its config."""
    identity = read_identity(run_dir)
    if identity is not None or not (run_dir / ID).exists() or not list(run_dir.glob(f"{WANDB}/*run-*")):
        return identity
    config = redact(read_json(run_dir / CONFIG))
    node = config["logger"] if isinstance(config, dict) and isinstance(config.get("logger"), dict) else {}
    kinds = {"project": str, "entity": str, "notes": str, "images": int, "checkpoints": bool}
    options = {key: node[key] for key, kind in kinds.items() if isinstance(node.get(key), kind)}
    made = identify(
        run_dir, run_dir.name, tags=[tag for tag in node.get("tags") or [] if isinstance(tag, str)], **options
    )
    facts = {key: value for key, value in made.config.items() if key != "git"}  # of now, not of then
    made = replace(made, config=config | facts)
    write_identity(run_dir, made)
    return made


def _send(run_dir: Path, identity: Identity, again: bool, limits: dict[str, Any]) -> Outcome:
    summary = _summary(run_dir)
    running = summary["status"] == "running"
    # What comes after may be made again, and be other numbers. Of a run that failed it is what shows why, so that is sent;
    # if it goes on, the same steps have the same numbers, or a line in its log says that they have others.
    whole = newest_step(run_dir) if running else None
    if running and not whole:
        return Outcome(run_dir, LEFT, note="is running or was killed, before its first checkpoint")
    content = digest(run_dir, identity, summary, whole)
    word = f"running or killed: up to its newest checkpoint, step {whole}" if running else summary["status"]
    if not again and _noted(run_dir) == content:
        return Outcome(run_dir, NOTHING_NEW, note=word)
    if not wandb.login(prompt=False):
        raise LoggedOutError
    with _run(run_id(run_dir), identity, limits) as run:
        has, end = arrived(run, run_dir), last_step(run_dir)
        history = History(run, sent=has, images=identity.images, end=end, note=run_dir, sparing=True)
        history.catch_up(run_dir, whole)
        history.flush()
        write_sent(run_dir, history.sent)
        upload = identity.checkpoints and summary["status"] == "finished"
        path = run.path
        end_run(run, summary["metrics"], summary["status"], run_dir if upload else None)
    done = Outcome(run_dir, SENT_ALL, history.rows, history.shown, history.sent.step, word)
    if not confirmed(path, history.sent.step):  # W&B's client ends without an error when it gives up
        return replace(done, state=FAILED, note="W&B has not confirmed all of it; call again")
    write_sent(run_dir, history.sent, digest=content)
    return done


def confirmed(path: str, step: int) -> bool:
    """Whether W&B says of a run that it has come to a step.

    Args:
        path: "entity/project/id".
        step: −1: no row was ever sent.
    """
    for wait in WAITS:
        time.sleep(wait)
        with suppress(wandb.errors.Error, ValueError):
            if step < 0 or wandb.Api(timeout=30).run(path).summary.get(STEP) == step:
                return True
    return False


@contextmanager
def _run(id: str, identity: Identity, limits: dict[str, Any]) -> Iterator[Any]:  # noqa: A002
    """The W&B run, online; it says nothing of this machine, which is not the one that trained."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        quiet = settings(x_disable_stats=True, x_disable_meta=True, **limits)
        run = wandb.init(
            dir=scratch,
            id=id,
            job_type="train",
            mode="online",
            resume="allow",
            settings=quiet,
            config=identity.config,
            **identity.told(),
        )
        try:
            define_steps(run)
            yield run
        except BaseException:
            run.finish(exit_code=1)
            raise


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max((step_of(path) or 0 for path in checkpoints_of(run_dir / FOLDER)), default=0)


def digest(run_dir: Path, identity: Identity, summary: dict[str, Any], whole: int | None) -> str:
    """A hash of what is to be sent, and whereto."""
    rows = [row for row in read_rows(run_dir / METRICS) if whole is None or int(row["step"]) <= whole]
    pictures = [str(step) for step in pictures_of(run_dir) if whole is None or step <= whole]
    return hashlib.sha256(json.dumps([vars(identity), summary, rows, pictures]).encode()).hexdigest()


def _summary(run_dir: Path) -> dict[str, Any]:
    """How the run ended, with its final numbers."""
    try:
        said = redact(read_json(run_dir / SUMMARY))
    except FileNotFoundError:
        said = {}
    said = said if isinstance(said, dict) else {}
    status, metrics = said.get("status"), said.get("metrics")
    return {
        "status": status if isinstance(status, str) else "running",
        "metrics": metrics if isinstance(metrics, dict) else {},
    }


def _noted(run_dir: Path) -> str | None:
    try:
        said = read_json(run_dir / WANDB / SENT)
    except (FileNotFoundError, ConfigError):
        return None
    return said.get("digest") if isinstance(said, dict) else None
