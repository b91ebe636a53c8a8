"""Pictures that break or vanish while a run is stopped: under skip it goes on with the same samples, else it says so."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from calls import QUIET, call
from killing import by_place
from PIL import Image

from denoiselab.runs.folder import DATA, STARTS
from stand_ins import random_images

TINY = [
    "backbone.width=8",
    "backbone.multipliers=[1]",
    "backbone.attention_resolutions=[]",
    "datamodule=image_folder",
    "datamodule.root=images",
    "datamodule.resolution=8",
    "datamodule.num_classes=2",
    "datamodule.batch_size=4",
    "schedule.decay=constant",
    "schedule.steps=9",
    "schedule.warmup_steps=0",
    "trainer.max_steps=4",
    "trainer.val_every=100",
    "trainer.threads=1",
    "callbacks.monitor.every=1",
    "callbacks.checkpoints.every=2",
    "callbacks.pictures=null",
    "+callbacks.recorder._target_=killing.Recorder",
    *QUIET,
]
MORE = ["resume=auto", "trainer.max_steps=9", "trust=[killing]"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Fourteen images, a run of four steps of each policy, and one of nine."""
    cwd = tmp_path_factory.mktemp("lost")
    for i, pixels in enumerate(random_images(14, 9)):
        (cwd / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(cwd / "images" / str(i % 2) / f"{i}.png")
    for run, policy, steps in (("skip", "skip", 4), ("fail", "fail", 4), ("straight", "skip", 9)):
        asked = [f"datamodule.on_corrupt={policy}", f"run={run}", f"+callbacks.recorder.file={run}.seen"]
        done = call("train", *TINY, *asked, f"trainer.max_steps={steps}", cwd=cwd)
        assert done.code == 0, done.err
    return cwd


@pytest.fixture
def cwd(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


def lose(cwd, how):
    """A training image of the run, broken or gone."""
    record = json.loads((cwd / "skip" / DATA).read_text())["train"]
    path = cwd / "images" / record["names"][3]
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40])
    return path


@pytest.mark.parametrize(
    ("how", "more"),
    [
        ("missing", []),
        pytest.param(
            "cut short",
            ["datamodule.cache=false", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_under_skip_the_run_goes_on_with_the_same_samples(cwd, how, more):
    path = lose(cwd, how)
    done = call("train", "run=skip", *MORE, *more, cwd=cwd)
    assert done.code == 0, done.err
    drawn, straight = by_place(cwd / "skip.seen"), by_place(cwd / "straight.seen")
    assert drawn.keys() == straight.keys()
    assert [drawn[at]["index"] for at in drawn] == [straight[at]["index"] for at in drawn]
    assert [drawn[at]["label"] for at in drawn] == [straight[at]["label"] for at in drawn]
    assert 3 in {drawn[at]["index"] for at in drawn if at[0] >= 4}
    log = (cwd / "skip" / "train.log").read_text()
    assert f"on_corrupt=skip: {path.relative_to(cwd)} is {how}; an image of the same class stands in" in log
    first, then = (json.loads(line) for line in (cwd / "skip" / STARTS).read_text().splitlines())
    assert first["data"] == then["data"]
    done = call("train", "run=branch", "resume=skip", "trainer=cpu", "trainer.max_steps=11", "trust=[killing]", cwd=cwd)
    assert done.code == 0, done.err
    assert (cwd / "branch" / DATA).read_bytes() == (cwd / "skip" / DATA).read_bytes()


@pytest.mark.slow
def test_a_run_that_was_not_told_to_skip_says_which_file_and_can_be_told(cwd):
    path = lose(cwd, "cut short").relative_to(cwd)
    done = call("train", "run=fail", *MORE, cwd=cwd)
    assert done.code == 2
    assert done.err == (
        f"config error: datamodule.on_corrupt=fail: 1 of 14 files cannot be decoded: {path} is cut short; "
        "repair or remove them, or set on_corrupt=skip\n"
    )
    (cwd / path).unlink()
    done = call("train", "run=fail", *MORE, cwd=cwd)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "datamodule: the train data is not what the run has trained with" in done.err
    told = ["datamodule.on_corrupt=skip", "allow=[datamodule.on_corrupt]"]
    done = call("train", "run=fail", *MORE, *told, cwd=cwd)
    assert done.code == 0, done.err
    drawn, straight = by_place(cwd / "fail.seen"), by_place(cwd / "straight.seen")
    assert [drawn[at]["index"] for at in drawn] == [straight[at]["index"] for at in drawn]


def test_other_pixels_are_other_data(cwd):
    path = lose(cwd, "missing")
    Image.fromarray(random_images(1, 9, seed=5)[0]).save(path)
    done = call("train", "run=skip", *MORE, cwd=cwd)
    assert done.code == 2
    assert re.fullmatch(
        r"config error: datamodule: the train data is not what the run has trained with \(fingerprint .*\); "
        r"allow=\[data\] goes on all the same\n",
        done.err,
    )
    before = (cwd / "skip" / DATA).read_bytes()
    done = call("train", "run=skip", *MORE, "allow=[data]", cwd=cwd)
    assert done.code == 0, done.err
    assert (cwd / "skip" / DATA).read_bytes() != before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "its data.json cannot be read"),
        ("[1]", "must hold the sets of a run"),
        ('{"train": {"names": ["../a.png"], "labels": [0], "marks": [""]}}', "names a file outside the folder"),
    ],
)
def test_a_record_that_is_none(cwd, content, said):
    (cwd / "skip" / DATA).write_text(content)
    done = call("train", "run=skip", *MORE, cwd=cwd)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err
