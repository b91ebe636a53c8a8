"""The code that jobs run is a copy, named by its content, of whoever started them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from denoiselab.runs import frozen_code
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import cache_folder, git_state
from denoiselab.runs.frozen_code import PACKAGE, freeze, frozen


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DENOISELAB_CACHE", str(tmp_path / "cache"))


def test_the_copy_is_whole_and_is_what_runs(tmp_path):
    name = freeze()
    source = frozen(name)
    assert source == cache_folder() / "code" / name / "src"
    code = (
        "import json; from pathlib import Path; import denoiselab; from denoiselab.app.compose import config_folder;"
        "from denoiselab.runs.folder import versions; import hydra_plugins.denoiselab as plugins;"
        "print(Path(denoiselab.__file__).parent); print(config_folder()); print(plugins.__file__);"
        "print(json.dumps(versions()['git']))"
    )
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    package, conf, plugins, git = done.stdout.splitlines()
    assert package == str(source / "denoiselab")
    assert conf in (str(source / "denoiselab" / "conf"), str(source.parent / "conf"))
    assert plugins.startswith(str(source))
    state = git_state(PACKAGE)
    assert git == ("null" if state is None else __import__("json").dumps(state))


def test_the_same_code_is_copied_once_and_other_code_again(monkeypatch, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("1")
    monkeypatch.setattr(frozen_code, "code_of_now", lambda: {"src/denoiselab": tmp_path / "package"})
    first = freeze()
    made = (frozen(first) / "denoiselab" / "a.py").stat().st_ino
    assert freeze() == first
    assert (frozen(first) / "denoiselab" / "a.py").stat().st_ino == made
    (tmp_path / "package" / "a.py").write_text("2")
    assert freeze() != first
    assert (frozen(first) / "denoiselab" / "a.py").read_text() == "1"
    assert len(list((cache_folder() / "code").iterdir())) == 2


@pytest.mark.parametrize("name", ["0123456789abcdef", "../../evil", "", "."])
def test_a_sweep_brings_no_code_along(name, tmp_path):
    (tmp_path / "evil").mkdir()
    with pytest.raises(ConfigError, match="code=now takes the code as it is now"):
        frozen(name)


def test_a_cache_that_cannot_be_written_to(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="the code cannot be copied there"):
        freeze()
