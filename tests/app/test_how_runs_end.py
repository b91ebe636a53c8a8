"""How a run says that it ended, whoever is left to say so."""

from __future__ import annotations

import json
import signal

import pytest

from denoiselab.app.train import as_stopped, conclude
from denoiselab.runs.errors import RankError, Stopped
from denoiselab.runs.folder import RUNNING, SUMMARY, write_json


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
