"""How a run says that it ended, whoever is left to say so."""

from __future__ import annotations

import errno
import io
import json
import signal
from types import SimpleNamespace

import pytest
from calls import QUIET, call

from denoiselab.app import train
from denoiselab.app.train import as_stopped, conclude, how_to_go_on
from denoiselab.runs.errors import RankError, Stopped
from denoiselab.runs.files import write_json
from denoiselab.runs.folder import RUNNING, SUMMARY
from denoiselab.training import checkpoint_io
from denoiselab.training.checkpoint import FOLDER, checkpoints_of, step_name
from denoiselab.training.saving import Checkpoints


def test_a_signal_is_no_failure(tmp_path):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        stopped = Stopped(number)
        assert as_stopped(stopped, None) is stopped
    assert as_stopped(ValueError("trouble"), None) is None


def test_ctrl_c_is_one_also_as_lightning_tells_of_it():
    leaving = SystemExit(1)
    leaving.__context__ = KeyboardInterrupt()
    for error in (KeyboardInterrupt(), leaving):
        assert as_stopped(error, None).number == signal.SIGINT
    trouble = ValueError()
    trouble.__context__ = KeyboardInterrupt()
    for error in (SystemExit(1), trouble):
        assert as_stopped(error, None) is None


def test_a_rank_that_is_ended_since_another_has_failed_was_not_stopped(tmp_path):
    asked = tmp_path / "asked"
    assert as_stopped(Stopped(signal.SIGTERM), asked) is None
    assert as_stopped(Stopped(signal.SIGUSR1), asked) is not None  # which the agent does not send
    asked.write_text("SIGTERM\n")
    assert as_stopped(Stopped(signal.SIGTERM), asked) is not None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RankError("rank 1 failed"), "failed"),
        (Stopped(signal.SIGTERM), "preempted"),
        (Stopped(signal.SIGINT), "interrupted"),
    ],
)
def test_the_summary_of_a_run_that_nobody_was_left_to_write(tmp_path, error, status):
    write_json(tmp_path / SUMMARY, RUNNING)
    conclude(tmp_path, error)
    assert json.loads((tmp_path / SUMMARY).read_text()) == {"status": status, "error": str(error)}
    written = {"status": "finished", "steps": 4}
    write_json(tmp_path / SUMMARY, written)
    conclude(tmp_path, error)
    assert json.loads((tmp_path / SUMMARY).read_text()) == written


class Full(io.StringIO):
    """A file on a disk without room."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_happens_to_checkpoints_is_said_on_the_terminal_where_the_log_has_no_room(tmp_path, monkeypatch):
    write = checkpoint_io.write_checkpoint

    def full_at_first(checkpoint, path):
        if path.name == step_name(1):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", full_at_first)
    monkeypatch.setattr(train, "open_own", lambda path, mode: Full())
    small = ["backbone.width=8", "backbone.multipliers=[1]", "backbone.attention_resolutions=[]", "trainer.max_steps=2"]
    saving = [
        "callbacks.checkpoints.every=1",
        "callbacks.checkpoints.reserve_gb=1e9",
        "callbacks.checkpoints.best=null",
    ]
    plain = ["datamodule.batch_size=4", "schedule.warmup_steps=0", "trainer.threads=1", "callbacks.pictures=null"]
    done = call("train", *QUIET, *small, *saving, *plain, "run=run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [path.name for path in checkpoints_of(tmp_path / "run" / FOLDER)] == [step_name(2)]
    lines = done.err.splitlines()
    failed = f"{step_name(1)}: could not be written (No space left on device); the run goes on"
    assert [line for line in lines if line.startswith("ERROR: checkpoint=") and failed in line] == lines[2:3]
    little = [line for line in lines if line.startswith("WARNING: ") and line.endswith("(reserve_gb=1e+09)")]
    assert little == [*lines[:2], *lines[3:]]
    assert len(lines) == 4  # at the start, before the first save, and before the second


def test_a_save_that_failed_is_not_said_to_be_saved(tmp_path):
    checkpoints = Checkpoints(every=1)
    trainer = SimpleNamespace(callbacks=[checkpoints])
    again = f"to go on: python scripts/train.py run={tmp_path} resume=auto"
    assert how_to_go_on(trainer, tmp_path) == f"nothing was saved yet; {again}"
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / step_name(2)).touch()
    assert how_to_go_on(trainer, tmp_path) == f"saved {step_name(2)}; {again}"
    checkpoints.last_failure = "checkpoint=step_3: could not be written (No space left on device)"
    assert how_to_go_on(trainer, tmp_path) == f"{checkpoints.last_failure}; the newest is {step_name(2)}; {again}"
