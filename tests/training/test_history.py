"""The files that grow while a run trains, and how a resumed run cuts and continues them."""

from __future__ import annotations

import errno
import json
import math
import os
import re

import pytest

from denoiselab.runs.errors import ConfigError
from denoiselab.training import history
from denoiselab.training.history import METRICS, NUMBERS, TRACE, CSVLogger, append_rows, read_numbers, read_rows, rewind


def number(step, value=1.0):
    return {"name": "fd", "value": value, "floor": None, "protocol": {"step": step}}


def test_metrics_csv_is_whole_after_every_row(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.5}, 7)
    assert (tmp_path / METRICS).read_text() == "step,a\n7,1.5\n"
    logger.log_metrics({"a": 2.5}, 8)
    logger.log_metrics({"b": 2.0}, 8)  # a new column in the middle of a run, for a step that has a row
    assert (tmp_path / METRICS).read_text() == "step,a,b\n7,1.5,\n8,2.5,2.0\n"


def test_a_resumed_run_goes_on_with_its_rows(tmp_path):
    CSVLogger(tmp_path).log_metrics({"a": 1.5}, 7)
    CSVLogger(tmp_path).log_metrics({"b": 3.5}, 9)
    CSVLogger(tmp_path).log_metrics({"a": 4.5, "b": 5.5}, 10)
    assert (tmp_path / METRICS).read_text() == "step,a,b\n7,1.5,\n9,,3.5\n10,4.5,5.5\n"


def test_rewinding_cuts_what_comes_after_a_step(tmp_path):
    logger = CSVLogger(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"a": step / 10}, step)
    append_rows(tmp_path / TRACE, [{"step": step, "loss": "0.1"} for step in range(1, 31)])
    (tmp_path / NUMBERS).write_text("".join(f"{json.dumps(number(step))}\n" for step in (10, 20, 30)))
    rewind(tmp_path, 20)
    assert (tmp_path / METRICS).read_text() == "step,a\n10,1.0\n20,2.0\n"
    assert [row["step"] for row in read_rows(tmp_path / TRACE)] == [str(step) for step in range(1, 21)]
    assert read_numbers(tmp_path / NUMBERS) == [number(10), number(20)]
    rewind(tmp_path, 0)
    assert [read_rows(tmp_path / name) for name in (METRICS, TRACE)] == [[], []]
    append_rows(tmp_path / TRACE, [{"step": 1, "loss": "0.2"}])
    assert read_rows(tmp_path / TRACE) == [{"step": "1", "loss": "0.2"}]


def test_rewinding_an_empty_folder_makes_nothing(tmp_path):
    rewind(tmp_path, 20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_line_that_was_being_written_is_dropped(tmp_path, cut):
    (tmp_path / TRACE).write_text("step,loss\n1,0.12345\n2,0.54321\n"[:-cut])
    assert read_rows(tmp_path / TRACE) == [{"step": "1", "loss": "0.12345"}]
    lines = f"{json.dumps(number(1))}\n{json.dumps(number(2))}\n"
    (tmp_path / NUMBERS).write_text(lines[:-cut])
    assert read_numbers(tmp_path / NUMBERS) == [number(1)]


def test_blocks_that_the_disk_has_lost_are_dropped(tmp_path):
    (tmp_path / TRACE).write_text("step,loss\n1,0.12345\n\0\0\0\0\n")
    assert read_rows(tmp_path / TRACE) == [{"step": "1", "loss": "0.12345"}]


@pytest.fixture
def full(monkeypatch):
    """A disk that takes the first ten bytes of what is appended, while it is full."""
    state, write, append = {"full": False}, history.write_text, history.os.fsync

    def fsync(descriptor):
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(descriptor)

    def write_text(path, text):
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(history.os, "fsync", fsync)
    monkeypatch.setattr(history, "write_text", write_text)
    return state


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path, full):
    append_rows(tmp_path / TRACE, [{"step": 1, "loss": "0.5"}])
    full["full"] = True
    with pytest.raises(OSError, match="No space left"):
        append_rows(tmp_path / TRACE, [{"step": 2, "loss": "0.5"}])
    assert (tmp_path / TRACE).read_text() == "step,loss\n1,0.5\n"


def test_a_full_disk_costs_no_row_of_a_run_that_goes_on(tmp_path, full, caplog):
    logger = CSVLogger(tmp_path)
    for step in range(1, 8):
        full["full"] = step in (2, 3, 5)
        logger.log_metrics({"loss": step / 2}, step)
    rows = read_rows(tmp_path / METRICS)
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [(step, step / 2) for step in range(1, 8)]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"{tmp_path / METRICS}: could not be written (No space left on device); the run goes on"] * 3


def test_numbers_that_are_none_survive(tmp_path):
    (tmp_path / NUMBERS).write_text(f"{json.dumps(number(1, math.nan))}\nnot json\n{json.dumps([1])}\n")
    (only,) = read_numbers(tmp_path / NUMBERS)
    assert math.isnan(only["value"])


@pytest.mark.parametrize(
    "row",
    ["²,0.5", "１,0.5", "-1,0.5", f"{'1' * 5000},0.5", "2,zz", "2,0.5,3", "2", "2,\x1b[2J"],
    ids=["power", "wide", "negative", "long", "word", "more", "less", "escape"],
)
def test_rows_that_no_run_has_written_are_dropped(tmp_path, row):
    (tmp_path / METRICS).write_text(f"step,a\n1,0.5\n{row}\n3,\n")
    assert read_rows(tmp_path / METRICS) == [{"step": "1", "a": "0.5"}, {"step": "3", "a": ""}]
    rewind(tmp_path, 2)
    assert (tmp_path / METRICS).read_text() == "step,a\n1,0.5\n"


@pytest.mark.parametrize("text", [f"1,{'9' * 200_000}\n", '1,"\n' + "9\n" * 100_000], ids=["long", "open"])
def test_a_field_without_end_is_said(tmp_path, text):
    (tmp_path / METRICS).write_text(f"step,a\n{text}")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / METRICS}: is damaged (field larger than")):
        read_rows(tmp_path / METRICS)


@pytest.mark.parametrize(
    "line",
    [
        '{"protocol": null}',
        json.dumps(number(1) | {"protocol": {"step": "x"}}),
        json.dumps(number(1) | {"protocol": {"step": 1, "weights": ["ema"]}}),
        json.dumps(number(1) | {"protocol": {}}),
        json.dumps(number(1) | {"value": "1"}),
        "[" * 100_000,
    ],
    ids=["null", "step", "weights", "none", "value", "deep"],
)
def test_lines_that_no_run_has_written_are_dropped(tmp_path, line):
    (tmp_path / NUMBERS).write_text(f"{line}\n{json.dumps(number(2))}\n")
    assert read_numbers(tmp_path / NUMBERS) == [number(2)]
    rewind(tmp_path, 1)
    assert (tmp_path / NUMBERS).read_text() == ""


@pytest.mark.parametrize("name", [METRICS, TRACE, NUMBERS])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / name}: cannot be read (is no regular file)")):
        rewind(tmp_path, 1)


def test_rewinding_and_writing_stay_in_the_folder(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (outside / "step_0000009_ema.png").touch()
    (run / "samples").symlink_to(outside)
    (outside / TRACE).write_text("step,loss\n1,0.5\n9,0.5\n")
    (run / TRACE).symlink_to(outside / TRACE)
    with pytest.raises(OSError, match="is a link"):
        append_rows(run / TRACE, [{"step": 10, "loss": "0.5"}])
    rewind(run, 1)
    assert read_rows(run / TRACE) == [{"step": "1", "loss": "0.5"}]
    assert sorted(path.name for path in outside.iterdir()) == ["step_0000009_ema.png", TRACE]
    assert (outside / TRACE).read_text() == "step,loss\n1,0.5\n9,0.5\n"
