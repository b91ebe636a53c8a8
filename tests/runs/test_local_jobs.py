"""Jobs as processes: what each begins with, how each may end, and that none outlives a sweep. The jobs here are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from denoiselab.runs import local_jobs
from denoiselab.runs.errors import Stopped
from denoiselab.runs.files import read_json, write_json
from denoiselab.runs.folder import RUNNING, SUMMARY
from denoiselab.runs.local_jobs import Slot, job_command, job_environment, run_jobs, share_out, start_here
from denoiselab.runs.signals import stopping
from denoiselab.runs.sweep_folder import LOG, Status, add_jobs, make_sweep, write_status


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Makes a sweep of jobs, each of which is a Python program."""

    def make(*programs):
        what = {"command": [], "launcher": {}, "directory": str(tmp_path), "metric": None}
        sweep = make_sweep(tmp_path, tmp_path / "sweep", "x", what)
        composed = [({"program": program}, {}, []) for program in programs]
        return add_jobs(sweep, [[f"i={i}"] for i in range(len(programs))], composed)

    def stand_in(folder, slot=None, trust=None):
        code = (
            "import json, sys, os, signal, time; exec(json.load(open(sys.argv[1] + '/job.json'))['config']['program'])"
        )
        return [sys.executable, "-c", code, str(folder)]

    monkeypatch.setattr(local_jobs, "job_command", stand_in)
    return make


def run(sweep, jobs, at_once=1, **how):
    lines = []
    run_jobs(sweep, jobs, [Slot()] * at_once, total=len(jobs), say=lines.append, **how)
    return lines, [job.status for job in jobs]


def test_each_job_runs_whatever_became_of_the_one_before(begin):
    sweep, jobs = begin(
        "print('hello')", "raise SystemExit(3)", "os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(75)", "sys.exit(130)"
    )
    lines, states = run(sweep, jobs)
    assert [s.state for s in states] == ["finished", "failed", "failed", "preempted", "interrupted"]
    assert [s.exit_code for s in states] == [0, 3, -9, 75, 130]
    assert states[1].error == "ended with exit code 3"
    assert states[2].error == "killed by SIGKILL (out of memory?)"
    assert (jobs[0].folder / LOG).read_text() == "hello\n"
    assert lines[0].startswith("[1/5] i=0: started; ")
    assert lines[5].startswith("[3/5] i=2: failed after 0 s: killed by SIGKILL")


def test_what_a_job_says_of_itself_stands(begin):
    sweep, jobs = begin("""
from pathlib import Path
from dataclasses import replace
from denoiselab.runs.sweep_folder import Status, write_status
write_status(Path(sys.argv[1]), Status(state="failed", attempts=1, exit_code=1, error="the first cause"))
sys.exit(1)
""")
    _, (status,) = run(sweep, jobs)
    assert (status.state, status.error, status.attempts) == ("failed", "the first cause", 1)


def test_the_numbers_of_the_summary_are_in_the_status(begin):
    sweep, jobs = begin("pass")
    write_json(jobs[0].folder / SUMMARY, {"steps": 7, "metrics": {"fid": 3.5}, "checkpoint": "c"})
    (jobs[0].folder / "id").write_text("some-id\n")
    _, (status,) = run(sweep, jobs)
    assert (status.step, status.metric, status.checkpoint) == (7, {"name": "fid", "value": 3.5}, "c")
    assert status.wandb_id == "some-id"


def test_what_a_job_that_was_killed_had_come_to_is_in_its_status(begin):
    sweep, jobs = begin("os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGTERM)", "sys.exit(3)")
    before = Status(attempts=1, checkpoint="old", step=2, metric={"name": "fid", "value": 9.0}, wandb_id="some-id")
    for job in jobs:
        write_json(job.folder / SUMMARY, RUNNING)
        write_status(job.folder, before)
    (jobs[0].folder / "checkpoints").mkdir()
    for name in ("step_9999999.ckpt", "step_10000000.ckpt", "best.ckpt"):
        (jobs[0].folder / "checkpoints" / name).touch()
    known = {jobs[0].folder: (7, 3.5)}
    _, states = run(replace(sweep, metric={"name": "fid"}), jobs, logged=lambda f, m: known.get(f, (None, None)))
    assert (states[0].step, states[0].metric) == (7, {"name": "fid", "value": 3.5})
    assert states[0].checkpoint == "checkpoints/step_10000000.ckpt"
    kept = [(s.checkpoint, s.step, s.metric, s.wandb_id) for s in states]
    assert kept[1:] == [("old", 2, before.metric, "some-id")] * 2
    said = [read_json(job.folder / SUMMARY) for job in jobs]
    assert said == [
        {"status": "failed", "error": "killed by SIGKILL (out of memory?)"},
        {"status": "preempted", "error": None},
        {"status": "failed", "error": "ended with exit code 3"},
    ]


def test_jobs_work_at_a_time_and_no_more(begin, tmp_path):
    program = """
open("began", "a").write("+")
while len(open("began").read()) < 2:  # the first is there when the second begins
    time.sleep(0.01)
"""
    sweep, jobs = begin(*[program] * 4)
    processes, at_work = [], []

    def start(*what):
        at_work.append(1 + sum(not process.is_over() for process in processes))
        processes.append(start_here(*what))
        return processes[-1]

    run(sweep, jobs, at_once=2, start=start)
    assert at_work[:2] == [1, 2]
    assert max(at_work) == 2


def test_a_job_has_a_process_group_of_its_own_that_ends_with_it(begin, tmp_path):
    sweep, jobs = begin("""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open("pids", "w").write(f"{os.getpgrp()} {child.pid}")
""")
    run(sweep, jobs)
    group, child = map(int, (tmp_path / "pids").read_text().split())
    assert group != os.getpgrp()
    end = time.monotonic() + 5
    while _alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_ranks_of_a_job_that_was_killed_may_save(begin, tmp_path):
    sweep, jobs = begin("""
import subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1); open('saved', 'w')"])
os.kill(os.getpid(), signal.SIGKILL)
""")
    run(sweep, jobs)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("number", "state"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "preempted")])
def test_a_signal_is_handed_on_and_the_rest_stays_queued(begin, number, state):
    program = """
def stop(number, frame):
    time.sleep(0.5)
    sys.exit(130 if number == signal.SIGINT else 75)
for n in (signal.SIGINT, signal.SIGTERM):
    signal.signal(n, stop)
open(sys.argv[1] + "/ready", "w")
time.sleep(60)
"""
    sweep, jobs = begin(program, program)

    def send():
        while not (jobs[0].folder / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with stopping(), pytest.raises(Stopped):
        run(sweep, jobs)
    assert [job.status.state for job in jobs] == [state, "queued"]


def test_a_second_signal_kills(begin):
    program = """
for n in (signal.SIGINT, signal.SIGTERM):
    signal.signal(n, signal.SIG_IGN)
open(sys.argv[1] + "/ready", "w")
time.sleep(60)
"""
    sweep, jobs = begin(program)

    def send():
        while not (jobs[0].folder / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send).start()
    began = time.monotonic()
    with stopping(), pytest.raises(Stopped):
        run(sweep, jobs)
    assert time.monotonic() - began < 30
    assert jobs[0].status.exit_code == -signal.SIGKILL


def test_a_job_is_stopped_when_it_is_not_worth_going_on(begin, monkeypatch):
    monkeypatch.setattr(local_jobs, "WATCH_SECONDS", 0.1)
    program = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(60)"
    sweep, jobs = begin(program, "time.sleep(0.5)")
    _, states = run(sweep, jobs, prune=lambda job: job.number == 0 and local_jobs.time.monotonic() > 0)
    assert [s.state for s in states] == ["pruned", "finished"]


def test_nothing_of_another_job_or_run_reaches_a_job():
    foreign = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "WANDB_RUN_ID": "the same for all",
        "WANDB_RUN_GROUP": "g",
    }
    own = {"PATH": "p", "WANDB_MODE": "offline", "WANDB_API_KEY": "k", "OMP_NUM_THREADS": "1", "MY_RANK": "1"}
    assert job_environment(foreign | own, Slot()) == own
    assert job_environment(own, Slot(gpus=("2", "3")))["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert job_environment({"SLURM_CONF": "c"}, Slot()) == {
        "SLURM_CONF": "c"
    }  # which says where Slurm is, not what runs


def test_a_job_runs_the_code_that_was_kept_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DENOISELAB_CACHE", str(tmp_path))
    (tmp_path / "code" / "0123abcd" / "src").mkdir(parents=True)
    kept = job_environment({"PYTHONPATH": "/mine"}, Slot(), "0123abcd")
    assert kept["PYTHONPATH"] == f"{tmp_path}/code/0123abcd/src:/mine"


def test_a_job_takes_no_code_from_the_folder_that_it_starts_in(tmp_path, monkeypatch):
    """A sweep's file names it, and a sweep may be somebody else's."""
    (tmp_path / "denoiselab").mkdir()
    (tmp_path / "denoiselab" / "__init__.py").write_text("open('evil', 'w')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([":", "src", os.environ.get("PYTHONPATH", "")]))
    environment = job_environment(os.environ, Slot())
    done = subprocess.run(
        job_command(tmp_path / "missing"), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "config error: run=" in done.stderr
    assert not (tmp_path / "evil").exists()
    assert all(os.path.isabs(path) for path in environment["PYTHONPATH"].split(os.pathsep))
    assert "PYTHONPATH" not in job_environment({"PYTHONPATH": ""}, Slot())


@pytest.mark.parametrize(
    ("at_once", "cores", "gpus", "slots"),
    [
        (1, range(4), [], [Slot()]),
        (1, range(4), ["0", "1"], [Slot(gpus=("0", "1"))]),
        (2, range(4), [], [Slot((0, 1)), Slot((2, 3))]),
        (3, range(2), [], [Slot((0,)), Slot((1,)), Slot((0,))]),
        (2, range(4), list("abcde"), [Slot((0, 1), ("a", "b")), Slot((2, 3), ("c", "d"))]),
    ],
)
def test_the_machine_is_shared_out_in_equal_parts(at_once, cores, gpus, slots):
    assert share_out(at_once, list(cores), gpus) == slots
