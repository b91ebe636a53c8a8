"""The frontier from outside: what is measured once, what is skipped, how it goes on, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from calls import call, files_below

from denoiselab.app import frontier as app
from denoiselab.app import frontier_points
from denoiselab.app.frontier_points import POINTS
from denoiselab.training.checkpoint import newest_checkpoint

SMALL = ["count=20", "batch_size=10", "logger=none"]
GRID = ["samplers=[ddim,heun]", "nfe=[1,2,4]", "scales=[1,2]"]


def lines_of(folder):
    return [json.loads(text) for text in (folder / POINTS).read_text().splitlines()]


def rows_of(folder):
    return list(csv.DictReader((folder / "table.csv").open()))


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A small frontier in a folder of its own, and what the command printed."""
    cwd = tmp_path_factory.mktemp("frontier")
    done = call("frontier", f"run={tiny_run}", *GRID, *SMALL, "output=here", cwd=cwd)
    assert done.code == 0, done.err
    return done, cwd / "here"


@pytest.fixture
def copy(finished, tmp_path):
    """That folder, to be changed."""
    shutil.copytree(finished[1], tmp_path / "here")
    return tmp_path / "here"


def test_each_point_is_measured_once_at_what_it_really_costs(finished):
    _, folder = finished
    assert files_below(folder) == ["README.md", "frontier.png", POINTS, "table.csv"]
    found = {(line["sampler"], line["scale"], line["nfe"]) for line in lines_of(folder)}
    # heun lands with a first-order step: of 4 evaluations it uses 3, and of 2 one; a guided step costs twice as much
    unguided = {("ddim", 1.0, 1), ("ddim", 1.0, 2), ("ddim", 1.0, 4), ("heun", 1.0, 1), ("heun", 1.0, 3)}
    assert found == unguided | {("ddim", 2.0, 2), ("ddim", 2.0, 4), ("heun", 2.0, 2)}
    assert len(lines_of(folder)) == len(found)
    asked = {(row["sampler"], row["scale"], row["nfe"]): row["asked"] for row in rows_of(folder)}
    assert asked["heun", "1.0", "1"] == "1, 2"
    assert asked["heun", "2.0", "2"] == "2, 4"


def test_what_cannot_be_is_a_row_with_the_reason(finished):
    done, folder = finished
    skipped = [row for row in rows_of(folder) if row["note"]]
    assert [(row["sampler"], row["scale"], row["asked"]) for row in skipped] == [
        ("ddim", "2.0", "1"),
        ("heun", "2.0", "1"),
    ]
    assert skipped[0]["note"] == "skipped: nfe=1: one step of this sampler already costs more"
    assert "already costs more: ddim at scale 2 (1), heun at scale 2 (1)" in done.out


def test_a_number_is_that_of_evaluate(finished, tiny_run):
    _, folder = finished
    output = folder.parent / "evaluated.json"
    done = call(
        "evaluate", f"run={tiny_run}", "sampler=ddim", "nfe=4", "counts=[20]", f"output={output}", cwd=folder.parent
    )
    assert done.code == 0, done.err
    theirs = {number["name"]: number for number in json.loads(output.read_text())["numbers"]}
    (line,) = (line for line in lines_of(folder) if (line["sampler"], line["scale"], line["nfe"]) == ("ddim", 1, 4))
    assert {number["name"] for number in line["numbers"]} == set(theirs)
    for number in line["numbers"]:
        assert number["protocol_id"] == theirs[number["name"]]["protocol_id"]
        assert number["value"] == pytest.approx(theirs[number["name"]]["value"], rel=1e-4)


def test_an_interrupted_frontier_goes_on(copy, tiny_run):
    """One line is missing and one is torn: these two are measured again, to the same numbers, the others are not touched."""
    whole = (copy / POINTS).read_text().splitlines()
    (copy / POINTS).write_text("\n".join([*whole[:-2], whole[-2][:1000]]))
    before = [(row["nfe"], row["value"], row["front_nfe"], row["note"]) for row in rows_of(copy)]
    (copy / "table.csv").unlink()
    done = call("frontier", f"run={tiny_run}", *GRID, *SMALL, "output=here", cwd=copy.parent)
    assert done.code == 0, done.err
    assert len(done.err.splitlines()) == 2
    text = (copy / POINTS).read_text().splitlines()
    assert text[:-2] == whole[:-2]
    assert [json.loads(line)["numbers"] for line in text[-2:]] == [json.loads(line)["numbers"] for line in whole[-2:]]
    assert [(row["nfe"], row["value"], row["front_nfe"], row["note"]) for row in rows_of(copy)] == before


def test_a_larger_grid_measures_what_is_new(copy, tiny_run):
    known = (copy / POINTS).read_text()
    done = call(
        "frontier", f"run={tiny_run}", "samplers=[ddim,euler]", "nfe=[4,6]", *SMALL, "output=here", cwd=copy.parent
    )
    assert done.code == 0, done.err
    assert (copy / POINTS).read_text().startswith(known)
    assert len(lines_of(copy)) == len(known.splitlines()) + 3
    assert [(row["sampler"], row["nfe"]) for row in rows_of(copy)] == [
        ("ddim", "4"),
        ("ddim", "6"),
        ("euler", "4"),
        ("euler", "6"),
    ]


def test_another_number_takes_no_new_samples(copy, tiny_run):
    done = call("frontier", f"run={tiny_run}", *GRID, *SMALL, "output=here", "metric=recall_digits", cwd=copy.parent)
    assert done.code == 0, done.err
    assert done.err == ""
    assert {row["metric"] for row in rows_of(copy)} == {"recall_digits_20"}
    assert "larger is better" in (copy / "README.md").read_text()


def test_points_of_another_protocol_are_not_mixed(copy, tiny_run):
    before = files_below(copy)
    done = call("frontier", f"run={tiny_run}", *GRID, "count=20", "batch_size=5", "output=here", cwd=copy.parent)
    assert done.code == 2
    assert done.err == (
        "config error: output=here: its points have batch_size=10, new ones would have 5; choose another folder, or remove "
        "this one\n"
    )
    assert files_below(copy) == before


def test_the_folder_is_in_the_run(tiny_run, tmp_path):
    done = call("frontier", f"run={tiny_run}", "samplers=[ddim]", "nfe=[1]", *SMALL, cwd=tmp_path)
    assert done.code == 0, done.err
    (folder,) = (tiny_run / "frontier").iterdir()
    assert POINTS in files_below(folder)
    assert files_below(tmp_path) == []
    shutil.rmtree(tiny_run / "frontier")


def test_solvers_that_choose_their_steps_are_measured_by_tolerance(tiny_run, tmp_path):
    options = ["samplers=[dopri5]", "tolerances=[0.5,0.01]", "count=10", "batch_size=10", "logger=none", "output=here"]
    done = call("frontier", f"run={tiny_run}", *options, cwd=tmp_path)
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "here")
    assert [row["asked"] for row in rows] == ["tolerance 0.5", "tolerance 0.01"]
    assert 7 <= float(rows[0]["nfe"]) < float(rows[1]["nfe"])


def test_halving_leaves_the_beaten_behind(tiny_run, tmp_path, monkeypatch):
    """Points go on from a rung to the next with the features they have; what is left behind is marked, with its count."""
    counts, measure = [], frontier_points.Bench._measure

    def counted(self, way, count, shards):
        line = measure(self, way, count, shards)
        counts.append((way.name, count))
        return line

    monkeypatch.setattr(frontier_points.Bench, "_measure", counted)
    monkeypatch.setattr(
        frontier_points, "survivors", lambda points, higher: [p for p in points if p.sampler == "ddim" or p.count < 16]
    )
    options = [
        "samplers=[ddim,euler_t]",
        "nfe=[2]",
        "count=32",
        "halving=true",
        "batch_size=10",
        "logger=none",
        "output=here",
    ]
    done = call("frontier", f"run={tiny_run}", *options, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [count for name, count in counts if name == "euler_t"] == [4, 8, 16]
    assert sorted(count for name, count in counts if name == "ddim") == [4, 8, 16, 32]
    assert "pruned at n=16" in done.out
    assert [(row["note"], row["count"]) for row in rows_of(tmp_path / "here")] == [("", "32"), ("pruned", "16")]
    assert files_below(tmp_path / "here") == ["README.md", "frontier.png", POINTS, "table.csv"]


class Board:
    """Stands for a W&B run."""

    def __init__(self, **given):
        self.given, self.logged, self.ended = given, {}, None

    def log(self, values):
        self.logged |= values

    def finish(self, exit_code):
        self.ended = exit_code


def test_one_dashboard_run_a_folder_with_its_true_end(copy, tiny_run, monkeypatch):
    boards = []
    monkeypatch.setattr("wandb.init", lambda **given: boards.append(Board(**given)) or boards[-1])
    call("frontier", f"run={tiny_run}", *GRID, *SMALL[:2], "logger=wandb", "output=here", cwd=copy.parent)
    assert boards[0].given["job_type"] == "frontier"
    assert boards[0].given["mode"] == "offline"
    assert boards[0].given["resume"] == "allow"
    assert sorted(boards[0].logged) == ["frontier/figure", "frontier/table"]
    assert boards[0].ended == 0

    def fail(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(app, "write_frontier", fail)
    done = call("frontier", f"run={tiny_run}", *GRID, *SMALL[:2], "logger=wandb", "output=here", cwd=copy.parent)
    assert done.code == 1
    assert done.err.splitlines()[-1] == "error: RuntimeError: no space left"
    assert boards[1].ended == 1
    assert boards[1].given["id"] == boards[0].given["id"]


MISTAKES = [
    ("samplers=[ddim,hoin]", "samplers=hoin: must be among ab_2, "),
    ("samplers=[]", "samplers=[]: must name at least one"),
    ("samplers=ddim", "samplers=ddim: must be a list of text"),
    ("nfe=[4,0]", "nfe=0: each must be at least 1"),
    ("nfe=[4.5]", "nfe=[4.5]: must be a list of integers"),
    ("scales=[-1]", "scales=-1.0: must be at least 0"),
    ("scales=[a]", "scales=['a']: must be a list of numbers"),
    ("tolerances=[1]", "tolerances=1: each must be in (0, 1)"),
    ("guidance=none scales=[1,2]", "scales=[1, 2]: must be [1] with guidance=none"),
    ("guidance=cfg_rescale", "guidance=cfg_rescale: must be none, or one with a scale"),
    ("count=3", "count=3: must be at least 4"),
    ("threads=0", "threads=0: must be at least 1, or null"),
    ("batch_size=0", "batch_size=0: must be at least 1"),
    ("metric=loveliness", "metric=loveliness: must be one that has a better end: "),
    ("metric=fid", "metric=fid: must be one of the numbers that metrics measures: fd_digits, "),
    ("metrics=none", "metrics=none: nothing to measure"),
    ("logger=tensorboard", "logger=tensorboard: must be wandb or none"),
    (
        "nfe=[1] scales=[2]",
        "samplers=['ddim', 'heun', 'dpmpp_2m', 'unipc_2']: none of them can be used; nfe=1: one step",
    ),
    ("halving=perhaps", "halving=perhaps: must be true or false"),
    ("run=nowhere", "run=nowhere: no such folder"),
]


@pytest.mark.parametrize(("typed", "message"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_mistakes_are_one_line_and_nothing_is_made(typed, message, tiny_run, tmp_path):
    run = [] if "run=" in typed else [f"run={tiny_run}"]
    count = [] if "count=" in typed else ["count=20"]
    done = call("frontier", *run, *count, *typed.split(), "output=here", cwd=tmp_path)
    assert done.code == 2, done.out + done.err
    assert done.err.startswith(f"config error: {message}")
    assert done.err.count("\n") == 1
    assert files_below(tmp_path) == []


def test_a_run_that_never_saw_missing_labels_is_not_guided(tiny_run, tmp_path):
    loaded = torch.load(newest_checkpoint(tiny_run), weights_only=True)
    loaded["config"]["objective"]["label_dropout"] = 0.0
    torch.save(loaded, tmp_path / "no_dropout.ckpt")
    done = call("frontier", "checkpoint=no_dropout.ckpt", "scales=[1,3]", "count=20", cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith(
        "config error: scales=3.0: needs a network trained without labels at times; set objective.label_"
    )
    assert files_below(tmp_path) == ["no_dropout.ckpt"]
