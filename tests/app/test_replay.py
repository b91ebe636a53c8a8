"""A finished run trained again from its folder: what is found equal, and what is found to differ."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from denoiselab.app.compose import command
from denoiselab.app.replay import Verdict, compare
from denoiselab.runs.errors import RankError
from stand_ins import write_imagenet

ROOT = Path(__file__).parents[2]
SMALL = [
    "backbone.width=8",
    "backbone.multipliers=[1]",
    "backbone.attention_resolutions=[]",
    "datamodule.batch_size=8",
    "datamodule.flip=true",
    "schedule.warmup_steps=2",
    "trainer.max_steps=12",
    "trainer.val_every=100",
    "callbacks.monitor.every=5",
    "callbacks.checkpoints.every=4",
    "callbacks.checkpoints.keep=3",
    "callbacks.pictures=null",
    "logger=none",
    "metrics=none",
]


def started(task, folder, *overrides):
    """Run a command in this process; its exit code."""
    arguments, where = sys.argv, Path.cwd()
    sys.argv = [task, *overrides]
    os.chdir(folder)
    try:
        command(task, f"denoiselab.app.{task}:{task}")
    except SystemExit as ended:
        return ended.code
    finally:
        sys.argv = arguments
        os.chdir(where)
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    images = folder / "images"
    for label in range(2):
        (images / str(label)).mkdir(parents=True)
        for i in range(12):
            content = bytes((37 * i + 11 * label + 3 * p) % 256 for p in range(64))
            (images / str(label) / f"{i}.pgm").write_bytes(b"P5 8 8 255\n" + content)
    data = ["datamodule=image_folder", f"datamodule.root={images}", "datamodule.resolution=8", "datamodule.channels=1"]
    assert started("train", folder, "run=done", *data, "datamodule.num_classes=2", *SMALL) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run's folder, and the folder of its images."""
    shutil.copytree(finished / "done", tmp_path / "done")
    return tmp_path / "done", finished / "images"


def replayed(run, capsys, *options):
    capsys.readouterr()
    code = started("replay", run[0].parent, "run=done", *options)
    said = capsys.readouterr()
    return code, " ".join((said.out + said.err).split())


def test_a_run_is_trained_again_to_the_last_bit(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run[0].rglob("*")}
    code, said = replayed(run, capsys)
    assert code == 0
    assert "steps 1 to 12" in said
    assert "data as recorded versions as recorded" in said
    assert "identical: 12 losses, gradient norms and samples, to the last bit" in said
    assert "identical to step_0000012.ckpt: raw, ema" in said
    assert {path: path.stat().st_mtime_ns for path in run[0].rglob("*")} == before  # the run itself is not touched


def test_from_a_checkpoint_and_only_some_steps(run, capsys):
    code, said = replayed(run, capsys, "checkpoint=done/checkpoints/step_0000004.ckpt", "steps=4")
    assert code == 0
    assert "steps 5 to 8" in said
    assert "identical: 4 losses" in said
    assert "identical to step_0000008.ckpt" in said


def test_one_changed_byte_of_data_is_found_before_training(run, capsys):
    picture = run[1] / "1" / "7.pgm"
    content = picture.read_bytes()
    picture.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        code, said = replayed(run, capsys)
    finally:
        picture.write_bytes(content)
    assert code == 2
    assert "data has changed since (fingerprint" in said
    assert "nothing was trained" in said


def edited(run, name, change):
    path = run[0] / name
    path.write_text(change(path.read_text()))


def test_a_loss_that_differs_is_named_with_its_step(run, capsys):
    def change(text):
        lines = text.splitlines()
        step, loss, *rest = lines[6].split(",")
        lines[6] = ",".join([step, repr(float(loss) * 1.01), *rest])
        return "\n".join(lines) + "\n"

    edited(run, "trace.csv", change)
    code, said = replayed(run, capsys)
    assert code == 1
    assert "the first step that differs at all is 6" in said
    assert "equal within 9.9e-03" in said
    assert replayed(run, capsys, "tolerance=0.02")[0] == 0


def test_another_seed_is_another_run(run, capsys):
    edited(run, "config.json", lambda text: text.replace('"seed": 0', '"seed": 1'))
    code, said = replayed(run, capsys)
    assert code == 1
    assert "step 1 saw other samples than recorded" in said


def test_other_packages_and_other_code_are_said(run, capsys):
    def change(text):
        line = json.loads(text)
        line["packages"]["torch"] = "1.0"
        line["git"] = {"commit": "0" * 40, "changed_files": [], "changes_sha256": "1" * 64}
        return json.dumps(line) + "\n"

    edited(run, "starts.jsonl", change)
    code, said = replayed(run, capsys, "steps=1")
    assert code == 0
    assert "torch 1.0 →" in said
    assert "code.commit 000000000000 →" in said
    assert "code.changes_sha256 111111111111 →" in said


def test_it_is_said_where_only_names_and_sizes_are_compared(tmp_path, capsys):
    write_imagenet(tmp_path / "images", train=4)
    data = ["datamodule=imagenet", "datamodule.root=images", "datamodule.resolution=8", "datamodule.num_classes=2"]
    more = ["datamodule.num_workers=0", "trainer.max_steps=2", "run=done"]
    assert started("train", tmp_path, *data, *SMALL, *more) == 0
    code, said = replayed((tmp_path / "done", None), capsys)
    assert code == 0
    assert "as recorded, by the names and sizes of its files; their pixels were not compared" in said


def resay(run, change):
    (run / "starts.jsonl").write_text(json.dumps(json.loads((run / "starts.jsonl").read_text()) | change) + "\n")


def piped(path):
    path.unlink()
    os.mkfifo(path)


def respell(run, step):
    heading, first, *rest = (run / "trace.csv").read_text().splitlines(keepends=True)
    (run / "trace.csv").write_text("".join([heading, first.replace("1", step, 1), *rest]))


@pytest.mark.parametrize(
    ("spoil", "options", "said"),
    [
        (lambda run: (run / "trace.csv").unlink(), [], "has no trace.csv"),
        (lambda run: (run / "config.json").unlink(), [], "has no config.json"),
        (lambda run: (run / "starts.jsonl").write_text("{"), [], "cannot be read"),
        *[
            ((lambda run, change=change: resay(run, change)), [], "its config.json or starts.jsonl cannot be read")
            for change in ({"data": {}}, {"data": {"train": 3, "test": 4}}, {"git": "x"}, {"packages": [1]})
        ],
        (lambda run: (run / "config.json").write_text("[" * 100_000), [], "cannot be read"),
        (lambda run: (run / "trace.csv").write_text("step,loss\n1,1\n2,1\n"), [], "trace.csv has no column grad_norm"),
        (lambda run: piped(run / "trace.csv"), [], "trace.csv: cannot be read (is no regular file)"),
        (lambda run: piped(run / "config.json"), [], "config.json or starts.jsonl cannot be read"),
        (lambda run: respell(run, "²"), ["steps=1"], "began at step 1, on from another run"),
        (lambda run: respell(run, "1," + "9" * 200_000), [], "trace.csv: is damaged (field larger than"),
        (lambda run: None, ["steps=0"], "steps=0: must be at least 1"),
        (lambda run: None, ["tolerance=-1.0"], "tolerance=-1.0: must be at least 0"),
        (lambda run: None, ["checkpoint=nowhere.ckpt"], "checkpoint=nowhere.ckpt: must be a file in"),
        (lambda run: None, ["checkpoint=done/checkpoints/step_0000012.ckpt"], "none is left to make again"),
        (
            lambda run: (run / "checkpoints/step_0000004.ckpt").write_bytes(b"x"),
            ["checkpoint=done/checkpoints/step_0000004.ckpt"],
            "damaged",
        ),
        (
            lambda run: (run / "config.json").write_text(
                (run / "config.json").read_text().replace("torch.optim.AdamW", "os.system")
            ),
            [],
            "os.system: is not trusted",
        ),
    ],
)
def test_what_cannot_be_replayed(run, capsys, spoil, options, said):
    spoil(run[0])
    code, text = replayed(run, capsys, *options)
    assert code == 2
    assert said in text
    assert text.count("config error: ") == 1


@pytest.mark.slow
def test_another_number_of_ranks_is_equal_within_rounding(run):
    options = ["run=done", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/replay.py", *options],
        cwd=run[0].parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "equal within" in done.stdout


def rows(*losses, samples=7):
    return [
        {"step": str(i), "loss": loss, "grad_norm": "1.0", "samples": str(samples)} for i, loss in enumerate(losses, 1)
    ]


def test_verdicts():
    same = compare(rows("0.5", "nan"), rows("0.5", "nan"))  # a skipped step is skipped again
    assert same == Verdict(2, None, None, 0.0, (1, "0.5", "0.5"))
    close = compare(rows("0.5", "0.25"), rows("0.5", "0.2500001"))
    assert (close.differs, close.other_samples, close.at) == (2, None, (2, "0.25", "0.2500001"))
    assert close.largest == pytest.approx(4e-7, rel=1e-3)
    assert compare(rows("0.5", "nan"), rows("0.5", "0.3")).largest == float("inf")
    assert compare(rows("0.5", ""), rows("0.5", "0.3")).largest == float("inf")
    assert compare(rows("0"), rows("0.0")).largest == 0
    assert compare(rows("0.5"), rows("0.5", samples=8)).other_samples == 1
    with pytest.raises(RankError, match="made 1 steps, and 2 are recorded"):
        compare(rows("0.5", "0.4"), rows("0.5"))
