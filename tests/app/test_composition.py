"""Composition is real: every pair of parts that fits runs, and every file in conf/ composes and takes a step."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import yaml
from calls import CONF, NETWORK, SHORT, call, composed, only_run

from denoiselab.app.build import make_module, make_training
from denoiselab.app.nodes import make, make_network
from denoiselab.condition import Condition
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.evaluation.generate import balanced_labels
from denoiselab.runs.errors import ConfigError

SMALL = {"width": 8, "blocks": 1, "head_channels": None, "hidden_size": 16, "depth": 1, "num_heads": 2}
SIDES = (8, 28, 32, 64, 256)  # resolutions that backbone presets are made for
BASE = ["metrics=none", "logger=none", "trainer.threads=1", "datamodule.batch_size=4"]
PRIMARY = {file.stem for file in CONF.glob("*.yaml")}
ELSEWHERE = ("experiment", "hydra", "metrics/", "study", "sweep")  # composed by tests of their own


def all_choices():
    """(group, choice) of every file in conf/, experiments left out."""
    files = [file.relative_to(CONF).with_suffix("") for file in sorted(CONF.rglob("*.yaml"))]
    pairs = [(file.parent.as_posix(), file.name) for file in files if file.as_posix() not in PRIMARY]
    return [(group, choice) for group, choice in pairs if not group.startswith(ELSEWHERE)]


def choices_of(group):
    return [choice for g, choice in all_choices() if g == group]


def shrunk(config):
    """The config with its backbone cut down to a few thousand weights."""
    backbone = config["backbone"] | {key: value for key, value in SMALL.items() if key in config["backbone"]}
    return config | {"backbone": backbone}


def take_a_step(config, run_dir):
    """One optimizer step as the trainer takes it, then two samples with the averaged weights.

    Returns:
        the parts, the loss, how many parameters the step changed, the samples and what they cost.
    """
    parts, training = make_training(config)
    module = make_module(config, parts, training, make_network(config), {"train": "0" * 64, "test": "0" * 64})
    module.trainer = training.settings.build(run_dir, [], [])
    optimizer = module.configure_optimizers()["optimizer"]
    before = {key: p.detach().clone() for key, p in module.network.named_parameters()}
    loss = module.training_step(next(iter(parts.data.train_dataloader())), 0)["loss"]
    loss.backward()
    module.configure_gradient_clipping(optimizer, training.settings.gradient_clip)
    optimizer.step()
    module.ema.update(module.network)
    changed = sum(not torch.equal(before[key], p) for key, p in module.network.named_parameters())
    with module.denoiser() as denoiser:
        condition = Condition(label=balanced_labels(2, parts.data.num_classes))
        noise = NoiseSource(seed=0, index=torch.arange(2))
        samples = parts.sampler.sample(denoiser, parts.shape, condition, noise)
        nfe = parts.sampler.plan(denoiser)[1]
    return parts, loss.item(), changed, samples, nfe


def runs(config, run_dir):
    """Whether a config trains and samples; fails if it does not."""
    parts, loss, changed, samples, nfe = take_a_step(config, run_dir)
    assert loss > 0
    assert changed > 0
    assert samples.shape == (2, *parts.shape)
    assert samples.isfinite().all()
    assert samples[0].ne(samples[1]).any()
    assert nfe is None or 1 <= nfe <= 4


@pytest.mark.parametrize(
    ("backbone", "objective", "sampler"),
    list(
        itertools.product(
            ("unet", "dit"),
            ("epsilon", "x0", "v", "rectified_flow"),
            ("ddpm", "ddim", "euler", "heun", "dpmpp_2m"),
        )
    ),
)
def test_all_forty_compose_train_a_step_and_sample(backbone, objective, sampler, tmp_path):
    choice = [f"backbone={backbone}", f"objective={objective}", f"sampler={sampler}", "sampler.nfe=4"]
    runs(shrunk(composed(*BASE, *choice)), tmp_path)


@pytest.fixture
def datasets(class_folder, fashion_folder, cifar10_folder, imagenet_folder):
    """Overrides that give a datamodule its files."""
    two = "datamodule.num_classes=2"
    return {
        "digits": [],
        "image_folder": [f"datamodule.root={class_folder}", two],
        "fashion_mnist": [f"datamodule.root={fashion_folder}"],
        "cifar10": [f"datamodule.root={cifar10_folder}"],
        "imagenet": [f"datamodule.root={imagenet_folder}", two, "datamodule.resolution=16", "datamodule.num_workers=0"],
    }


@pytest.fixture
def needs(datasets, tiny_run, autoencoder_folder):
    """What a choice needs beside itself; a refusal names it."""
    latents = [f"codec.weights={autoencoder_folder}", "backbone.channels=4", "backbone.resolution=8"]
    rgb = ["datamodule=image_folder", *datasets["image_folder"], "datamodule.resolution=16"]
    return {
        "guidance=cfg_pp": ["sampler=ddim"],
        "guidance=autoguidance": [f"guidance.guide={tiny_run}"],
        "objective=edm": ["sampler=heun"],
        "objective/path=variance_exploding": ["sampler=heun"],
        "objective/path=laplace": ["sampler=heun"],
        "codec=sd_vae": [*rgb, *latents],
        "augmentation=edm": [
            "datamodule=cifar10",
            *datasets["cifar10"],
            "datamodule.flip=false",
            "backbone=ddpmpp_cifar10",
        ],
        "sampler=dopri5": ["sampler.rtol=0.01", "sampler.atol=0.01"],
    }


@pytest.mark.parametrize("choice", choices_of("datamodule"))
def test_every_datamodule(choice, datasets, tmp_path):
    overrides = [f"datamodule={choice}", *datasets[choice], "backbone=dit", "sampler.nfe=4"]
    runs(shrunk(composed(*BASE, *overrides)), tmp_path)


@pytest.mark.parametrize("choice", choices_of("backbone"))
def test_every_backbone_at_a_resolution_that_it_is_made_for(choice, datasets, tmp_path):
    data = ["datamodule=image_folder", *datasets["image_folder"], f"backbone={choice}", "sampler.nfe=4"]
    problems = []
    for side in SIDES:
        config = shrunk(composed(*BASE, *data, f"datamodule.resolution={side}"))
        try:
            make_network(config, device="meta")
        except ConfigError as error:
            problems.append(str(error))
            continue
        runs(config, tmp_path)
        return
    pytest.fail(f"no resolution fits: {problems}")


# Nested choices are not all legal up to the pure noise of the default path: it ends a little earlier here.
@pytest.mark.parametrize(
    ("group", "choice"),
    [(g, c) for g, c in all_choices() if g not in ("datamodule", "backbone", "metrics", "logger", "trainer")],
)
def test_every_choice_of_the_other_groups(group, choice, needs, tmp_path):
    end = ["objective.path.t_max=0.99"] if "/" in group else []
    budget = [] if choice == "dopri5" else ["sampler.nfe=4"]
    more = needs.get(f"{group}={choice}", [])
    runs(shrunk(composed(*BASE, f"{group}={choice}", *end, *more, *budget)), tmp_path)


@pytest.mark.parametrize("choice", choices_of("trainer"))
def test_every_trainer(choice, tmp_path):
    config = shrunk(composed(*BASE, f"trainer={choice}", "sampler.nfe=4"))
    if config["trainer"]["accelerator"] == "gpu" and not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"^trainer\.accelerator=gpu: this machine has no GPU"):
            make_training(config)
        return
    runs(config, tmp_path)


@pytest.mark.parametrize("choice", choices_of("metrics"))
def test_every_metrics(choice, tmp_path):
    overrides = [f"metrics={choice}", "sampler.nfe=4"]
    if choice == "fid":
        missing = tmp_path / "missing.pth"
        config = composed(*BASE, *overrides, f"metrics.extractors.inception.weights={missing}")
        match = rf"^metrics\.extractors\.inception\.weights={missing}: no such file; .*metrics=none"
        with pytest.raises(ConfigError, match=match):
            make_training(config)
        return
    runs(shrunk(composed(*BASE, *overrides)), tmp_path)


@pytest.mark.parametrize("choice", sorted(file.stem for file in (CONF / "metrics" / "extractor").glob("*.yaml")))
def test_every_extractor_can_join_a_measurement(choice):
    config = composed("logger=none", f"+metrics/extractor@metrics.extractors.mine={choice}")
    assert list(make(config, "metrics").extractors) == ["digits", "mine"]
    refusal = (
        r"extractors=.* must have different labels" if choice == "digits" else r"extractors\.mine\.(weights|code)="
    )
    with pytest.raises(ConfigError, match=rf"^metrics\.{refusal}"):  # no published weights in this house
        make_training(config)


@pytest.mark.parametrize("choice", choices_of("logger"))
def test_every_logger_runs_a_whole_job(choice, tmp_path):
    steps = ["trainer.max_steps=1", "metrics=none", f"logger={choice}"]
    done = call("train", *NETWORK, *SHORT, *steps, "callbacks.monitor.every=1", cwd=tmp_path)
    assert done.code == 0, done.err
    run = only_run(tmp_path)
    assert '"status": "finished"' in (run / "summary.json").read_text()
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"step", "train/loss"} <= set(header)
    assert len(list(run.glob("tensorboard/events*"))) == (choice == "tensorboard")
    assert len(list(run.glob("wandb/offline-run-*"))) == (choice == "wandb")


@pytest.mark.parametrize("file", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_experiment(file, datasets, autoencoder_folder, tmp_path):
    overrides = [f"experiment={file.stem}", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true"]
    target = composed(*overrides)["datamodule"]["_target_"]
    data = next(
        name for name in choices_of("datamodule") if target == composed(f"datamodule={name}")["datamodule"]["_target_"]
    )
    adaptive = "nfe" not in composed(*overrides)["sampler"]
    more = ["sampler.rtol=0.01", "sampler.atol=0.01"] if adaptive else ["sampler.nfe=4"]
    if "SDVAE" in composed(*overrides)["codec"]["_target_"]:
        more += [f"codec.weights={autoencoder_folder}", "backbone.resolution=8"]
    runs(shrunk(composed(*overrides, *BASE, *datasets[data], *more)), tmp_path)


@pytest.mark.parametrize("choice", choices_of("backbone"))
def test_shapes_flow_from_the_datamodule(choice):
    shape = {"channels": 3, "resolution": 16, "num_classes": 7}
    config = composed(f"backbone={choice}", *(f"datamodule.{key}={value}" for key, value in shape.items()))
    assert {key: config["backbone"][key] for key in shape} == shape


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.relative_to(CONF).as_posix())
def test_files_say_what_they_are_and_never_repeat_a_shape(file):
    text = file.read_text()
    assert re.match(r"(# @package _global_\n)?# \S+ ", text), "the first line says what the choice is"
    backbone = (
        yaml.safe_load(text) if file.parent.name == "backbone" else (yaml.safe_load(text) or {}).get("backbone", {})
    )
    latents = "override /codec: sd_vae" in text  # whose shape no interpolation can make of the images'
    for key in ("num_classes",) if latents else ("channels", "resolution", "num_classes"):
        assert str(backbone.get(key, "${datamodule.")).startswith("${datamodule."), key
