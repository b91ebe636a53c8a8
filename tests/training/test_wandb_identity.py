from __future__ import annotations

import json

import pytest

from denoiselab.runs.errors import ConfigError
from denoiselab.training.wandb_identity import (
    add_config,
    display_name,
    git_facts,
    identify,
    read_identity,
    tidy_tags,
)

CHOICES = {"datamodule": "digits", "backbone": "dit", "objective": "v", "sampler": "ddim", "objective/path": "cosine"}


def run_folder(root, *, name=None, overrides=(), sweep=None, job=None):
    run = root / "run"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"name": name}))
    (run / "command.json").write_text(json.dumps({"overrides": list(overrides), "choices": CHOICES}))
    if sweep:
        (root / "sweep.json").write_text(json.dumps({"name": sweep}))
        (run / "job.json").write_text(json.dumps({"name": job}))
    return run


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        (None, [], "folder"),
        (None, ["objective=v", "seed=1"], "objective=v,seed=1"),
        ("mine", ["objective=v"], "mine"),
        (None, ["run=runs/a", "resume=auto", "logger.mode=offline", "+logger.x=1", "runs=b", "name=null"], "folder"),
        (None, ["+callbacks.ema.every=2", "run=a"], "+callbacks.ema.every=2"),
    ],
)
def test_the_name_is_what_a_run_overrides(tmp_path, name, overrides, expected):
    identity = identify(run_folder(tmp_path, name=name, overrides=overrides), "folder")
    assert (identity.name, identity.group) == (expected, None)
    assert display_name(name, overrides, "folder") == expected


def test_a_long_name_is_cut():
    assert display_name(None, ["a" * 60, "b" * 60], "x") == "a" * 60 + "," + "b" * 39


def test_a_job_is_named_by_its_sweep(tmp_path):
    run = run_folder(tmp_path / "2026-01-01_sweep", name="n", sweep="objectives", job="objective=v,seed=1")
    identity = identify(run, "folder")
    assert (identity.name, identity.group) == ("objective=v,seed=1", "objectives")
    assert identity.config["sweep_folder"] == "2026-01-01_sweep"  # which no other sweep has
    assert identity.config["job"] == "objective=v,seed=1"


def test_a_resumed_run_keeps_its_name_group_and_project(tmp_path, caplog):
    run = run_folder(tmp_path / "sweep", sweep="objectives", job="seed=1")
    first = identify(run, "folder", notes="then", project="p", entity=None)
    (tmp_path / "sweep" / "sweep.json").unlink()
    (run / "command.json").write_text(json.dumps({"overrides": ["trainer.max_steps=9"], "choices": CHOICES}))
    again = identify(run, "other", notes="now", project="q", entity="team")
    assert (again.name, again.group) == (first.name, first.group) == ("seed=1", "objectives")
    assert again.notes == "now"
    assert (again.project, again.entity) == ("p", None)  # elsewhere it would be a second run
    assert "logger.project=q: a W&B run stays where it is, project=p" in caplog.text


def test_tags_are_short_and_of_the_choices(tmp_path):
    identity = identify(run_folder(tmp_path), "folder", tags=["mine", " ", "x" * 70])
    assert identity.tags == ["mine", "x" * 64, "digits", "dit", "v"]
    assert tidy_tags(["a", "a ", ""]) == ["a"]
    assert identity.config["choices"] == CHOICES


def test_git_is_told_without_its_remote(monkeypatch):
    state = {"commit": "abc", "branch": "main", "changed_files": [" M secret.py"]}
    monkeypatch.setattr("denoiselab.training.wandb_identity.git_state", lambda folder: state)
    assert git_facts() == {"commit": "abc", "branch": "main", "changed": True}
    monkeypatch.setattr("denoiselab.training.wandb_identity.git_state", lambda folder: None)
    assert git_facts() is None


def test_what_is_kept_is_read_back_without_secrets(tmp_path, monkeypatch):
    run = run_folder(tmp_path)
    identity = identify(run, "folder", project="p", notes="api_key=abcdefgh12345")
    add_config(run, {"optimizer": {"lr": 0.1}, "token": "abcdefgh12345"})
    text = (run / "wandb" / "identity.json").read_text()
    assert "abcdefgh12345" not in text
    found = read_identity(run)
    assert found is not None
    assert found.config["optimizer"] == {"lr": 0.1}
    assert found.config["choices"] == CHOICES
    assert (found.name, found.project) == (identity.name, "p")


@pytest.mark.parametrize("content", ['{"name": "a"}', "[]", "{", None])
def test_a_damaged_one_is_said(tmp_path, content):
    run = run_folder(tmp_path)
    assert read_identity(run) is None
    identity = identify(run, "folder")
    path = run / "wandb" / "identity.json"
    path.write_text(content or json.dumps(json.loads(path.read_text()) | {"images": "many"}))
    with pytest.raises(ConfigError, match="identity.json"):
        read_identity(run)
    assert identify(run, "folder") == identity  # a run that starts makes it anew
    assert read_identity(run) == identity
