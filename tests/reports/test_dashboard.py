from __future__ import annotations

import json
import socket

import pytest

from denoiselab.reports.dashboard import (
    COLUMNS,
    DEFAULTS,
    choose_metric,
    ids_of,
    is_falling,
    logged_keys,
    make_board,
    varying_columns,
    where_logged,
)
from stand_in_runs import write_run

pages = pytest.importorskip("denoiselab.reports.dashboard_pages")
METRIC = "metrics/fd_digits_500"


def board(sweep="2026-01-01_00-00-00_a", logged=DEFAULTS, **change):
    given = {"title": "a", "metric": METRIC, "columns": COLUMNS, "falling": True} | change
    return make_board(given.pop("title"), sweep, logged, given.pop("metric"), given.pop("columns"), **given)


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach W&B, or to start its service, is an error."""

    def refuse(*_, **__):
        raise AssertionError("talked to the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr("wandb.Api", refuse)
    monkeypatch.setattr("wandb.setup", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)


def specs(made):
    return pages.spec_of(pages.workspace(made, "e", "p")), pages.spec_of(pages.report(made, "e", "p"))


def panels_of(node):
    """All panels of a spec, as (view type, config)."""
    if isinstance(node, dict):
        if "viewType" in node:
            yield node["viewType"], node["config"]
        for value in node.values():
            yield from panels_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from panels_of(value)


def run_sets_of(node):
    if isinstance(node, dict):
        yield from node.get("runSets", [])
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from run_sets_of(value)


def filters_of(spec):
    for runs in run_sets_of(spec):
        yield from ((found["key"], found["op"], found["value"]) for found in runs["filters"]["filters"])


def shown_in(config):
    """The keys of numbers and pictures that a panel's config names."""
    names = [*config.get("metrics", []), *config.get("mediaKeys", []), config.get("xAxis"), config.get("yAxis")]
    names += [config.get("targetKey"), *(column["accessor"] for column in config.get("columns", []))]
    return {name.removeprefix("summary:") for name in names if name and not name.startswith("config:")}


def test_a_spec_has_every_panel_that_the_board_has(no_network):
    made = board()
    kinds = {
        "lines": "Run History Line Plot",
        "scatter": "Scatter Plot",
        "pictures": "Media Browser",
        "parallel": "Parallel Coordinates Plot",
        "importance": "Parameter Importance",
        "bars": "Bar Chart",
        "differences": "Run Comparer",
    }
    expected = sorted(kinds[panel.kind] for section in made.sections for panel in section.panels)
    for spec in specs(made):
        found = list(panels_of(spec))
        assert sorted(kind for kind, _ in found) == expected
        assert {key for _, config in found for key in shown_in(config)} == made.keys()


def test_the_panels_are_those_that_a_researcher_wants(no_network):
    workspace, _ = specs(board())
    found = list(panels_of(workspace))
    axes = {(config["xAxis"], tuple(config["metrics"])) for kind, config in found if kind == "Run History Line Plot"}
    assert ("trainer/global_step", (METRIC, f"{METRIC}_real")) in axes
    assert ("train/seconds", (METRIC, f"{METRIC}_real")) in axes
    (nfe,) = [config for kind, config in found if kind == "Scatter Plot"]
    assert (nfe["xAxis"], nfe["yAxis"]) == ("config:nfe.value", f"summary:{METRIC}")
    (bins,) = [keys for _, keys in axes if keys[0].startswith("train/loss_by_log_snr")]
    assert len(bins) == 8
    assert ("trainer/global_step", ("train/images_per_second",)) in axes
    (grids, _) = [config["mediaKeys"] for kind, config in found if kind == "Media Browser"]
    assert grids == ["samples/ema", "samples/raw"]
    (parallel,) = [config for kind, config in found if kind == "Parallel Coordinates Plot"]
    assert parallel["columns"][-1] == {"accessor": f"summary:{METRIC}", "inverted": True}
    assert {"accessor": "config:choices.value.objective"} in parallel["columns"]


def test_a_sweep_is_filtered_by_its_folder(no_network):
    for spec in specs(board("2026-01-01_00-00-00_a")):
        key = {"section": "config", "name": "sweep_folder.value"}
        assert list(filters_of(spec)) == [(key, "=", "2026-01-01_00-00-00_a")] * len(list(run_sets_of(spec)))
    for spec in specs(board(None)):
        assert list(filters_of(spec)) == []


def test_runs_of_no_sweep_are_filtered_by_their_ids(no_network):
    for spec in specs(board(None, ids=["a-1", "b-2"])):
        key = {"section": "run", "name": "name"}  # what W&B's own pages call the id
        assert list(filters_of(spec)) == [(key, "IN", ["a-1", "b-2"])] * len(list(run_sets_of(spec)))


def test_what_is_not_logged_is_not_shown():
    made = board(logged=["train/loss", "val/x0_mse"], metric="val/x0_mse")
    assert made.keys() == {"train/loss", "val/x0_mse", "trainer/global_step", "train/seconds"}
    assert [section.name for section in made.sections] == ["Quality", "Training", "Sweep"]


def sweep_folder(root, metric=None, jobs=(("objective=v", "seed=1"), ("objective=epsilon", "seed=1"))):
    (root / "sweep.json").write_text(json.dumps({"name": "a", "metric": metric}))
    runs = []
    for number, overrides in enumerate(jobs):
        run = root / f"{number}_x"
        run.mkdir()
        told = {"name": ",".join(overrides), "overrides": list(overrides), "choices": {"objective": "v"}}
        config = {"logger": {"project": "p", "entity": "e"}}
        (run / "job.json").write_text(json.dumps(told | {"config": config}))
        runs.append(run)
    return runs


def test_the_columns_are_what_the_jobs_vary(tmp_path):
    runs = sweep_folder(
        tmp_path, jobs=(("objective=v", "optimizer.lr=1", "seed=1"), ("objective=x0", "optimizer.lr=2", "seed=1"))
    )
    assert varying_columns(runs) == ["choices.objective", "optimizer.lr"]
    assert varying_columns(runs[:1]) == list(COLUMNS)
    assert where_logged(runs) == ("p", "e")


def test_the_columns_of_plain_runs_are_what_their_commands_say(tmp_path):
    runs = [
        write_run(tmp_path / "a", overrides=["objective=v", "optimizer.lr=1", "name=a"]),
        write_run(tmp_path / "b", overrides=["objective=x0", "optimizer.lr=1", "name=b", "seed=3"], objective="x0"),
    ]
    assert varying_columns(runs) == ["choices.objective", "seed"]
    (runs[0] / "id").write_text("a-1\n")
    assert ids_of(runs) == ["a-1"]


def test_a_sweep_that_has_not_begun_shows_what_runs_log(tmp_path):
    assert logged_keys(sweep_folder(tmp_path)) == list(DEFAULTS)


def test_the_keys_are_those_that_the_runs_have_logged(tmp_path):
    first, second = sweep_folder(tmp_path)
    (first / "metrics.csv").write_text("step,train/loss,val/x0_mse/log_snr_-2,val/x0_mse/log_snr_-8\n1,0.5,1,1\n")
    (second / "metrics.csv").write_text("step,train/loss,metrics/fd_digits_20,empty\n1,0.5,3,\n")
    (first / "samples").mkdir()
    (first / "samples" / "step_0000001_slow.png").write_text("")
    assert logged_keys([first, second]) == [
        "metrics/fd_digits_20",
        "samples/slow",
        "train/loss",
        "val/x0_mse/log_snr_-8",
        "val/x0_mse/log_snr_-2",
    ]


@pytest.mark.parametrize(
    ("metric", "logged", "expected"),
    [
        (None, DEFAULTS, (METRIC, True)),
        (None, ["metrics/fd_digits_500", "metrics/fd_digits_2000"], ("metrics/fd_digits_2000", True)),
        (None, ["metrics/fd_digits_2000", "metrics/fid_500"], ("metrics/fid_500", True)),
        (None, ["train/loss"], ("val/x0_mse", True)),
        ({"name": "accuracy_digits_20", "mode": "max"}, ["train/loss"], ("metrics/accuracy_digits_20", False)),
        ({"name": "val/x0_mse", "mode": "min"}, DEFAULTS, ("val/x0_mse", True)),
    ],
)
def test_the_metric_is_that_of_the_sweep(tmp_path, metric, logged, expected):
    runs = sweep_folder(tmp_path, metric)
    assert choose_metric(runs, tmp_path, logged) == expected


def test_which_way_is_better():
    assert is_falling("metrics/fd_digits_500")
    assert is_falling("metrics/nearest_20")
    assert not is_falling("metrics/accuracy_digits_500")
