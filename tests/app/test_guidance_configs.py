"""Guidance from YAML: chains, what they need, and networks of other runs as guides."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from calls import NETWORK, QUIET, SHORT, call, composed, files_below, only_run

from denoiselab.app.build import make_parts, make_training
from denoiselab.condition import Condition
from denoiselab.diffusion.guidance import APG, Autoguidance, ClassifierFree, DynamicThreshold, Rescale
from denoiselab.runs.errors import ConfigError
from denoiselab.training.checkpoint import load_checkpoint, newest_checkpoint

BASE = ["metrics=none", "logger=none", "trainer.threads=1"]


def guided(*overrides):
    """The guided denoiser of a composed config, over a network that says nothing."""
    config = composed(*BASE, *overrides)
    parts = make_training(config)[0]
    return parts.guidance(parts.objective.denoiser(lambda x, t, condition: torch.zeros_like(x)))


def refusal(*overrides):
    """The one line that a config ends with."""
    with pytest.raises(ConfigError) as caught:
        make_training(composed(*BASE, *overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="session")
def other_run(tmp_path_factory):
    """A run with another objective on another path, and another network."""
    cwd = tmp_path_factory.mktemp("other")
    done = call("train", *NETWORK, *SHORT, *QUIET, "objective=epsilon", "backbone.blocks=1", cwd=cwd)
    assert done.code == 0, done.err
    return only_run(cwd)


# --- chains ---


def test_a_chain_wraps_as_its_file_says():
    rescaled = guided("guidance=cfg_rescale", "guidance.parts.cfg.scale=3", "guidance.parts.cfg.sigma_max=2.0")
    assert isinstance(rescaled, Rescale)
    assert (rescaled.phi, rescaled.denoiser.scale, rescaled.denoiser.sigma_max) == (0.7, 3, 2.0)
    assert (rescaled.evaluations(0.5), rescaled.evaluations(0.9)) == (2, 1)
    thresholded = guided("guidance=cfg_threshold")
    assert isinstance(thresholded, DynamicThreshold)
    assert type(thresholded.denoiser) is ClassifierFree


def test_parts_are_replaced_and_left_out_on_the_command_line():
    swapped = guided("guidance=cfg_rescale", "guidance@guidance.parts.cfg=apg")
    assert isinstance(swapped, Rescale)
    assert isinstance(swapped.denoiser, APG)
    for without in ("~guidance.parts.rescale", "guidance.parts.rescale=null"):
        assert type(guided("guidance=cfg_rescale", without)) is ClassifierFree
    longer = guided("guidance=cfg_rescale", "+guidance@guidance.parts.threshold=dynamic_threshold")
    assert [type(longer), type(longer.denoiser)] == [DynamicThreshold, Rescale]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("guidance=apg guidance.scale=0.5", ["guidance.scale=0.5: ", "at least 1"]),
        ("guidance=apg guidance.momentum=1", ["guidance.momentum=1: ", "(-1, 1)"]),
        ("guidance=apg guidance.norm_threshold=large", ["guidance.norm_threshold=large: ", "a number or null"]),
        ("guidance=cfg_pp guidance.scale=7.5", ["guidance.scale=7.5: ", "[0, 1]"]),
        ("guidance=cfg_pp sampler=heun", ["sampler.", "CFG++", "sampler=ddim"]),
        ("guidance=dynamic_threshold guidance.percentile=99.5", ["guidance.percentile=99.5: ", "(0, 1]"]),
        ("guidance=cfg_rescale guidance.parts.rescale.phi=2", ["guidance.parts.rescale.phi=2: ", "[0, 1]"]),
        ("guidance=cfg_rescale guidance.parts.cfg.scale=-1", ["guidance.parts.cfg.scale=-1: ", "at least 0"]),
        ("guidance=cfg_rescale guidance.parts.cfg.scal=1", ["guidance.parts.cfg.scal=1: ", "did you mean scale?"]),
        (
            "guidance=cfg_rescale guidance.parts.rescale=0.7",
            ["guidance.parts.rescale=0.7: ", "must be something that makes a Denoiser", "or null"],
        ),
        ("guidance=cfg_rescale ~guidance.parts.cfg", ["guidance.parts.rescale.denoiser=NetworkDenoiser: ", "cfg, apg"]),
        ("guidance=cfg_rescale ~guidance.parts", ["guidance.parts: is missing"]),
        ("guidance=cfg_rescale guidance.parts=3", ["guidance.parts=3: ", "a mapping"]),
        (
            "guidance=cfg_threshold guidance@guidance.parts.cfg=cfg_pp",
            ["guidance.parts.threshold.denoiser=CFGPlusPlus: ", "use it alone"],
        ),
        ("guidance=cfg_threshold datamodule.num_classes=0", ["guidance.parts.cfg.scale=1.5: ", "guidance=none"]),
        (
            "guidance=cfg_rescale objective.label_dropout=0",
            ["guidance.parts.cfg.scale=1.5: ", "objective.label_dropout above 0"],
        ),
        ("guidance=apg objective.label_dropout=0", ["guidance.scale=4.0: ", "objective.label_dropout above 0"]),
        ("guidance=cfg_pp guidance.scale=1.0 objective.label_dropout=0 sampler=ddim", ["guidance.scale=1.0: "]),
        ("guidance=autoguidance", ["guidance.guide=null: ", "run folder or the checkpoint file"]),
        ("guidance=autoguidance guidance.guide=missing", ["guidance.guide=missing: ", "no such file"]),
        ("guidance=autoguidance guidance.guide=3", ["guidance.guide=3: ", "text or null"]),
    ],
)
def test_a_mistake_is_named_where_it_stands(typed, words, tmp_path):
    done = call("train", "trainer.max_steps=1", *QUIET, *typed.split(), cwd=tmp_path)
    assert (done.code, done.err.count("\n"), files_below(tmp_path)) == (2, 1, []), done.err
    for word in ("config error: guidance." if "heun" not in typed else "config error: sampler.", *words):
        assert word in done.err, f"{word!r} is not in {done.err!r}"


def test_what_needs_no_labels_runs_without_them():
    for choice in (["guidance=dynamic_threshold"], ["guidance=cfg_threshold", "guidance.parts.cfg.scale=1.0"]):
        make_training(composed(*BASE, *choice, "datamodule.num_classes=0"))


# --- a second network ---


def drawn(cwd, run, *arguments):
    done = call(
        "sample", f"run={run}", "num_samples=4", "sampler=ddim", "steps=4", "output=drawn.npz", *arguments, cwd=cwd
    )
    assert done.code == 0, done.err
    with np.load(cwd / "drawn.npz") as arrays:
        return arrays["images"].astype(int), json.loads((cwd / "drawn.npz.json").read_text())


def test_samples_of_a_run_guided_by_another(tiny_run, other_run, tmp_path):
    plain, record = drawn(tmp_path, tiny_run)
    assert record["nfe"] == 4
    auto = ["guidance=autoguidance", f"guidance.guide={other_run}"]
    images, record = drawn(tmp_path, tiny_run, *auto)
    assert record["nfe"] == 7  # its path does not reach the pure noise of the first step
    assert record["guidance"]["guide"] == str(other_run)
    assert np.abs(images - plain).max() > 5
    raw, _ = drawn(tmp_path, tiny_run, *auto, "guidance.guide_weights=raw")
    assert (raw != images).any()
    one, record = drawn(tmp_path, tiny_run, *auto, "guidance.scale=1.0")
    assert record["nfe"] == 4
    assert (one == plain).all()


def test_a_network_that_guides_itself_changes_nothing(tiny_run, tmp_path):
    plain, _ = drawn(tmp_path, tiny_run)
    checkpoint = newest_checkpoint(tiny_run)
    images, _ = drawn(tmp_path, tiny_run, "guidance=autoguidance", f"guidance.guide={checkpoint}", "guidance.scale=3.0")
    assert np.abs(images - plain).max() <= 1


def test_the_guide_is_the_averaged_frozen_network_of_its_run(other_run):
    config = composed(*BASE, "guidance=autoguidance", f"guidance.guide={other_run}")
    parts = make_parts(config)
    denoiser = parts.guidance(parts.objective.denoiser(lambda x, t, condition: torch.zeros_like(x)))
    assert isinstance(denoiser, Autoguidance)
    network = denoiser.guide.network.network
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    averages = load_checkpoint(newest_checkpoint(other_run))["ema"]["ema"]
    for key, parameter in network.named_parameters():
        assert torch.equal(parameter, averages[key]), key
    assert type(denoiser.guide.path) is not type(denoiser.path)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    said = denoiser(x, t, Condition(label=torch.tensor([0, -1])))
    torch.testing.assert_close(0.5 * said.x0 + 0.5 * said.eps, x)


def test_a_guide_inside_a_chain(other_run):
    chained = guided(
        "guidance=cfg_rescale", "guidance@guidance.parts.cfg=autoguidance", f"guidance.parts.cfg.guide={other_run}"
    )
    assert isinstance(chained, Rescale)
    assert isinstance(chained.denoiser, Autoguidance)
    line = refusal(
        "guidance=cfg_rescale", "guidance@guidance.parts.cfg=autoguidance", "guidance.parts.cfg.guide=missing"
    )
    assert line.startswith("guidance.parts.cfg.guide=missing: ")


def test_training_with_a_guide_keeps_it_out_of_the_checkpoint(other_run, tmp_path):
    auto = ["guidance=autoguidance", f"guidance.guide={other_run}", "callbacks.pictures.every=1", "trainer.max_steps=1"]
    done = call("train", *NETWORK, *SHORT, *QUIET, *auto, cwd=tmp_path)
    assert done.code == 0, done.err
    run = only_run(tmp_path)
    assert [name for name in files_below(run) if name.startswith("samples/")]
    loaded = load_checkpoint(newest_checkpoint(run))
    assert loaded["config"]["guidance"]["guide"] == str(other_run)
    ours = {f"network.{key}" for key in loaded["ema"]["ema"]}
    assert {key for key in loaded["state_dict"] if "guid" in key} == set()
    assert ours <= set(loaded["state_dict"])


def test_a_guide_must_fit(other_run, tiny_run, tmp_path):
    auto = ["guidance=autoguidance", f"guidance.guide={other_run}"]
    assert refusal(*auto, "guidance.guide_weights=slow") == "guidance.guide_weights=slow: the checkpoint has ema, raw"
    line = refusal(
        *auto, "datamodule=image_folder", "datamodule.root=.", "datamodule.resolution=8", "datamodule.num_classes=10"
    )
    assert line.startswith(f"guidance.guide={other_run}: its network does not fit: backbone.channels=1: the data has 3")
    (tmp_path / "no.ckpt").write_bytes(b"no checkpoint")
    line = refusal("guidance=autoguidance", f"guidance.guide={tmp_path / 'no.ckpt'}")
    assert "plain data" in line
    loaded = load_checkpoint(newest_checkpoint(other_run))
    loaded["state_dict"].popitem()
    torch.save(loaded, tmp_path / "less.ckpt")
    less = refusal("guidance=autoguidance", f"guidance.guide={tmp_path / 'less.ckpt'}", "guidance.guide_weights=raw")
    assert "does not fit its own config" in less


@pytest.mark.parametrize("part", ["backbone", "optimizer"])
def test_a_foreign_guide_runs_none_of_its_code(part, other_run, tiny_run, tmp_path):
    loaded = load_checkpoint(newest_checkpoint(other_run))
    loaded["config"][part] = {"_target_": "os.system", "command": "touch harmed"}
    torch.save(loaded, tmp_path / "foreign.ckpt")
    auto = ["guidance=autoguidance", "guidance.guide=foreign.ckpt"]
    for command, arguments in (("sample", [f"run={tiny_run}"]), ("train", [*NETWORK, *SHORT, *QUIET])):
        done = call(command, *arguments, *auto, cwd=tmp_path)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert done.err.startswith(
            f"config error: guidance.guide=foreign.ckpt: its network does not fit: {part}._target_=os."
        )
        assert files_below(tmp_path) == ["foreign.ckpt"]


def test_a_guide_is_pinned_by_its_digest(other_run, tiny_run, tmp_path):
    auto = ["guidance=autoguidance", f"guidance.guide={other_run}"]
    _, record = drawn(tmp_path, tiny_run, *auto)
    digest = record["guidance"]["guide_sha256"]
    assert len(digest) == 64
    _, raw = drawn(tmp_path, tiny_run, *auto, "guidance.guide_weights=raw")
    assert raw["guidance"]["guide_sha256"] != digest
    assert refusal(*auto, f"guidance.guide_sha256={'0' * 64}").endswith(f"the weights of {other_run} have {digest}")
