"""Multiruns as a user starts, kills and resumes them."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from calls import NETWORK, QUIET, ROOT, SHORT, call, files_below, run_script

from denoiselab.app import sweep as sweep_module
from denoiselab.app.local_sweep import conclude, make_slots
from denoiselab.runs.errors import RankError
from denoiselab.runs.folder import WORKING, is_worked_on
from denoiselab.runs.local_jobs import Slot, job_command
from denoiselab.runs.sweep_folder import (
    LOG,
    STATUS,
    SWEEP,
    Status,
    add_jobs,
    make_sweep,
    read_jobs,
    read_sweep,
    write_status,
)
from hydra_plugins.denoiselab import _returned

TINY = [*NETWORK, "backbone.multipliers=[1]", "backbone.attention_resolutions=[]", *SHORT, "datamodule.batch_size=8"]
TROUBLE = """
import os
import signal
import time
from lightning.pytorch.callbacks import Callback


class Trouble(Callback):
    def __init__(self, *, what: str) -> None:
        self.what = what

    def on_train_batch_end(self, trainer, module, *rest):
        if self.what == "slow":
            time.sleep(0.5)
        if trainer.global_rank == trainer.world_size - 1 and trainer.global_step == 3:
            if self.what == "raises":
                raise RuntimeError("deliberate trouble")
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
"""


def only_sweep(cwd):
    (folder,) = (cwd / "sweeps").iterdir()
    return read_sweep(folder)


def sweep_call(*arguments, cwd):
    return call("sweep", *map(str, arguments), cwd=cwd)


def test_a_multirun_is_a_sweep(tmp_path, monkeypatch):
    for key, value in {"WANDB_RUN_ID": "one-for-all", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    few = ["metrics=none", "trainer.max_steps=1", "callbacks.monitor.every=1", "name=pair"]
    done = call("train", "-m", "objective=epsilon,v", *TINY, *few, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [p.name for p in tmp_path.iterdir()] == ["sweeps"]
    sweep = only_sweep(tmp_path)
    assert sweep.folder.name.endswith("_pair")
    assert sorted(p.name for p in sweep.folder.iterdir()) == [WORKING, "0_objective-epsilon", "1_objective-v", SWEEP]
    ids = []
    for job, prediction in zip(read_jobs(sweep), ("Epsilon", "V"), strict=True):
        config = json.loads((job.folder / "config.json").read_text())
        assert config["objective"]["prediction"]["_target_"].endswith(f".{prediction}")
        assert json.loads((job.folder / "summary.json").read_text())["status"] == "finished"
        assert job.name in json.loads((job.folder / "command.json").read_text())["overrides"]
        (dashboard,) = job.folder.glob("wandb/offline-run-*")
        ids.append((job.folder / "id").read_text().strip())
        assert dashboard.name.endswith(ids[-1])
        status = job.status
        assert (status.state, status.attempts, status.exit_code, status.step) == ("finished", 1, 0, 1)
        assert status.wandb_id == ids[-1]
        assert status.checkpoint == "checkpoints/step_0000001.ckpt"
    assert len({*ids, "one-for-all"}) == 3
    assert re.search(r"0 +epsilon +finished +1 +1 ", done.out)
    assert "[2/2] objective=v: finished after" in done.out
    assert "torch/distributed/elastic" not in (sweep.folder / "0_objective-epsilon" / LOG).read_text()

    done = sweep_call("status", sweep.folder, cwd=tmp_path)
    assert done.code == 0
    assert re.search(r"1 +v +finished +1 +1 ", done.out)
    assert sweep_call("collect", sweep.folder, cwd=tmp_path).code == 0
    rows = list(csv.DictReader((sweep.folder / "results.csv").open()))
    assert [(row["objective"], row["state"], row["steps"]) for row in rows] == [
        ("epsilon", "finished", "1"),
        ("v", "finished", "1"),
    ]
    assert float(rows[0]["train/loss"]) > 0
    done = sweep_call("resume", sweep.folder, cwd=tmp_path)  # which has nothing to do
    assert done.code == 0
    assert "0 of 2 jobs to do" in done.out


def test_a_dry_run_makes_nothing(tmp_path):
    done = call("train", "-m", "objective=v,x0", "seed=range(2)", *QUIET, "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    lines = [f"{i}  objective={o},seed={s}" for i, (o, s) in enumerate((o, s) for o in ("v", "x0") for s in (0, 1))]
    assert done.out.splitlines() == lines
    assert files_below(tmp_path) == []


def test_a_sweep_of_one_job(tmp_path):
    done = call("train", "-m", "hydra/launcher=local", *QUIET, "--dry-run", cwd=tmp_path)
    assert (done.code, done.out) == (0, "0  defaults\n"), done.err


@pytest.mark.parametrize(
    "word",
    [
        "--dry-run",
        "hydra/launcher=slurm",
        "+hydra.launcher.environment.A=1",
        "hydra.sweep.dir=there",
        "hydra/sweeper=optuna",
        "sweep=lr_width",
    ],
)
def test_what_is_about_sweeps_is_not_said_of_a_run(word, tmp_path):
    done = call("train", word, *QUIET, cwd=tmp_path)
    sentence = "needs -m; without anything that varies, that is a sweep of one job"
    assert (done.code, done.err) == (2, f"config error: {word}: {sentence}\n")
    assert files_below(tmp_path) == []
    if word != "--dry-run":
        assert call("train", word, "--cfg", "job", cwd=tmp_path).code == 0  # which trains nothing


def test_a_run_on_several_machines_is_started_on_each(tmp_path):
    done = call("train", "trainer.num_nodes=2", *QUIET, cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("config error: trainer.num_nodes=2: start it with torchrun on each")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["objective=v,x0", "optimizer.lr=1e-3,-1"], ["optimizer.lr=-1", "job objective=v,optimizer.lr=-1", "2 of 4"]),
        (["seed=1,2", "run=mine"], ["run=mine", "hydra.launcher.folder"]),
        (["seed=1,2", "resume=auto"], ["resume=auto", "sweep.py resume"]),
        (["seed=1,2", "hydra.launcher.jobs=0"], ["hydra.launcher.jobs=0", "at least 1"]),
        (["seed=1,2", "hydra.launcher.jobs=two"], ["hydra.launcher.jobs=two", "at least 1"]),
        (["seed=1,2", "hydra.launcher.dry_run=1"], ["hydra.launcher.dry_run=1"]),
        (["seed=1,2", "hydra.launcher.job=2"], ["hydra.launcher.job=2", "no such key", "jobs"]),
        (["seed=1,2", "hydra/launcher=nothing"], ["hydra/launcher=nothing", "local"]),
        (["seed=1,2", "hydra.sweep.dir=there"], ["there: exists"]),
        (["seed=1,2", "name=a/b"], ["name=a/b"]),
        (["seed=1,2", "trainer.num_nodes=2"], ["trainer.num_nodes=2", "torchrun", "hydra/launcher=slurm"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_mistake_is_found_before_anything_is_made(typed, words, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    before = files_below(tmp_path)
    done = call("train", "-m", *typed, *QUIET, cwd=tmp_path)
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1
    assert all(word in done.err for word in words), done.err
    assert files_below(tmp_path) == before


def test_a_sweep_is_not_started_by_each_rank_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = call("train", "-m", "seed=1,2", *QUIET, cwd=tmp_path)
    assert done.code == 2
    assert "-m: a sweep starts the processes of its jobs itself" in done.err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ([], ["resume|status|collect"]),
        (["status"], ["resume|status|collect"]),
        (["stats", "."], ["resume|status|collect"]),
        (["status", "."], ["is no sweep"]),
        (["status", "missing"], ["missing: is no sweep"]),
        (["status", ".", "jobs=0.5"], ["jobs=0.5"]),
        (["status", ".", "other=1"], ["other=1: no such key"]),
    ],
    ids=str,
)
def test_mistakes_of_the_sweep_command(typed, words, tmp_path):
    done = sweep_call(*typed, cwd=tmp_path)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert all(word in done.err for word in words), done.err


@pytest.fixture
def sweep(tmp_path):
    """Of two jobs that cannot begin."""
    what = {"command": ["train.py", "-m"], "launcher": {"kind": "local"}, "directory": str(tmp_path), "metric": None}
    made = make_sweep(tmp_path, tmp_path / "sweep", "x", what)
    return add_jobs(made, [["seed=1"], ["seed=2"]], [({"seed": 1}, {}, []), ({"seed": 2}, {}, [])])[0]


@contextmanager
def another_process_works_on(folder):
    program = (
        "import sys; from pathlib import Path; from denoiselab.runs.folder import working\n"
        "with working(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], **pipes)
    assert process.stdout.readline()
    try:
        yield
    finally:
        process.communicate()


@pytest.mark.parametrize("whose", ["sweep", "job"])
def test_a_job_is_at_work_as_long_as_somebody_works_on_it(sweep, whose, tmp_path):
    """A job is running when it is started, and holds its lock some time later, and also when its sweep was killed."""
    first, second = read_jobs(sweep)
    write_status(first.folder, Status(state="running", attempts=1))
    (first.folder / "metrics.csv").write_text("step,val/x0_mse\n3,0.5\n")
    written = (first.folder / STATUS).read_text()
    with another_process_works_on(sweep.folder if whose == "sweep" else first.folder):
        done = sweep_call("status", sweep.folder, cwd=tmp_path)
        assert re.search(r"0 +1 +running +1", done.out), done.err
    done = sweep_call("status", sweep.folder, cwd=tmp_path)
    assert re.search(r"0 +1 +failed +1 +3", done.out), done.err
    assert "ended without a word (killed?)" in done.out
    assert (first.folder / STATUS).read_text() == written
    assert not (second.folder / WORKING).exists()


def test_a_job_holds_its_lock_before_it_has_imported_what_it_needs(sweep):
    (job, _) = read_jobs(sweep)
    process = subprocess.Popen([*job_command(job.folder), "--stay"], stderr=subprocess.PIPE)
    while process.poll() is None and not is_worked_on(job.folder):
        time.sleep(0.005)
    assert process.poll() is None
    process.communicate()
    assert job.status.state == "failed"  # it has no trainer
    assert not is_worked_on(job.folder)


def test_two_do_not_work_on_one_sweep(sweep, tmp_path):
    with another_process_works_on(sweep.folder):
        done = sweep_call("resume", sweep.folder, cwd=tmp_path)
    assert done.code == 2
    assert re.fullmatch(rf"config error: run={sweep.folder}: is being worked on by process \d+ on .*\n", done.err)
    assert states(sweep.folder) == ["queued"] * 2


def test_what_ends_while_a_resume_waits_for_it_is_not_done_again(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "wait_for", lambda job: write_status(job.folder, Status(state="finished")))
    done = sweep_call("resume", sweep.folder, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "0 of 2 jobs to do" in done.out


def test_a_sweep_that_was_killed_before_it_had_jobs(tmp_path):
    what = {"command": [], "launcher": {"kind": "local"}, "directory": str(tmp_path), "metric": None}
    made = make_sweep(tmp_path, tmp_path / "sweep", "x", what)
    done = sweep_call("resume", made.folder, cwd=tmp_path)
    assert (done.code, done.err) == (
        2,
        f"config error: sweep={made.folder}: was killed before its jobs were written; start it again\n",
    )


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (["finished", "pruned"], None),
        (["finished", "preempted"], "1 of 2 jobs did not finish (preempted); to do them again: "),
        (["failed", "interrupted"], "2 of 2 jobs did not finish (failed, interrupted); "),
        (["failed", "failed"], "2 of 2 jobs failed; "),
    ],
)
def test_a_job_that_did_not_finish_is_said(sweep, ends, words, capsys):
    for job, state in zip(read_jobs(sweep), ends, strict=True):
        write_status(job.folder, Status(state=state))
    if words is None:
        conclude(sweep)
        return
    with pytest.raises(RankError, match=re.escape(words)):
        conclude(sweep)
    out = capsys.readouterr().out
    assert all(f"job {i} {state}" in out for i, state in enumerate(ends) if state != "finished")
    assert str(read_jobs(sweep)[1].folder / LOG) in out


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("-1", None), ("2,-1,3", ("2",)), (" 0, 1", ("0", "1")), ("GPU-5a,GPU-6b", ("GPU-5a", "GPU-6b"))],
)
def test_the_gpus_of_a_job_are_those_that_cuda_sees(visible, gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert make_slots(1, [{"trainer": {"devices": 1, "accelerator": "gpu"}}]) == [Slot(gpus=gpus)]


@pytest.mark.parametrize(
    ("status", "value"),
    [
        (Status(state="finished", metric={"name": "fid", "value": 0.25}), 0.25),
        (Status(state="finished"), "it has not logged the metric"),
        (Status(state="failed", metric={"name": "fid", "value": 0.25}, error="too hot"), "too hot"),
        (Status(state="preempted"), "preempted"),
    ],
)
def test_a_sweeper_is_told_the_number_of_a_job(sweep, status, value):
    job, _ = read_jobs(sweep)
    write_status(job.folder, status)
    told = _returned(job, basic=False)
    assert told.overrides == job.overrides
    if isinstance(value, str):
        with pytest.raises(RankError, match=value):
            _ = told.return_value
        assert _returned(job, basic=True).return_value == (status.metric or {}).get("value")
    else:
        assert told.return_value == value


def begin(tmp_path, *typed, script="train", flags=("-m",)):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "200",
        "DENOISELAB_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *flags, *typed]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, start_new_session=True, **pipes)


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    assert condition()


def states(folder):
    return [job.status.state for job in read_jobs(read_sweep(folder))]


def in_job(folder, number, steps):
    """Whether a job has written so many rows of its trace."""
    (path,) = folder.glob(f"{number}_*")
    trace = path / "trace.csv"
    return trace.exists() and trace.read_text().count("\n") > steps


LONG = [*TINY, "metrics=none", "trainer.max_steps=12", "callbacks.checkpoints.every=4", "hydra.sweep.dir=sweep"]
SLOW_JOBS = ["+callbacks.trouble._target_=trouble.Trouble", "+callbacks.trouble.what=slow"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_a_sweep_that_is_stopped_in_its_third_job_is_resumed(tmp_path, number):
    folder = tmp_path / "sweep"
    logger = "wandb" if number == signal.SIGINT else "none"
    process = begin(tmp_path, "seed=1,2,3,4", *LONG, *SLOW_JOBS, f"logger={logger}")
    wait_until(lambda: folder.is_dir() and len(list(folder.glob("2_*"))) == 1 and in_job(folder, 2, 5))
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=300)
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    assert process.returncode == expected, out
    if number != signal.SIGKILL:
        assert f"to go on: python scripts/sweep.py resume {folder}" in out
    third = next(folder.glob("2_*"))
    wait_until(lambda: json.loads((third / STATUS).read_text())["state"] != "running")
    stopped = "interrupted" if number == signal.SIGINT else "preempted"
    assert states(folder) == ["finished", "finished", stopped, "queued"]
    seen = {path: path.stat().st_mtime_ns for path in folder.glob("[01]_*/**/*") if path.is_file()}

    done = begin(tmp_path, "resume", str(folder), "trust=[trouble]", script="sweep", flags=())
    out, _ = done.communicate(timeout=300)
    assert done.returncode == 0, out
    assert "2 of 4 jobs to do" in out
    assert states(folder) == ["finished"] * 4
    assert len(list(folder.iterdir())) == 6
    changed = {
        p for p, when in seen.items() if p.stat().st_mtime_ns != when and p.name not in (".lock", ".writing", WORKING)
    }
    assert not changed
    assert [job.status.attempts for job in read_jobs(read_sweep(folder))] == [1, 1, 2, 1]
    starts = [json.loads(line)["step"] for line in (third / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[1] >= 5  # it had saved as it was stopped
    if logger == "wandb":
        ids = [job.status.wandb_id for job in read_jobs(read_sweep(folder))]
        assert len(set(ids)) == 4
        boards = list(third.glob("wandb/offline-run-*"))
        assert len(boards) == 2
        assert all(board.name.endswith(ids[2]) for board in boards)
    straight = run_script("train", "seed=3", *LONG[:-1], "logger=none", f"run={tmp_path / 'straight'}", cwd=tmp_path)
    assert straight.code == 0, straight.err
    assert (third / "trace.csv").read_text() == (tmp_path / "straight" / "trace.csv").read_text()


@pytest.mark.slow
def test_two_ranks_a_job_and_what_goes_wrong_stays_in_its_job(tmp_path, record_property):
    """Six jobs on two ranks each: one raises on rank 1, one of rank 1 is killed, and one diverges."""
    small = [
        *TINY,
        "metrics=none",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.max_steps=6",
    ]
    trouble = "+callbacks.trouble.what=none,raises,killed"
    rates = "optimizer.lr=1e-3,1e18"
    typed = [*small, trouble, rates, "+callbacks.trouble._target_=trouble.Trouble", "hydra.sweep.dir=sweep"]
    process = begin(tmp_path, *typed)
    out, _ = process.communicate(timeout=500)
    record_property("table", out)
    assert process.returncode == 1
    jobs = read_jobs(read_sweep(tmp_path / "sweep"))
    found = {
        tuple(sorted(override.partition("=")[2] for override in job.varies)): (job.status.state, job.status.error or "")
        for job in jobs
    }
    assert found.pop(("0.001", "none")) == ("finished", "")
    assert {state for state, _ in found.values()} == {"failed"}
    assert "deliberate trouble" in found["0.001", "raises"][1]
    assert "SIGKILL" in found["0.001", "killed"][1]
    assert all("is not finite" in why for (rate, _), (_, why) in found.items() if rate == "1e+18")
    assert out.strip().splitlines()[-1].startswith("error: 5 of 6 jobs failed")
    assert all(str(job.folder / LOG) in out for job in jobs if job.status.state == "failed")
    assert len(jobs) == 6
    made = sorted(p.name for p in (tmp_path / "sweep").iterdir())
    assert made == sorted([WORKING, SWEEP, *(job.folder.name for job in jobs)])
    assert not list(tmp_path.glob("runs"))
    ids = [(job.folder / "id").read_text() for job in jobs]
    assert len(set(ids)) == 6
    assert all(len(list(job.folder.glob("wandb/offline-run-*"))) == 1 for job in jobs)
