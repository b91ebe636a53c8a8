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

from denoiselab.runs import folder as folders
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import (
    CONFIG,
    LOCK,
    MOST_DEPTH,
    WRITING,
    check_own,
    command_line,
    from_json,
    git_state,
    held,
    make_run_folder,
    newest_run,
    open_own,
    read_json,
    read_small,
    run_id,
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


@pytest.fixture
def precious(tmp_path):
    """A file of the user, outside of the run."""
    (tmp_path / "precious").write_text("mine\n")
    yield tmp_path / "precious"
    assert (tmp_path / "precious").read_text() == "mine\n"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_a_file_is_not_written_through_a_link(precious, run):
    (run / "a.json").symlink_to(precious)
    write_json(run / "a.json", {"a": 1})
    assert sorted(path.name for path in run.iterdir()) == ["a.json"]
    assert json.loads((run / "a.json").read_text()) == {"a": 1}


def test_two_that_write_one_file_do_not_meet(run, monkeypatch):
    """The second writes while the first has written and not yet renamed."""
    real, began = os.fsync, []

    def sync(descriptor):
        if not began:
            began.append(None)
            write_json(run / "a.json", {"by": "second"})
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write_json(run / "a.json", {"by": "first"})
    assert json.loads((run / "a.json").read_text()) == {"by": "first"}
    assert [path.name for path in run.iterdir()] == ["a.json"]


def test_what_could_not_be_written_leaves_nothing(run, monkeypatch):
    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_json(run / "a.json", {})
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("name", [LOCK, WRITING])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_is_a_file(precious, run, name, kind):
    (run / name).symlink_to(precious) if kind == "link" else os.mkfifo(run / name)
    with (
        pytest.raises(ConfigError, match=f"run={run}: {name} cannot be written to .is (a link|no regular file)"),
        held(run),
    ):
        pass


@pytest.mark.parametrize("mode", ["a", "ab", "a+", "w"])
def test_what_is_opened_to_be_written_is_a_file(precious, run, mode):
    (run / "link").symlink_to(precious)
    (run / "lost").symlink_to(run / "nowhere")
    (run / "folder").mkdir()
    os.mkfifo(run / "pipe")
    for name in ("link", "lost", "folder", "pipe"):
        with pytest.raises(OSError, match="is a link|Is a directory|is no regular file|No such device"):
            open_own(run / name, mode)
    with open_own(run / "new", mode) as file:
        file.write(b"1" if "b" in mode else "1")
    assert (run / "new").read_text() == "1"
    assert not (run / "nowhere").exists()


@pytest.mark.parametrize("place", ["samples", ".metrics.csv.partial", "evaluations/a/b.png", "wandb", "exports"])
def test_links_that_lead_out_of_a_run_are_refused(precious, run, place):
    (run / place).parent.mkdir(parents=True, exist_ok=True)
    (run / place).symlink_to(precious)
    said = re.escape(f"run={run}: {place} is a link that leads out of the run folder")
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check_own(run)
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check_own(run, place.split("/")[0])
    check_own(run, "checkpoints")


def test_links_that_harm_nobody(tmp_path, run):
    (tmp_path / "scratch").mkdir()
    (run / "wandb" / "logs").mkdir(parents=True)
    (run / "wandb" / "logs" / "core.log").symlink_to(tmp_path / "scratch")  # W&B's own
    (run / "last").symlink_to("checkpoints")
    (run / "round").symlink_to("round")
    (tmp_path / "elsewhere").symlink_to(run)
    check_own(run)
    check_own(tmp_path / "elsewhere")
    check_own(tmp_path / "nowhere", "samples")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large", "endless link"])
def test_only_files_of_a_fair_size_are_read(run, kind):
    path = run / ("id" if kind != "device" else "zero")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to(path)
    for read in (
        (read_small, read_json) if path.name != "id" or kind == "endless link" else (read_small, read_json, _id)
    ):
        with pytest.raises(ConfigError, match=re.escape(f"{path}: cannot be read (")):
            read(path)


def _id(path):
    return run_id(path.parent)


def test_the_content_of_a_file(run):
    (run / "a").write_bytes(b"abc")
    assert read_small(run / "a", 3) == b"abc"
    with pytest.raises(ConfigError, match=re.escape(f"{run / 'a'}: cannot be read (has 3 bytes, more than 2)")):
        read_small(run / "a", 2)
    for read in (read_small, read_json):
        with pytest.raises(FileNotFoundError):
            read(run / "b")


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "text", ["{", nested(MOST_DEPTH + 1), '{"a":' * 900 + "1" + "}" * 900, "[" * 100_000, "1" * 5000]
)
def test_what_is_no_plain_data(run, text):
    (run / "a").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{run / 'a'}: cannot be read (")) as refused:
        read_json(run / "a")
    assert "\n" not in str(refused.value)


def test_plain_data_may_be_nested():
    assert from_json(nested(MOST_DEPTH)) == json.loads(nested(MOST_DEPTH))
    assert from_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


def test_what_is_made_is_on_the_disk_with_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(folders, "sync_folder", synced.append)
    run = folders.make_run_folder(tmp_path / "a" / "runs", "x")
    assert synced == [tmp_path / "a", tmp_path, tmp_path / "a" / "runs"]
    folders.make_folder(tmp_path / "named")
    folders.make_folder(tmp_path / "named")
    folders.write_text(run / "note", "x")
    assert synced[3:] == [tmp_path, run]
