"""A training run that takes a tenth of a second: a few hundred weights on twenty 4x4 images."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from denoiselab.codecs.rgb import RGB
from denoiselab.data.augmentation import NoAugmentation
from denoiselab.data.datamodule import ImageDataModule
from denoiselab.data.dataset import InMemoryImages
from denoiselab.diffusion.coupling import Independent
from denoiselab.diffusion.grids import Uniform as UniformGrid
from denoiselab.diffusion.guidance import unguided
from denoiselab.diffusion.objective import Objective
from denoiselab.diffusion.paths import RectifiedFlow
from denoiselab.diffusion.prediction import Velocity
from denoiselab.diffusion.samplers import Euler
from denoiselab.diffusion.time_sampling import Uniform
from denoiselab.diffusion.weighting import Unit
from denoiselab.training.ema import EMA
from denoiselab.training.module import DiffusionModule
from denoiselab.training.schedule import Schedule
from denoiselab.training.trainer import TrainerSettings

CLASSES = 3
SHAPE = (1, 4, 4)


class TinyNetwork(nn.Module):
    """Two convolutions with time and class added in between."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)
        self.time, self.label = nn.Linear(1, 6), nn.Embedding(CLASSES + 1, 6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, t, condition):
        h = self.inner(x) + (self.time(t[:, None] / 1000) + self.label(condition.label + 1))[..., None, None]
        return self.outer(self.dropout(torch.tanh(h)))


class TinyData(ImageDataModule):
    """Random images, the same every time."""

    def __init__(self, *, batch_size=8, seed=0):
        super().__init__(channels=1, resolution=4, num_classes=CLASSES, batch_size=batch_size, seed=seed)

    def load(self, split):
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        images = torch.randint(0, 256, (20, *SHAPE), generator=generator, dtype=torch.uint8)
        return InMemoryImages(images, torch.arange(20) % CLASSES)


def tiny_objective(**changes):
    parts = {
        "path": RectifiedFlow(t_min=0.001, t_max=1.0),
        "prediction": Velocity(),
        "time_sampling": Uniform(),
        "weighting": Unit(),
        "coupling": Independent(),
        "label_dropout": 0.2,
    }
    return Objective(**(parts | changes))


def tiny_module(*, dropout=0.0, batch_size=8, **changes):
    torch.manual_seed(0)
    parts = {
        "network": TinyNetwork(dropout),
        "objective": tiny_objective(),
        "codec": RGB(),
        "augmentation": NoAugmentation(dim=0),
        "sampler": Euler(grid=UniformGrid(), steps=2),
        "guidance": unguided,
        "optimizer": partial(torch.optim.AdamW, lr=0.01),
        "schedule": Schedule(decay="constant", steps=100),
        "ema": EMA(decays={"ema": 0.9}),
        "seed": 0,
        "batch_size": batch_size,
        "shape": SHAPE,
        "num_classes": CLASSES,
        "config": {"sampler": {}, "guidance": {}},
        "data": {"train": "", "test": ""},
    }
    return DiffusionModule(**(parts | changes))


def fit(module, run_dir, *, callbacks=(), loggers=(), steps=4, val_every=1000, resume=None, data=None, **settings):
    """Train on TinyData, unless told otherwise, with the project's own trainer."""
    run_dir.mkdir(exist_ok=True)
    built = TrainerSettings(accelerator="cpu", devices=1, max_steps=steps, val_every=val_every, **settings)
    trainer = built.build(run_dir, list(loggers), list(callbacks))
    trainer.fit(module, datamodule=data or TinyData(batch_size=module.batch_size), ckpt_path=resume)
    return trainer


def weights_of(module):
    return {key: value.detach().clone() for key, value in module.network.named_parameters()}


def equal(left, right):
    """Whether two state dicts are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
