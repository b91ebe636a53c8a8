"""`report` as a command: its arguments, its file, its exit codes."""

from __future__ import annotations

import pytest
from calls import call

from stand_in_sweeps import write_status, write_sweep


@pytest.fixture
def cwd(tmp_path):
    """A working folder with a sweep of eleven jobs and one that never began."""
    sweep = write_sweep(tmp_path / "sweeps" / "mine", 11, points=5, pictures=2)
    write_status(sweep / "11_objective=v", 11, ["objective=v"], state="queued")
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [["sweeps/mine"], ["runs=[sweeps/mine]"], ["sweeps/*/*"], ["sweeps/mine", "sweeps/mine"]], ids=" ".join
)
def test_sweeps_are_named_in_many_ways(cwd, arguments):
    done = call("report", *arguments, "output=new/page.html", cwd=cwd)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("new/page.html: 12 runs, ")
    assert [path.name for path in (cwd / "new").iterdir()] == ["page.html"]


def test_jobs_stand_in_the_order_of_their_numbers(cwd):
    call("report", "sweeps/mine", "max_megabytes=0", cwd=cwd)
    text = (cwd / "report.html").read_text()
    places = [text.index(f'"folder":"sweeps/mine/{i}_') for i in range(12)]
    assert places == sorted(places)


def test_what_was_left_out_is_said(cwd):
    done = call("report", "sweeps/mine", "max_megabytes=0.02", cwd=cwd)
    assert done.code == 0
    assert "sample grids" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "config error: runs=[]: name run folders or sweeps, as in report.py sweeps/<sweep>\n"),
        (["nosuch"], "config error: runs=nosuch: there is no such run folder or file\n"),
        (["empty"], "config error: runs=empty: is no run folder; it has no config.json\n"),
        (["sweeps/mine", "output=page.pdf"], "config error: output=page.pdf: must be a file that ends in .html\n"),
        (["sweeps/mine", "max_points=3"], "config error: max_points=3: must be at least 10\n"),
        (["sweeps/mine", "max_megabytes=-1"], "config error: max_megabytes=-1: must be at least 0\n"),
        (["sweeps/mine", "max_megabytes=much"], "config error: max_megabytes=much: must be a number\n"),
        (
            ["sweeps/mine", "output=empty/file/page.html"],
            "config error: output=empty/file/page.html: empty/file cannot ",
        ),
        (["sweeps/mine", "outputs=x"], "config error: outputs=x: no such key; did you mean output? (allowed: "),
    ],
    ids=str,
)
def test_mistakes_are_one_line(cwd, arguments, message):
    (cwd / "empty").mkdir()
    (cwd / "empty" / "file").write_text("")
    before = sorted(cwd.rglob("*"))
    done = call("report", *arguments, cwd=cwd)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(message)
    assert done.err.count("\n") == 1
    assert sorted(cwd.rglob("*")) == before
