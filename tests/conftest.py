import os
import tempfile
from pathlib import Path

# One thread per process: on shared cores, oversubscribed threads make the same step many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("DENOISELAB_CACHE", str(Path(tempfile.gettempdir()) / "denoiselab-test-cache"))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_global_randomness_leaks():
    """Each test starts from the same global generator, so that tests do not depend on their order."""
    torch.manual_seed(0)
