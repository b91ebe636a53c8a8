from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from calls import ROOT, call, files_below, run_script

import denoiselab.app.sample
from denoiselab.evaluation.pictures import read_images

FEW = ["nfe=8", "num_samples=53"]


def drawn(run, cwd, *options):
    """What `denoiselab-sample` leaves in a folder: images and labels."""
    done = call("sample", f"run={run}", "output=drawn", *FEW, *options, cwd=cwd)
    assert done.code == 0, done.err
    return read_images(cwd / "drawn", 1)


def assert_same(found, expected):
    """Equal to at most one grey level on at most 0.1 % of the pixels."""
    off = (found[0].int() - expected[0].int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() <= 0.001
    assert torch.equal(found[1], expected[1])


def refused(run, cwd, *options):
    """The one line of a refusal, which leaves everything as it was."""
    before = files_below(cwd)
    done = call("sample", f"run={run}", *options, cwd=cwd)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert files_below(cwd) == before
    return done.err


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    """The samples as one process draws them in one batch."""
    return drawn(tiny_run, tmp_path_factory.mktemp("whole"), "format=png", "batch_size=500")


def test_shards_with_their_protocol(tiny_run, whole, tmp_path):
    assert_same(drawn(tiny_run, tmp_path, "format=npz", "shard=20", "batch_size=7"), whole)
    names = ["000000-000019.npz", "000020-000039.npz", "000040-000052.npz", "protocol.json"]
    assert files_below(tmp_path) == ["drawn", *(f"drawn/{name}" for name in names)]
    protocol = json.loads((tmp_path / "drawn" / "protocol.json").read_text())
    wanted = {"num_samples": 53, "seed": 0, "class": None, "nfe": 8, "weights": "ema", "step": 4, "shard": 20}
    assert protocol | wanted | {"format": "npz"} == protocol
    assert len(protocol["weights_sha256"]) == 64
    assert {"checkpoint", "sampler", "guidance", "objective", "codec"} < set(protocol)


@pytest.mark.parametrize(
    ("form", "turns"),
    [("npz", "shard=20"), pytest.param("png", "shard=1", marks=pytest.mark.slow)],
)
def test_two_ranks_draw_what_one_draws(form, turns, tiny_run, whole, tmp_path):
    options = [f"format={form}", turns, "batch_size=7", "devices=2"]
    done = run_script("sample", f"run={tiny_run}", "output=drawn", *FEW, *options, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "processes: 2" in done.out
    assert_same(read_images(tmp_path / "drawn", 1), whole)


@pytest.mark.slow
def test_torchrun_draws_what_one_process_draws(tiny_run, whole, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [f"run={tiny_run}", "output=drawn", *FEW, "format=npz", "shard=20"]
    command = [*launcher, str(ROOT / "scripts" / "sample.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("output") == 1
    assert_same(read_images(tmp_path / "drawn", 1), whole)


@pytest.mark.parametrize(
    ("form", "lost"), [("npz", ["000020-000039.npz"]), ("png", ["003/000013.png", "009/000009.png"])]
)
def test_a_folder_goes_on_where_it_was_left(form, lost, tiny_run, whole, tmp_path):
    drawn(tiny_run, tmp_path, f"format={form}", "shard=20")
    folder = tmp_path / "drawn"
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob(f"*.{form}")}
    for name in lost:
        (folder / name).rename((folder / name).with_name(f".{(folder / name).name}.0a1b2c3d.partial"))
        del kept[folder / name]
    done = call("sample", f"run={tiny_run}", "output=drawn", *FEW, f"format={form}", "shard=20", cwd=tmp_path)
    missing = 20 if form == "npz" else 2
    assert f"53, seed 0, {53 - missing} of them found there" in done.out
    assert f"images {missing}/{missing} (100%)" in done.out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(folder.rglob("*.partial"))
    assert_same(read_images(folder, 1), whole)


def test_a_folder_of_other_samples_is_refused(tiny_run, tmp_path):
    drawn(tiny_run, tmp_path, "format=npz", "shard=20")
    here = [*FEW, "format=npz", "shard=20", "output=drawn"]
    assert "seed is 0 there, here it is 1; give another folder" in refused(tiny_run, tmp_path, *here, "seed=1")
    assert 'weights is "ema" there, here it is "raw"' in refused(tiny_run, tmp_path, *here, "weights=raw")
    assert "sampler.nfe is 8 there, here it is 16" in refused(tiny_run, tmp_path, *here, "nfe=16")
    assert "num_samples is 53 there, here it is 54" in refused(tiny_run, tmp_path, *here, "num_samples=54")
    assert "shard is 20 there, here it is 10" in refused(tiny_run, tmp_path, *here, "shard=10")
    assert 'format is "npz" there, here it is "png"' in refused(tiny_run, tmp_path, *here, "format=png")


def test_what_does_not_go_together_is_refused(tiny_run, tmp_path):
    assert "format=npz: is for a folder" in refused(tiny_run, tmp_path, "format=npz", "output=a.png")
    assert "format=jpg: " in refused(tiny_run, tmp_path, "format=jpg", "output=a")
    assert "devices=2: one file is written by one process" in refused(tiny_run, tmp_path, "devices=2", "output=a.npz")
    assert "num_samples=50000: a grid shows at most 1000" in refused(tiny_run, tmp_path, "num_samples=50000")
    assert "shard=0: must be at least 1" in refused(tiny_run, tmp_path, "shard=0", "output=a")
    assert "devices=0: must be at least 1" in refused(tiny_run, tmp_path, "devices=0", "output=a")
    assert "class=[10]: must be among 0 to 9" in refused(tiny_run, tmp_path, "class=10", "output=a")


def test_the_labels_asked_for_are_kept(tiny_run, tmp_path):
    _, labels = drawn(tiny_run, tmp_path, "format=npz", "shard=20", "class=[3,5]")
    assert labels.tolist() == [3, 5] * 26 + [3]


def test_a_full_disk_is_one_line(tiny_run, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(denoiselab.app.sample, "write_npz", full)
    done = call("sample", f"run={tiny_run}", "output=a.npz", *FEW, cwd=tmp_path)
    assert (done.code, done.err) == (1, "error: output=a.npz: [Errno 28] No space left on device\n")


@pytest.mark.slow
def test_a_killed_job_goes_on(tiny_run, tmp_path):
    """All processes are killed in the middle of a shard; nothing half-written is taken."""
    options = [f"run={tiny_run}", "output=drawn", "nfe=20", "num_samples=400", "batch_size=5"]
    options += ["format=npz", "shard=20"]
    command = [sys.executable, str(ROOT / "scripts" / "sample.py"), *options, "devices=2"]
    job = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    while len(list(tmp_path.glob("drawn/*.npz"))) < 3:
        assert job.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    for pid in [job.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    job.wait()
    found = len(list(tmp_path.glob("drawn/*.npz")))
    assert 3 <= found < 20
    for file in tmp_path.glob("drawn/*.npz"):
        with np.load(file) as arrays:
            assert arrays["images"].shape == (20, 8, 8, 1)
    done = call("sample", *options, cwd=tmp_path)
    assert f"{20 * found} of them found there" in done.out
    assert len(read_images(tmp_path / "drawn", 1)[1]) == 400
