"""The certificate as a command: it finds what is in conf/ and fails where a claim does."""

import os
import shutil

import pytest
from calls import CONF, call

from denoiselab.app import certify as app
from denoiselab.app.certify import PLOTTED
from denoiselab.diffusion.samplers import Euler

SMALL = ["paths=[cosine]", "processes=1"]
CHOICES = sorted(file.stem for file in (CONF / "objective" / "path").glob("*.yaml"))


class Mine(Euler):
    """A new sampler that claims too much."""

    order = 2


def test_a_new_sampler_is_one_step_and_one_file(tmp_path, monkeypatch):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    text = (conf / "sampler" / "euler.yaml").read_text()
    (conf / "sampler" / "mine.yaml").write_text(
        text.replace("denoiselab.diffusion.samplers.Euler", "test_certify.Mine")
    )
    monkeypatch.setattr(app, "config_folder", lambda: conf)
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))  # for the processes that measure
    done = call("certify", *SMALL, "samplers=[mine,heun]", "output=here", cwd=tmp_path)
    assert done.code == 1
    assert "mine" in done.out
    assert "1.00 OUTSIDE" in done.out
    assert "4 outside their bounds" in done.out
    assert {file.name for file in (tmp_path / "here").iterdir()} == {
        "table.csv",
        "README.md",
        "error_against_nfe.png",
        "error_against_nfe.svg",
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("samplers=[hoin]", "config error: samplers=hoin: must be among ab_2, "),
        ("paths=[line]", "config error: paths=line: must be among cosine, "),
        ("processes=0", "config error: processes=0: must be at least 1"),
    ],
)
def test_mistakes_are_one_line(option, message, tmp_path):
    done = call("certify", option, cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith(message)
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.certify
@pytest.mark.parametrize("path", CHOICES)
def test_every_row_on_every_path_is_inside_its_bound(path, tmp_path):
    done = call("certify", f"paths=[{path}]", "processes=1", "output=null", cwd=tmp_path)
    assert done.code == 0, done.out
    assert "OUTSIDE" not in done.out
    assert set(PLOTTED) <= set(CHOICES)
