"""The studies as a command: each ends in a page with verdicts, and a trained run is used again."""

from __future__ import annotations

import csv
import json

import pytest
from calls import CONF, call, files_below

EXACT = ["study.points=60", "study.scales=[1.0,3.0]", "study.sampler.steps=4"]
TRAIN = [
    "logger=none",
    "metrics=none",
    "backbone.width=8",
    "trainer.threads=1",
    "callbacks.pictures=null",
    "sampler.nfe=4",
]
CHOICES = sorted(file.stem for file in (CONF / "study").glob("*.yaml"))


def page_of(folder, done):
    assert done.code == 0, done.err
    page, protocol = ((folder / name).read_text() for name in ("README.md", "protocol.json"))
    assert "page/README.md, " in done.out
    for verdict in ("confirmed", "refuted", "undecided"):
        assert (f"**{verdict}**" in page) == (verdict in done.out)
    with (folder / "table.csv").open() as file:
        return page, json.loads(protocol), list(csv.DictReader(file))


def test_steps_and_frequency(tiny_run, tmp_path):
    done = call(
        "study",
        f"run={tiny_run}",
        f"output={tmp_path / 'page'}",
        *("study.steps=[2,4]", "study.side=8", "study.images=20", "sampler@study.reference=heun_t"),
        *(f"~sampler@study.samplers.{name}" for name in ("ddpm_large", "heun", "dpmpp_2m")),
        "~study.samplers.ddpm_large",
        cwd=tmp_path,
    )
    page, protocol, rows = page_of(tmp_path / "page", done)
    assert {row["sampler"] for row in rows} == {"ddim", "ddpm", "heun_t", "ODE solution"}
    assert {row["data"] for row in rows} == {
        "exact, cosine",
        "exact, rectified_flow",
        "run, against its ODE",
        "run, against test images",
    }
    assert len(rows) == 2 * 2 * 3 * 2 * 3 + 2 * 2 * 2 * 3 + 3 * 2 * 3 + 3
    euler = [
        row for row in rows if (row["data"], row["sampler"], row["quantity"]) == ("exact, cosine", "ddim", "power")
    ]
    assert all(float(row["value"]) < 0 and row["low"] == row["high"] for row in euler)
    assert protocol["run"] == tiny_run.name
    assert protocol["settings"]["steps"] == [2, 4]
    assert "| ddpm | refuted" in page or "| ddpm | confirmed" in page
    assert files_below(tmp_path / "page") == ["README.md", "distance.png", "power.png", "protocol.json", "table.csv"]


def test_guidance_scale(tiny_run, tmp_path):
    how = ["study=guidance", f"run={tiny_run}", "output=page", "study.images=200", *EXACT]
    done = call("study", *how, cwd=tmp_path)
    page, protocol, rows = page_of(tmp_path / "page", done)
    assert str(tiny_run) not in page.replace(f"run={tiny_run}", "")
    assert (
        protocol["steps"] == 11
    )  # what the run's 20 evaluations buy without guidance: Heun begins and ends with single ones
    by = {(row["data"], row["guided"], row["scale"], row["measure"]): float(row["value"]) for row in rows}
    for data in ("exact density", "run"):
        assert by[data, "everywhere", "1.0", "recall"] == by[data, "in the interval", "1.0", "recall"]
    assert by["exact density", "everywhere", "3.0", "accuracy"] > by["exact density", "everywhere", "1.0", "accuracy"]
    assert (tmp_path / "page" / "figure.png").stat().st_size > 20_000


def test_copying_trains_its_runs_once(tmp_path):
    how = [
        "study=copying",
        "output=page",
        "study.sizes=[2,12]",
        "study.images=20",
        "study.points=20",
        f"study.train={TRAIN}",
    ]
    done = call("study", *how, "study.steps=1", cwd=tmp_path)
    _, protocol, rows = page_of(tmp_path / "page", done)
    runs = sorted(folder.name for folder in (tmp_path / "page" / "runs").iterdir())
    assert sorted(protocol["runs"].values()) == runs
    assert len(runs) == 2
    ideal = [row for row in rows if row["what"] == "ideal denoiser of the training set"]
    assert len(ideal) == 6
    assert {row["copies"] for row in ideal} == {"20"}
    again = call("study", *how, "study.steps=1", cwd=tmp_path)
    assert page_of(tmp_path / "page", again)[2] == rows
    assert len(list((tmp_path / "page" / "runs").iterdir())) == 2
    call("study", *how, "study.steps=2", cwd=tmp_path)  # another config is another run
    assert len(list((tmp_path / "page" / "runs").iterdir())) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["study=nothing"], f"study=nothing: must be one of {', '.join(CHOICES)}"),
        (["study.steps=[4]"], "study.steps=[4]: must be at least two increasing numbers, the first at least 2"),
        (["study=guidance", "study.scales=[2.0,3.0]"], "study.scales=[2.0, 3.0]: must begin with 1"),
        (["study=copying", "study.train=['objective=nothing']"], "objective=nothing: must be one of "),
        (["study=copying", "study.sizes=[10,2000]"], "datamodule.train_size=2000: must be from 1 to 1297"),
        (["study.images=many"], "study.images=many: must be an integer"),
        (["run=nowhere"], "run=nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path):
    done = call("study", *options, cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith(f"config error: {message}")
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_guided_is_refused(tiny_run, tmp_path):
    done = call("study", "study=guidance", f"run={tiny_run}", *EXACT, "study.images=20", cwd=tmp_path)
    assert done.code == 2
    assert done.err == "config error: study=guidance: images=20: must be at least 200, 20 a class\n"
    assert not list(tmp_path.iterdir())
