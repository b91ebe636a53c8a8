"""What stands in the folder of a sweep, and what is refused of one that somebody else may have written."""

from __future__ import annotations

import json

import pytest

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.sweep_folder import (
    JOB,
    STATUS,
    SWEEP,
    Status,
    add_jobs,
    ended,
    make_sweep,
    membership,
    read_job,
    read_jobs,
    read_status,
    read_sweep,
    sweep_name,
    varying,
    write_status,
)

WHAT = {"command": ["train.py", "-m"], "launcher": {"kind": "local"}, "directory": "/", "metric": None}


@pytest.fixture
def sweep(tmp_path):
    made = make_sweep(tmp_path, None, "name", WHAT)
    jobs = [({"seed": 1}, {"objective": "v"}, ["seed=1", "a.b=2"]), ({"seed": 2}, {}, [])]
    return add_jobs(made, [["seed=1"], ["objective=v", "optimizer.lr=1e-3"]], jobs)[0]


def test_a_sweep_is_read_as_it_was_written(sweep):
    assert read_sweep(sweep.folder) == sweep
    assert sweep.jobs == ["0_seed-1", "1_objective-v+lr-1e-3"]
    first, second = read_jobs(sweep)
    assert (first.config, first.choices, first.overrides) == ({"seed": 1}, {"objective": "v"}, ["seed=1", "a.b=2"])
    assert (second.number, second.name, second.varies) == (
        1,
        "objective=v,optimizer.lr=1e-3",
        ["objective=v", "optimizer.lr=1e-3"],
    )
    assert first.status == Status()
    assert membership(first.folder) == (sweep.folder.name, "seed=1")
    assert membership(sweep.folder) is None


def test_jobs_are_added_after_those_there_are(sweep):
    more, (job,) = add_jobs(sweep, [["seed=3"]], [({}, {}, [])])
    assert (job.number, job.folder.name) == (2, "2_seed-3")
    assert read_sweep(sweep.folder) == more


def test_a_sweep_keeps_the_time_at_which_it_began(sweep):
    (sweep.folder / SWEEP).write_text((sweep.folder / SWEEP).read_text().replace('"time": "2', '"time": "1'))
    began = json.loads((sweep.folder / SWEEP).read_text())["time"]
    assert began.startswith("1")
    add_jobs(sweep, [["seed=3"]], [({}, {}, [])])
    assert json.loads((sweep.folder / SWEEP).read_text())["time"] == began


def test_names_say_what_varies_and_fit_into_a_folder_name():
    typed = ["objective=v,epsilon", "trainer.max_steps=4", "+sampler.eta=0,1"]
    overrides = ["objective=v", "trainer.max_steps=4", "+sampler.eta=0"]
    assert varying(overrides, typed) == ["objective=v", "+sampler.eta=0"]
    assert varying(["seed=1"], ["seed=1"]) == []
    assert sweep_name([varying(overrides, typed)]) == "objective+eta"
    assert sweep_name([[]]) == "sweep"
    assert len(sweep_name([[f"key{i}=1" for i in range(100)]])) <= 60


def test_odd_values_make_harmless_folders(tmp_path):
    sweep = make_sweep(tmp_path, tmp_path / "s", "x", WHAT)
    odd = [["x=../../evil"], ["x=[1,2]"], ["x=" + "y" * 500], ["x='a b'\n"]]
    _, jobs = add_jobs(sweep, odd, [({}, {}, [])] * 4)
    assert [job.folder.parent for job in jobs] == [sweep.folder] * 4
    assert all(len(job.folder.name) < 80 for job in jobs)
    assert jobs[0].folder.name == "0_x-..-..-evil"


def test_a_folder_that_is_there_is_left_alone(tmp_path, sweep):
    with pytest.raises(ConfigError, match="holds a sweep already; go on with it"):
        make_sweep(tmp_path, sweep.folder, "x", WHAT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="hydra.launcher.folder=.*full: exists"):
        make_sweep(tmp_path, tmp_path / "full", "x", WHAT)
    (tmp_path / "empty").mkdir()
    make_sweep(tmp_path, tmp_path / "empty", "x", WHAT)
    with pytest.raises(ConfigError, match="hydra.launcher.root=.*cannot make a folder there"):
        make_sweep(tmp_path / "full" / "file", None, "x", WHAT)


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "finished"), (75, "preempted"), (130, "interrupted"), (1, "failed"), (-15, "preempted"), (-9, "failed")],
)
def test_how_a_job_has_ended(sweep, code, state):
    status = ended(sweep.folder / sweep.jobs[0], Status(state="running", attempts=2), code, "why")
    assert (status.state, status.attempts, status.exit_code) == (state, 2, code)
    assert status.error == ("why" if state == "failed" else None)


def test_the_number_of_a_job_is_the_one_that_was_asked_for(sweep):
    folder = sweep.folder / sweep.jobs[0]
    summary = {"steps": 3, "metrics": {"fid": 2.0}, "losses": {"train/loss": 0.5, "val/x0_mse": None}, "error": "e"}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert ended(folder, Status(), 0, None).metric == {"name": "fid", "value": 2.0}
    assert ended(folder, Status(), 0, None, "train/loss").metric == {"name": "train/loss", "value": 0.5}
    exact = ended(folder, Status(), 0, None, "train/loss", (2, 0.500000123))  # which the summary rounds
    assert (exact.step, exact.metric) == (3, {"name": "train/loss", "value": 0.500000123})
    before = Status(metric={"name": "val/x0_mse", "value": 1.0})  # of an earlier attempt: this one diverged
    assert ended(folder, before, 0, None, "val/x0_mse").metric is None
    assert ended(folder, Status(), 0, None, "val/x0_mse").metric is None
    assert ended(folder, Status(), 1, None).error == "e"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"state": "well"}', '{"attempts": "x"}', '{"other": 1}'])
def test_a_status_that_is_none_of_ours(sweep, content):
    folder = sweep.folder / sweep.jobs[0]
    (folder / STATUS).write_text(content)
    if content == "{}":
        assert read_status(folder) == Status()
        return
    with pytest.raises(ConfigError, match=STATUS):
        read_status(folder)
    (folder / STATUS).unlink()
    assert read_status(folder) == Status()


@pytest.mark.parametrize("name", ["../other", "/etc", "a/b", "", ".", "..", 3, None])
def test_a_sweep_cannot_name_jobs_outside_it(sweep, name):
    plain = json.loads((sweep.folder / SWEEP).read_text())
    (sweep.folder / SWEEP).write_text(json.dumps(plain | {"jobs": [name]}))
    with pytest.raises(ConfigError, match="names jobs outside it"):
        read_sweep(sweep.folder)


@pytest.mark.parametrize(
    "change", [{"jobs": "x"}, {"launcher": 3}, {"directory": None}, {"command": {}}, {"metric": 3}, {"metric": "fid"}]
)
def test_a_sweep_that_is_none_of_ours(sweep, change):
    plain = json.loads((sweep.folder / SWEEP).read_text())
    (sweep.folder / SWEEP).write_text(json.dumps(plain | change))
    with pytest.raises(ConfigError, match="is none of ours"):
        read_sweep(sweep.folder)


def test_what_is_no_sweep_and_no_job(tmp_path, sweep):
    with pytest.raises(ConfigError, match=f"is no sweep .it has no {SWEEP}"):
        read_sweep(tmp_path)
    with pytest.raises(ConfigError, match=f"has no {JOB}"):
        read_job(tmp_path)
    (sweep.folder / sweep.jobs[0] / JOB).write_text('{"number": 0}')
    with pytest.raises(ConfigError, match="is none of ours"):
        read_jobs(sweep)


def test_secrets_are_in_none_of_the_files(sweep):
    folder = sweep.folder / sweep.jobs[0]
    write_status(folder, Status(state="failed", error="api_key=abcdefgh12345678 was refused"))
    assert "abcdefgh12345678" not in (folder / STATUS).read_text()


def job(root, sweep, told):
    run = root / "0_seed=1"
    run.mkdir()
    for path, content in ((root / "sweep.json", sweep), (run / "job.json", told)):
        if content is not None:
            path.write_text(content)
    return run


def test_a_job_knows_its_sweep(tmp_path):
    run = job(tmp_path, json.dumps({"name": "objectives", "jobs": []}), json.dumps({"number": 0, "name": "seed=1"}))
    assert membership(run) == ("objectives", "seed=1")


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        (None, None),
        ('{"name": "a"}', None),
        (None, '{"name": "b"}'),
        ('{"name": "a"', '{"name": "b"}'),
        ('{"name": 3}', '{"name": "b"}'),
        ('["name"]', '{"name": "b"}'),
        ('{"name": "a"}', '{"name": ""}'),
    ],
)
def test_a_run_that_is_in_none_goes_on_alone(tmp_path, sweep, told):
    assert membership(job(tmp_path, sweep, told)) is None
