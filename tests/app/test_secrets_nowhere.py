"""Secrets in the environment, in what was typed and in what is raised are in no file and no line of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from calls import NETWORK, call, only_run, run_script

ENVIRONMENT = {
    "WANDB_API_KEY": "5e4711e1c0ffee5e4711e1c0ffee5e4711e1c0ff",
    "HF_TOKEN": "hf_SentinelOfTheHub",
    "DB_PASSWORD": "sentinel of the database",
    "AWS_SECRET_ACCESS_KEY": "sentinel/of+the/cloud==",
    "HTTPS_PROXY": "http://me:sentinel-of-the-proxy@localhost:9",
}
TYPED = {
    "a key": "sentinel-of-a-key",
    "short": "s3ntnl",
    "a URL": "sentinel-of-a-url",
    "a note": "sentinel-of-a-note",
    "a tag": "hf_sentinelofatag0000000000000",
}
REMOTE = "sentinel-of-the-remote"
SENTINELS = [*ENVIRONMENT.values(), *TYPED.values(), REMOTE, "sentinel-of-the-proxy"]
OVERRIDES = [
    *NETWORK,
    "sampler.nfe=2",
    "trainer.max_steps=2",
    "trainer.threads=1",
    "callbacks.monitor.every=1",
    "callbacks.pictures.rows=1",
    "+callbacks.helper._target_=helper.Helper",
    f"+callbacks.helper.api_key={TYPED['a key']}",
    f"+callbacks.helper.password={TYPED['short']}",
    f"+callbacks.helper.url=https://me:{TYPED['a URL']}@host/data",
    "+callbacks.helper.hub='${oc.env:HF_TOKEN}'",
    f"logger.notes='token={TYPED['a note']} and {TYPED['a key']} and {ENVIRONMENT['DB_PASSWORD']}'",
    f"logger.tags=[{TYPED['a tag']},{ENVIRONMENT['HF_TOKEN']}]",
]
FEW = [
    "metrics.counts=[4]",
    *(f"metrics.measures.{name}=null" for name in ("kernel", "precision_recall", "density_coverage")),
]
HELPER = """
import logging
import os
import warnings

from lightning.pytorch.callbacks import Callback


class Helper(Callback):
    def __init__(self, *, api_key: str, password: str, url: str, hub: str, fail: bool = False) -> None:
        self.seen, self.fail = (api_key, password, url, hub), fail
        if hub == "wrong":
            raise ValueError("hub=wrong: refuses " + os.environ["HF_TOKEN"])

    def on_train_start(self, trainer, module):
        logging.getLogger("helper").warning("%s and %s", self.seen, os.environ["HF_TOKEN"])
        warnings.warn("as " + os.environ["DB_PASSWORD"])

    def on_train_batch_end(self, trainer, module, *rest):
        if self.fail:
            raise RuntimeError("refused: " + " ".join(os.environ[name] for name in NAMES))
"""


def git(cwd, *arguments):
    subprocess.run(["git", "-C", str(cwd), *arguments], check=True, capture_output=True)


def train(cwd, *overrides):
    """A run inside a repository whose remote's URL holds a token."""
    (cwd / "helper.py").write_text(f"NAMES = {list(ENVIRONMENT)}\n{HELPER}")
    git(cwd, "init")
    git(cwd, "remote", "add", "origin", f"https://{REMOTE}@host/a.git")
    git(cwd, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--allow-empty", "-m", "first")
    modules = os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])
    more = {"WANDB_MODE": "offline", "COLUMNS": "200", "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"}
    return run_script("train", *OVERRIDES, *overrides, cwd=cwd, **ENVIRONMENT, **more)


def leaks(content):
    """The sentinels in some bytes."""
    forms = {form for sentinel in SENTINELS for form in (sentinel, json.dumps(sentinel)[1:-1])}
    return sorted(form for form in forms if form.encode() in content)


def check_tree(done, cwd, *kinds):
    """No sentinel in what a run printed and in any byte of its files, unpacked where they are packed."""
    assert leaks((done.out + done.err).encode()) == []
    files = [path for path in (cwd / "runs").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".json", ".csv", ".log", ".wandb", *kinds}
    for path in files:
        contents = [path.read_bytes(), str(path).encode()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        if path.suffix == ".wandb":
            contents.append(wandb_records(path).encode())
        assert [leaks(content) for content in contents] == [[]] * len(contents), path
    assert [path.name for path in cwd.iterdir() if path.name not in ("runs", "helper.py", ".git", "__pycache__")] == []


def wandb_records(file):
    """The records of a W&B run as lines of JSON."""
    program = Path(sys.executable).with_name("wandb")
    return subprocess.run(
        [program, "leet", "inspect", "--json", file], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("finished")
    return train(cwd, *FEW), cwd


def test_the_search_can_find():
    for sentinel in SENTINELS:
        assert leaks(f"x{sentinel}x".encode())
    for value in TYPED.values():
        assert any(value in override for override in OVERRIDES)


def test_a_run_keeps_no_secret(finished):
    done, cwd = finished
    assert done.code == 0, done.err
    check_tree(done, cwd, ".jsonl", ".ckpt", ".png")


def test_what_is_hidden_is_said(finished):
    done, _ = finished
    (line,) = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    for key in ("callbacks.helper.api_key", "callbacks.helper.url", "logger.notes", "logger.tags"):
        assert key in line
    assert "secret" in line


def test_what_is_no_secret_is_kept(finished):
    _, cwd = finished
    run = only_run(cwd)
    config = json.loads((run / "config.json").read_text())
    assert config["callbacks"]["helper"] == {
        "_target_": "helper.Helper",
        "api_key": "***",
        "password": "***",
        "url": "https://***@host/data",
        "hub": "***",
    }
    assert config["logger"]["notes"] == "token=*** and *** and ***"
    assert config["logger"]["tags"] == ["***", "***"]
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["config"] == config
    told = json.loads((run / "command.json").read_text())
    for said in (told["overrides"], told["command"]):
        assert "+callbacks.helper.api_key=***" in said
        assert "trainer.max_steps=2" in said
    log = (run / "train.log").read_text()
    assert "('***', '***', 'https://***@host/data', '***') and ***" in log
    assert "as ***" in log


def test_wandb_keeps_what_helps(finished):
    (file,) = only_run(finished[1]).rglob("*.wandb")
    records = [json.loads(line) for line in wandb_records(file).splitlines()]
    known = {}
    for record in records:
        if record["type"] == "environment":
            known |= record["environment"]
    assert {"host", "python", "cpu", "args", "program"} <= known.keys()
    assert "+callbacks.helper.api_key=***" in known["args"]
    assert "remote_url" not in known.get("git", {})
    here = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    if here.returncode == 0:  # the commit of this program, not that of the folder it was started in
        assert known["git"]["commit"] == here.stdout.strip()


def test_a_failing_run_keeps_no_secret(tmp_path):
    done = train(tmp_path, "+callbacks.helper.fail=true", "metrics=none")
    assert done.code == 1
    assert "RuntimeError: refused: *** *** *** ***" in done.err
    run = only_run(tmp_path)
    assert json.loads((run / "summary.json").read_text())["error"].startswith("RuntimeError: refused: *** *** *** ***")
    assert "RuntimeError: refused: *** *** *** ***" in (run / "train.log").read_text()
    check_tree(done, tmp_path)


@pytest.mark.slow
def test_failing_ranks_keep_no_secret(tmp_path):
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = train(tmp_path, "+callbacks.helper.fail=true", "metrics=none", *two)
    assert done.code == 1
    assert "refused: *** *** *** ***" in done.err
    check_tree(done, tmp_path)


@pytest.fixture
def environment(monkeypatch):
    for name, value in (ENVIRONMENT | {"ELSEWHERE": TYPED["short"]}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--cfg", "job", "--resolve"],
        ["--cfg", "job", "-p", "callbacks.helper"],
        ["--cfg", "job", "-p", "callbacks.helper.token"],
        ["--cfg", "all"],
        ["--info", "all"],
        ["--help", "--resolve"],
    ],
)
def test_hydra_prints_no_secret(flags, tmp_path, environment):
    done = call("train", *OVERRIDES, "+callbacks.helper.token='${oc.env:ELSEWHERE}'", *flags, cwd=tmp_path)
    assert done.code == 0, done.err
    assert leaks((done.out + done.err).encode()) == []
    assert "***" in done.out


def test_a_class_that_quotes_a_secret_does_it_without(tmp_path, environment, monkeypatch):
    (tmp_path / "helper.py").write_text(f"NAMES = []\n{HELPER}")
    monkeypatch.syspath_prepend(tmp_path)
    done = call("train", *OVERRIDES, "callbacks.helper.hub=wrong", cwd=tmp_path)
    assert done.code == 2
    assert leaks((done.out + done.err).encode()) == []
    assert done.err.splitlines()[-1] == "config error: callbacks.helper.hub=wrong: refuses ***"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("+logger.api_key=s3ntnl", "logger.api_key=***: no such key"),
        ("++logger.password='s3ntnl x'", "logger.password=***: no such key"),
        ("+logger={password:s3ntnl}", "password"),
        ("++logger.password=s3ntnl b{c", "logger.password=***: no such key"),
        ("loger.api_key=s3ntnl", "loger.api_key=***: no such key"),
        ("api_key=s3ntnl", "api_key=***: no such key"),
        ("seed='password=s3ntnl'", "seed=password=***: must be an integer"),
        ("datamodule=https://s3ntnl@host", "***@host: must be one of"),
        ("name=hf_SentinelOfTheHub", "name=***: must be"),
        ("seed=hf_SentinelOfTheHub", "seed=***: must be an integer"),
        (
            "datamodule=image_folder datamodule.root=https://s3ntnl@host",
            "datamodule.root=https://***@host: no such folder",
        ),
    ],
)
def test_mistakes_are_quoted_without_secrets(typed, expected, tmp_path, environment):
    parts = [typed] if "'" in typed or "{" in typed else typed.split()
    done = call("train", *parts, cwd=tmp_path)
    assert done.code == 2, done.out + done.err
    assert leaks((done.out + done.err).encode()) == []
    assert expected in done.err.splitlines()[-1]
