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

from stand_ins import write_autoencoder, write_cifar10, write_imagenet

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_global_randomness_leaks():
    """Each test starts from the same global generator, so that tests do not depend on their order."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """Tables of what tests have measured, which they leave with `record_property("table", …)`, whatever process ran them."""
    for report in terminalreporter.getreports("passed"):
        for table in [text for name, text in report.user_properties if name == "table"]:
            terminalreporter.write_line(f"{report.nodeid}\n{table}\n")


@pytest.fixture
def cifar10_folder(tmp_path_factory, monkeypatch):
    """A folder with cifar-10-batches-py of ten images a file, which is taken for complete."""
    root = tmp_path_factory.mktemp("cifar10")
    write_cifar10(root / "cifar-10-batches-py", per_batch=10)
    monkeypatch.setattr("denoiselab.data.cifar10.COUNTS", {"train": 50, "test": 10})
    return root


@pytest.fixture(scope="session")
def imagenet_folder(tmp_path_factory):
    """A folder with train and val in the layout of ImageNet, of two classes."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory):
    """A tiny autoencoder that halves the sides, in diffusers' layout."""
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder"))
