"""`compare` as a command: its arguments, its files, its exit codes."""

from __future__ import annotations

import pytest
from calls import call

from denoiselab.app.compose import gather
from stand_in_runs import PROTOCOL, number, write_run

OTHER = {"sampler": PROTOCOL["sampler"] | {"nfe": 50}}


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """A working folder with a sweep of two runs and one run that was sampled otherwise."""
    monkeypatch.setenv("COLUMNS", "100")
    for objective, value in (("v", 0.25), ("epsilon", 0.5)):
        name = f"objective={objective}"
        numbers = number("fd_digits_2k", value), number("accuracy_2k", 0.9)
        write_run(tmp_path / "sweep" / name, *numbers, objective=objective)
    write_run(tmp_path / "run_c", number("fd_digits_2k", 0.125, protocol=OTHER), objective="x0")
    return tmp_path


V, EPSILON = "sweep/objective=v", "sweep/objective=epsilon"


@pytest.mark.parametrize(
    "arguments",
    [[V, EPSILON], [f"runs=['{V}','{EPSILON}']"], ["sweep"], ["sweep/*v", EPSILON], ["runs=[sweep]"]],
    ids=" ".join,
)
def test_runs_are_named_in_many_ways(cwd, arguments):
    done = call("compare", *arguments, cwd=cwd)
    assert (done.code, done.err) == (0, "")
    for shown in ("objective=v", "objective=epsilon", "0.2500", "0.5000", f"{V} (seed 0)"):
        assert shown in done.out


def test_unlike_protocols_are_one_line_and_exit_code_2(cwd):
    done = call("compare", V, "run_c", cwd=cwd)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "compare: fd_digits_2k: sampler.nfe differs: 20 in objective=v, 50 in run_c; compare like with like, or "
        "allow it with vary=[sampler]\n"
    )
    done = call("compare", V, "run_c", "vary=[sampler]", cwd=cwd)
    assert done.code == 0
    assert "objective=v, nfe=20" in done.out
    assert "objective=x0, nfe=50" in done.out


@pytest.mark.parametrize("name", ["table.md", "new/table.csv", "table.json"])
def test_the_table_is_written(cwd, name):
    done = call("compare", "sweep", f"output={name}", "columns=['fd_*']", cwd=cwd)
    assert (done.code, done.err) == (0, "")
    text = (cwd / name).read_text()
    assert "objective=epsilon" in text
    assert "accuracy_2k" not in text
    assert "accuracy_2k" not in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "config error: runs=[]: name run folders or evaluation files, as in compare.py run_a run_b"),
        (["nosuch"], "config error: runs=nosuch: there is no such run folder or file"),
        (["sweep", "output=table.txt"], "config error: output=table.txt: must be a file that ends in .md, .csv, .json"),
        (["sweep", "columns=[fid]"], "config error: columns=fid: must be among fd_digits_2k, accuracy_2k"),
        (["sweep", "vary=[sample]"], "config error: vary=sample: must be a field of the protocols: class_balance, "),
        (["sweep", "vary=sampler"], "config error: vary=sampler: must be a list"),
        (["sweep", "varies=[x]"], "config error: varies=[x]: no such key; did you mean vary? (allowed: "),
        (["empty"], "config error: runs: hold no numbers (empty/metrics.jsonl: there is none; "),
    ],
    ids=str,
)
def test_mistakes_are_one_line(cwd, arguments, message):
    (cwd / "empty").mkdir()
    before = sorted(cwd.rglob("*"))
    done = call("compare", *arguments, cwd=cwd)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(message)
    assert done.err.count("\n") == 1
    assert sorted(cwd.rglob("*")) == before


def test_what_could_not_be_read_is_said_and_the_rest_shown(cwd):
    file = cwd / "run_c" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"name": "fd_dig')
    done = call("compare", "run_c", cwd=cwd)
    assert done.code == 0
    assert done.err == "compare: run_c/metrics.jsonl:2: is damaged; left out\n"
    assert "0.1250" in done.out


def test_arguments_that_stand_alone_become_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert gather(["a", "vary=[step]", "it's", "lr=1"], "runs") == ["vary=[step]", r"runs=['a','it\'s','lr=1']"]
    assert gather(["--cfg", "job", "a"], "runs") == ["--cfg", "job", "runs=['a']"]
    assert gather(["x=1"], "runs") == ["x=1"]
