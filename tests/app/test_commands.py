"""The three commands from outside: what they print, where they write, and that what they write is right."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import CONF, NETWORK, QUIET, ROOT, RUN, SHORT, call, files_below, only_run
from PIL import Image

from denoiselab.app.build import make_training
from denoiselab.runs import folder as run_folders
from denoiselab.training.checkpoint import load_checkpoint, newest_checkpoint

HEAVY = ("torch", "lightning", "wandb", "torchvision", "sklearn", "torch_fidelity", "matplotlib")


# --- help and printing the config ---


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
@pytest.mark.parametrize("flags", ["--help", "--cfg job", "--cfg job --resolve", "--info defaults"])
def test_asking_is_light_and_leaves_nothing(command, flags, tmp_path):
    code = (
        "import atexit, sys\n"
        f"sys.argv = ['denoiselab-{command}', *{flags.split()!r}]\n"
        f"heavy = lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])\n"
        "atexit.register(heavy)\n"
        f"from denoiselab.app import {command}_command\n"
        f"{command}_command()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert files_below(tmp_path) == []
    groups = ("sampler", "guidance") if command != "train" else tuple(p.name for p in CONF.iterdir() if p.is_dir())
    wanted = {
        "--help": groups,
        "--cfg job": ("seed: 0",),
        "--cfg job --resolve": ("seed: 0",),
        "--info defaults": ("base",),
    }
    for word in wanted[flags]:
        assert word in done.stdout
    assert "${" not in done.stdout or "--resolve" not in flags


# --- what a training run leaves ---


def test_a_run_is_made_in_the_working_folder(trained, tiny_run):
    done, cwd = trained
    assert [path.name for path in cwd.iterdir()] == ["runs"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_digits-unet-rectified_flow", tiny_run.name)
    assert str(tiny_run) in done.out
    assert "images/s" in done.out
    assert "fd_digits_20" in done.out
    assert "protocol: 20 samples" in done.out
    assert done.err == "WARNING: best=val/x0_mse: nothing has measured it, so there is no new best.ckpt\n"


def test_a_run_holds_all_that_is_needed_to_know_what_ran(tiny_run):
    made = {"checkpoints", "samples", "wandb", "train.log", "metrics.csv", "metrics.jsonl", "trace.csv"}
    made |= {"id", "starts.jsonl", ".lock", ".writing"}
    assert {path.name for path in tiny_run.iterdir()} == made | {
        "config.json",
        "command.json",
        "versions.json",
        "summary.json",
    }
    saved = {path.name for path in (tiny_run / "checkpoints").iterdir()}
    assert saved - {"best.ckpt", "best.json"} == {"step_0000004.ckpt"}
    assert files_below(tiny_run / "samples") == [
        "step_0000004_ema.png",
        "step_0000004_ema_closest.png",
        "step_0000004_raw.png",
    ]
    assert len(list(tiny_run.glob("wandb/offline-run-*"))) == 1
    log = (tiny_run / "train.log").read_text()
    assert "INFO denoiselab: " in log
    assert "step 4/4" in log


def test_the_config_of_a_run_is_resolved_and_builds_again(tiny_run):
    text = (tiny_run / "config.json").read_text()
    assert "${" not in text
    config = json.loads(text)
    parts, training = make_training(config)
    assert (parts.shape, training.settings.max_steps) == ((1, 8, 8), 4)
    assert config == load_checkpoint(newest_checkpoint(tiny_run))["config"]


def test_the_command_of_a_run_is_kept(tiny_run):
    command = json.loads((tiny_run / "command.json").read_text())
    assert command["overrides"] == RUN
    assert command["command"] == ["train.py", *RUN]
    assert command["choices"] | {"backbone": "unet", "sampler": "heun"} == command["choices"]


def test_the_versions_of_a_run_are_kept(tiny_run):
    versions = json.loads((tiny_run / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__.partition("+")[0]
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", versions["git"]["commit"])
        assert isinstance(versions["git"]["changed_files"], list)


def test_the_numbers_of_a_run_carry_their_protocol(tiny_run):
    numbers = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    names = {number["name"] for number in numbers}
    assert {
        f"{name}_digits_20" for name in ("fd", "kd", "precision", "recall", "coverage", "copy_rate", "accuracy")
    } <= names
    for number in numbers:
        protocol = number["protocol"]
        assert (protocol["count"], protocol["nfe"], protocol["weights"], protocol["step"]) == (20, 20, "ema", 4)
        assert (protocol["quantisation"], protocol["class_balance"]) == ("uint8", "balanced")
        assert {"extractor_hash", "resize", "reference_hash", "sampler", "guidance", "measure"} <= set(protocol)
    with (tiny_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/loss"]] == ["2", "4"]
    assert [row["step"] for row in rows if row["metrics/fd_digits_20"]] == ["4"]
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["error"]) == ("finished", 4, None)
    assert summary["metrics"] == {number["name"]: number["value"] for number in numbers}
    assert (tiny_run / summary["checkpoint"]).is_file()
    assert float(rows[-1]["metrics/fd_digits_20"]) == pytest.approx(summary["metrics"]["fd_digits_20"])


def test_two_launches_in_the_same_second_get_two_folders(tmp_path, monkeypatch):
    class Noon(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 12, 0, 0)

    monkeypatch.setattr(run_folders, "datetime", Noon)
    for _ in range(2):
        done = call("train", *NETWORK, *SHORT, *QUIET, "trainer.max_steps=1", "name=twice", cwd=tmp_path)
        assert done.code == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "2030-01-02_12-00-00_twice",
        "2030-01-02_12-00-00_twice-2",
    ]
    assert all((p / "summary.json").is_file() for p in (tmp_path / "runs").iterdir())


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_starting_from_the_weights_of_another_run_is_no_resume(weights, tiny_run, tmp_path):
    still = [
        "optimizer.lr=1e-12",
        "trainer.max_steps=1",
        "seed=7",
        f"init_weights={weights if weights == 'raw' else 'null'}",
    ]
    done = call("train", *NETWORK, *SHORT, *QUIET, f"init_from={tiny_run}", *still, cwd=tmp_path)
    assert done.code == 0, done.err
    source = load_checkpoint(newest_checkpoint(tiny_run))
    result = load_checkpoint(newest_checkpoint(only_run(tmp_path)))
    assert (result["global_step"], result["ema_updates"]) == (1, 1)
    others = {name: {f"network.{k}": v for k, v in average.items()} for name, average in source["ema"].items()}
    others["raw"] = source["state_dict"]
    for key, value in result["state_dict"].items():
        torch.testing.assert_close(value, others[weights][key], rtol=0, atol=1e-9)
    assert any(not torch.equal(others["raw"][key], value) for key, value in others["ema"].items())


# --- sampling ---


def drawn(tiny_run, cwd, *options):
    """The arrays and the record that `denoiselab-sample` writes."""
    done = call("sample", f"run={tiny_run}", "output=drawn.npz", *options, cwd=cwd)
    assert done.code == 0, done.err
    with np.load(cwd / "drawn.npz") as arrays:
        return arrays["images"], arrays["labels"], json.loads((cwd / "drawn.npz.json").read_text())


def test_samples_as_arrays(tiny_run, tmp_path):
    images, labels, record = drawn(tiny_run, tmp_path, "num_samples=25", "seed=1")
    assert (images.dtype, images.shape) == (np.uint8, (25, 8, 8, 1))
    assert np.bincount(labels).tolist() == [3] * 5 + [2] * 5
    assert images.std() > 10
    wanted = {"weights": "ema", "step": 4, "num_samples": 25, "seed": 1, "class": None, "nfe": 20}
    assert record | wanted == record
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drawn.npz", "drawn.npz.json"]


def test_a_sample_does_not_depend_on_the_batch_or_the_count(tiny_run, tmp_path):
    few, labels, _ = drawn(tiny_run, tmp_path, "num_samples=30", "batch_size=7")
    many, more, _ = drawn(tiny_run, tmp_path, "num_samples=70", "batch_size=64")
    assert (labels == more[:30]).all()
    off = np.abs(few.astype(int) - many[:30])
    assert off.max() <= 1
    assert (off > 0).mean() <= 0.001


def test_seeds_weights_and_steps_decide_the_samples(tiny_run, tmp_path):
    base, _, _ = drawn(tiny_run, tmp_path, "num_samples=10")
    again, _, _ = drawn(tiny_run, tmp_path, "num_samples=10", "weights=ema")
    assert (base == again).all()
    cases = {"seed=1": 20, "weights=raw": 20, "nfe=8": 8, "steps=3": 4, "sampler=ddim": 20, "guidance=cfg": 20}
    for option, nfe in cases.items():
        images, _, record = drawn(tiny_run, tmp_path, "num_samples=10", option)
        assert record["nfe"] == nfe, option
        assert (images != base).any(), option


def test_classes(tiny_run, tmp_path):
    assert drawn(tiny_run, tmp_path, "num_samples=5", "class=3")[1].tolist() == [3] * 5
    assert drawn(tiny_run, tmp_path, "num_samples=5", "class=[3,5]")[1].tolist() == [3, 5, 3, 5, 3]


def test_samples_as_a_grid(tiny_run, tmp_path):
    call("sample", f"run={tiny_run}", "num_samples=20", "output=new/grid.png", cwd=tmp_path)
    assert Image.open(tmp_path / "new" / "grid.png").size == (10 * 50 + 2, 2 * 50 + 2)
    assert (tmp_path / "new" / "grid.png.json").is_file()


def test_samples_as_single_files(tiny_run, tmp_path):
    call("sample", f"run={tiny_run}", "num_samples=12", "output=single", cwd=tmp_path)
    single = [f for f in files_below(tmp_path / "single") if f.endswith(".png")]
    assert single == sorted(f"{i % 10:03d}/{i:06d}.png" for i in range(12))
    images, _, _ = drawn(tiny_run, tmp_path, "num_samples=12")
    assert (np.asarray(Image.open(tmp_path / "single" / "001" / "000011.png")) == images[11, :, :, 0]).all()


def test_without_a_run_the_newest_is_taken(tmp_path):
    for name in ("first", "second"):
        call("train", *NETWORK, *SHORT, *QUIET, "trainer.max_steps=1", f"name=z-{name}", cwd=tmp_path)
        done = call("sample", "num_samples=4", cwd=tmp_path)
        assert done.code == 0
        (run,) = (tmp_path / "runs").glob(f"*_z-{name}*")
        assert str(run / "checkpoints" / "step_0000001.ckpt") in done.out
        assert (run / "samples" / "drawn_4_seed_0.png").is_file()


# --- measuring ---


def numbers_of(path):
    return {number["name"]: number for number in json.loads(Path(path).read_text())["numbers"]}


def test_a_run_its_samples_and_its_pictures_measure_the_same(tiny_run, tmp_path):
    done = call("evaluate", f"run={tiny_run}", "output=run.json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "fd_digits_20" in done.out
    numbers = numbers_of(tmp_path / "run.json")
    assert {name: n["value"] for name, n in numbers.items()} == pytest.approx(
        json.loads((tiny_run / "summary.json").read_text())["metrics"], rel=1e-4
    )
    call("sample", f"run={tiny_run}", "num_samples=20", "output=drawn.npz", cwd=tmp_path)
    call("sample", f"run={tiny_run}", "num_samples=20", "output=drawn", cwd=tmp_path)
    for source in ("drawn.npz", "drawn"):
        groups = [
            "datamodule=digits",
            "metrics=digits",
            "metrics.counts=[20]",
            f"images={source}",
            f"output={source}.out.json",
        ]
        done = call("evaluate", *groups, cwd=tmp_path)
        assert done.code == 0, done.err
        measured = numbers_of(tmp_path / f"{source}.out.json")
        assert measured.keys() == numbers.keys()
        for name, number in measured.items():
            assert number["value"] == pytest.approx(numbers[name]["value"], rel=1e-4), name
            assert number["floor"] == pytest.approx(numbers[name]["floor"], rel=1e-6), name
            assert number["protocol"]["images"] == source


def test_measuring_with_other_weights_sampler_and_count(tiny_run, tmp_path):
    other = ["weights=raw", "sampler=euler", "nfe=5", "metrics=digits", "metrics.counts=[10]"]
    done = call("evaluate", f"run={tiny_run}", *other, "output=other.json", cwd=tmp_path)
    assert done.code == 0, done.err
    protocol = numbers_of(tmp_path / "other.json")["fd_digits_10"]["protocol"]
    assert (protocol["weights"], protocol["nfe"], protocol["count"]) == ("raw", 5, 10)
    assert protocol["sampler"]["_target_"].endswith(".Euler")


def test_stored_images_carry_how_they_were_drawn(tiny_run, tmp_path):
    call("sample", f"run={tiny_run}", "num_samples=20", "output=drawn", "format=npz", cwd=tmp_path)
    groups = ["datamodule=digits", "metrics=digits", "counts=[20]", "images=drawn", "output=x.json"]
    done = call("evaluate", *groups, cwd=tmp_path)
    assert done.code == 0, done.err
    theirs = {n["name"]: n for n in map(json.loads, (tiny_run / "metrics.jsonl").read_text().splitlines())}
    for name, found in numbers_of(tmp_path / "x.json").items():
        assert found["protocol_id"] == theirs[name]["protocol_id"]
        assert found["value"] == pytest.approx(theirs[name]["value"], rel=1e-4)
        assert len(found["protocol"]["images_sha256"]) == 64


def test_labels_that_the_data_does_not_have_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 8, 8, 1), np.uint8), labels=np.full(20, 77))
    done = call("evaluate", "datamodule=digits", "metrics=digits", "counts=[20]", "images=x.npz", cwd=tmp_path)
    assert (done.code, done.err) == (2, "config error: images=x.npz: labels must be from 0 to 9, or -1, not 77\n")


def test_a_part_of_the_metrics_is_no_metrics(tiny_run, tmp_path):
    joined = "+metrics/extractor@metrics.extractors.mine=digits"
    done = call("evaluate", f"run={tiny_run}", joined, cwd=tmp_path)
    assert done.code == 2
    assert done.err == "config error: metrics: only a part of it is given; name the whole with metrics=<choice>\n"


def test_a_measurement_stays_in_the_run_folder(tiny_run, tmp_path):
    before = files_below(tiny_run)
    call("evaluate", f"run={tiny_run}", cwd=tmp_path)
    (new,) = {file for file in set(files_below(tiny_run)) - set(before) if file.endswith(".json")}
    assert new.startswith("evaluations/step_0000004_ema_")
    (tiny_run / new).unlink()
    assert files_below(tmp_path) == []


def test_places_that_cannot_be_written_are_refused_before_the_work(tiny_run, tmp_path):
    (tmp_path / "file").write_text("")
    for command in ("sample", "evaluate"):
        done = call(
            command,
            f"run={tiny_run}",
            "output=file/here/x.json" if command == "evaluate" else "output=file/x.png",
            cwd=tmp_path,
        )
        assert done.code == 2
        assert done.err.startswith("config error: output")
        assert "file" in done.err
        assert done.err.count("\n") == 1


def test_options_that_a_sampler_does_not_have_are_named(tiny_run, tmp_path):
    done = call("sample", f"run={tiny_run}", "sampler=dopri5", "steps=2", cwd=tmp_path)
    assert done.code == 2
    assert done.err == "config error: steps=2: this sampler chooses its own steps; leave nfe and steps out\n"


def test_other_data_than_the_networks_is_refused(tiny_run, fashion_folder, tmp_path):
    data = ["datamodule=fashion_mnist", f"datamodule.root={fashion_folder}", "metrics=bits_per_dim"]
    done = call("evaluate", f"run={tiny_run}", *data, cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("config error: backbone.resolution=8: the data has 28x28")


def test_a_checkpoint_that_lacks_a_part_is_one_line(tiny_run, tmp_path):
    for key in ("config", "ema", "state_dict", "global_step"):
        loaded = load_checkpoint(newest_checkpoint(tiny_run))
        del loaded[key]
        torch.save(loaded, tmp_path / "less.ckpt")
        done = call("sample", "checkpoint=less.ckpt", cwd=tmp_path)
        assert (done.code, done.err) == (
            2,
            f"config error: checkpoint=less.ckpt: has no {key}; it is damaged, or not of this program\n",
        )
    for key in ("objective", "seed", "codec"):
        loaded = load_checkpoint(newest_checkpoint(tiny_run))
        del loaded["config"][key]
        torch.save(loaded, tmp_path / "less.ckpt")
        done = call("sample", "checkpoint=less.ckpt", cwd=tmp_path)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert f"its config has no {key}" in done.err
