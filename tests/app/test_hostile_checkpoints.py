"""A checkpoint from elsewhere runs none of its own code, unless its package is trusted by name."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from calls import call, files_below

from denoiselab.training.checkpoint import load_checkpoint, newest_checkpoint

SOLVER = """
from pathlib import Path

from denoiselab.diffusion.samplers import Euler

Path("imported").touch()


class Mine(Euler):
    pass
"""


@pytest.fixture
def with_config(tiny_run, tmp_path):
    """Writes the checkpoint of the short run with another config."""

    def write(**changes):
        loaded = load_checkpoint(newest_checkpoint(tiny_run))
        loaded["config"] |= changes
        torch.save(loaded, tmp_path / "other.ckpt")

    return write


def refused(cwd, target, *options, command="sample"):
    before = files_below(cwd)
    done = call(command, "checkpoint=other.ckpt", *options, cwd=cwd)
    assert done.code == 2
    assert done.err.count("\n") == 1, done.err
    assert target in done.err
    assert "trust=" in done.err
    assert files_below(cwd) == before
    return done.err


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "touch harmed"},
        {"_target_": "subprocess.run", "args": ["touch", "harmed"]},
        {"_target_": "subprocess.run", "_args_": [["touch", "harmed"]]},
        {"_target_": "denoiselab.runs.folder.subprocess.run", "args": ["touch", "harmed"]},
        {"_target_": "denoiselab.training.logs.WandbLogger", "project": "harmed"},
        {"_target_": "denoiselab.diffusion.samplers.base.partial", "_partial_": True},
        {"_target_": "builtins.exec", "source": "open('harmed', 'w')"},
        {"_target_": "hydra.utils.get_method", "path": "os.system"},
        {"_target_": "denoiselab_evil.Sampler"},
    ],
    ids=lambda node: node["_target_"],
)
def test_foreign_targets_are_refused(node, command, with_config, tmp_path):
    with_config(sampler=node)
    assert f"sampler._target_={node['_target_']}" in refused(tmp_path, node["_target_"], command=command)


@pytest.mark.parametrize("place", ["callbacks", "optimizer", "something_else"])
def test_wherever_they_are(place, with_config, tmp_path):
    with_config(**{place: {"deep": [{"er": {"_target_": "os.system", "command": "touch harmed"}}]}})
    assert f"{place}.deep[0].er._target_" in refused(tmp_path, "os.system", "sampler=heun")


def test_replacing_a_foreign_part_does_not_hide_it(with_config, tmp_path):
    with_config(sampler={"_target_": "os.system", "command": "touch harmed"})
    refused(tmp_path, "os.system", "sampler=heun")


def test_a_checkpoint_that_is_code_is_not_run(tiny_run, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, ("harmed", "w")

    loaded = load_checkpoint(newest_checkpoint(tiny_run)) | {"evil": Evil()}
    torch.save(loaded, tmp_path / "other.ckpt")
    done = call("sample", "checkpoint=other.ckpt", cwd=tmp_path)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "plain data" in done.err
    assert files_below(tmp_path) == ["other.ckpt"]


def test_a_package_of_ones_own_is_admitted_by_name(with_config, tmp_path, monkeypatch):
    package = tmp_path / "site" / "my_solvers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "solver.py").write_text(SOLVER)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    target = "my_solvers.solver.Mine"
    with_config(sampler={"_target_": target, "grid": {"_target_": "denoiselab.diffusion.grids.Uniform"}, "nfe": 5})
    refused(tmp_path, target)
    refused(tmp_path, target, "trust=[my]")  # a package, not the beginning of its name
    done = call("sample", "checkpoint=other.ckpt", "trust=[my_solvers]", "num_samples=2", "output=a.png", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "Mine, 5 NFE" in done.out
    assert json.loads((tmp_path / "a.png.json").read_text())["sampler"]["_target_"] == target
    for module in ("my_solvers.solver", "my_solvers"):
        monkeypatch.delitem(sys.modules, module)
