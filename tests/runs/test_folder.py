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

from denoiselab.runs import files
from denoiselab.runs import folder as folders
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import write_json
from denoiselab.runs.folder import (
    CONFIG,
    LOCK,
    WRITING,
    command_line,
    git_state,
    held,
    make_run_folder,
    newest_run,
    versions,
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


def test_versions_say_what_ran():
    found = versions()
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["torch"].split("+")[0].count(".") == 2
    assert found["packages"]["denoiselab"] != "not installed"
    json.dumps(found)


def test_each_edit_of_a_source_is_another_state(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    inside = tmp_path / "src" / "deep"
    inside.mkdir(parents=True)
    (inside / "a.py").write_text("1")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git("init", "-b", "trunk")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-m", "first")
    states = [git_state(inside)["changes_sha256"]]
    assert states == [None]
    for name, text in (
        ("a.py", "2"),
        ("a.py", "3"),
        ("b.py", "1"),
        ("b.py", "2"),
        ("../c ä.yaml", "1"),
        ("a.py", None),
    ):
        (inside / name).unlink() if text is None else (inside / name).write_text(text)
        states.append(git_state(inside)["changes_sha256"])
        assert git_state(tmp_path)["changes_sha256"] == states[-1]
    git("add", ".")  # what is staged is no more committed than before
    assert git_state(inside)["changes_sha256"] == states[-1]
    assert len({*states}) == 7
    (inside / "ignored.py").write_text("1")
    (inside / "notes.txt").write_text("1")
    assert git_state(inside)["changes_sha256"] == states[-1]


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
    changed = git_state(tmp_path)
    assert changed["changed_files"] == ["M a.txt", "?? b.txt"]
    assert clean["changes_sha256"] is changed["changes_sha256"] is None  # of no source
    inside = tmp_path / "lib" / "site-packages" / "denoiselab"
    inside.mkdir(parents=True)
    assert git_state(inside) is None  # an installed copy is not the checkout that its environment lies in


def test_the_command_as_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/private/train.py", "optimizer.lr=0.1"])
    assert command_line() == ["train.py", "optimizer.lr=0.1"]


# --- a folder of somebody else's ---


@pytest.mark.parametrize("name", [LOCK, WRITING])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_is_a_file(precious, run, name, kind):
    (run / name).symlink_to(precious) if kind == "link" else os.mkfifo(run / name)
    with (
        pytest.raises(ConfigError, match=f"run={run}: {name} cannot be written to .is (a link|no regular file)"),
        held(run),
    ):
        pass


def test_what_is_made_is_on_the_disk_with_its_name(tmp_path, monkeypatch):
    synced = []
    for module in (files, folders):
        monkeypatch.setattr(module, "sync_folder", synced.append)
    run = folders.make_run_folder(tmp_path / "a" / "runs", "x")
    assert synced == [tmp_path / "a", tmp_path, tmp_path / "a" / "runs"]
    folders.make_folder(tmp_path / "named")
    folders.make_folder(tmp_path / "named")
    files.write_text(run / "note", "x")
    assert synced[3:] == [tmp_path, run]
