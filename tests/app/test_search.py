"""Searches: what is asked, told, stopped early and gone on with. Jobs are stand-ins that know the answer at once."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import optuna
import pytest
from calls import CONF, QUIET, call, files_below
from hydra.errors import ConfigCompositionException
from optuna.trial import TrialState

from denoiselab.app import search as search_module
from denoiselab.app.local_sweep import LocalSweep, last_logged
from denoiselab.app.search import PRUNERS, STUDY, Search, as_distribution, as_override, run_search
from denoiselab.app.sweep import resume_search
from denoiselab.reports.search_picture import importances
from denoiselab.runs import local_jobs
from denoiselab.runs.errors import ConfigError, RankError, Stopped
from denoiselab.runs.sweep_folder import read_jobs, read_sweep

LAUNCHER = {
    "folder": None,
    "root": "sweeps",
    "jobs": 1,
    "metric": None,
    "resume": False,
    "freeze": False,
    "dry_run": False,
}
SETTINGS = {
    "metric": "val/x0_mse",
    "mode": "min",
    "trials": 12,
    "seed": 0,
    "sampler": "tpe",
    "startup": 4,
    "pruner": "none",
    "warmup": 0,
    "params": None,
}
JOB = """
import json, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
folder = Path(sys.argv[1])
config = json.loads((folder / "job.json").read_text())["config"]
lr, kind = float(config["lr"]), config["kind"]
if kind == "fails":
    sys.exit(1)
rows = ["step,val/x0_mse"]
for step in range(1, 4):
    value = "nan" if kind == "diverges" else (lr - 0.3) ** 2 + 1 / step
    rows.append(f"{step},{value}")
    (folder / "metrics.csv").write_text("\\n".join(rows) + "\\n")
    if kind == "slow":
        time.sleep(0.6)
losses = {} if kind == "silent" else {"val/x0_mse": None if value == "nan" else value}
(folder / "summary.json").write_text(json.dumps({"steps": 3, "losses": losses}))
"""
SPACE = {"lr": as_distribution("lr", None, 0.0, 1.0, False)}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        local_jobs, "job_command", lambda folder, *rest: [sys.executable, str(tmp_path / "job.py"), str(folder)]
    )
    monkeypatch.setattr(local_jobs, "POLL_SECONDS", 0.01)

    def check(config):
        if config.get("kind") == "refused":
            raise ConfigError("kind=refused: must be another one")

    monkeypatch.setattr(search_module, "check_job", check)


def compose(overrides):
    given = dict(override.split("=") for override in overrides)
    return {"lr": "0.5", "kind": "good", "trainer": {}} | given, {}, list(overrides)


def run(space=SPACE, fixed=(), launcher=LAUNCHER, **settings):
    search = Search(SETTINGS | settings, space)
    local = LocalSweep(settings=launcher, typed=[], trusted=[])
    try:
        run_search(search, local, list(fixed), None, compose)
    finally:
        if local.sweep is not None:
            local.sweep = read_sweep(local.sweep.folder)
    return search, local.sweep


def states(search):
    return [trial.state for trial in search.study.get_trials()]


def test_a_search_finds_what_is_best(tmp_path, capsys):
    search, sweep = run(trials=25)
    assert abs(search.best.params["lr"] - 0.3) < 0.05
    assert states(search) == [TrialState.COMPLETE] * 25
    assert [job.number for job in read_jobs(sweep)] == list(range(25))
    assert sweep.folder.name.endswith("_lr")
    assert (sweep.folder / "search.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert f"best     trial {search.best.number}: val/x0_mse {search.best.value:.5g}" in out
    assert f"lr={search.best.params['lr']:.6g}" in out


def test_the_greatest_is_found_if_that_is_asked_for():
    search, _ = run(mode="max", trials=6)
    values = [trial.value for trial in search.study.get_trials()]
    assert search.best.value == max(values)


def test_what_matters_is_seen():
    space = SPACE | {"idle": as_distribution("idle", None, 0.0, 1.0, False)}
    search, _ = run(space=space, trials=15, sampler="random")
    shares = importances(search.study)
    assert list(shares) == ["lr", "idle"]
    assert shares["lr"] > 0.8


@pytest.mark.parametrize("kind", ["fails", "diverges", "refused"])
def test_a_trial_that_fails_is_no_end(kind, capsys):
    space = SPACE | {"kind": as_distribution("kind", ["good", kind], None, None, False)}
    search, sweep = run(space=space, trials=8)
    kinds = [trial.params["kind"] for trial in search.study.get_trials()]
    assert 0 < kinds.count(kind) < 8
    expected = [TrialState.FAIL if k == kind else TrialState.COMPLETE for k in kinds]
    assert states(search) == expected
    if kind == "refused":
        job = read_jobs(sweep)[kinds.index("refused")]
        assert (job.status.state, job.status.error) == ("failed", "kind=refused: must be another one")
        assert "refused: kind=refused: must be another one" in capsys.readouterr().out


def test_a_search_in_which_nothing_can_begin_makes_nothing(tmp_path):
    before = files_below(tmp_path)
    with pytest.raises(ConfigError, match="kind=refused"):
        run(fixed=["kind=refused"])
    assert files_below(tmp_path) == before


def test_a_search_without_a_finished_trial_has_failed():
    with pytest.raises(RankError, match="no trial has finished"):
        run(fixed=["kind=fails"], trials=2)


def test_a_number_that_no_job_logs_is_said_after_the_first():
    with pytest.raises(ConfigError, match="hydra.sweeper.metric=fid: must be among what a job logs: val/x0_mse"):
        run(metric="fid", trials=3)


def test_a_number_of_the_log_that_the_summary_does_not_have(monkeypatch, tmp_path):
    """What `sweep_job` adds to the status: its own tests are those of whole sweeps."""
    assert last_logged(tmp_path, "val/x0_mse") == (None, None)
    (tmp_path / "metrics.csv").write_text("step,val/x0_mse,metrics/fd_digits_9\n2,nan,\n4,0.123456789,7\n6,,nan\n")
    assert last_logged(tmp_path, "val/x0_mse") == (6, 0.123456789)
    assert last_logged(tmp_path, "fd_digits_9") == (6, None)
    (tmp_path / "trace.csv").write_text("step,loss\n6,1\n7,1\n")
    assert last_logged(tmp_path, "other") == (7, None)
    assert last_logged(tmp_path, None) == (7, None)


def test_a_trial_that_cannot_be_composed_is_refused(monkeypatch, capsys):
    """As a key that only one of several backbones has; the first three points that are tried may all be such."""
    space = SPACE | {"kind": as_distribution("kind", ["good", "odd"], None, None, False)}
    real = compose
    count = []

    def some(overrides):
        if "kind=odd" in overrides or len(count) < 3:
            count.append(None)
            raise ConfigCompositionException("Could not override 'backbone.depth'")
        return real(overrides)

    monkeypatch.setattr(sys.modules[__name__], "compose", some)
    search, sweep = run(space=space, trials=8)
    kinds = [trial.params["kind"] for trial in search.study.get_trials()]
    assert 0 < kinds.count("odd") < 8
    assert states(search) == [TrialState.FAIL if kind == "odd" else TrialState.COMPLETE for kind in kinds]
    odd = [job for job, kind in zip(read_jobs(sweep), kinds, strict=True) if kind == "odd"]
    assert all("Could not override 'backbone.depth'" in job.status.error for job in odd)
    assert "refused: " in capsys.readouterr().out


def test_a_search_over_keys_that_not_every_choice_has(tmp_path, monkeypatch):
    """The example of `OptunaSweeper`."""
    monkeypatch.undo()
    typed = ["hydra/sweeper=optuna", "hydra.sweeper.metric=val/x0_mse", "backbone=unet,dit"]
    done = call("train", "-m", *typed, "backbone.depth=int(interval(2,8))", *QUIET, "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.startswith("backbone  Categorical")


def test_a_pruner_that_halves_leaves_the_first_steps_alone():
    pruner = PRUNERS["halving"](5, 40)
    assert pruner._min_resource == 40
    assert PRUNERS["halving"](5, 0)._min_resource is None


def test_a_trial_that_falls_behind_is_stopped(monkeypatch):
    monkeypatch.setattr(local_jobs, "WATCH_SECONDS", 0.05)
    space = {"lr": as_distribution("lr", ["0.3", "0.9"], None, None, False)}
    search, sweep = run(
        space=space, fixed=["kind=slow"], trials=2, startup=1, pruner="median", sampler="random", seed=2
    )
    pruned = [t for t in search.study.get_trials() if t.state == TrialState.PRUNED]
    assert pruned
    assert all(trial.params["lr"] == "0.9" for trial in pruned)
    assert {job.status.state for job in read_jobs(sweep)} == {"finished", "pruned"}


def test_a_search_that_was_stopped_goes_on_to_the_same_end(monkeypatch):
    straight, _ = run()
    real, asked = Search.ask, []

    def ask(self):
        if len(asked) == 5:
            asked.append(None)
            raise Stopped(15)
        asked.append(None)
        return real(self)

    monkeypatch.setattr(Search, "ask", ask)
    with pytest.raises(Stopped, match="to go on: python scripts/sweep.py resume"):
        run(launcher=LAUNCHER | {"folder": "mine"})
    monkeypatch.setattr(Search, "ask", real)
    again, sweep = run(launcher=LAUNCHER | {"folder": "mine", "resume": True})
    assert len(read_jobs(sweep)) == SETTINGS["trials"]
    assert [t.params for t in again.study.get_trials()] == [t.params for t in straight.study.get_trials()]


def test_a_trial_whose_search_was_killed_is_done_when_it_goes_on(monkeypatch):
    real = Search.tell

    def killed(self, trial, job):
        if job.number == 2:
            raise Stopped(9)
        real(self, trial, job)

    monkeypatch.setattr(Search, "tell", killed)
    with pytest.raises(Stopped):
        run(launcher=LAUNCHER | {"folder": "mine"}, trials=4)
    monkeypatch.setattr(Search, "tell", real)
    search, sweep = run(launcher=LAUNCHER | {"folder": "mine", "resume": True}, trials=4)
    assert states(search) == [TrialState.COMPLETE] * 4
    assert len(read_jobs(sweep)) == 4


def test_distributions():
    assert as_distribution("k", ["1", "2"], None, None, False) == optuna.distributions.CategoricalDistribution(
        ["1", "2"]
    )
    assert as_distribution("k", None, 1, 8, True) == optuna.distributions.IntDistribution(1, 8, log=True)
    assert as_distribution("k", None, 1e-4, 1.0, True) == optuna.distributions.FloatDistribution(1e-4, 1.0, log=True)
    with pytest.raises(ConfigError, match="k=interval.0.0,1.0.: "):
        as_distribution("k", None, 0.0, 1.0, True)
    assert as_override("lr", 0.000123456789) == "lr=0.000123457"
    assert as_override("depth", 3) == "depth=3"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["optimizer.lr=1e-3,1e-2"], ["hydra.sweeper.metric=null"]),
        (["hydra.sweeper.metric=val/x0_mse", "optimizer.lr=1e-3"], ["nothing to search", "interval"]),
        (["hydra.sweeper.metric=val/x0_mse", "seed=1,2", "hydra.sweeper.mode=least"], ["mode=least", "min, max"]),
        (["hydra.sweeper.metric=val/x0_mse", "seed=1,2", "hydra.sweeper.trials=0"], ["trials=0", "at least 1"]),
        (["hydra.sweeper.metric=val/x0_mse", "seed=1,2", "hydra/launcher=basic"], ["hydra/launcher=local"]),
        (
            ["hydra.sweeper.metric=val/x0_mse", "optimizer.lr=tag(log,interval(0,1))"],
            ["optimizer.lr=interval(0.0,1.0)"],
        ),
        (["hydra.sweeper.metric=val/x0_mse", "optimizer.lr=interval(-2,-1)"], ["optimizer.lr=-", "at least 0"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_mistakes_are_one_line(typed, words, tmp_path, monkeypatch):
    monkeypatch.undo()
    done = call("train", "-m", "hydra/sweeper=optuna", *typed, *QUIET, cwd=tmp_path)
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1
    assert all(word in done.err for word in words), done.err
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_of_a_sweep(file, tmp_path, monkeypatch):
    monkeypatch.undo()
    done = call("train", "-m", f"sweep={file.stem}", "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == (3 if "optuna" in file.read_text() else 9)
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize(
    "word",
    [
        "hydra/launcher=evil",
        "hydra.sweeper._target_=os.system",
        "hydra.launcher._target_=x",
        "hydra.searchpath=[/evil]",
        "hydra.sweeper.metric=${oc.env:SECRET}",
        "objective=v,../../evil",
        "objective=choice(v,'/evil/x')",
        "--config-dir=/evil",
        "hydra.sweeper.params.seed=1",
        "hydra.sweeper.params={hydra.searchpath:'[/evil]'}",
        "hydra.sweeper.params={objective:'v,../../evil'}",
        "hydra.sweeper.params={seed:1,name:'${oc.env:SECRET}'}",
        "hydra.sweeper.params=[1]",
        "hydra.sweeper.params={'--config-dir':'/evil'}",
        3,
    ],
)
def test_a_foreign_search_cannot_ask_for_more_than_a_search(word, tmp_path):
    _, sweep = run(trials=1)
    plain = json.loads((sweep.folder / "sweep.json").read_text())
    plain["command"] = ["train.py", "-m", "hydra/sweeper=optuna", "seed=1,2", word]
    (sweep.folder / "sweep.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="which is no override of a search"):
        resume_search(read_sweep(sweep.folder), {"jobs": None, "trust": []})
    assert (sweep.folder / STUDY).exists()


def test_parameters_that_were_typed_as_one_are_those_of_a_search(monkeypatch):
    _, sweep = run(trials=1)
    params = "hydra.sweeper.params={optimizer.lr:'tag(log,interval(1e-4,1e-2))',objective:'v,epsilon',seed:1}"
    seen = []
    monkeypatch.setattr("denoiselab.app.train_command", lambda: seen.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    for word in (params, "hydra.sweeper.params=null"):
        resume_search(replace(sweep, command=["train.py", "-m", word]), {"jobs": None, "trust": []})
        assert word in seen


def test_what_a_foreign_search_names_is_checked_before_it_is_built(tmp_path):
    _, sweep = run(trials=1)

    def hostile(overrides):
        config, choices, some = compose(overrides)
        return config | {"optimizer": {"_target_": "os.system", "command": "touch evil"}}, choices, some

    local = LocalSweep(settings=LAUNCHER | {"folder": str(sweep.folder), "resume": True}, typed=[], trusted=[])
    with pytest.raises(ConfigError, match="os.system: is not trusted"):
        run_search(Search(SETTINGS | {"trials": 3}, SPACE), local, [], None, hostile)
    assert len(read_sweep(sweep.folder).jobs) == 1
