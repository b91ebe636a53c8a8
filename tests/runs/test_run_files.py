from __future__ import annotations

import json
import os
import re

import pytest

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import MOST_DEPTH, check_own, from_json, open_own, read_json, read_small, write_json
from denoiselab.runs.folder import (
    run_id,
)


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
