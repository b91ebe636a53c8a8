from __future__ import annotations

import pytest


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
