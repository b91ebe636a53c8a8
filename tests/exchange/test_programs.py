"""Exported programs compute what the denoiser computes, for any number of samples, and without this package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from elsewhere import built, node_of, perturbed
from torch import nn

from denoiselab.backbones.dit import DiT
from denoiselab.backbones.song_unet import SongUNet
from denoiselab.backbones.unet import UNet
from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.diffusion.paths import DDPMCosine, DDPMLinear, RectifiedFlow, Shifted, VarianceExploding
from denoiselab.diffusion.prediction import EDM, Epsilon, V, Velocity
from denoiselab.exchange.programs import DenoiserProgram, difference, save_torch_export, save_torchscript

SHAPE = (1, 8, 8)
SAVE = {"pt2": save_torch_export, "pt": save_torchscript}


def song_unet():
    settings = {"channels": 1, "resolution": 8, "num_classes": 3, "augment_dim": 9, "width": 16, "multipliers": [1, 2]}
    settings |= {"blocks": 1, "attention_resolutions": [4], "dropout": 0.0, "time_embedding": "positional"}
    settings |= {"time_multiplier": 1, "encoder": "standard", "resample_filter": [1, 1]}
    return perturbed(SongUNet(**settings))


CASES = {
    "unet": (lambda: built(node_of(UNet)), RectifiedFlow(), Velocity(), True),
    "dit with a learned variance": (
        lambda: built(node_of(DiT, learned_variance=True, num_classes=0)),
        DDPMLinear(),
        Epsilon(),
        False,
    ),
    "edm": (song_unet, VarianceExploding(), EDM(), True),
}


def program_of(case):
    make, path, prediction, labelled = CASES[case]
    network = make()
    learned = "learned" in case
    denoiser = NetworkDenoiser(network=network, path=path, prediction=prediction, learned_variance=learned)
    return DenoiserProgram(denoiser=denoiser, labelled=labelled).eval()


@pytest.mark.parametrize(
    ("case", "ending"),
    [
        ("unet", "pt"),
        ("dit with a learned variance", "pt2"),
        ("edm", "pt"),
        pytest.param("edm", "pt2", marks=pytest.mark.slow),
    ],
)
def test_programs_compute_the_denoiser(case, ending, tmp_path):
    program = program_of(case)
    saved = SAVE[ending](program, SHAPE, tmp_path / f"denoiser.{ending}")
    assert difference(program, saved, SHAPE) < 1e-6
    x, t = torch.randn(7, *SHAPE), torch.linspace(program.denoiser.path.t_min, program.denoiser.path.t_max, 7).double()
    label = torch.tensor([0, 1, 2, -1, 0, -1, 2]) if program.labelled else None
    with torch.no_grad():
        want = program.denoiser(x, t, Condition(label=label)).x0
        got = saved(x, t, label) if program.labelled else saved(x, t)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_difference_is_seen():
    program = program_of("unet")
    arguments = program.examples(3, SHAPE)
    assert arguments[2].tolist() == [-1, 0, 0]
    assert difference(program, lambda x, t, label: program(x, t, label) * 1.01, SHAPE) == pytest.approx(0.01, rel=1e-3)
    assert difference(program, lambda x, t, label: program(x, t, torch.zeros_like(label)), SHAPE) > 1e-3


def test_a_path_that_searches_a_table_is_followed_by_both(tmp_path):
    path = Shifted(path=DDPMCosine(), shift=2.0)
    denoiser = NetworkDenoiser(network=built(node_of(DiT)), path=path, prediction=V())
    program = DenoiserProgram(denoiser=denoiser, labelled=True).eval()
    assert difference(program, save_torch_export(program, SHAPE, tmp_path / "denoiser.pt2"), SHAPE) < 1e-6
    assert difference(program, save_torchscript(program, SHAPE, tmp_path / "denoiser.pt"), SHAPE) < 1e-6


ALONE = """
import sys
sys.modules["denoiselab"] = None
import torch
x, t, label, want = torch.load("io.pt")
for name, load in (("denoiser.pt2", lambda n: torch.export.load(n).module()), ("denoiser.pt", torch.jit.load)):
    torch.testing.assert_close(load(name)(x, t, label), want, rtol=1e-5, atol=1e-5)
print("same")
"""


def test_the_files_need_torch_alone(tmp_path):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t, condition):
            return x * self.factor * (condition.label[:, None, None, None] + t[:, None, None, None] / 1000)

    denoiser = NetworkDenoiser(network=Scale(), path=RectifiedFlow(), prediction=Velocity())
    program = DenoiserProgram(denoiser=denoiser, labelled=True).eval()
    for ending, save in SAVE.items():
        save(program, SHAPE, tmp_path / f"denoiser.{ending}")
    arguments = program.examples(4, SHAPE)
    torch.save((*arguments, program(*arguments).detach()), tmp_path / "io.pt")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr
