"""Mistakes end as one line that names the key, the value and what is allowed, with exit code 2, before anything is made."""

from __future__ import annotations

import os

import pytest
import torch
from calls import QUIET, call, files_below, run_script


def check_refused(done, words, cwd, before=()):
    assert done.code == 2, done.out + done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("config error: ")
    assert done.out == ""
    for word in words:
        assert word in done.err, f"{word!r} is not in {done.err!r}"
    assert len(done.err) < 500, "a line that nobody reads"
    assert files_below(cwd) == list(before)


# What is typed, and what the line must hold: the key and value as typed where they stand alone, and a word of what is
# allowed.
TRAIN = {
    "unknown keys": [
        ("nme=x", ["nme=x", "no such key", "did you mean name?"]),
        ("optimizer.rate=1", ["optimizer.rate=1", "no such key", "lr"]),
        ("backbone.widht=3", ["backbone.widht=3", "did you mean width?"]),
        ("+backbone.widht=3", ["backbone.widht=3", "did you mean width?"]),
        ("objective/path=cosine +objective.path.beta=1", ["objective.path.beta=1", "t_max"]),
        ("logger=csv +logger.mode=offline", ["logger.mode=offline", "no such key"]),
    ],
    "unknown groups and choices": [
        ("flavour=vanilla", ["flavour=vanilla", "no such key", "sampler"]),
        ("gidance=cfg", ["gidance=cfg", "did you mean guidance?"]),
        ("sampler=dopri9", ["sampler=dopri9", "heun", "dpmpp_2m"]),
        ("objective/prediction=scores", ["objective/prediction=scores", "velocity"]),
        ("sampler/grid=cosinus", ["sampler/grid=cosinus", "log_snr"]),
        ("experiment=nothing", ["experiment=nothing", "digits_guided"]),
        ("sampler=null", ["sampler=null", "must be"]),
        ("~optimizer", ["optimizer", "must be"]),
    ],
    "wrong types": [
        ("optimizer.lr=abc", ["optimizer.lr=abc", "a number"]),
        ("optimizer.betas=0.9", ["optimizer.betas=0.9", "a list of numbers"]),
        ("datamodule.batch_size=2.5", ["datamodule.batch_size=2.5", "an integer"]),
        ("datamodule.resolution=large", ["datamodule.resolution=large", "an integer or a list of integers"]),
        ("trainer.max_steps=many", ["trainer.max_steps=many", "an integer"]),
        ("trainer.devices=two", ["trainer.devices=two", "an integer or auto"]),
        ("trainer.precision=fp8", ["trainer.precision=fp8", "bf16-mixed"]),
        ("logger=wandb logger.mode=sometimes", ["logger.mode=sometimes", "offline"]),
        ("logger=wandb logger.images=-1", ["logger.images=-1", "at least 0"]),
        ("seed=true", ["seed=true", "an integer"]),
        ("compile=3", ["compile=3", "true or false"]),
        ("name=3", ["name=3", "text or null"]),
        ("runs=null", ["runs=null", "text"]),
        ("objective.prediction=epsilon", ["objective.prediction=epsilon", "objective/prediction=epsilon"]),
        ("sampler.grid=karras", ["sampler.grid=karras", "sampler/grid=karras"]),
        ("~datamodule.batch_size", ["datamodule.batch_size", "is missing"]),
    ],
    "out of range": [
        ("datamodule.batch_size=0", ["datamodule.batch_size=0", "at least 1"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1", "at least 0"]),
        ("optimizer.betas=[0.9,1.5]", ["optimizer.betas=[0.9, 1.5]", "[0, 1)"]),
        ("ema.decays.ema=1.5", ["ema.decays.ema=1.5", "[0, 1)"]),
        ("+ema.decays.slow=2", ["ema.decays.slow=2", "[0, 1)"]),
        ("sampler.nfe=0", ["sampler.nfe=0", "at least 1"]),
        ("sampler=ddim sampler.eta=2", ["sampler.eta=2", "[0, 1]"]),
        ("objective.label_dropout=1.0", ["objective.label_dropout=1.0", "[0, 1)"]),
        ("objective.path.t_max=2", ["objective.path.t_max=2", "at most 1"]),
        ("schedule.warmup_steps=-1", ["schedule.warmup_steps=-1", "at least 0"]),
        ("trainer.accumulate=0", ["trainer.accumulate=0", "at least 1"]),
        ("trainer.max_steps=0", ["trainer.max_steps=0", "at least 1"]),
        ("trainer.gradient_clip=0", ["trainer.gradient_clip=0", "positive"]),
        ("callbacks.pictures.rows=0", ["callbacks.pictures.rows=0", "at least 1"]),
        ("callbacks.checkpoints.keep=1", ["callbacks.checkpoints.keep=1", "at least 2"]),
        ("metrics.counts=[2]", ["metrics.counts=[2]", "at least 4"]),
        ("guidance=cfg guidance.scale=-1", ["guidance.scale=-1", "at least 0"]),
        ("seed=-1", ["seed=-1", "0 to 2^63"]),
        ("name=a/b", ["name=a/b", "letters"]),
    ],
    "what does not fit together": [
        ("objective=rectified_flow objective/prediction=epsilon", ["prediction=epsilon", "t=1", "t_max=0.999"]),
        (
            "sampler/grid=log_snr sampler.grid.sigma_max=null",
            ["sampler.grid=LogSNR", "pure noise", "sampler/grid=uniform"],
        ),
        ("sampler/grid=karras sampler.grid.sigma_max=null", ["sampler.grid=Karras", "pure noise", "sigma_max=80"]),
        ("sampler/grid=karras sampler.grid.sigma_min=99", ["sampler.grid.sigma_min=99", "below sigma_max=80"]),
        ("+lr=0.5", ["lr=0.5", "no such key"]),
        ("+datamodul.batch_size=3", ["datamodul=", "no such key"]),
        ("backbone.resolution=16", ["backbone.resolution=16", "the data has 8x8"]),
        ("backbone.learned_variance=true", ["backbone.learned_variance=true", "the objective has false"]),
        ("sampler=ddpm sampler.variance=learned", ["variance=learned", "objective.learned_variance"]),
        ("sampler=heun guidance=cfg_pp", ["Heun", "sampler=ddim"]),
        ("sampler=dopri5 guidance=apg guidance.scale=2", ["DormandPrince", "guidance.momentum=0"]),
        ("objective=edm", ["grid=Uniform", "sampler=heun"]),
        ("objective/path=laplace", ["grid=Uniform", "sampler=heun"]),
        (
            "objective=flow_matching_ot objective.coupling.group_size=7",
            ["objective.coupling.group_size=7", "64 samples"],
        ),
        ("augmentation=edm", ["augmentation.dim=9", "told 0 numbers"]),
        ("codec=sd_vae", ["codec.weights=null"]),
        ("metrics=bits_per_dim", ["metrics=bits_per_dim", "evaluate.py"]),
        ("backbone=dit backbone.patch_size=3", ["backbone.patch_size=3", "divide the resolution 8x8"]),
        ("datamodule.resolution=9", ["backbone.resolution=9", "divisible by 2"]),
        ("backbone=dit backbone.num_heads=3", ["backbone.hidden_size=128", "num_heads=3"]),
        ("backbone.attention_resolutions=[5]", ["backbone.attention_resolutions=[5]", "[8, 4]"]),
        ("backbone.channels=3", ["backbone.channels=3", "the data has 1"]),
        ("backbone.num_classes=10 datamodule.num_classes=0", ["backbone.num_classes=10", "the data has 0"]),
        ("backbone=dit datamodule.channels=3", ["datamodule.channels=3", "have 1"]),
        ("guidance=cfg datamodule.num_classes=0", ["guidance.scale=1.5", "no class labels", "guidance=none"]),
        ("guidance=cfg objective.label_dropout=0", ["guidance.scale=1.5", "label_dropout above 0"]),
        ("guidance=cfg sampler.nfe=1", ["sampler.nfe=1", "one step"]),
        ("datamodule.batch_size=10 trainer.accumulate=4", ["datamodule.batch_size=10", "divisible", "4"]),
        ("sampler.steps=5", ["nfe=20", "steps=5", "either"]),
        ("sampler.nfe=null", ["sampler.nfe=null", "either nfe or steps"]),
        ("metrics=digits metrics.counts=[]", ["metrics.counts=[]", "one or more"]),
        ("datamodule=image_folder", ["datamodule.root=null", "folder"]),
        ("init_from=missing", ["init_from=missing", "no such"]),
    ],
    "what cannot be read": [
        ("optimizer.lr", ["optimizer.lr", "key=value"]),
        ("optimizer.lr=[1", ["optimizer.lr=[1", "key=value"]),
        ("sampler=heun,ddim", ["sampler=heun,ddim", "-m"]),
        ("optimizer.lr=${nothing}", ["optimizer.lr", "nothing"]),
        ("optimizer._target_=torch.optim.Adamm", ["optimizer._target_=torch.optim.Adamm", "Adamm"]),
        ("optimizer._target_=Adam", ["optimizer._target_=Adam", "full name"]),
    ],
}


@pytest.mark.parametrize(("typed", "words"), [case for cases in TRAIN.values() for case in cases], ids=lambda v: str(v))
def test_train(typed, words, tmp_path):
    short = "trainer.max_steps=1"  # what is not refused shall at least not train for minutes
    check_refused(call("train", short, *typed.split(), cwd=tmp_path), words, tmp_path)


def test_a_gpu_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["trainer.accelerator=gpu", "no GPU", "trainer=cpu"]
    check_refused(call("train", "trainer=gpu", cwd=tmp_path), words, tmp_path)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("datamodule.root=/nowhere", ["datamodule.root=/nowhere", "no such folder"]),
        ("guidance=cfg", ["guidance.scale=1.5", "no class labels"]),
        ("datamodule.num_classes=3", ["datamodule.num_classes=3", "has 0 class folders"]),
        ("datamodule.channels=2", ["datamodule.channels=2", "1 (grey) or 3 (RGB)"]),
        ("metrics=digits", ["datamodule.channels=3", "grey", "metrics=none"]),
        ("metrics=digits datamodule.channels=1", ["datamodule.resolution=16", "takes 8", "metrics=none"]),
    ],
)
def test_image_folder(typed, words, tmp_path, image_folder):
    folder = [f"datamodule.root={image_folder}", "datamodule.resolution=16", "backbone=dit"]
    done = call("train", "datamodule=image_folder", *folder, *QUIET, *typed.split(), cwd=tmp_path)
    check_refused(done, words, tmp_path)


def test_a_broken_image_is_named(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "broken.png").write_bytes(b"no image")
    folder = [f"datamodule.root={images}", "datamodule.resolution=16", "backbone=dit"]
    done = call("train", "datamodule=image_folder", *folder, *QUIET, cwd=tmp_path)
    check_refused(done, ["broken.png", "on_corrupt=skip"], tmp_path, before=files_below(tmp_path))


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("run=missing", ["run=missing", "no such folder"]),
        ("checkpoint=missing.ckpt", ["checkpoint=missing.ckpt", "no such file"]),
        ("", ["run=null", "no run in runs"]),
        ("smapler=heun", ["smapler=heun", "no such key"]),
        ("sampler=dopri9", ["sampler=dopri9", "heun"]),
        ("sampler.nfe=9", ["sampler.nfe=9", "the run's own sampler", "sampler=<name>"]),
        ("seed=abc", ["seed=abc", "an integer"]),
    ],
)
def test_sample_and_evaluate_without_a_run(command, typed, words, tmp_path):
    check_refused(call(command, *typed.split(), cwd=tmp_path), words, tmp_path)


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("weights=unknown", ["weights=unknown", "ema, raw"]),
        ("device=tpu", ["device=tpu", "auto, cpu, cuda"]),
        ("nfe=5 steps=5", ["nfe=5", "steps=5", "either"]),
        ("nfe=0", ["nfe=0", "at least 1"]),
        ("steps=2.5", ["steps=2.5", "an integer"]),
        ("batch_size=0", ["batch_size=0", "at least 1"]),
        ("seed=-1", ["seed=-1", "0 to 2^63"]),
        ("sampler=ddim sampler.eta=2", ["sampler.eta=2", "[0, 1]"]),
        ("guidance=cfg guidance.scale=-1", ["guidance.scale=-1", "at least 0"]),
        ("trust=mine", ["trust=mine", "a list of text"]),
    ],
)
def test_sample_and_evaluate_with_a_run(command, typed, words, tmp_path, tiny_run):
    before = files_below(tiny_run)
    check_refused(call(command, f"run={tiny_run}", *typed.split(), cwd=tmp_path), words, tmp_path)
    assert files_below(tiny_run) == before


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("output=x.jpg", ["output=x.jpg", ".npz", ".png"]),
        ("class=12", ["class=[12]", "0 to 9"]),
        ("class=seven", ["class=seven", "an integer or a list of integers"]),
        ("num_samples=0", ["num_samples=0", "at least 1"]),
    ],
)
def test_sample(typed, words, tmp_path, tiny_run):
    check_refused(call("sample", f"run={tiny_run}", *typed.split(), cwd=tmp_path), words, tmp_path)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("images=missing", ["datamodule=null", "datamodule=digits"]),
        ("images=missing datamodule=digits", ["metrics=null", "metrics=digits"]),
        ("images=missing datamodule=digits metrics=digits", ["images=missing", "no folder with npz or PNG files"]),
        ("images=missing datamodule=digits metrics=none", ["metrics=none", "metrics=digits"]),
        ("images=missing datamodule=digits metrics=digits metrics.counts=[x]", ["metrics.counts=['x']", "a list of"]),
    ],
)
def test_evaluate(typed, words, tmp_path):
    check_refused(call("evaluate", *typed.split(), cwd=tmp_path), words, tmp_path)


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "no.ckpt").write_bytes(b"no checkpoint")
    for command, key in (("sample", "checkpoint"), ("evaluate", "checkpoint"), ("train", "init_from")):
        done = call(command, f"{key}=no.ckpt", cwd=tmp_path)
        check_refused(done, [f"{key}=no.ckpt", "plain data"], tmp_path, before=["no.ckpt"])


def test_weights_to_start_from_must_exist_and_fit(tmp_path, tiny_run):
    start = f"init_from={tiny_run}"
    done = call("train", start, "backbone.width=8", "init_weights=slow", cwd=tmp_path)
    check_refused(done, ["init_weights=slow", "ema, raw"], tmp_path)
    done = call("train", start, "backbone=dit", cwd=tmp_path)
    check_refused(done, [start, "the network differs"], tmp_path)


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    for command in ("sample", "evaluate"):
        check_refused(
            call(command, "run=empty", cwd=tmp_path), ["run=empty", "no checkpoint"], tmp_path, before=["empty"]
        )


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        ("train", "run"),
        ("train", "resume=auto run"),
        ("train", "resume"),
        ("train", "init_from"),
        ("train", "datamodule=image_folder datamodule.resolution=8 datamodule.root"),
        ("sample", "run"),
        ("evaluate", "checkpoint"),
        ("replay", "run"),
        ("sweep", "action=status folder"),
    ],
)
def test_a_name_that_is_too_long_for_a_file(command, typed, tmp_path):
    words = f"{typed}={'x' * 300}".split()
    done = call(command, *words, *(QUIET if command == "train" else []), cwd=tmp_path)
    check_refused(done, [words[-1]], tmp_path)


def test_runs_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    done = call("train", "runs=file", cwd=tmp_path)
    check_refused(done, ["runs=file", "cannot make a folder"], tmp_path, before=["file"])


def test_a_mistake_in_a_multirun(tmp_path):
    done = call("train", "-m", "optimizer.lr=-1,-2", *QUIET, cwd=tmp_path)
    check_refused(done, ["optimizer.lr=-1", "at least 0"], tmp_path)
    done = call("train", "-m", "objective=epsilon,nothing", *QUIET, cwd=tmp_path)
    check_refused(done, ["objective=nothing", "rectified_flow"], tmp_path)
    done = call("train", "-m", "optimizer.lr=1e-3,${nothing}", *QUIET, cwd=tmp_path)
    check_refused(done, ["nothing"], tmp_path)


@pytest.mark.parametrize(
    ("command", "typed", "words"),
    [
        ("train", "backbone=resnet", ["backbone=resnet", "dit", "unet"]),
        ("train", "datamodule.batch_size=0", ["datamodule.batch_size=0", "at least 1"]),
        pytest.param("sample", "run=missing", ["run=missing", "no such folder"], marks=pytest.mark.slow),
    ],
)
def test_as_a_process_of_its_own(command, typed, words, tmp_path):
    check_refused(run_script(command, typed, cwd=tmp_path), words, tmp_path)


def test_a_traceback_for_those_who_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = call("train", "seed=-1", cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("Traceback")
    assert done.err.splitlines()[-1].startswith("config error: seed=-1: ")


def test_a_mistake_leaves_the_environment_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = dict(os.environ)
    assert call("train", "seed=-1", cwd=tmp_path).code == 2
    assert dict(os.environ) == before
