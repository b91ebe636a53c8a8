"""The Slurm that the other tests of this folder rely on: it runs jobs, and `down` leaves nothing of it and all of others."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from slurm_cluster import SCRIPT, clean_environment, control, running_cluster


def processes_of(folder):
    """The live processes that name a folder in their command or environment, but this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            named = [(process / name).read_bytes() for name in ("cmdline", "environ")]
        except OSError:
            continue
        if process.name != str(os.getpid()) and any(str(folder).encode() in text for text in named):
            found.append(named[0].replace(b"\0", b" ").decode())
    return found


@pytest.mark.slurm
def test_a_job_runs_on_each_node(slurm):
    for node in ("n1", "n2"):
        job = slurm.submit(f"--nodelist={node}", script='echo "hello from $SLURMD_NODENAME"')
        (record,) = slurm.wait(job)
        assert (record["JobState"], record["ExitCode"]) == ("COMPLETED", "0:0")
        assert slurm.output(job) == f"hello from {node}\n"


@pytest.mark.slurm
def test_one_step_runs_on_both_nodes(slurm):
    job = slurm.submit(
        "--nodes=2", script="srun --label bash -c 'echo $SLURMD_NODENAME $SLURM_PROCID of $SLURM_NTASKS'"
    )
    slurm.wait(job, "COMPLETED")
    assert sorted(slurm.output(job).splitlines()) == ["0: n1 0 of 2", "1: n2 1 of 2"]


@pytest.mark.slurm
def test_every_task_of_an_array_runs(slurm):
    job = slurm.submit("--array=0-3%2", script="echo hello $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_TASK_COUNT")
    records = slurm.wait(job, "COMPLETED")
    assert sorted(record["ArrayTaskId"] for record in records) == ["0", "1", "2", "3"]
    assert [slurm.output(f"{job}_{i}") for i in range(4)] == [f"hello {i} of 4\n" for i in range(4)]


@pytest.mark.slurm
def test_a_job_that_fails_says_so(slurm):
    (record,) = slurm.wait(slurm.submit(script="exit 3"))
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "3:0")


@pytest.mark.slurm
def test_another_slurm_beside_it_goes_with_its_jobs_and_leaves_this_one(slurm):
    mine = slurm.submit("--nodes=2", script="srun sleep 60")
    with running_cluster(nodes=1) as other:
        stray = other.folder / "stray.sh"
        stray.write_text("trap '' TERM\nsleep 300\nsleep 300\n")
        job = other.submit(script=f"srun bash -c 'env --ignore-environment bash {stray} & wait'")
        slurm.wait(mine, "RUNNING")
        other.wait(job, "RUNNING")
        end = time.monotonic() + 60
        while not any(process.startswith(f"bash {stray}") for process in processes_of(other.folder)):
            assert time.monotonic() < end, other.output(job)
            time.sleep(0.1)
    assert processes_of(other.folder) == []
    assert slurm.states(mine) == ["RUNNING"]
    slurm.run("scancel", mine)
    slurm.wait(mine, "CANCELLED")


@pytest.fixture
def short_folder():
    """A folder whose path is as short as that of a socket has to be."""
    with tempfile.TemporaryDirectory(prefix="denoiselab-slurm-", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.slurm
def test_a_start_that_fails_stops_what_it_had_started(slurm, short_folder, tmp_path):
    broken = tmp_path / "slurmd"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    environment = clean_environment()
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    call = [str(SCRIPT), "up", str(short_folder)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "could not start: slurmd" in done.stderr
    assert processes_of(short_folder) == []
    control("up", str(short_folder), "1")
    control("down", str(short_folder))
    assert processes_of(short_folder) == []


@pytest.mark.slurm
def test_down_of_nothing_is_nothing(slurm):
    folder = slurm.folder / "nothing"
    control("down", str(folder))
    control("down", str(folder))
    assert not folder.exists()


@pytest.mark.parametrize(
    "words", [[], ["up"], ["up", "/tmp/x", "0"], ["up", "/tmp/x", "2", "many"], ["down"], ["reset"]]
)
def test_a_wrong_call_is_one_line(words):
    done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("slurm_local.sh: usage: ")
    assert done.stderr.count("\n") == 1
