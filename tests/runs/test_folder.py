from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from denoiselab.runs.folder import (
    CONFIG,
    command_line,
    git_state,
    make_run_folder,
    newest_run,
    versions,
    write_json,
)

NOW = datetime(2026, 1, 2, 3, 4, 5)


def test_a_folder_is_named_after_time_and_name(tmp_path):
    folder = make_run_folder(tmp_path / "deep" / "runs", "digits-unet", NOW)
    assert folder == tmp_path / "deep" / "runs" / "2026-01-02_03-04-05_digits-unet"
    assert folder.is_dir()
    assert folder.is_absolute()


def test_launches_in_the_same_second_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: make_run_folder(tmp_path, "a", NOW), range(64)))
    assert len(set(folders)) == 64
    stem = "2026-01-02_03-04-05_a"
    assert {folder.name for folder in folders} == {stem} | {f"{stem}-{n}" for n in range(2, 65)}


def test_processes_never_share_a_folder(tmp_path):
    program = (
        "import sys; from datetime import datetime; from pathlib import Path\n"
        "from denoiselab.runs.folder import make_run_folder\n"
        f"for _ in range(50): print(make_run_folder(Path({str(tmp_path)!r}), 'a', datetime(2026, 1, 1)))\n"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    made = [line for job in jobs for line in job.communicate()[0].split()]
    assert len(made) == len(set(made)) == len(list(tmp_path.iterdir())) == 200


@pytest.mark.parametrize("name", ["a", "0", "digits-unet.v2_x,lr=0.1+b", "a" * 100])
def test_good_names(tmp_path, name):
    assert make_run_folder(tmp_path, name).name.endswith(f"_{name}")


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "-a", "a b", "a\n", "é", "a" * 101, "$HOME", "a\x00"])
def test_bad_names(tmp_path, name):
    with pytest.raises(ValueError, match=re.escape(f"name={name}: must be 1 to 100 letters, digits")):
        make_run_folder(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_hold_folders(tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(ValueError, match=re.escape(f"runs={root}: cannot make a folder there")):
            make_run_folder(root, "a")


def started(root, *moments):
    for moment in moments:
        write_json(make_run_folder(root, "b", datetime(2026, 1, moment)) / CONFIG, {})


def test_the_newest_run(tmp_path):
    started(tmp_path, 5, 9, 7)
    make_run_folder(tmp_path, "a", datetime(2026, 1, 30))  # without a config: never began
    named = tmp_path / "a_folder_with_a_name"
    named.mkdir()
    write_json(named / CONFIG, {})
    now = time.time()
    for age, run in enumerate(["2026-01-07_00-00-00_b", named.name, "2026-01-09_00-00-00_b", "2026-01-05_00-00-00_b"]):
        os.utime(tmp_path / run / CONFIG, (now - age, now - age))
        assert newest_run(tmp_path).name == "2026-01-07_00-00-00_b"
    os.utime(tmp_path / "2026-01-05_00-00-00_b")  # looking into an old run does not make it the newest
    assert newest_run(tmp_path).name == "2026-01-07_00-00-00_b"
    write_json(named / CONFIG, {})  # resumed
    assert newest_run(tmp_path) == named


def test_the_newest_run_of_many_in_one_moment(tmp_path):
    started(tmp_path, *[5] * 12)
    for config in tmp_path.glob(f"*/{CONFIG}"):
        os.utime(config, (1, 1))
    assert newest_run(tmp_path).name == "2026-01-05_00-00-00_b-12"


@pytest.mark.parametrize("root", ["empty", "missing"])
def test_no_run(tmp_path, root):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"run=null: there is no run in .*{root}; train one, or give run=<folder>"):
        newest_run(tmp_path / root)


def test_json_is_written_complete_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1, "path": tmp_path})
    assert json.loads(path.read_text()) == {"a": 1, "path": str(tmp_path)}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text())["a"] == 1


def test_versions_say_what_ran():
    found = versions()
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["torch"].split("+")[0].count(".") == 2
    assert found["packages"]["denoiselab"] != "not installed"
    json.dumps(found)


def test_the_state_of_a_checkout(tmp_path):
    assert git_state(tmp_path) is None  # no checkout

    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "-b", "trunk")
    (tmp_path / "a.txt").write_text("1")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-m", "first")
    clean = git_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"])
    assert (clean["branch"], clean["changed_files"]) == ("trunk", [])
    (tmp_path / "a.txt").write_text("2")
    (tmp_path / "b.txt").touch()
    assert git_state(tmp_path)["changed_files"] == ["M a.txt", "?? b.txt"]
    inside = tmp_path / "lib" / "site-packages" / "denoiselab"
    inside.mkdir(parents=True)
    assert git_state(inside) is None  # an installed copy is not the checkout that its environment lies in


def test_the_command_as_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/private/train.py", "optimizer.lr=0.1"])
    assert command_line() == ["train.py", "optimizer.lr=0.1"]
