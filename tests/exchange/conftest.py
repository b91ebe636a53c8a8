from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_modules(tmp_path_factory, monkeypatch):
    """diffusers copies a pipeline's file into a cache before it imports it; here into one of the test's own."""
    cache = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
