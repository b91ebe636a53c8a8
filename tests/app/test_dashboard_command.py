from __future__ import annotations

import json
import sys

import pytest
from calls import RUN, call, only_run

from denoiselab.reports.dashboard import DEFAULTS, logged_keys, make_board
from stand_in_runs import write_run
from wandb_server import wandb_server

pytest.importorskip("wandb_workspaces")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has logged everything."""
    cwd = tmp_path_factory.mktemp("logged")
    done = call("train", *RUN, "trainer.val_every=2", "trainer.max_steps=4", "logger=none", cwd=cwd)
    assert done.code == 0, done.err
    return only_run(cwd)


def test_the_panels_show_what_runs_log(run):
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    pictures = {"samples/" + path.stem.split("_", 2)[2] for path in (run / "samples").iterdir()}
    logged = {*header[1:], *(name.replace("_closest", "_closest_to_training") for name in pictures)}
    assert logged == set(logged_keys([run]))
    assert {key.replace("_500", "_20") for key in DEFAULTS} <= logged  # of a project, of which no run is here
    made = make_board("a", None, logged_keys([run]), "metrics/fd_digits_20", ["seed"], falling=True)
    assert made.keys() - {"trainer/global_step"} <= logged
    assert {key for key in logged if not key.startswith("metrics/")} <= made.keys()


def test_it_is_written_without_an_account(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    monkeypatch.setattr("wandb.Api", lambda **_: pytest.fail("talked to W&B"))
    done = call("dashboard", str(run), "project=mine", "output=here/board.json", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "not saved at W&B: not logged in" in done.out
    written = json.loads((tmp_path / "here" / "board.json").read_text())
    assert written["project"] == "mine"
    assert "metrics/fd_digits_20" in json.dumps(written["workspace"])
    assert "metrics/fd_digits_20" in json.dumps(written["report"])
    assert written["saved"] == {}


def test_runs_of_no_sweep_are_shown_alone(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "a" / "id").write_text("a-1\n")
    done = call("dashboard", "runs", "project=mine", "save=false", "output=board.json", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "1 of 2 runs have never been at W&B: sync.py sends them" in done.out
    written = json.loads((tmp_path / "board.json").read_text())
    for name in ("workspace", "report"):
        assert "a-1" in json.dumps(written[name])


def test_it_is_saved_with_one_and_saved_again_in_place(tmp_path, monkeypatch):
    import wandb

    with wandb_server() as server:
        for key, value in server.environment().items():
            monkeypatch.setenv(key, value)
        wandb.teardown()
        for _ in range(2):
            done = call("dashboard", "project=denoiselab", cwd=tmp_path)
            assert done.code == 0, done.err
        wandb.teardown()
    assert len(server.views) == 2  # a workspace and a report, however often
    workspace, report = server.views.values()
    assert workspace["type"] == "project-view"
    assert (workspace["entityName"], workspace["projectName"]) == ("somebody", "denoiselab")
    assert report["type"] == "runs"
    written = json.loads((tmp_path / "dashboard-denoiselab.json").read_text())
    assert done.out.count("http") == 2
    for name in ("workspace", "report"):
        assert f"{name}: {written['saved'][name]['url']}" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "project=null: name a W&B project"),
        (["nowhere"], "runs=nowhere: there is no run folder"),
        (["project=a", "output=board.txt"], "output=board.txt: must be a file that ends in .json"),
        (["project=3"], "project=3: must be"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    done = call("dashboard", *arguments, "save=false", cwd=tmp_path)
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_metric_that_no_run_has_is_a_mistake(run, tmp_path):
    done = call("dashboard", str(run), "project=a", "metric=fid_50k", "save=false", cwd=tmp_path)
    assert done.code == 2
    assert "metric=fid_50k: must be among" in done.err
    assert "metrics/fd_digits_20" in done.err


def test_the_package_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    for name in [
        name for name in sys.modules if name.startswith(("wandb_workspaces.", "denoiselab.reports.dashboard_"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    done = call("dashboard", "project=a", cwd=tmp_path)
    assert done.code == 2
    assert "pip install 'denoiselab[dashboard]'" in done.err
