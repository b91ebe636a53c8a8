"""The README's commands, run as written but small; `make` targets run what the Makefile runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from wandb_server import wandb_server

ROOT = Path(__file__).parents[1]
SMALL = {
    "train": "trainer.max_steps=2 trainer.val_every=2 callbacks.monitor.every=1 callbacks.pictures.rows=1 metrics.counts=[20]",
    "replay": "",
    "sweep": "",
    "report": "",
    "sync": "",
    "dashboard": "save=false",
    "sample": "",
    "evaluate": "metrics.counts=[20]",
    "compare": "",
    "frontier": "samplers=[ddim] nfe=[1,2] scales=[1] count=20 logger=none",
    "certify": "samplers=[heun] paths=[cosine] processes=1",
    "convert": "",
    "study=frequency": "study.steps=[2,4] study.side=8 study.images=20 sampler@study.reference=heun_t",
    "study=guidance": "study.scales=[1.0,3.0] study.images=200 study.points=60",
    "study=copying": "study.sizes=[2,12] study.steps=1 study.images=20 study.points=20",
}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    inline = re.findall(r"`(make \w+ ARGS=\"[^`]*\")`", (ROOT / "README.md").read_text())
    return [line for block in blocks for line in block.splitlines() if line.strip()] + inline


def as_python(line):
    """The arguments of the Python call behind a line of the README, or None for the test targets."""
    words = shlex.split(line)
    if words[0] == "make":
        if words[1] == "test":
            return None
        arguments = [w for word in words[2:] for w in shlex.split(word.removeprefix("ARGS="))]
        recipe = re.search(rf"^{words[1]}:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
        assert f"scripts/{words[1]}.py $(ARGS)" in recipe
        return words[1], arguments
    assert words[0] == "python"
    return Path(words[1]).stem, words[2:]


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path):
    lines = commands()
    assert sum("scripts/" in line for line in lines) >= 8
    for line in sorted(filter(as_python, lines), key=lambda line: "make train" not in line):
        script, arguments = as_python(line)
        small = shlex.split(SMALL[arguments[0] if script == "study" else script])
        if script == "evaluate" and not any(a.startswith("metrics=") for a in arguments):
            small = []  # the run's own metrics, small already
        if script == "train" and "--cfg" in arguments:
            small = []
        small = [w if w.split("=")[0] not in [a.split("=")[0] for a in arguments] else "" for w in small]
        call = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments, *filter(None, small)]
        (tmp_path / "docs").mkdir(exist_ok=True)
        with wandb_server() as server:
            known = os.environ | (server.environment() if script == "sync" else {})
            done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=known)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    assert (tmp_path / "docs" / "digits.png").is_file()
    assert (tmp_path / "samples.npz").is_file()
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "threes.png").is_file()
    assert len(list((tmp_path / "drawn").glob("*.npz"))) == 2
    assert len(list((tmp_path / "sweeps").glob("*_objectives/*/summary.json"))) == 2
    assert all(
        (tmp_path / "docs" / "studies" / name / "README.md").is_file() for name in ("frequency", "guidance", "copying")
    )
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 7


def test_the_table_of_groups_names_every_choice():
    text = (ROOT / "README.md").read_text()
    for folder in sorted({path.parent for path in (ROOT / "conf").rglob("*.yaml")} - {ROOT / "conf"}):
        group = str(folder.relative_to(ROOT / "conf"))
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`{group}`" in line)
        for choice in folder.glob("*.yaml"):
            assert f"`{choice.stem}`" in row, f"{group}={choice.stem}"
