"""A W&B run: how it begins, what Lightning logs to it, and how it ends."""

from __future__ import annotations

import logging
import os
import re
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import from_json, read_json, read_small
from denoiselab.runs.folder import CONFIG, STARTS, sending
from denoiselab.runs.signals import blocked
from denoiselab.training.checkpoint import FOLDER, checkpoints_of
from denoiselab.training.history import surviving
from denoiselab.training.saving import BEST
from denoiselab.training.wandb_history import STEP, History, Sent, read_sent
from denoiselab.training.wandb_identity import Identity, add_config, git_facts, read_identity

PATIENCE = 60.0  # seconds that a run waits for `denoiselab-sync` to finish with it
END_SECONDS = 30.0  # that the end of a run waits for W&B: a batch system kills it soon; WANDB_FINISH_TIMEOUT wins
UPLOAD_SECONDS = 1800  # that the end of a finished run waits for its checkpoints to be uploaded
log = logging.getLogger(__name__)


class RunLogger(WandbLogger):
    """Lightning's logger for a W&B run that has begun, which sends each number once and in order; see `History`.

    Args:
        run: of W&B.
        run_dir: the run folder.
        history: of the run.
        lock: closed when the run has ended.
    """

    def __init__(self, *, run: Any, run_dir: Path, history: History, lock: ExitStack | None = None) -> None:
        super().__init__(experiment=run, save_dir=run_dir)
        self.run_dir, self.history, self.lock = run_dir, history, lock or ExitStack()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Numbers of a step, which arrive with the others of that step."""
        assert step is not None
        self.history.add(step, metrics)

    def log_hyperparams(self, params: Any) -> None:
        """What the dashboard shows as the run's config; kept in the run folder too."""
        super().log_hyperparams(params)
        with surviving(self.run_dir):
            add_config(self.run_dir, params)

    def add_protocols(self, protocols: dict[str, dict[str, Any]]) -> None:
        """Put protocols of metrics, by the metrics' names, into the config."""
        identity = read_identity(self.run_dir)
        known = dict((identity.config if identity else {}).get("protocols") or {})
        config = {"protocols": known | protocols}  # an update replaces the whole entry
        self.experiment.config.update(config, allow_val_change=True)
        add_config(self.run_dir, config)

    def finish(self, summary: dict[str, Any], status: str) -> None:
        """Send what is held, and end the W&B run."""
        with surviving(self.run_dir):
            self.history.flush()
        identity, run = read_identity(self.run_dir), self.experiment
        upload = identity is not None and identity.checkpoints and not (run.offline or run.disabled)
        try:
            end_run(run, summary, status, self.run_dir if upload and status == "finished" else None)
        except Exception as error:  # the run has ended as it has
            log.warning("the W&B run could not be ended (%s); send it with sync.py: %s", error, self.run_dir)
        self.lock.close()


def begin_run(run_dir: Path, id: str, identity: Identity, mode: str | None, end: int | None) -> RunLogger:  # noqa: A002
    """Begin or go on with the W&B run of a run folder that is about to be trained.

    Args:
        run_dir: the run folder.
        id: of the W&B run.
        identity: of the W&B run.
        mode: as in `wandb_logger`.
        end: the run's last step; None: unknown.
    """
    mode = choose_mode(mode)
    how = {"config": identity.config, "resume": "allow", "mode": mode, **identity.told()}
    with ExitStack() as lock:
        if mode == "online":
            _lock(run_dir, lock)  # first: what W&B says that it has must not grow meanwhile
        run = start_wandb(run_dir, id, "train", limits=end_limits(), **how)
        define_steps(run)
        if run.offline or run.disabled:  # nothing arrives from here: `denoiselab-sync` sends it, from the run folder
            _warn_of_seam(run_dir, read_sent(run_dir).step)
            return RunLogger(run=run, run_dir=run_dir, history=History(run, images=identity.images, end=end))
        history = History(run, sent=arrived(run, run_dir), images=identity.images, end=end, note=run_dir)
        _warn_of_seam(run_dir, history.sent.step)
        history.catch_up(run_dir)
        return RunLogger(run=run, run_dir=run_dir, history=history, lock=lock.pop_all())


def define_steps(run: Any) -> None:
    """Make the optimizer step the x-axis of everything."""
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)


def arrived(run: Any, run_dir: Path) -> Sent:
    """What W&B has of a run that has just begun or gone on."""
    last = run.summary.get(STEP)
    return read_sent(run_dir).at(int(last)) if isinstance(last, int | float) else Sent()


def _warn_of_seam(run_dir: Path, sent: int) -> None:
    """Say so if steps that W&B has are made again with other numbers, which it does not take."""
    try:
        allow, starts = read_json(run_dir / CONFIG).get("allow"), read_small(run_dir / STARTS).splitlines()
    except FileNotFoundError:
        return
    step = from_json(starts[-1])["step"]
    if allow and step < sent:
        log.warning(
            "this run goes on from step %d with allow=[%s], and W&B has its steps up to %d: there it keeps their old numbers; "
            "metrics.csv has the new ones",
            *(step, ",".join(allow), sent),
        )


def _lock(run_dir: Path, lock: ExitStack) -> None:
    """Take the right to send a run once nobody else does; go on without it if that takes too long: it must not end a run."""
    end, waiting = time.monotonic() + PATIENCE, False
    while True:
        try:
            lock.enter_context(sending(run_dir))
            return
        except ConfigError as error:
            if time.monotonic() > end:
                log.warning("%s; going on all the same: rows may reach W&B twice", error)
                return
            if not waiting:
                log.info("%s; waiting for it", error)
            waiting = True
        time.sleep(1)


def start_wandb(
    folder: Path,
    id: str,  # noqa: A002
    job_type: str,
    *,
    mode: str | None = None,
    limits: dict[str, Any] | None = None,
    **how: Any,
) -> Any:
    """A W&B run that says nothing on the terminal and loses a second of rows at most; offline if W&B cannot be reached.

    Args:
        folder: where its files go.
        id: of the W&B run.
        job_type: "train", "frontier", …
        mode: as in `wandb_logger`.
        limits: how long W&B may take, as further settings; None: as long as it likes.
        how: further arguments of `wandb.init`.
    """
    import wandb

    with blocked():  # USR1 and USR2 would end W&B's own process, which a batch system sends them to as well
        chosen: Any = choose_mode(mode)
        how |= {"dir": folder, "id": id, "job_type": job_type, "settings": settings(**(limits or {}))}
        try:
            return wandb.init(mode=chosen, **how)
        except wandb.errors.CommError as error:
            if chosen != "online":
                raise
            log.warning("W&B cannot be reached (%s); this run is offline, send it later with sync.py", error)
            return wandb.init(mode="offline", **how)


def choose_mode(mode: str | None) -> str:
    """The mode that is meant, as in `wandb_logger`."""
    import wandb

    with blocked():
        return os.environ.get("WANDB_MODE") or mode or ("online" if wandb.login(prompt=False) else "offline")


def settings(**more: Any) -> Any:
    """How every W&B run of denoiselab is set up."""
    import wandb

    return wandb.Settings(
        x_transaction_log_flush_interval=1.0,  # default 15 s: the rows that a killed job would lose
        console="off",
        silent=True,
        disable_git=True,  # no remote, whose URL may hold a token, and no diff; the commit is enough
        git_commit=(git_facts() or {}).get("commit"),
        save_code=False,  # whatever the account says
        **more,
    )


def end_limits() -> dict[str, Any]:
    """Settings of a run whose end must not take long, whatever becomes of the network: `TimeoutError` then."""
    given = "WANDB_FINISH_TIMEOUT" in os.environ
    return {"finish_timeout_raises": True} | ({} if given else {"finish_timeout": END_SECONDS})


def end_run(run: Any, summary: dict[str, Any], status: str, checkpoints_of_run: Path | None = None) -> None:
    """Write the closing summary and end a W&B run with its true status.

    W&B shows "finished" for exit code 0, "killed" for 255, "preempted" for another one after `mark_preempting`, else "failed".

    Args:
        run: of W&B.
        summary: the final numbers.
        status: as in summary.json; one that runs elsewhere is shown as preempted, since more will come.
        checkpoints_of_run: the run folder whose newest and best checkpoint are uploaded; None: no checkpoint is.
    """
    run.summary.update(summary | {"status": status})
    try:
        if checkpoints_of_run is not None:
            _upload_checkpoints(run, checkpoints_of_run)
    finally:
        if status in ("preempted", "running"):
            run.mark_preempting()
        run.finish(exit_code={"finished": 0, "interrupted": 255}.get(status, 1))


def _upload_checkpoints(run: Any, run_dir: Path) -> None:
    import wandb
    from wandb.sdk.artifacts.exceptions import WaitTimeoutError

    newest, best = checkpoints_of(run_dir / FOLDER)[-1:], run_dir / FOLDER / BEST
    files = [path for path in (*newest, best) if path.is_file() and not path.is_symlink()]
    if files:
        artifact = wandb.Artifact(name=re.sub(r"[^A-Za-z0-9_.-]", "-", f"checkpoints-{run.id}")[:128], type="model")
        for path in files:
            artifact.add_file(str(path), policy="immutable")
        with suppress(WaitTimeoutError):
            run.log_artifact(artifact, aliases=["newest"]).wait(timeout=UPLOAD_SECONDS)
