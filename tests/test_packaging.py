"""The wheel holds what an installed copy needs, and works without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_config_and_asset(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"denoiselab/conf/{path.relative_to(ROOT / 'conf')}" in names
    assert "denoiselab/evaluation/assets/digits_classifier.safetensors" in names
    for path in (ROOT / "src" / "denoiselab" / "reports" / "page" / "assets").iterdir():
        assert f"denoiselab/reports/page/assets/{path.name}" in names
    assert not any(name.startswith(("tests/", "scripts/", "runs/")) for name in names)


def test_an_unpacked_wheel_composes_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys, denoiselab.app as app; "
        f"assert app.__file__.startswith({str(tmp_path)!r}), app.__file__; "
        "sys.argv = ['denoiselab-train', '--cfg', 'job', 'objective=v']; app.train_command()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "denoiselab.diffusion.prediction.V" in done.stdout
