"""What is asked of Slurm, without one: shapes, scripts and what a process makes of its place in a step."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from denoiselab.app.sweep_job import STUCK, TASK, _first_cause, _join_step, _said, main
from denoiselab.runs import frozen_code, slurm
from denoiselab.runs.errors import ConfigError, Stopped
from denoiselab.runs.slurm import ATTEMPT, FAILED, Shape, in_queue, script, seconds_of, shape_of, submit
from denoiselab.runs.sweep_folder import Status, Sweep, add_jobs, make_sweep, read_sweep, write_status

SETTINGS = {
    "nodes": None,
    "gpus_per_node": None,
    "cpus_per_task": 4,
    "mem": None,
    "time": "24:00:00",
    "partition": None,
    "account": None,
    "qos": None,
    "at_once": None,
    "signal_seconds": 120,
    "requeues": 100,
    "python": "/env/bin/python",
    "container": None,
    "prologue": None,
    "environment": None,
    "options": None,
}


def config(accelerator="cpu", devices=1, nodes=1):
    return {"trainer": {"accelerator": accelerator, "devices": devices, "num_nodes": nodes}}


@pytest.mark.parametrize(
    ("trainer", "settings", "shape"),
    [
        (config(), {}, Shape(1, 1, False)),
        (config(devices=2, nodes=2), {"nodes": 2}, Shape(2, 2, False)),
        (config("gpu", 8, 2), {}, Shape(2, 8, True)),
        (config("auto", "auto"), {"gpus_per_node": 4}, Shape(1, 4, True)),
        (config("auto", 4), {"gpus_per_node": 4}, Shape(1, 4, True)),
        (config("auto", 2), {"gpus_per_node": 0}, Shape(1, 2, False)),
        (config("cpu", "auto"), {}, Shape(1, 1, False)),
    ],
)
def test_what_a_job_occupies(trainer, settings, shape):
    assert shape_of(trainer, SETTINGS | settings) == shape


@pytest.mark.parametrize(
    ("trainer", "settings", "words"),
    [
        (config(), {"nodes": 2}, "nodes=2: but trainer.num_nodes=1; say trainer.num_nodes=2"),
        (config("gpu", 4), {"gpus_per_node": 8}, "gpus_per_node=8: but trainer.devices=4; say trainer.devices=8"),
        (config("auto", "auto"), {}, "trainer.devices=auto: say how many GPUs"),
        (config("cpu"), {"gpus_per_node": 1}, "trainer.accelerator=cpu"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(trainer, settings, words):
    with pytest.raises(ConfigError, match=words):
        shape_of(trainer, SETTINGS | settings)


@pytest.fixture
def job(tmp_path):
    """The folder of one job in a sweep."""
    sweep = make_sweep(tmp_path, tmp_path / "sweep", "x", {"command": [], "launcher": {}, "directory": str(tmp_path)})
    _, (job,) = add_jobs(sweep, [["seed=1"]], [(config(), {}, ["seed=1"])])
    return job


def text_of(shape, **settings):
    return script(Sweep(Path("/sweeps/a b's"), [], {}, "/work dir"), shape, [0, 1, 2], SETTINGS | settings)


def test_a_script_says_what_is_asked_and_is_valid_bash():
    text = text_of(
        Shape(2, 8, True),
        partition="gpu",
        mem="64G",
        at_once=2,
        options={"constraint": "a100"},
        prologue=["module load cuda"],
        environment={"NCCL_DEBUG": "a b"},
        container="apptainer exec --nv x.sif",
    )
    for line in (
        '#SBATCH --array="0,1,2%2"',
        '#SBATCH --nodes="2"',
        '#SBATCH --ntasks-per-node="8"',
        '#SBATCH --gpus-per-node="8"',
        '#SBATCH --partition="gpu"',
        '#SBATCH --mem="64G"',
        '#SBATCH --constraint="a100"',
        '#SBATCH --signal="USR1@120"',
        "#SBATCH --requeue",
        "module load cuda",
        "export NCCL_DEBUG='a b'",
        "cd '/work dir' || exit 1",
    ):
        assert f"\n{line}\n" in text, line
    assert '  apptainer exec --nv x.sif /env/bin/python -P -m denoiselab.app.sweep_job --stay "$folder"\n' in text
    assert "account" not in text
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "state", "requeued"),
    [
        (75, 0, "preempted", True),
        (75, 99, "preempted", True),
        (75, 100, "preempted", False),
        (75, 1, "failed", False),
        (0, 0, "finished", False),
        (1, 0, "running", False),
    ],
)
def test_only_what_has_saved_and_may_go_on_is_queued_again(code, restarts, state, requeued, job, tmp_path):
    """The script itself, with stand-ins for srun and scontrol."""
    for name, body in {
        "srun": f"ls -A {job.folder} > {tmp_path}/seen; exit {code}",
        "scontrol": f'echo "$@" >> {tmp_path}/asked',
        "python": "exit 0",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    write_status(job.folder, Status(state=state))
    (job.folder / FAILED).write_text("6.0 rank 1 failed\n")
    text = script(read_sweep(job.folder.parent), Shape(1, 1, False), [0], SETTINGS | {"python": "python"})
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "9",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_RESTART_COUNT": str(restarts),
        "MASTER_ADDR": "x",
    }
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    assert FAILED not in (tmp_path / "seen").read_text(), "what another attempt has left is still there"
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 7_0\n" if requeued else "")


def test_secrets_are_not_handed_to_slurm(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text('#!/bin/bash\ncat > /dev/null\nenv > "$(dirname "$0")/seen"\necho "12;cluster"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert submit("#!/bin/bash\n") == "12"
    seen = (tmp_path / "seen").read_text()
    assert "very-secret" not in seen
    assert "SLURM_CONF=/etc/slurm.conf" in seen
    assert "SLURM_JOB_ID" not in seen


def test_what_slurm_refuses_is_said_in_its_words(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "sbatch: error: invalid partition specified: x" >&2\nexit 1\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match="sbatch refuses: invalid partition specified: x"):
        submit("#!/bin/bash\n")


def test_where_there_is_no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        slurm.check_sbatch()
    with pytest.raises(ConfigError, match="squeue does not answer"):
        in_queue(["51_0"])


def test_the_queue_is_asked_once_for_all_arrays(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\nprintf "51_0|RUNNING\\n51_9|PENDING\\n"\n'
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert in_queue(["51_0", "51_1", "52_0"]) == {"51_0": "RUNNING"}
    assert (tmp_path / "asked").read_text() == "-h -r -t all -o %i|%T -j 51,52\n"


def test_a_queue_that_does_not_answer_is_not_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def says(error):
        (tmp_path / "squeue").write_text(f'#!/bin/bash\necho "slurm_load_jobs error: {error}" >&2\nexit 1\n')
        (tmp_path / "squeue").chmod(0o755)

    says("Unable to contact slurm controller (connect failure)")
    with pytest.raises(ConfigError, match="Unable to contact slurm controller"):
        in_queue(["51_0"])
    says("Invalid job id specified")  # of a job that Slurm has forgotten
    assert in_queue(["51_0"]) == {}


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        (2, 120),
        ("90", 5400),
        ("1:30", 90),
        ("04:00:00", 14400),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("2-00:00:05", 172805),
        ("0", None),
        ("UNLIMITED", None),
        (None, None),
    ],
)
def test_time_limits_as_slurm_writes_them(limit, seconds):
    assert seconds_of(limit) == seconds


def test_options_of_sbatch_without_a_value():
    text = text_of(Shape(1, 1, False), options={"exclusive": True, "spread-job": False, "exclude": None, "nice": 5})
    assert "#SBATCH --exclusive\n" in text
    assert '#SBATCH --nice="5"\n' in text
    assert "spread-job" not in text
    assert "exclude" not in text


def run_script(folder, text, *, path="", **environment):
    """A batch script, where srun does what it is told to; Python is this one."""
    (folder / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (folder / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    said = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "MASTER_ADDR": "x"}
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "PYTHONPATH": path} | said | environment
    return subprocess.run(["bash"], input=text, text=True, capture_output=True, env=environment, check=False)


def test_jobs_run_the_code_of_then(tmp_path, monkeypatch):
    live = tmp_path / "live" / "src"
    for place in (live / "denoiselab" / "app", live / "hydra_plugins" / "denoiselab", tmp_path / "live" / "conf"):
        place.mkdir(parents=True)
    module = live / "denoiselab" / "app" / "sweep_job.py"
    for package in (module.parent, module.parents[1]):
        (package / "__init__.py").touch()
    module.write_text("import sys\nprint('then', sys.argv[1:])\n")
    monkeypatch.setattr(frozen_code, "PACKAGE", live / "denoiselab")
    monkeypatch.setenv("DENOISELAB_CACHE", str(tmp_path / "a cache"))
    (tmp_path / "0_job").mkdir()
    code = frozen_code.freeze()
    sweep = Sweep(tmp_path, [], {}, str(live), code=code)  # from a folder where the code of now would be found first
    text = script(sweep, Shape(1, 1, False), [0], SETTINGS | {"python": sys.executable})
    module.write_text("print('now')\n")
    done = run_script(tmp_path, text, path=str(live))
    frozen = str(tmp_path / "a cache" / "code" / code / "src")
    assert done.stdout == f"then {['--stay', '--code', frozen, str(tmp_path / '0_job')]}\n", done.stderr


def test_where_the_code_of_the_sweep_is_not_there_its_jobs_fail(job, tmp_path):
    sweep = replace(read_sweep(job.folder.parent), code=None)
    text = script(sweep, Shape(1, 1, False), [0], SETTINGS | {"python": sys.executable})
    text = text.replace('--stay "$folder"', f'--stay --code {tmp_path}/gone "$folder"')
    done = run_script(tmp_path, text, path=str(frozen_code.PACKAGE.parent))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert job.status.state == "failed"
    assert job.status.error.startswith(f"code={tmp_path}/gone: the code of this sweep is not there on ")


@pytest.mark.parametrize(
    ("prologue", "directory"),
    [(["exit 3"], "."), (["set -e", "false"], "."), (["set -eu"], "gone"), (["exit 0"], ".")],
)
def test_a_script_that_ends_before_its_ranks_begin_is_a_job_that_failed(prologue, directory, job, tmp_path):
    sweep = replace(read_sweep(job.folder.parent), directory=str(tmp_path / directory))
    text = script(sweep, Shape(1, 1, False), [0], SETTINGS | {"python": sys.executable, "prologue": prologue})
    done = run_script(tmp_path, text, path=str(frozen_code.PACKAGE.parent))
    assert job.status.state == "failed", done.stderr
    assert job.status.error == "its script ended before the run began: see slurm/7_0.log"


def test_a_process_of_several_takes_its_place():
    said = {
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "60",
        "SLURM_ARRAY_JOB_ID": "59",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_CONF": "c",
        "HOME": "h",
    }
    assert _join_step(said)
    assert said == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "TORCHELASTIC_RUN_ID": "60",
        TASK: "59_3",
        "SLURM_CONF": "c",
        "HOME": "h",
    }


def test_a_process_that_is_alone_or_outside_a_step_has_none():
    alone = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "60", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}
    assert not _join_step(alone)
    assert alone == {}
    outside = {"SLURM_JOB_ID": "60", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}  # as batch scripts have it
    before = dict(outside)
    assert not _join_step(outside)
    assert outside == before


def test_a_failure_of_another_attempt_ends_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(ATTEMPT, "60.0")
    assert _first_cause(tmp_path, "oh", echo=False) == "rank 1 failed: oh"
    assert _first_cause(tmp_path, "gloo/", echo=True) == "rank 1 failed: oh"
    assert _said(tmp_path) == "rank 1 failed: oh"
    monkeypatch.setenv(ATTEMPT, "60.1")  # queued again, and its file is still seen on this node
    assert _said(tmp_path) is None
    assert _first_cause(tmp_path, "ah", echo=False) == "rank 1 failed: ah"


@pytest.mark.parametrize(
    ("number", "saves", "state"),
    [(signal.SIGUSR1, False, "failed"), (signal.SIGUSR1, True, "preempted"), (signal.SIGTERM, False, "preempted")],
)
def test_a_job_that_gets_nowhere_in_its_time_is_not_queued_for_ever(number, saves, state, job, monkeypatch):
    def stopped(*_):
        if saves:
            (job.folder / "checkpoints" / f"step_000000{job.status.attempts}.ckpt").touch()
        raise Stopped(number)

    (job.folder / "checkpoints").mkdir()
    monkeypatch.setattr("denoiselab.app.train.train", stopped)
    monkeypatch.setattr(sys, "argv", ["sweep_job", "--stay", str(job.folder)])
    monkeypatch.setenv(TASK, "")
    for expected in ("preempted", state):
        for key in ("STEP_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"):
            monkeypatch.setenv(f"SLURM_{key}", "0")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 75
        assert job.status.state == expected
    assert job.status.error == (STUCK if state == "failed" else None)
