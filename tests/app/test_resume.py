"""Where a run begins, what it may go on with, and that nothing is lost or made twice by starting it again."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from calls import QUIET, call
from PIL import Image

from denoiselab.app import job
from denoiselab.app.resume import Start, _saved_before, find_start, key_of, restore_overrides, restored
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import write_json
from denoiselab.runs.folder import COMMAND, CONFIG, STARTS
from denoiselab.training.checkpoint import (
    FOLDER,
    SCHEMA,
    checkpoints_of,
    load_checkpoint,
    newest_checkpoint,
    newest_valid,
    step_name,
)
from denoiselab.training.checkpoint_io import write_checkpoint
from denoiselab.training.saving import written_bytes

TINY = [
    "backbone.width=8",
    "backbone.multipliers=[1]",
    "backbone.attention_resolutions=[]",
    "datamodule.batch_size=8",
    "schedule.decay=constant",
    "schedule.warmup_steps=0",
    "trainer.max_steps=4",
    "trainer.val_every=100",
    "trainer.threads=1",
    "callbacks.monitor.every=1",
    "callbacks.checkpoints.every=2",
    "callbacks.pictures=null",
]


EMPTY = {"schema": SCHEMA, "config": {}, "ema": {}, "ema_updates": 0, "state_dict": {}}


def start_at(run=None, resume="none"):
    return find_start({"run": None if run is None else str(run), "resume": str(resume)})


def begun(folder, *steps, damaged=()):
    """A run folder with checkpoints of these steps."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text("{}")
    for step in steps:
        write_checkpoint(EMPTY | {"global_step": step}, folder / FOLDER / step_name(step))
    for step in damaged:
        path = folder / FOLDER / step_name(step)
        path.write_bytes(path.read_bytes()[:-100])
    return folder


def refused(message, **asked):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        start_at(**asked)


# find_start


def test_a_run_begins(tmp_path):
    for run in (None, tmp_path / "new", tmp_path):
        start = start_at(run)
        assert (start.folder, start.checkpoint, start.damaged, start.exists) == (run, None, (), False)


def test_a_run_is_not_begun_twice(tmp_path):
    run = begun(tmp_path / "run", 3)
    refused(f"run={run}: holds a run already; resume=auto goes on with it", run=run)


def test_auto_needs_a_folder():
    message = "resume=auto: say of which run, run=<folder>; a folder that is not there is made"
    refused(message, resume="auto")


@pytest.mark.parametrize(
    "left", [None, [], [".lock", COMMAND], [".lock", COMMAND, "versions.json", ".config.json.partial"]]
)
def test_auto_begins_in_a_folder_that_is_new(tmp_path, left):
    run = tmp_path / "run"
    if left is not None:  # the last two: its first start was killed before there was a config
        run.mkdir()
        for name in left:
            (run / name).write_text("{}")
    start = start_at(run, "auto")
    assert (start.folder, start.checkpoint, start.exists) == (run, None, False)


def test_auto_begins_again_before_the_first_checkpoint(tmp_path):
    run = begun(tmp_path / "run")
    start = start_at(run, "auto")
    assert (start.folder, start.checkpoint, start.exists) == (run, None, True)


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_other_folders_are_left_alone(tmp_path, resume):
    (tmp_path / "file").write_text("mine")
    for run in (tmp_path, tmp_path / "file"):
        refused(f"run={run}: exists and is no run folder", run=run, resume=resume)


def test_auto_goes_on_from_the_newest(tmp_path):
    run = begun(tmp_path / "run", 9, 10, 8)
    start = start_at(run, "auto")
    assert (start.folder, start.checkpoint, start.damaged) == (run, run / FOLDER / step_name(10), ())


def test_auto_skips_what_is_damaged_and_says_so(tmp_path):
    run = begun(tmp_path / "run", 8, 9, 10, damaged=[9, 10])
    start = start_at(run, "auto")
    assert start.checkpoint == run / FOLDER / step_name(8)
    assert [line.partition(": ")[0] for line in start.damaged] == [
        f"checkpoint={run / FOLDER / step_name(step)}" for step in (10, 9)
    ]
    assert "damaged" in start.damaged[0]


def test_auto_skips_a_whole_file_that_is_no_checkpoint_of_a_run(tmp_path):
    run = begun(tmp_path / "run", 8)
    newer = run / FOLDER / step_name(9)
    write_checkpoint({"x": 1}, newer)
    start = start_at(run, "auto")
    assert start.checkpoint == run / FOLDER / step_name(8)
    assert start.damaged == (f"checkpoint={newer}: layout None is not the layout {SCHEMA} that this version reads",)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over(tmp_path, by_name):
    run = begun(tmp_path / "run", 8, 9, damaged=[8, 9])
    with pytest.raises(ConfigError, match=re.escape(f"run={run}: none of its checkpoints is whole: checkpoint={run}")):
        start_at(None if by_name else run, run if by_name else "auto")


def test_a_checkpoint_by_name(tmp_path):
    run = begun(tmp_path / "run", 8, 9)
    path = run / FOLDER / step_name(9)
    for asked in ({"resume": path}, {"resume": run}, {"run": run, "resume": path}):
        start = start_at(**asked)
        assert (start.folder, start.checkpoint, start.exists) == (run, path, True)


@pytest.mark.parametrize("how", ["missing", "damaged", "a pipe"])
def test_a_checkpoint_that_is_no_good_is_an_error(tmp_path, how):
    run = begun(tmp_path / "run", 8, 9, damaged=[9])
    path = run / FOLDER / step_name(7 if how == "missing" else 9)
    if how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    reason = (
        r"cannot be read as plain data \(\w+\); it is damaged, or no checkpoint" if how == "damaged" else "no such file"
    )
    for new in (None, tmp_path / "new"):
        with pytest.raises(ConfigError, match=f"^resume={re.escape(str(path))}: {reason}$"):
            start_at(new, path)


def test_a_newer_damaged_checkpoint_does_not_stand_in_the_way(tmp_path):
    run = begun(tmp_path / "run", 8, 9, damaged=[9])
    assert start_at(None, run / FOLDER / step_name(8)).checkpoint == run / FOLDER / step_name(8)
    start = start_at(None, run)
    assert start.checkpoint == run / FOLDER / step_name(8)
    assert len(start.damaged) == 1


def test_an_older_checkpoint_needs_a_folder_of_its_own(tmp_path):
    run = begun(tmp_path / "run", 8, 9)
    path = run / FOLDER / step_name(8)
    message = (
        f"resume={path}: the run has gone on to {step_name(9)} since; resume=auto goes on from there, run=<new folder> "
        "branches off here"
    )
    refused(message, resume=path)
    refused(message, run=run, resume=path)
    start = start_at(tmp_path / "branch", path)
    assert (start.folder, start.checkpoint, start.exists) == (tmp_path / "branch", path, False)
    other = begun(tmp_path / "other", 3)
    message = f"run={other}: holds another run already; give run=<new folder> to branch off into"
    refused(message, run=other, resume=path)


def test_a_checkpoint_outside_a_run_needs_a_folder(tmp_path):
    path = tmp_path / "copied.ckpt"
    write_checkpoint({"global_step": 5}, path)
    refused(f"resume={path}: lies in no run folder; say where to go on, run=<new folder>", resume=path)
    assert start_at(tmp_path / "new", path).checkpoint == path


def test_a_folder_without_checkpoints_cannot_be_resumed_by_name(tmp_path):
    for folder in (tmp_path, begun(tmp_path / "run")):
        refused(f"resume={folder}: has no checkpoint in checkpoints/", resume=folder)


# restore_overrides


def stored(folder, overrides):
    folder.mkdir(exist_ok=True)
    (folder / COMMAND).write_text(json.dumps({"overrides": overrides}))
    return folder


@pytest.mark.parametrize(
    ("override", "key"),
    [("a.b=3", "a.b"), ("+a=3", "a"), ("++a=b=c", "a"), ("~a.b", "a.b"), ("objective/path=vp", "objective/path")],
)
def test_the_key_of_an_override(override, key):
    assert key_of(override) == key


def test_what_is_typed_wins(tmp_path):
    run = stored(
        tmp_path / "run", ["seed=1", "optimizer.lr=0.1", "+callbacks.x.every=3", "~optimizer.eps", "backbone=dit"]
    )
    typed = [f"run={run}", "resume=auto", "optimizer.lr=0.2", "++callbacks.x.every=4"]
    assert restore_overrides(typed) == ["seed=1", "~optimizer.eps", "backbone=dit", *typed]
    assert restored == ["seed=1", "~optimizer.eps", "backbone=dit"]
    assert restore_overrides(["seed=2"]) == ["seed=2"]
    assert restored == []


def test_a_folder_has_no_say_in_where_to_work_and_whom_to_trust(tmp_path):
    run = stored(
        tmp_path / "run", ["run=elsewhere", "resume=none", "allow=[seed]", "trust=[evil]", "+trust=[evil]", "seed=1"]
    )
    assert restore_overrides([f"run={run}", "resume=auto"]) == ["seed=1", f"run={run}", "resume=auto"]


def test_what_is_typed_again_is_not_asked_of_the_folder(tmp_path):
    run = stored(tmp_path / "run", ["name=${oc.env:HOME}", "optimizer.lr=${seed}"])
    assert restore_overrides([f"run={run}", "resume=auto", "name=mine"])[:1] == ["optimizer.lr=${seed}"]


def test_the_folder_is_found_by_what_is_typed(tmp_path):
    run = begun(tmp_path / "a run", 3)
    stored(run, ["seed=1"])
    path = run / FOLDER / step_name(3)
    for typed in (
        [f"run='{run}'", "resume=auto"],
        [f"resume={run}"],
        [f"resume={path}"],
        [f"resume={path}", "run=new"],
    ):
        assert restore_overrides(typed) == ["seed=1", *typed]


def test_nothing_is_restored_without_a_resume(tmp_path):
    run = stored(tmp_path / "run", ["seed=1"])
    for typed in (
        [f"run={run}"],
        [f"run={run}", "resume=none"],
        [f"run={run}", "resume=null"],
        ["resume=auto"],
        [f"run={tmp_path / 'new'}", "resume=auto"],
        ["-m", f"run={run}", "resume=auto"],
    ):
        assert restore_overrides(typed) == typed


@pytest.mark.parametrize(
    "override",
    [
        "hydra.run.dir=/",
        "+hydra.job.chdir=true",
        "hydra/launcher=joblib",
        "~hydra.sweep",
        "hydra=x",
        "--config-dir=/evil",
        "--multirun",
        "-m",
        "-cd=/evil",
        "backbone=../../evil",
        "backbone='../evil'",
        "experiment=/evil/x",
        "objective/path=[vp,../evil]",
        "+sampler@hydra.callbacks.evil=heun",
        "+sampler@sampler:hydra.callbacks=heun",
        "objective/../../evil=x",
        "name=${oc.env:HOME}",
        "name=${ oc.env:HOME}",
        "name=${oc.${x}:HOME}",
        "name=" + "x" * 20_000,
        "",
        "=3",
        " seed=1",
        "seed\n=1",
        3,
        None,
        ["seed=1"],
        {"seed": 1},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_override_of_a_run_is_refused(tmp_path, override):
    run = stored(tmp_path / "run", ["seed=1", override])
    with pytest.raises(
        ConfigError, match=f"^{re.escape(f'run={run}: {COMMAND} holds ')}.*, which is no override of a run$"
    ):
        restore_overrides([f"run={run}", "resume=auto"])
    assert restored == []


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"overrides": 3', "\xff", "[" * 100_000, '{"overrides": "seed=1"}', '{"overrides": null}'],
    ids=lambda text: text[:12],
)
def test_a_command_that_cannot_be_read(tmp_path, text):
    (tmp_path / COMMAND).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        restore_overrides([f"run={tmp_path}", "resume=auto"])
    assert str(caught.value).startswith(f"run={tmp_path}: ")
    assert "\n" not in str(caught.value)


# whole runs


def train(cwd, *overrides):
    return call("train", *TINY, *QUIET, *overrides, cwd=cwd)


def go_on(cwd, *overrides):
    return call("train", *overrides, cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of four steps, to be copied."""
    cwd = tmp_path_factory.mktemp("source")
    done = train(cwd, "run=run", "resume=auto")
    assert done.code == 0, done.err
    return cwd / "run"


@pytest.fixture
def run(source, tmp_path):
    """A run of four steps that went on from nothing, and may be changed."""
    subprocess.run(["cp", "-r", source, tmp_path / "run"], check=True)
    return tmp_path / "run"


def rows(run, name="metrics.csv"):
    with (run / name).open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def test_a_run_goes_on_with_what_it_was_started_with(run):
    done = go_on(run.parent, "run=run", "resume=auto", "trainer.max_steps=6", "schedule.steps=4")
    assert done.code == 0, done.err
    assert "going on from" in done.out
    assert list(rows(run, "trace.csv")) == [1, 2, 3, 4, 5, 6]
    config = json.loads((run / CONFIG).read_text())
    assert (config["backbone"]["width"], config["trainer"]["max_steps"], config["schedule"]["steps"]) == (8, 6, 4)
    overrides = json.loads((run / COMMAND).read_text())["overrides"]
    assert {"backbone.width=8", "trainer.max_steps=6"} <= {*overrides}
    assert "trainer.max_steps=4" not in overrides
    assert [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()] == [0, 4]


def test_the_length_of_the_schedule_is_not_changed_in_passing(run):
    before = (run / CONFIG).read_bytes()
    done = go_on(run.parent, "run=run", "resume=auto", "trainer.max_steps=6")
    assert done.code == 2
    assert done.err == (
        "config error: resume: schedule.steps 4 → 6: would change what the run means; to do so all the same, "
        "allow=[schedule.steps]\n"
    )
    assert (run / CONFIG).read_bytes() == before


def test_the_same_command_on_a_finished_run_changes_nothing(tmp_path):
    measured = [*TINY, "logger=none", "metrics.counts=[20]", "metrics.weights=[ema,raw]"]
    measured += [f"metrics.measures.{name}=null" for name in ("kernel", "precision_recall", "density_coverage")]
    command = [*measured, "trainer.val_every=2", "callbacks.pictures.every=2", "run=run", "resume=auto"]
    command[command.index("callbacks.pictures=null")] = "callbacks.pictures.rows=1"
    run = tmp_path / "run"

    def left():
        files = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
        summary = json.loads(files.pop("summary.json"))
        for name in ("train.log", "starts.jsonl", ".lock", ".writing"):
            files.pop(name)
        return files, {key: value for key, value in summary.items() if "seconds" not in key}

    first = call("train", *command, cwd=tmp_path)
    assert first.code == 0, first.err
    assert "begins again" not in first.out
    before, told = left()
    assert told["status"] == "finished"
    assert told["metrics"]
    assert told["losses"].keys() >= {"train/loss", "val/x0_mse"}
    written = (run / FOLDER / step_name(4)).stat().st_mtime_ns
    again = call("train", *command, cwd=tmp_path)
    assert again.code == 0, again.err
    assert left() == (before, told)
    assert (run / FOLDER / step_name(4)).stat().st_mtime_ns == written
    for name in told["metrics"]:
        assert name in again.out


def test_a_changed_rate_is_refused_and_once_allowed_it_is_used(run):
    done = go_on(run.parent, "run=run", "resume=auto", "trainer.max_steps=6", "schedule.steps=4", "optimizer.lr=0.5")
    assert done.code == 2
    assert "optimizer.lr 0.001 → 0.5: would change what the run means" in done.err
    assert {row["train/lr"] for row in rows(run).values()} == {"0.001"}
    more = ["trainer.max_steps=6", "schedule.steps=4", "optimizer.lr=0.5", "allow=[optimizer.lr]"]
    done = go_on(run.parent, "run=run", "resume=auto", *more)
    assert done.code == 0, done.err
    assert "changed: optimizer.lr 0.001 → 0.5" in done.out
    assert [row["train/lr"] for row in rows(run).values()] == ["0.001"] * 4 + ["0.5"] * 2
    before, after = (load_checkpoint(run / FOLDER / step_name(step))["state_dict"] for step in (4, 6))
    moved = max(float((after[key] - before[key]).abs().max()) for key in after)
    assert moved > 0.1  # Adam moves a weight by about the rate


def test_other_settings_of_the_optimizer_are_used_as_well(run):
    more = ["trainer.max_steps=5", "schedule.steps=4", "optimizer.weight_decay=0.3", "allow=[optimizer]"]
    done = go_on(run.parent, "run=run", "resume=auto", *more)
    assert done.code == 0, done.err
    (group,) = load_checkpoint(newest_checkpoint(run))["optimizer_states"][0]["param_groups"]
    assert (group["weight_decay"], group["lr"]) == (0.3, 0.001)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1\nhydra.run.dir=elsewhere", "must have the form key=value"),
        ("+callbacks.evil._target_=os.mkdir", "callbacks.evil._target_=os.mkdir"),
        ("+callbacks.evil._target_=test_resume.Evil", "callbacks.evil._target_=test_resume.Evil"),
        ("seed=${oc.env:HOME}", "seed="),
    ],
    ids=lambda value: value[:40],
)
def test_what_a_folder_asks_for_is_checked_like_a_strangers_word(run, override, message):
    stored(run, [*TINY, *QUIET, override])
    before = sorted(run.parent.rglob("*"))
    done = go_on(run.parent, "run=run", "resume=auto", "trainer.max_steps=5", "schedule.steps=4")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert sorted(run.parent.rglob("*")) == before


def test_a_new_average_begins_with_the_weights(run):
    more = ["trainer.max_steps=5", "schedule.steps=4", "+ema.decays.slow=0.25"]
    done = go_on(run.parent, "run=run", "resume=auto", *more)
    assert done.code == 2
    assert "ema.decays.slow absent → 0.25" in done.err
    done = go_on(run.parent, "run=run", "resume=auto", *more, "allow=[ema.decays.slow]")
    assert done.code == 0, done.err
    before, after = (load_checkpoint(run / FOLDER / step_name(step)) for step in (4, 5))
    for key, found in after["ema"]["slow"].items():
        began, raw = before["state_dict"][f"network.{key}"], after["state_dict"][f"network.{key}"]
        torch.testing.assert_close(found, torch.lerp(began, raw, 0.75))
    assert after["ema_updates"] == 5


def test_another_network_is_refused_even_if_its_change_is_allowed(run):
    more = ["trainer.max_steps=6", "schedule.steps=4", "backbone.width=16", "allow=[backbone]"]
    done = go_on(run.parent, "run=run", "resume=auto", *more)
    assert done.code == 2
    assert "the network differs: " in done.err
    assert done.err.count("\n") == 1


def test_a_branch_leaves_the_run_as_it_is(run):
    def left():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = left()
    from_step = run / FOLDER / step_name(2)
    done = go_on(run.parent, f"resume={from_step}", "run=branch", "seed=1", "allow=[seed,datamodule.seed]")
    assert done.code == 0, done.err
    assert left() == before
    branch = run.parent / "branch"
    assert list(rows(branch, "trace.csv")) == [3, 4]
    assert rows(branch, "trace.csv")[3] != rows(run, "trace.csv")[3]
    same = go_on(run.parent, f"resume={from_step}", "run=same")
    assert same.code == 0, same.err
    assert rows(run.parent / "same", "trace.csv") == {step: rows(run, "trace.csv")[step] for step in (3, 4)}


def test_a_branch_that_was_killed_before_its_first_save_goes_on_from_where_it_began(run):
    from_step = run / FOLDER / step_name(2)
    branch = ["trainer.max_steps=6", "schedule.steps=4", "run=branch"]
    assert go_on(run.parent, f"resume={from_step}", *branch).code == 0
    folder = run.parent / "branch"
    whole = rows(folder, "trace.csv")
    for path in (folder / FOLDER).iterdir():  # as it was at first
        path.unlink()
    os.link(from_step, folder / FOLDER / step_name(2))
    done = go_on(run.parent, "run=branch", "resume=auto")
    assert done.code == 0, done.err
    assert f"going on from  {step_name(2)}" in done.out
    assert rows(folder, "trace.csv") == whole


@pytest.mark.parametrize("name", [step_name(2), "best.ckpt"])
def test_a_branch_begins_with_its_checkpoint(run, name):
    from_step = run / FOLDER / name
    if name == "best.ckpt":
        from_step.unlink(missing_ok=True)
        (run / FOLDER / step_name(2)).rename(from_step)
    done = go_on(run.parent, f"resume={from_step}", "run=branch", "trainer.max_steps=3", "schedule.steps=4")
    assert done.code == 0, done.err
    held = [path.name for path in checkpoints_of(run.parent / "branch" / FOLDER)]
    assert held == [step_name(2), step_name(3)]
    from_step.unlink()
    assert newest_valid(run.parent / "branch" / FOLDER)[1] == []
    done = call("replay", "run=branch", f"checkpoint=branch/{FOLDER}/{step_name(2)}", cwd=run.parent)
    assert done.code == 0, done.err
    assert "identical: 1 losses" in done.out
    done = call("replay", "run=branch", cwd=run.parent)
    assert done.code == 2
    assert "run=branch: began at step 2, on from another run" in done.err


@pytest.mark.parametrize("left", ["nothing", "the best", "an empty folder"])
def test_a_run_whose_checkpoints_are_gone_never_starts_over(run, left):
    for path in [*(run / FOLDER).iterdir()]:
        if left != "the best" or not path.name.startswith("best"):
            path.unlink()
    if left == "nothing":
        (run / FOLDER).rmdir()
    trace = (run / "trace.csv").read_bytes()
    done = go_on(run.parent, "run=run", "resume=auto")
    assert done.code == 2
    assert done.err == (
        f"config error: run=run: has gone as far as step 4, and there is no checkpoint in {FOLDER}/; put them back, or "
        "begin in a new folder\n"
    )
    assert (run / "trace.csv").read_bytes() == trace


@pytest.mark.parametrize(("steps", "asynchronous", "saved"), [(2, 0, 0), (3, 0, 3), (4, 1, 0), (5, 1, 5)])
def test_what_a_run_must_have_saved(tmp_path, steps, asynchronous, saved):
    saver = {"_target_": "denoiselab.training.saving.Checkpoints", "every": 2, "asynchronous": bool(asynchronous)}
    write_json(tmp_path / "config.json", {"callbacks": {"checkpoints": saver, "pictures": None}})
    (tmp_path / "starts.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "trace.csv").write_text("step,loss\n" + "".join(f"{step + 1},1.0\n" for step in range(steps)))
    assert _saved_before(tmp_path) == saved


def test_a_run_that_was_killed_before_its_first_save_begins_again_and_says_so(run):
    for path in (run / FOLDER).iterdir():
        path.unlink()
    whole = rows(run, "trace.csv")
    lines = (run / "trace.csv").read_text().splitlines(keepends=True)
    (run / "trace.csv").write_text("".join(lines[:3]))  # two steps: the save is at the second
    done = go_on(run.parent, "run=run", "resume=auto")
    assert done.code == 0, done.err
    assert "no checkpoint yet: begins again at step 0" in done.out
    assert rows(run, "trace.csv") == whole


def test_pictures_of_steps_that_are_made_again_are_drawn_again(run):
    (run / "samples").mkdir()
    for step in (2, 4):
        (run / "samples" / f"step_{step:07d}_ema.png").write_text("drawn by an earlier start")
    (run / FOLDER / step_name(4)).unlink()
    done = go_on(run.parent, "run=run", "resume=auto")
    assert done.code == 0, done.err
    assert [path.name for path in (run / "samples").iterdir()] == ["step_0000002_ema.png"]


def test_what_another_process_saves_until_the_folder_is_locked_counts(run, monkeypatch):
    real, calls = job.find_start, []

    def find(config):
        calls.append(config)
        return Start(run, run / FOLDER / step_name(2)) if len(calls) == 1 else real(config)

    monkeypatch.setattr(job, "find_start", find)
    done = go_on(run.parent, f"run={run}", "resume=auto", "trainer.max_steps=5", "schedule.steps=4")
    assert done.code == 0, done.err
    assert f"going on from  {step_name(4)}" in done.out


def test_weights_alone_are_no_run_to_go_on_with(run):
    path = run / FOLDER / step_name(4)
    loaded = load_checkpoint(path)
    del loaded["optimizer_states"]
    write_checkpoint(loaded, path)
    for more in ([], ["run=other"]):
        done = go_on(run.parent, f"resume={path}", *more)
        assert done.code == 2
        assert done.err == (
            f"config error: resume={path}: has no optimizer_states; it holds weights for init_from=, not a run to go on with\n"
        )
    assert not (run.parent / "other").exists()


def test_a_run_needs_no_room_for_the_checkpoints_that_it_has(run, monkeypatch):
    size = (run / FOLDER / step_name(4)).stat().st_size
    free = shutil.disk_usage(run)._replace(free=int(2.5 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    done = go_on(run.parent, "run=run", "resume=auto", "trainer.max_steps=5", "schedule.steps=4")
    assert done.code == 0, done.err
    assert written_bytes(run / FOLDER) < 3.5 * size  # the best is another name of one of them
    done = train(run.parent, "run=new")
    assert done.code == 2
    assert "GB free, and checkpoints of this run need" in done.err


def test_a_damaged_checkpoint_is_named_and_left(run):
    newest = run / FOLDER / step_name(4)
    damaged = newest.read_bytes()[:-200]
    newest.write_bytes(damaged)
    trace = rows(run, "trace.csv")
    done = go_on(run.parent, "run=run", "resume=auto", "trainer.max_steps=3", "schedule.steps=4")
    assert done.code == 0, done.err
    assert f"damaged, left alone: checkpoint=run/{FOLDER}/{newest.name}: cannot be read as plain data" in done.out
    assert newest.read_bytes() == damaged
    assert rows(run, "trace.csv") == {step: trace[step] for step in (1, 2, 3)}
    for path in (run / FOLDER).glob("step_*"):
        path.write_bytes(b"nothing")
    done = go_on(run.parent, "run=run", "resume=auto")
    assert done.code == 2
    assert done.err.startswith("config error: run=run: none of its checkpoints is whole: checkpoint=")
    assert list(rows(run, "trace.csv")) == [1, 2, 3]


@pytest.mark.parametrize("lock", ["held", "writing"])  # of the command, and of the rank that writes and may outlive it
def test_two_processes_cannot_train_one_run(run, lock):
    program = (
        "import sys; from pathlib import Path; from denoiselab.runs.folder import held, writing\n"
        f"with {lock}(Path({str(run)!r})): print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert holder.stdout.readline() == "held\n"
        files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        done = go_on(run.parent, "run=run", "resume=auto")
        assert done.code == 2
        assert re.fullmatch(rf"config error: run=.*run: is being trained by process {holder.pid} on .+\n", done.err), (
            done.err
        )
        now = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert now | {run / ".lock": b""} == files | {run / ".lock": b""}
        holder.kill()  # however it ends: the lock ends with it
        holder.wait()
        assert go_on(run.parent, "run=run", "resume=auto").code == 0
    finally:
        holder.kill()
        holder.communicate()


def test_a_start_says_its_threads_and_the_next_one_has_as_many(tmp_path, source, monkeypatch):
    shutil.copytree(source, tmp_path / "run")
    lines = (tmp_path / "run" / STARTS).read_text().splitlines()
    (tmp_path / "run" / STARTS).write_text(json.dumps(json.loads(lines[-1]) | {"threads": 7}) + "\n")
    asked = []
    monkeypatch.setattr(
        "denoiselab.training.trainer.TrainerSettings.choose_threads", lambda _, then: asked.append(then) or 1
    )
    assert go_on(tmp_path, "run=run", "resume=auto", "trainer.max_steps=5", "schedule.steps=4").code == 0
    assert asked == [7]
    assert json.loads((tmp_path / "run" / STARTS).read_text().splitlines()[-1])["threads"] == 1


def test_one_changed_pixel_is_found(class_folder, tmp_path):
    for name in ("images", "moved"):
        subprocess.run(["cp", "-r", class_folder, tmp_path / name], check=True)
    data = ["datamodule=image_folder", "datamodule.root=images", "datamodule.resolution=8", "datamodule.num_classes=2"]
    done = train(tmp_path, *data, "run=run")
    assert done.code == 0, done.err
    more = ["run=run", "resume=auto", "trainer.max_steps=5", "schedule.steps=4"]
    done = go_on(tmp_path, *more, "datamodule.root=moved")  # the same images elsewhere
    assert done.code == 0, done.err

    changed = tmp_path / "images" / "class_0" / "0.png"
    with Image.open(changed) as image:
        pixels = image.convert("RGB")
    pixels.paste((0, 0, 0), (0, 0, 8, 8))
    pixels.save(changed)
    more = ["run=run", "resume=auto", "trainer.max_steps=6", "schedule.steps=4", "datamodule.root=images"]
    done = go_on(tmp_path, *more)
    assert done.code == 2
    assert re.fullmatch(
        r"config error: datamodule: the (train|test) data is not what the run has trained with \(fingerprint [0-9a-f]{8}, "
        r"then [0-9a-f]{8}\); allow=\[data\] goes on all the same\n",
        done.err,
    ), done.err
    assert list(rows(tmp_path / "run", "trace.csv")) == [1, 2, 3, 4, 5]
    done = go_on(tmp_path, *more, "allow=[data]")
    assert done.code == 0, done.err


def test_a_checkpoint_that_says_nothing_of_its_data(run):
    path = run / FOLDER / step_name(4)
    loaded = load_checkpoint(path)
    del loaded["data"]
    write_checkpoint(loaded, path)
    done = go_on(run.parent, "run=run", "resume=auto")
    assert done.code == 2
    assert "datamodule: the train data is not what the run has trained with (fingerprint" in done.err
    assert done.err.count("\n") == 1
