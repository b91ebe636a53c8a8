"""Sweeps on a real Ray cluster of this machine: they end, fail, are stopped, and outlive whoever started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile

import pytest
from calls import QUIET, ROOT, call, files_below
from test_sweeps import TINY, TROUBLE, in_job, states, wait_until

from denoiselab.runs.sweep_folder import read_jobs, read_sweep

RAY = ["hydra/launcher=ray", "hydra.launcher.cpus_per_process=1", "metrics=none", "callbacks.monitor.every=1"]
SMALL = [*TINY, *QUIET, *RAY, "+callbacks.trouble._target_=trouble.Trouble"]


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, with three cores; the variables that lead to it."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(
        prefix="ray-", ignore_cleanup_errors=True
    ) as folder:  # a short path: it holds sockets
        variables = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_USAGE_STATS_ENABLED": "0", "HOME": folder}
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=3"]
        line += [
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
            f"--temp-dir={folder}/ray",
            "--include-dashboard=false",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | variables
        process = subprocess.Popen(line, env=environment, start_new_session=True, **pipes)
        try:
            seen = ""
            while "Ray runtime started" not in seen:
                seen += process.stdout.readline() or pytest.fail(seen)
            yield variables
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def begin(cluster, tmp_path):
    """Starts a command on the cluster."""
    (tmp_path / "trouble.py").write_text(TROUBLE)

    def start(script, *typed):
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | cluster | {"PYTHONPATH": path, "DENOISELAB_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, typed)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment | {"COLUMNS": "200"}, **pipes)

    return start


def train(begin, folder, *typed):
    return begin("train", "-m", *SMALL, f"hydra.sweep.dir={folder}", *typed)


@pytest.mark.slow
def test_jobs_end_and_fail_on_a_cluster(begin, tmp_path):
    process = train(begin, tmp_path / "sweep", "+callbacks.trouble.what=none,raises,killed", "trainer.max_steps=4")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1, out
    assert "waits for room" in out
    assert out.strip().splitlines()[-1].startswith("error: 2 of 3 jobs failed"), out
    good, raises, killed = (job.status for job in read_jobs(read_sweep(tmp_path / "sweep")))
    assert (good.state, good.attempts, good.step) == ("finished", 1, 4)
    assert (raises.state, raises.error) == ("failed", "RuntimeError: deliberate trouble")
    assert (killed.state, killed.error) == ("failed", "killed by SIGKILL (out of memory?)")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_what_was_stopped_has_saved_and_is_resumed(begin, tmp_path, number):
    folder = tmp_path / "sweep"
    typed = ["seed=1,2,3,4", "+callbacks.trouble.what=slow", "trainer.max_steps=12", "callbacks.checkpoints.every=100"]
    process = train(begin, folder, *typed)  # three at a time, so that one finds no room
    wait_until(lambda: folder.is_dir() and len(list(folder.glob("*_*"))) == 4 and in_job(folder, 0, 5), 200)
    process.send_signal(number)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), out
    wait_until(lambda: "running" not in states(folder), 60)
    stopped = "preempted" if number == signal.SIGKILL else "interrupted"
    found = states(folder)
    assert found.count(stopped) >= 1, found
    assert "queued" in found, found
    assert set(found) <= {stopped, "queued"}, found
    first = read_jobs(read_sweep(folder))[0].status
    assert first.step > 4, "it did not save"

    again = begin("sweep", "resume", folder, "trust=[trouble]")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert "4 of 4 jobs to do" in out
    assert states(folder) == ["finished"] * 4
    rows = (next(folder.glob("0_*")) / "trace.csv").read_text().splitlines()[1:]
    assert [int(row.partition(",")[0]) for row in rows] == list(range(1, 13))


@pytest.mark.slow
def test_what_no_node_could_ever_hold_is_refused(begin, tmp_path):
    process = train(
        begin, tmp_path / "sweep", "seed=1,2", "+callbacks.trouble.what=none", "hydra.launcher.cpus_per_process=9"
    )
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 2, out
    (line,) = out.splitlines()
    assert "a job needs 9 cores and 0 GPUs of one node" in line
    assert "the nodes have 3 and 0" in line
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["hydra.launcher.address=127.0.0.1:1"], ["hydra.launcher.address=127.0.0.1:1", "no Ray cluster", "refused"]),
        (["hydra.launcher.address=there"], ["hydra.launcher.address=there", "host:port"]),
        (["hydra.launcher.address=ray://there:1"], ["hydra.launcher.address=ray", "host:port"]),
        (["trainer.num_nodes=2", "trainer=ddp"], ["trainer.num_nodes=2", "one node"]),
        (["trainer=ddp"], ["trainer.devices=auto", "say how many"]),
        (["hydra.launcher.cpus_per_process=0"], ["hydra.launcher.cpus_per_process=0", "at least 1"]),
        (["hydra.launcher.jobs=auto"], ["hydra.launcher.jobs=auto"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_mistake_is_found_before_anything_is_made(typed, words, tmp_path):
    before = files_below(tmp_path)
    done = call("train", "-m", "seed=1,2", *QUIET, "hydra/launcher=ray", *typed, cwd=tmp_path)
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err
    assert files_below(tmp_path) == before


def test_a_dry_run_needs_no_cluster(tmp_path):
    done = call("train", "-m", "seed=1,2", *QUIET, "hydra/launcher=ray", "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["0  seed=1", "1  seed=2"]


def test_what_is_said_of_a_process_that_a_shell_has_waited_for():
    from denoiselab.runs.ray_jobs import _as_signal

    assert [_as_signal(code) for code in (130, 137, 139, 143)] == [130, -9, -11, 143]
