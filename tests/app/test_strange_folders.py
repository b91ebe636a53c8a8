"""Run folders that somebody else has made: nothing is written elsewhere, waited for or believed because they say so."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil

import pytest
import torch
from calls import QUIET, call, composed, files_below, logging_restored
from hostile import good, options

from denoiselab.app.convert import convert
from denoiselab.app.evaluate import evaluate
from denoiselab.app.frontier import frontier
from denoiselab.app.sample import sample
from denoiselab.app.train import start_logging
from denoiselab.runs.errors import ConfigError

TINY = [
    *("backbone.width=8", "backbone.multipliers=[1]", "backbone.attention_resolutions=[]", "datamodule.batch_size=4"),
    *("trainer.max_steps=2", "trainer.threads=1", "callbacks.checkpoints.every=1", "callbacks.pictures=null"),
]
DIGITS = {"metrics": composed("metrics=digits")["metrics"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of two steps, to be copied."""
    cwd = tmp_path_factory.mktemp("source")
    done = call("train", *TINY, *QUIET, "run=run", cwd=cwd)
    assert done.code == 0, done.err
    return cwd / "run"


@pytest.fixture
def run(source, tmp_path):
    return shutil.copytree(source, tmp_path / "run")


def state(folder):
    return {name: (folder / name).read_bytes() for name in files_below(folder) if (folder / name).is_file()}


@pytest.mark.parametrize(
    "name",
    [".lock", ".config.json.partial", "train.log", "trace.csv", "metrics.csv", "checkpoints", "samples", "wandb"],
)
def test_a_run_that_would_write_elsewhere_is_not_gone_on_with(run, tmp_path, name):
    there = tmp_path / "outside" / name
    there.parent.mkdir()
    if (run / name).exists():
        (run / name).rename(there)
    elif "." in name:
        there.write_text("mine\n")
    else:
        there.mkdir()
        (there / "step_0000009_mine.png").touch()
    (run / name).symlink_to(there)
    before = state(tmp_path)
    done = call("train", "run=run", "resume=auto", "trainer.max_steps=3", "schedule.steps=2", cwd=tmp_path)
    assert (done.code, done.err) == (2, f"config error: run=run: {name} is a link that leads out of the run folder\n")
    assert state(tmp_path) == before


def test_a_run_on_another_disk_is_gone_on_with(run, tmp_path):
    run.rename(tmp_path / "scratch")
    run.symlink_to(tmp_path / "scratch")
    (run / "last.ckpt").symlink_to("checkpoints/step_0000002.ckpt")
    done = call("train", "run=run", "resume=auto", "trainer.max_steps=3", "schedule.steps=2", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "scratch" / "checkpoints" / "step_0000003.ckpt").exists()


def test_the_log_is_a_file_of_the_run(tmp_path):
    (tmp_path / "outside").touch()
    (tmp_path / "train.log").symlink_to(tmp_path / "outside")
    with logging_restored():
        with pytest.raises(OSError, match="is a link"):
            start_logging(tmp_path)
        (tmp_path / "train.log").unlink()
        start_logging(tmp_path)
        logging.getLogger("denoiselab").info("said")
    assert "INFO denoiselab: said" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "outside").read_text() == ""


@pytest.mark.parametrize("name", ["metrics.csv", "metrics.jsonl", ".lock"])
def test_pipes_are_not_waited_for(run, tmp_path, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    done = call("train", "run=run", "resume=auto", "trainer.max_steps=3", "schedule.steps=2", cwd=tmp_path)
    assert done.code == 2
    assert re.fullmatch(rf"config error: .*{re.escape(name)}.*\(is no regular file\)\n", done.err)


def test_lines_that_no_run_has_written_are_cut_off(run, tmp_path):
    (run / "metrics.csv").write_text("step,a\n²,1\n1,zz\n")
    record = {"name": "fid", "value": 1.0, "floor": None}
    lines = ['{"protocol": null}', json.dumps(record | {"protocol": {"step": "x"}}), "[" * 100_000]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (run / "checkpoints" / "best.json").write_text(
        '{"metric": "val/x0_mse", "mode": "min", "step": Infinity, "value": 1}'
    )
    done = call("train", "run=run", "resume=auto", "trainer.max_steps=3", "schedule.steps=2", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "best.json: cannot be used (OverflowError" in (run / "train.log").read_text()


@pytest.mark.parametrize(
    ("command", "name", "function", "changes"),
    [
        ("sample", "samples", sample, {"num_samples": 2}),
        ("evaluate", "evaluations", evaluate, {"counts": [20], **DIGITS}),
        ("frontier", "frontier", frontier, {"samplers": ["heun"], "nfe": [3], "logger": None, **DIGITS}),
        ("convert", "exports", convert, {"to": "safetensors"}),
    ],
)
def test_what_is_made_of_a_run_stays_in_it(tmp_path, command, name, function, changes):
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(good(), run / "checkpoints" / "step_0000007.ckpt")
    outside.mkdir()
    (run / name).symlink_to(outside)
    given = options(command, run=str(run), **changes)
    if command == "convert":
        given.pop("device")
    choices = {"logger": "none", "guidance": "cfg"}
    with pytest.raises(ConfigError, match=f"^run={run}: {name} is a link that leads out of the run folder$"):
        function(given, choices, [])
    assert not list(outside.iterdir())
