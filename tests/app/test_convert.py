"""denoiselab-convert: what comes from elsewhere is a run like any other, and what goes elsewhere draws the same."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from calls import NETWORK, QUIET, SHORT, call, files_below, only_run
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file

from denoiselab.backbones.song_unet import SongUNet, edm_names
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.exchange.keys import to_theirs
from denoiselab.exchange.networks import diffusers_model, empty, names_of
from denoiselab.training.checkpoint import load_checkpoint, network_weights, newest_checkpoint

DIT = {
    "_target_": "denoiselab.backbones.dit.DiT",
    "channels": 1,
    "resolution": 8,
    "num_classes": 10,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
}
OPTIONS = "arguments={num_heads:4,resolution:8}"
SONG = {"channels": 1, "resolution": 8, "num_classes": 0, "augment_dim": 9, "width": 16, "multipliers": [1, 2]}
SONG |= {"blocks": 1, "attention_resolutions": [4], "dropout": 0.0, "time_embedding": "positional"}
SONG |= {"time_multiplier": 1, "encoder": "standard", "resample_filter": [1, 1]}


@pytest.fixture
def own_modules(tmp_path_factory, monkeypatch):
    """Where diffusers copies a pipeline's file before it imports it."""
    cache = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))


def random_state(network):
    return {name: 0.05 * torch.randn(tensor.shape) for name, tensor in network.state_dict().items()}


def write_dit(path, **changes):
    """A file with the original names of a small DiT."""
    network = empty(DIT | changes)
    state = random_state(network)
    torch.save(to_theirs(state, names_of(network, "dit")), path)
    return state


def converted(cwd, *arguments):
    done = call("convert", *arguments, cwd=cwd)
    assert done.code == 0, done.err
    assert done.err == ""
    return done.out


def drawn(cwd, *arguments):
    """The images that denoiselab-sample draws, and its record."""
    done = call("sample", "output=drawn.npz", "num_samples=10", *arguments, cwd=cwd)
    assert done.code == 0, done.err
    with np.load(cwd / "drawn.npz") as arrays:
        return arrays["images"], json.loads((cwd / "drawn.npz.json").read_text())


def state_of(run):
    return network_weights(load_checkpoint(newest_checkpoint(run)), "raw")


# --- a run goes elsewhere ---


def test_a_pipeline_draws_what_the_run_draws(tiny_run, tmp_path, own_modules):
    out = converted(tmp_path, f"run={tiny_run}", "to=diffusers", "output=new/pipeline", "sampler=heun_t")
    assert files_below(tmp_path / "new") == [
        "pipeline",
        "pipeline/model_index.json",
        "pipeline/pipeline.py",
        "pipeline/scheduler",
        "pipeline/scheduler/scheduler_config.json",
        "pipeline/unet",
        "pipeline/unet/config.json",
        "pipeline/unet/diffusion_pytorch_model.safetensors",
    ]
    assert 'from_pretrained("new/pipeline", trust_remote_code=True)' in out
    assert "sampler=heun_t sampler/grid=uniform steps=N" in out
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "new" / "pipeline", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = NoiseSource(seed=3, index=torch.arange(10)).normal("start", (1, 8, 8))
    got = pipeline(latents=noise, class_labels=list(range(10)), output_type="pt").images
    images, _ = drawn(tmp_path, f"run={tiny_run}", "sampler=heun_t", "seed=3")
    off = np.abs(got.mul(255).round().permute(0, 2, 3, 1).numpy() - images)
    assert images.std() > 10
    assert off.max() <= 1
    assert (off > 0).mean() <= 0.001


def test_there_and_back_again(tiny_run, tmp_path):
    converted(tmp_path, f"run={tiny_run}", "to=diffusers", "output=pipeline", "weights=raw")
    out = converted(tmp_path, "source=pipeline", "output=imported/mine", "sampler=euler_t")
    assert "denoiselab-sample run=imported/mine" in out
    run = tmp_path / "imported" / "mine"
    before = network_weights(load_checkpoint(newest_checkpoint(tiny_run)), "raw")
    assert state_of(run).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(run).items())
    images, record = drawn(tmp_path, f"run={run}", "seed=1")
    assert (record["weights"], record["step"]) == ("raw", 0)
    want, _ = drawn(tmp_path, f"run={tiny_run}", "seed=1", "weights=raw", "sampler=euler_t")
    assert (images == want).all()
    assert {p.name for p in run.iterdir()} == {"checkpoints", "config.json", "command.json", "versions.json"}
    assert json.loads((run / "config.json").read_text()) == load_checkpoint(newest_checkpoint(run))["config"]
    assert "source=pipeline" in json.loads((run / "command.json").read_text())["overrides"]
    done = call("train", *NETWORK, *SHORT, *QUIET, f"init_from={run}", "trainer.max_steps=1", cwd=tmp_path)
    assert done.code == 0, done.err
    assert load_checkpoint(newest_checkpoint(only_run(tmp_path)))["global_step"] == 1


@pytest.mark.parametrize(
    ("to", "name"),
    [("torchscript", "denoiser.pt"), ("torch_export", "denoiser.pt2"), ("safetensors", "denoiser.safetensors")],
)
def test_other_forms(to, name, tiny_run, tmp_path):
    out = converted(tmp_path, f"run={tiny_run}", f"to={to}", f"output={name}")
    assert name in out
    if to == "safetensors":
        assert files_below(tmp_path) == ["denoiser.json", "denoiser.safetensors"]
        facts = json.loads((tmp_path / "denoiser.json").read_text())
        assert facts["config"] == json.loads((tiny_run / "config.json").read_text())
        assert facts["facts"]["weights"] == "ema, step 4"
        state = load_file(tmp_path / name)
        want = network_weights(load_checkpoint(newest_checkpoint(tiny_run)), "ema")
        assert all(torch.equal(state[key], want[key]) for key in want)
    else:
        assert files_below(tmp_path) == [name]
        assert "differs by" in out


def test_without_an_output_it_stays_in_the_run(tmp_path):
    call("train", *NETWORK, *SHORT, *QUIET, "trainer.max_steps=1", cwd=tmp_path)
    converted(tmp_path, "to=safetensors")
    assert files_below(only_run(tmp_path) / "exports") == ["denoiser.json", "denoiser.safetensors"]


def test_a_program_that_computes_something_else_is_not_kept(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("denoiselab.exchange.programs.difference", lambda *_: 0.1)
    done = call("convert", f"run={tiny_run}", "to=torchscript", "output=denoiser.pt", cwd=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert (
        done.err == "error: output=denoiser.pt: computes something else (off by 0.1 of the largest value); not kept\n"
    )
    assert files_below(tmp_path) == []


# --- weights from elsewhere ---


def test_a_pipeline_of_diffusers(tmp_path):
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    shape = {"sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 4}
    like_ddpm = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
    unet = UNet2DModel(**blocks, **shape, **like_ddpm, attention_head_dim=None)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipeline")
    out = converted(tmp_path, "source=pipeline")
    assert "V on DDPMCosine" in out
    run = only_run(tmp_path)
    assert run.name.endswith("_imported-pipeline")
    config = json.loads((run / "config.json").read_text())
    assert (config["datamodule"]["channels"], config["datamodule"]["resolution"]) == (3, 8)
    images, record = drawn(tmp_path, "sampler=ddim", "nfe=4")
    assert images.shape == (10, 8, 8, 3)
    assert record["nfe"] == 4


def test_a_model_without_a_scheduler_needs_an_objective(tmp_path):
    network = empty(DIT)
    diffusers_model(DIT, random_state(network)).save_pretrained(tmp_path / "model")
    before = files_below(tmp_path)
    done = call("convert", "source=model", cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("config error: source=model: has no scheduler_config.json")
    assert "objective=epsilon" in done.err
    assert files_below(tmp_path) == before
    out = converted(tmp_path, "source=model", "objective=rectified_flow", "sampler=euler_t")
    assert "Velocity on RectifiedFlow" in out
    assert "arguments={frequency_shift:0}" in out  # if the weights are of the original code
    assert drawn(tmp_path, "nfe=3")[1]["nfe"] == 3


def test_the_original_dit(tmp_path):
    state = write_dit(tmp_path / "dit.pt", learned_variance=True)
    out = converted(tmp_path, "source=dit.pt", OPTIONS)
    assert "dit.pt (dit)" in out
    assert "Epsilon on DDPMLinear" in out
    run = only_run(tmp_path)
    assert run.name.endswith("_imported-dit")
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(run).items())
    assert json.loads((run / "config.json").read_text())["objective"]["learned_variance"] is True
    images, _ = drawn(tmp_path, "sampler=ddpm", "sampler.variance=learned", "nfe=5")
    assert images.shape == (10, 8, 8, 1)


def test_edm(tmp_path):
    network = SongUNet(**SONG)
    names = edm_names(network)
    state = {f"model.{names[name]}": tensor for name, tensor in random_state(network).items()}
    state["model.enc.4x4_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    save_file(state, tmp_path / "edm.safetensors")
    assert "EDM on VarianceExploding" in converted(tmp_path, "source=edm.safetensors")
    assert drawn(tmp_path)[0].shape == (10, 8, 8, 1)


def test_latents_need_a_codec(tmp_path, autoencoder_folder):
    write_dit(tmp_path / "dit.pt", channels=4)
    done = call("convert", "source=dit.pt", OPTIONS, cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("config error: source=dit.pt: its network takes 4 channels, no pixels; choose the codec")
    assert files_below(tmp_path) == ["dit.pt"]
    converted(tmp_path, "source=dit.pt", OPTIONS, "to=safetensors", "output=dit.safetensors")
    assert files_below(tmp_path) == ["dit.json", "dit.pt", "dit.safetensors"]
    converted(tmp_path, "source=dit.pt", OPTIONS, "codec=sd_vae", f"codec.weights={autoencoder_folder}")
    assert drawn(tmp_path, "nfe=3")[0].shape == (10, 16, 16, 3)
    done = call("convert", "to=diffusers", "output=pipeline", cwd=tmp_path)
    assert (done.code, "exports networks on pixels" in done.err) == (2, True)


# --- mistakes ---


@pytest.fixture
def sources(tmp_path):
    """Files to import, some of them wrong."""
    write_dit(tmp_path / "dit.pt")
    state = torch.load(tmp_path / "dit.pt")
    more = {f"head.{i}": torch.ones(1) for i in range(9)}
    torch.save({name: tensor for name, tensor in state.items() if "qkv" not in name} | more, tmp_path / "other.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "unknown.pt")
    (tmp_path / "edm.pkl").write_bytes(b"")
    config = {**DiTTransformer2DModel(num_layers=1, num_attention_heads=1, num_embeds_ada_norm=1).config}
    (tmp_path / "geglu").mkdir()
    (tmp_path / "geglu" / "config.json").write_text(
        json.dumps(config | {"_class_name": "DiTTransformer2DModel", "activation_fn": "geglu"})
    )
    save_file({"a": torch.ones(1)}, tmp_path / "geglu" / "diffusion_pytorch_model.safetensors")
    return tmp_path


def check_refused(done, words, cwd, before):
    assert done.code == 2, done.out + done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("config error: ")
    assert done.out == ""
    assert len(done.err) < 500, "a line that nobody reads"
    for word in words:
        assert word in done.err, f"{word!r} is not in {done.err!r}"
    assert files_below(cwd) == before


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("source=missing.pt", ["source=missing.pt", "no such file or folder"]),
        ("source=edm.pkl", ["source=edm.pkl", "pickle", "state_dict()"]),
        ("source=unknown.pt", ["source=unknown.pt", "neither DiT's nor EDM's", "(a "]),
        ("source=dit.pt", ["arguments.resolution", "is missing"]),
        ("source=dit.pt arguments={resolution:8,num_heads:four}", ["arguments.num_heads=four", "an integer"]),
        (
            f"source=other.pt {OPTIONS}",
            ["source=other.pt", "4 missing (blocks.0.attn.qkv.weight", "9 unknown (head.0", "and 4 more"],
        ),
        ("source=geglu objective=epsilon", ["source=geglu", "activation_fn=geglu", "gelu-approximate"]),
        (f"source=dit.pt {OPTIONS} datamodule=fashion_mnist", ["28", "28x28"]),
        (f"source=dit.pt {OPTIONS} objective=edm sampler=heun sampler.nfe=0", ["sampler.nfe=0", "at least 1"]),
        (f"source=dit.pt {OPTIONS} to=safetensors output=x.pt", ["output=x.pt", ".safetensors"]),
        (f"source=dit.pt {OPTIONS} output=geglu", ["output=geglu", "exists already"]),
        (f"source=dit.pt {OPTIONS} runs=dit.pt", ["runs=dit.pt", "cannot make a folder"]),
        ("source=dit.pt run=x", ["source=dit.pt", "run=x", "either"]),
        ("source=dit.pt format=onnx", ["format=onnx", "one of auto, diffusers, dit, edm"]),
        ("to=diffusers", ["run=null", "no run in runs"]),
        ("", ["to=null", "must be one of diffusers, torch_export, torchscript, safetensors"]),
    ],
)
def test_mistakes(typed, words, sources):
    before = files_below(sources)
    check_refused(call("convert", *typed.split(), cwd=sources), words, sources, before)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("to=diffusers weights=slow", ["weights=slow", "ema, raw"]),
        ("to=diffusers objective=edm", ["objective=Objective", "is for imports"]),
        ("to=diffusers arguments={num_heads:4}", ["arguments", "is for imports"]),
        ("to=diffusers output=exists", ["output=exists", "exists already"]),
    ],
)
def test_mistakes_with_a_run(typed, words, tiny_run, tmp_path):
    (tmp_path / "exists").touch()
    done = call("convert", f"run={tiny_run}", *typed.split(), cwd=tmp_path)
    check_refused(done, words, tmp_path, ["exists"])
    assert "exports" not in files_below(tiny_run)


def test_what_diffusers_cannot_express(tmp_path):
    objective = ["objective=edm", "sampler=heun", "objective/time_sampling=uniform", "objective/weighting=unit"]
    call("train", *NETWORK, *SHORT, *QUIET, *objective, "trainer.max_steps=1", cwd=tmp_path)
    before = files_below(tmp_path)
    done = call("convert", "to=diffusers", cwd=tmp_path)
    words = ["to=diffusers", "edm on VarianceExploding", "epsilon, x0 and v on variance preserving paths"]
    check_refused(done, words, tmp_path, before)


def test_without_diffusers(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    done = call("convert", f"run={tiny_run}", "to=diffusers", "output=pipeline", cwd=tmp_path)
    check_refused(done, ["to=diffusers", "needs the package diffusers"], tmp_path, [])


def test_help_is_light(tmp_path):
    code = (
        "import atexit, sys\nsys.argv = ['denoiselab-convert', '--help']\n"
        "atexit.register(lambda: print([m for m in ('torch', 'diffusers', 'lightning') if m in sys.modules]))\n"
        "from denoiselab.app import convert_command\nconvert_command()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"
    assert "a .safetensors, .pt or .pth file" not in done.stdout or files_below(tmp_path) == []
