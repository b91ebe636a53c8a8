"""What a page is made of: folders read whatever is in them, curves thinned, pictures under a budget, numbers held apart."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re

import numpy as np
import pytest

from denoiselab.reports.page.columns import number_columns, telling
from denoiselab.reports.page.content import Limits, apart, gather
from denoiselab.reports.page.curves import Curve, Packer, clock, read_curves, thinned
from denoiselab.reports.page.folders import read_run, read_sweep
from denoiselab.reports.page.pictures import embedded, evenly, find_pictures, within_budget
from denoiselab.reports.page.write import SCRIPTS, as_json, own_script, page, write_page
from stand_in_runs import PROTOCOL, number, write_run
from stand_in_sweeps import png, write_curves, write_job, write_pictures, write_status, write_sweep

LIMITS = Limits(points=1000, picture_bytes=1e6)


def data_of(html):
    """The data in a page, as a browser finds it: up to the first end of a script element."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def unpacked(page_data, packed):
    steps = np.frombuffer(base64.b64decode(page_data["steps"][packed[0]]), "<f8")
    return steps, np.frombuffer(base64.b64decode(packed[1]), "<f4")


# --- folders ---


def test_a_job_says_how_it_stands(tmp_path):
    run = read_run(write_job(tmp_path / "3_x", 3, ["objective=v", "seed=1"], lr=1e-3))
    assert (run.number, run.name, run.state, run.cause) == (3, "objective=v,seed=1", "finished", "")
    assert run.facts["steps"] == 200
    assert run.facts["wandb"] == "id-3"
    assert run.typed == {"objective": "v", "seed": "1"}


def test_a_job_that_never_began_is_known_by_what_it_was_told(tmp_path):
    folder = write_status(
        tmp_path / "4_x", 4, ["objective=v"], config={"seed": 7, "optimizer": {"lr": 1}}, state="queued"
    )
    run = read_run(folder)
    assert (run.state, run.config["seed"], run.measured[0].choices, run.notes) == ("queued", 7, {"objective": "v"}, [])


def test_a_failed_run_names_its_first_cause_and_its_log(tmp_path):
    folder = write_status(
        tmp_path / "a", 0, [], state="failed", error="ValueError: first\nTraceback …", log="a/job.log"
    )
    run = read_run(folder)
    assert (run.state, run.cause, run.log) == ("failed", "ValueError: first", "a/job.log")
    alone = write_run(tmp_path / "b")
    (alone / "summary.json").write_text(json.dumps({"status": "failed", "error": "OSError: disk"}))
    (alone / "train.log").write_text("")
    run = read_run(alone)
    assert (run.state, run.cause, run.log) == ("failed", "OSError: disk", str(alone / "train.log"))


@pytest.mark.parametrize(
    "name", ["job.json", "status.json", "summary.json", "config.json", "metrics.jsonl", "metrics.csv", "id"]
)
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[" * 9999, b"\xff\xfe", b'{"state": [1], "name": {}, "number": "x", "step": 1e999}']
)
def test_whatever_is_in_a_file_the_rest_is_shown(tmp_path, name, content):
    folder = write_job(tmp_path / "0_x", 0, ["objective=v"], lr=1e-3)
    (folder / name).write_bytes(content)
    found = gather([folder], LIMITS)
    assert len(found["runs"]) == 1
    assert '"runs"' in as_json(found)


def test_pipes_are_not_waited_for(tmp_path):
    folder = write_job(tmp_path / "0_x", 0, ["objective=v"], lr=1e-3)
    for name in ("job.json", "status.json", "metrics.csv", "samples/step_0000010_ema.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    found = gather([folder], LIMITS)
    assert found["runs"][0]["curves"] == found["runs"][0]["pictures"] == {}
    assert found["notes"] == [f"{folder}/metrics.csv: cannot be read (is no regular file); left out"]


def test_a_sweep_says_what_it_is_after(tmp_path):
    folder = write_sweep(tmp_path / "s", 2, metric={"name": "metrics/fd_digits_2k", "mode": "max"})
    sweep = read_sweep(folder)
    assert (sweep.name, sweep.metric, sweep.mode) == ("s", "metrics/fd_digits_2k", "max")
    found = gather(sorted(path for path in folder.iterdir() if path.is_dir()), LIMITS)
    assert found["sweep"] == {"metric": "fd_digits_2k", "mode": "max"}
    assert found["title"] == "s"


# --- what tells runs apart ---


def test_only_overrides_that_differ_are_columns(tmp_path):
    jobs = [["objective=v", "optimizer.lr=0.1", "seed=1"], ["objective=v", "optimizer.lr=0.1", "seed=2"]]
    jobs.append(["objective=epsilon", "optimizer.lr=0.1", "seed=1"])
    runs = [read_run(write_job(tmp_path / str(i), i, job, lr=0.1)) for i, job in enumerate(jobs)]
    columns, names = telling(runs)
    assert {column["key"]: column["values"] for column in columns} == {
        "objective": ["v", "v", "epsilon"],
        "seed": [1, 2, 1],
    }
    assert names == ["objective=v, seed=1", "objective=v, seed=2", "objective=epsilon, seed=1"]


def test_what_was_swept_is_a_column_also_where_compare_leaves_it_to_the_protocol(tmp_path):
    runs = []
    for i, sampler in enumerate(("ddim", "heun")):
        run = write_run(tmp_path / f"{i}", overrides=[f"sampler={sampler}", "logger=none"])
        command = {"choices": {"sampler": sampler}, "overrides": [f"sampler={sampler}", f"name=n{i}"]}
        (run / "command.json").write_text(json.dumps(command))
        runs.append(read_run(run))
    columns, names = telling(runs)
    assert [column["key"] for column in columns] == ["sampler"]
    assert names == ["sampler=ddim", "sampler=heun"]


def test_runs_that_nothing_tells_apart_are_numbered(tmp_path):
    runs = [read_run(write_run(tmp_path / f"2026-01-0{i}_10-00-00_mine")) for i in (1, 2)]
    assert telling(runs) == ([], ["mine (1)", "mine (2)"])


# --- numbers of unlike protocols ---


def test_numbers_of_unlike_protocols_get_unlike_letters_and_the_reason(tmp_path):
    other = {"sampler": PROTOCOL["sampler"] | {"nfe": 50}}
    runs = [
        read_run(write_run(tmp_path / "a", number("fid_2k", 1.0), number("is_2k", 5.0))),
        read_run(write_run(tmp_path / "b", number("fid_2k", 2.0, protocol=other))),
        read_run(write_run(tmp_path / "c", number("fid_2k", 3.0, protocol={"seed": 5}))),
    ]
    fid, inception = number_columns(runs)[0]
    assert fid.kinds == ["a", "b", "a"]  # another seed of the noise is no other protocol
    assert fid.unlike == "fid_2k: sampler.nfe differs: 20 in a, 50 in b"
    assert (fid.better, inception.better) == ("low", "high")
    assert inception.unlike == ""
    assert inception.values == [5.0, None, None]
    described = fid.described()
    assert (described["kinds"], inception.described()["kinds"]) == (["a", "b", "a"], None)


def test_what_a_sweep_varies_of_its_sampling_is_compared_and_said(tmp_path):
    runs = []
    for i, (sampler, scale) in enumerate(itertools.product(("Ddim", "Heun"), (1.5, 2.0))):
        overrides = [f"sampler={sampler}", f"guidance.scale={scale}", "optimizer.lr=0.1"]
        how = {"sampler": {"_target_": f"lab.{sampler}", "nfe": 20}, "guidance": {"scale": scale}, "nfe": 19 + i % 2}
        numbers = number("fid_2k", 1.0 + i, protocol=how), number("is_2k", 1.0 + i)
        runs.append(read_run(write_run(tmp_path / str(i), *numbers, overrides=overrides)))
    fid, inception = (column.described() for column in number_columns(runs)[0])
    assert (fid["kinds"], fid["unlike"], fid["varied"]) == (None, "", ["sampler", "guidance.scale"])
    assert (inception["kinds"], inception["varied"]) == (None, [])
    # What no override varies still holds numbers apart
    how = {"sampler": {"_target_": "lab.Ddim", "nfe": 20}, "class_balance": "as it comes", "guidance": {"scale": 2.0}}
    other = write_run(tmp_path / "x", number("fid_2k", 9.0, protocol=how), overrides=["sampler=Ddim"])
    fid, *_ = number_columns([*runs, read_run(other)])[0]
    assert fid.kinds == ["a", "a", "a", "a", "b"]
    assert fid.unlike == "fid_2k: class_balance differs: balanced in 0, as it comes in x"


def test_the_curve_that_a_sweep_is_judged_by_is_no_second_column_without_a_protocol(tmp_path):
    sweep = write_sweep(tmp_path / "s", 2, metric={"name": "metrics/fd_digits_2k", "mode": "min"})
    folders = sorted(path for path in sweep.iterdir() if path.is_dir())
    for folder in folders:
        write_curves(folder, {"metrics/fd_digits_2k": [1.0], "val/x0_mse": [1.0]})
    names = [column["name"] for column in gather(folders, LIMITS)["columns"]]
    assert names == ["fd_digits_2k", "accuracy_2k", "val/x0_mse"]


def test_a_job_that_never_began_makes_no_columns(tmp_path):
    runs = [read_run(write_job(tmp_path / f"{i}", i, [f"seed={i}", "a=1"], lr=1e-3)) for i in (0, 1)]
    runs.append(read_run(write_status(tmp_path / "2", 2, ["seed=2", "a=1"], state="queued")))
    columns, names = telling(runs)
    assert [(column["key"], column["values"]) for column in columns] == [("seed", [0, 1, "2"])]
    assert names == ["seed=0", "seed=1", "seed=2"]


def test_raw_and_averaged_weights_are_columns_of_their_own(tmp_path):
    both = number("fid_2k", 1.0, protocol={"weights": "raw"}), number("fid_2k", 2.0)
    run = read_run(write_run(tmp_path / "a", *both))
    assert {c.name: c.values for c in number_columns([run])[0]} == {"fid_2k": [2.0], "fid_2k (raw)": [1.0]}


def test_losses_of_unlike_objectives_are_marked_and_validation_is_not(tmp_path):
    found = gather([write_job(tmp_path / o, i, [f"objective={o}"], lr=1e-3) for i, o in enumerate(("v", "x0"))], LIMITS)
    columns = {column["name"]: column for column in found["columns"]}
    assert columns["train/loss"]["unlike"] == "train/loss: means something else where objective differs: v, x0"
    assert columns["train/loss"]["kinds"] == ["a", "b"]
    assert columns["val/x0_mse"]["unlike"] == ""
    assert list(found["unlike"]) == ["train/loss"]


def test_protocols_are_kept_once_and_records_give_them_back(tmp_path):
    numbers = [number("fid_2k", 1.0), number("fid_2k", 2.0)]
    found = gather([write_run(tmp_path / str(i), n) for i, n in enumerate(numbers)], LIMITS)
    assert len(found["protocols"]) == 1
    for i, measured in enumerate(numbers):
        record = found["records"]["fid_2k"][i]
        assert found["protocols"][record["protocol"]]["record"] | record["own"] == measured.protocol
        assert record["value"] == measured.value


# --- configs ---


def test_what_configs_share_and_what_is_their_own_give_each_back():
    leaves = [{"a": 1, "b": 2.0, "c": None}, {"a": 1, "b": 3.0}, {"a": True, "b": 2.0, "c": None}]
    common, own = apart(leaves)
    assert common == {}  # 1 and true are not the same
    assert [common | some for some in own] == leaves
    common, own = apart(leaves[:2])
    assert common == {"a": 1}
    assert [common | some for some in own] == leaves[:2]


# --- curves ---


def test_curves_are_read_by_step_and_gaps_are_no_points(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,b,a\n20,2.5,\n10,nan,1\n30,inf,3\nx,1,1\n")
    found = read_curves(tmp_path)
    assert list(found) == ["a", "b"]
    assert found["a"].steps.tolist() == [10, 30]
    assert str(found["b"].values.tolist()) == "[nan, 2.5, inf]"


@pytest.mark.parametrize("count", [6, 10, 11, 500, 12_345])
def test_thinning_keeps_ends_spikes_and_the_limit(count):
    values = np.cos(np.arange(count) / 50)
    values[count // 2], values[count // 3] = 100.0, -100.0
    found = thinned(Curve(np.arange(count) * 7.0, values), 10)
    assert len(found.steps) <= 10
    assert {100.0, -100.0} <= set(found.values)
    assert (found.steps[0], found.steps[-1]) == (0, (count - 1) * 7)
    assert (np.diff(found.steps) > 0).all()
    at = (found.steps / 7).astype(int)
    assert (values[at] == found.values).all()  # each is a point that was measured


def test_thinning_keeps_where_a_curve_breaks_off():
    values = np.ones(1000)
    values[700:] = np.nan
    found = thinned(Curve(np.arange(1000.0), values), 20)
    assert found.steps[np.argmax(np.isnan(found.values))] == 700


def test_packed_curves_are_what_they_were_and_share_their_steps(tmp_path):
    packer = Packer()
    steps, values = np.arange(1.0, 6.0), np.array([1.234567891, -1e-12, np.nan, 1e300, 7])
    packed = [packer.pack(Curve(steps, values)), packer.pack(Curve(steps, values + 1))]
    assert packed[0][0] == packed[1][0] == 0
    assert len(packer.steps) == 1
    back = unpacked({"steps": packer.steps}, packed[0])
    assert (back[0] == steps).all()
    np.testing.assert_allclose(back[1], [1.234567891, -1e-12, np.nan, np.inf, 7], rtol=1e-7)


def test_seconds_are_those_that_were_logged():
    seconds = Curve(np.array([10.0, 20.0, 40.0]), np.array([1.5, np.nan, 7.0]))
    found = clock({"train/seconds": seconds})
    assert (found.steps.tolist(), found.values.tolist()) == ([0.0, 10.0, 40.0], [0.0, 1.5, 7.0])
    branched = clock({"train/seconds": Curve(np.array([1010.0, 1020.0]), np.array([3.0, 4.0]))})
    assert (branched.steps.tolist(), branched.values.tolist()) == ([1000.0, 1010.0, 1020.0], [0.0, 3.0, 4.0])
    assert clock({}) is None
    assert clock({"train/seconds": Curve(np.array([1.0]), np.array([np.nan]))}) is None


def test_intervals_of_numbers_are_no_curves(tmp_path):
    folder = write_run(tmp_path / "a")
    write_curves(
        folder, {"metrics/fid": [1.0], "metrics/fid_low": [0.5], "metrics/fid_real": [0.2], "train/low": [3.0]}
    )
    assert list(gather([folder], LIMITS)["runs"][0]["curves"]) == ["metrics/fid", "train/low"]


def test_a_loss_that_broke_off_is_told_by_its_step(tmp_path):
    folder = write_run(tmp_path / "a")
    write_curves(folder, {"train/loss": [1.0, float("nan"), float("inf")]})
    facts = gather([folder], LIMITS)["runs"][0]["facts"]
    assert (facts["not_finite"], facts["steps"]) == (20, 30)


def test_steps_and_seconds_are_those_of_all_starts(tmp_path):
    for state in ("running", "failed"):
        folder = write_job(tmp_path / state, 0, ["objective=v"], lr=1e-3)
        write_status(folder, 0, ["objective=v"], state=state, step=100, seconds=2.5, attempts=2)
        facts = gather([folder], LIMITS)["runs"][0]["facts"]
        assert (facts["steps"], facts["seconds"]) == (200 if state == "running" else 100, 20.0)
    (folder / "metrics.csv").unlink()
    assert gather([folder], LIMITS)["runs"][0]["facts"]["seconds"] == 2.5


def test_what_is_not_drawn_is_known_nevertheless(tmp_path):
    folder = write_job(tmp_path / "0_x", 0, ["objective=v"], lr=1e-3)
    write_curves(folder, {"train/loss": [1.0, float("nan")], "train/seconds": [1.0, 2.0], "val/x0_mse": [1.0, 0.5]})
    whole, some = (gather([folder], Limits(1000, 0, curves)) for curves in (None, ["val/*"]))
    assert list(some["runs"][0]["curves"]) == ["val/x0_mse"]
    assert some["columns"] == whole["columns"]
    assert some["runs"][0]["facts"] == whole["runs"][0]["facts"]
    assert unpacked(some, some["runs"][0]["clock"])[1].tolist() == [0.0, 1.0, 2.0]


def test_it_is_said_which_curves_were_thinned(tmp_path):
    folder = write_job(tmp_path / "0_x", 0, ["objective=v"], lr=1e-3, points=30)
    (note,) = gather([folder], Limits(20, 0))["notes"]
    assert note.startswith("4 of 4 curves are thinned, max_points=20: of each stretch the least and the largest value")
    assert gather([folder], Limits(30, 0))["notes"] == []


# --- pictures ---


def test_pictures_are_found_by_kind_averages_first(tmp_path):
    write_pictures(tmp_path, [400, 50], kinds=("raw", "ema_closest", "ema"))
    (tmp_path / "samples" / "step_1_raw.txt").write_text("no picture")
    found = find_pictures(tmp_path)
    assert list(found) == ["ema", "raw", "ema_closest"]
    assert [picture.step for picture in found["ema"]] == [50, 400]


@pytest.mark.parametrize(("count", "kept"), [(0, []), (1, [9]), (2, [0, 9]), (4, [0, 3, 6, 9]), (99, list(range(10)))])
def test_thinned_pictures_are_spread_evenly_and_keep_the_last(count, kept):
    assert evenly(list(range(10)), count) == kept


def test_the_budget_holds_and_says_what_it_left_out(tmp_path):
    for name in "ab":
        write_pictures(tmp_path / name, []), (tmp_path / name).mkdir()
        write_pictures(tmp_path / name, list(range(10, 90, 10)))
    runs = [find_pictures(tmp_path / name) for name in "ab"]
    sizes = sum(picture.bytes for run in runs for series in run.values() for picture in series)
    chosen, notes = within_budget(runs, sizes)
    assert (chosen, notes) == (runs, [])
    chosen, (note,) = within_budget(runs, sizes / 3)
    kept = [[picture.step for picture in series] for run in chosen for series in run.values()]
    assert kept == [[10, 80]] * 4
    assert note.startswith("24 of 32 sample grids are left out, evenly over the steps: all would take ")
    assert sum(p.bytes for run in chosen for series in run.values() for p in series) <= sizes / 3


def test_where_hardly_anything_fits_averages_come_first(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        write_pictures(tmp_path / name, [10, 20])
    runs = [find_pictures(tmp_path / name) for name in "abc"]
    one = max(series[-1].bytes for run in runs for series in run.values())
    chosen, (note,) = within_budget(runs, 4.5 * one)
    assert [list(run) for run in chosen] == [["ema", "raw"], ["ema"], ["ema"]]
    assert [picture.step for series in chosen[0].values() for picture in series] == [20, 20]
    assert note.startswith("only 4 of 12 sample grids fit, the last ones of some runs")
    assert within_budget(runs, 0)[0] == [{}, {}, {}]
    assert within_budget([{}], 0) == ([{}], [])


def test_embedded_bytes_are_no_more_than_was_counted(tmp_path):
    (tmp_path / "samples").mkdir()
    good = png(np.zeros((5, 7), np.uint8))
    (tmp_path / "samples" / "step_1_ema.png").write_bytes(good)
    (tmp_path / "samples" / "step_2_ema.png").write_bytes(b"<svg onload=alert(1)>")
    series = find_pictures(tmp_path)["ema"]
    ((step, text),) = embedded(series)
    assert (step, base64.b64decode(text)) == (1, good)
    assert len(text) == series[0].bytes


# --- the document ---

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>@@DATA@@\u2028\ud800"


def test_nothing_from_a_run_leaves_its_place_in_the_page(tmp_path):
    folder = write_status(
        tmp_path / "0_x",
        0,
        [f"objective={HOSTILE}"],
        config={HOSTILE: HOSTILE},
        state="failed",
        error=HOSTILE,
        log=HOSTILE,
        wandb_id=HOSTILE,
    )
    write_run(tmp_path / "1_x", number("fid", 1.0), objective=HOSTILE, evil={HOSTILE: HOSTILE})
    (tmp_path / "sweep.json").write_text(json.dumps({"name": HOSTILE}))
    html = page(gather([folder, tmp_path / "1_x"], LIMITS))
    assert html.encode().count(b"</script>") == 3  # of the data, of Plotly, of the page
    assert "alert(1)</" not in html
    assert data_of(html)["runs"][0]["cause"].startswith("</script><script>alert(1)")
    assert data_of(html)["title"].startswith("</script>")


def test_json_for_a_script_cannot_end_it():
    text = as_json({"<!--": "</script>&\u2028\ud800é"})
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"<!--": "</script>&\u2028\ud800é"}
    with pytest.raises(ValueError, match="JSON"):
        as_json({"x": float("nan")})


def test_secrets_stay_out_of_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    secret = "hunter2hunter2"
    run = write_run(tmp_path / "a", overrides=[f"db.password={secret}"], db={"password": secret})
    (run / "summary.json").write_text(json.dumps({"status": "failed", "error": "401 for 0123456789abcdef0123"}))
    html = page(gather([run], LIMITS))
    assert secret not in html
    assert "0123456789abcdef0123" not in html
    assert data_of(html)["runs"][0]["cause"] == "401 for ***"


def test_numbers_that_are_none_do_not_break_the_page(tmp_path):
    nan = float("nan")
    run = write_run(
        tmp_path / "a", number("fid", nan, protocol={"odd": [nan, {"x": float("inf")}]}), optimizer={"lr": nan}
    )
    found = data_of(page(gather([run], LIMITS)))
    assert found["columns"][0]["values"] == ["nan"]
    assert found["records"]["fid"][0]["value"] == "nan"


def test_the_page_asks_for_nothing_elsewhere(tmp_path):
    html = page(gather([write_run(tmp_path / "a")], LIMITS))
    own = html.replace(html[html.index("<script>/**") : html.index("<script>(() =>")], "")  # Plotly names its licences
    assert "http" not in own.replace("http-equiv", "")
    assert "default-src 'none'" in own
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(", own_script())
    assert len(own_script().splitlines()) > 500
    assert len(SCRIPTS) == len({*SCRIPTS})


def test_the_page_is_written_whole(tmp_path):
    data = gather([write_run(tmp_path / "a")], LIMITS)
    size = write_page(data, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size == size
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]
