import sys

import numpy as np
import pytest
import torch


class Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name):
        return getattr(self.module, name)


@pytest.fixture
def double(monkeypatch):
    """diffusers' schedulers, as far as they are imported, keep their tables and states in float64."""
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.schedulers.scheduling_") and "utils" not in name:
            for alias, real in (("torch", torch), ("np", np)):
                if getattr(module, alias, None) is real:
                    monkeypatch.setattr(module, alias, Double(real))
