"""Imported networks compute what the networks of the other project compute."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from elsewhere import DIT, UNET, built, node_of, original_dit, perturbed, same_embedders

from denoiselab.backbones.dit import DiT
from denoiselab.backbones.song_unet import SongUNet, edm_names
from denoiselab.backbones.unet import UNet
from denoiselab.condition import Condition
from denoiselab.exchange import dit, unet
from denoiselab.exchange.files import Source, read
from denoiselab.exchange.networks import diffusers_model, import_network

GOLDENS = Path(__file__).parents[1] / "goldens"

DDPM_CIFAR10 = {  # google/ddpm-cifar10-32
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
NARROW = DDPM_CIFAR10 | {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 4, "sample_size": [16, 24]}


def assert_same(ours, theirs, x, t, label, rows):
    """Both networks at three times, the label −1 being theirs of the number `rows`.

    What float32 rounds away in a sum over many terms goes by the largest ones, not by what is left of them.
    """
    with torch.no_grad():
        got = ours(x, t, Condition(label=label))
        want = theirs(x, t, class_labels=None if label is None else label.where(label >= 0, rows)).sample
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def filled(imported, kind):
    network = kind(**{key: value for key, value in imported.backbone.items() if key != "_target_"})
    network.load_state_dict(imported.state)
    return network.eval()


def old_names(state):
    """As google/ddpm-cifar10-32 names its attention layers."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {re.sub(rf"\.{new}\.", f".{old}.", name): tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize("age", ["new", "old"])
def test_ddpm_cifar10(age, tmp_path):
    theirs = perturbed(UNet2DModel(**DDPM_CIFAR10), 0.02)
    theirs.save_pretrained(tmp_path)
    if age == "old":
        torch.save(old_names(theirs.state_dict()), tmp_path / "diffusion_pytorch_model.bin")
        (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
        (tmp_path / "config.json").write_text(json.dumps(DDPM_CIFAR10 | {"_class_name": "UNet2DModel"}))
    imported = import_network(read(tmp_path))
    assert (imported.format, imported.notes) == ("diffusers", [])
    ours = filled(imported, UNet)
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    assert_same(ours, theirs, torch.randn(2, 3, 32, 32), torch.tensor([0, 850]), None, None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"resolution": [16, 24], "attention_resolutions": [12], "head_channels": None, "num_classes": 0}),
        ({"attention_head_dim": 8, "dropout": 0.1}, {"head_channels": 8, "dropout": 0.1}),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}, {"scale_shift": True}),
        ({"num_class_embeds": 6}, {"num_classes": 5}),
        ({"out_channels": 6}, {"channels": 3, "learned_variance": True}),
        (
            {"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4, "time_embedding_dim": 64},
            {"attention_resolutions": []},
        ),
    ],
)
def test_variants_of_the_unet(change, expected):
    config = NARROW | change
    theirs = perturbed(UNet2DModel(**config), 0.1)
    source = Source(theirs.state_dict(), {"_class_name": "UNet2DModel", **config})
    imported = import_network(source)
    assert imported.backbone | expected == imported.backbone
    rows = imported.backbone["num_classes"]
    label = torch.tensor([0, -1, 4]) if rows else None
    assert bool(imported.notes) == bool(rows)
    assert_same(filled(imported, UNet), theirs, torch.randn(3, 3, 16, 24), torch.tensor([0.0, 7.5, 850]), label, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample_padding": 1}, "downsample_padding=1: our network has 0 there"),
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos=True: our network has False there"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05: our network has 1e-06 there"),
        ({"downsample_type": "resnet"}, "downsample_type=resnet: our network has conv there"),
        ({"norm_num_groups": 8}, "norm_num_groups=8: our network has 4 there"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups=8: our network has 4 there"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None: our network has 4 there"),
        ({"block_out_channels": [16, 24]}, "block_out_channels=[16, 24]: our UNet has multiples of the first"),
        ({"time_embedding_dim": 32}, "time_embedding_dim=32: our UNet has 64"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier: our network has positional there"),
        (
            {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]},
            "down_block_types=['SkipDownBlock2D'",
        ),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types=['UpBlock2D'"),
        ({"sample_size": None}, "sample_size=null: must be known"),
        ({"out_channels": 4}, "out_channels=4: must be in_channels=3, or twice that"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name=UNet2DConditionModel: must be UNet2DModel or DiT"),
    ],
)
def test_a_unet_that_ours_cannot_express(change, message):
    config = {"_class_name": "UNet2DModel"} | NARROW | change
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        import_network(Source({}, config))


@pytest.mark.parametrize(("room", "theirs"), [(unet, UNet2DModel), (dit, DiTTransformer2DModel)])
def test_what_a_config_leaves_out_is_what_it_is_there(room, theirs):
    signature = inspect.signature(theirs.__init__).parameters
    assert {key: signature[key].default for key in room.DEFAULTS} == room.DEFAULTS
    assert room.FIXED.keys() <= room.DEFAULTS.keys()


@pytest.fixture(scope="module")
def dit_xl_2():
    """A transformer in the shape of DiT-XL/2, but of two blocks."""
    torch.manual_seed(0)
    return same_embedders(perturbed(DiTTransformer2DModel(num_layers=2, out_channels=8), 0.02))


def set_shift(transformer, shift):
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift


@pytest.mark.parametrize("names", ["diffusers", "diffusers, of the original code", "original"])
def test_dit_xl_2(names, dit_xl_2, tmp_path):
    shift = int(names == "diffusers")
    if names == "original":
        state = original_dit(dit_xl_2.state_dict(), depth=2)
        state["pos_embed"] = dit_xl_2.pos_embed.pos_embed
        torch.save(state, tmp_path / "DiT-XL-2-256x256.pt")
        imported = import_network(read(tmp_path / "DiT-XL-2-256x256.pt"))
        assert (imported.format, imported.notes) == ("dit", [])
    else:
        config = {**dit_xl_2.config, "_class_name": "DiTTransformer2DModel"}
        given = {} if shift else {"frequency_shift": 0}
        imported = import_network(Source(dit_xl_2.state_dict(), config), arguments=given)
        assert imported.notes == ([dit.NOTE] if shift else [])
    expected = {"hidden_size": 1152, "num_heads": 16, "depth": 2, "patch_size": 2, "channels": 4, "resolution": 32}
    expected |= {"num_classes": 1000, "mlp_ratio": 4.0, "learned_variance": True}
    expected |= {} if names == "original" else {"frequency_shift": shift}
    assert imported.backbone == {"_target_": "denoiselab.backbones.dit.DiT", **expected}
    set_shift(dit_xl_2, shift)
    x, label = torch.randn(3, 4, 32, 32), torch.tensor([0, 999, -1])
    assert_same(filled(imported, DiT), dit_xl_2, x, torch.tensor([0, 7, 850]), label, 1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": False}, "attention_bias=False: our network has True there"),
        ({"norm_eps": 1e-3}, "norm_eps=0.001: our network has 1e-06 there"),
        ({"num_layers": "2"}, "arguments.depth=2: must be an integer"),
        ({"num_attention_heads": None}, "config.json or tensors hold what no such network has (TypeError: "),
        ({"activation_fn": "geglu"}, "activation_fn=geglu: our network has gelu-approximate there"),
        ({"out_channels": 3}, "out_channels=3: must be in_channels=4, or twice that"),
        (
            {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"},
            "_class_name=Transformer2DModel: must be UNet2DModel or DiTTransformer2DModel",
        ),
    ],
)
def test_a_transformer_that_ours_cannot_express(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        import_network(Source({}, {"_class_name": "DiTTransformer2DModel"} | change))


def small_original():
    network = built(node_of(DiT))
    return original_dit(diffusers_model(node_of(DiT), network.state_dict()).state_dict(), depth=2), network


def test_the_original_names_of_a_size_that_is_not_published():
    state, network = small_original()
    with pytest.raises(ValueError, match=r"^arguments.resolution: is missing"):
        import_network(Source(state))
    with pytest.raises(ValueError, match=r"^arguments.num_heads: is missing"):
        import_network(Source(state), arguments={"resolution": 8})
    with pytest.raises(ValueError, match=r"^arguments.heads=4: no such key"):
        import_network(Source(state), arguments={"resolution": 8, "heads": 4})
    imported = import_network(Source(state), arguments={"resolution": 8, "num_heads": 4})
    assert imported.backbone == node_of(DiT)
    assert all(torch.equal(imported.state[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("side", [64, 2**40, 2**62])
def test_positions_are_made_for_a_file_that_has_them(side, monkeypatch):
    places = []
    made = dit.positions

    def positions(ours):
        places.append(torch.empty(0).device.type)
        return made(ours)

    monkeypatch.setattr(dit, "positions", positions)
    config = {"_class_name": "DiTTransformer2DModel", "sample_size": side, "num_layers": 1}
    with pytest.raises(ValueError, match=r"^keys: 25 missing|^config.json or tensors hold what no such network has"):
        import_network(Source({dit.DIFFUSERS_POSITIONS: torch.zeros(1)}, config))
    assert "cpu" not in places


def test_sides_of_nothing_are_refused():
    edm = {
        "enc.8x8_block0.conv1.weight": (0, 1, 3, 3),
        "enc.8x8_conv.weight": (0, 1, 3, 3),
        "dec.8x8_aux_conv.weight": (1, 1),
        "map_layer0.weight": (1, 1),
    }
    original = {
        "x_embedder.proj.weight": (0, 1, 0, 0),
        "final_layer.linear.weight": (1, 1),
        "blocks.0.mlp.fc1.weight": (1, 1),
    }
    nothing_wide = Source({}, {"_class_name": "UNet2DModel", **unet.FIXED, "block_out_channels": [0, 0]})
    tensors = [Source({n: torch.zeros(shape) for n, shape in shapes.items()}) for shapes in (edm, original)]
    for source in (nothing_wide, *tensors):
        with pytest.raises(ValueError, match=r"^config.json or tensors hold .+ has \(ZeroDivisionError: [a-z ]+\)$"):
            import_network(source)


def test_a_depth_that_a_config_claims_is_refused_before_it_is_made():
    state = {dit.LABELS.format(0): torch.zeros(2, 4)}
    config = {"_class_name": "DiTTransformer2DModel", "num_layers": 10**15, "num_embeds_ada_norm": 1}
    with pytest.raises(ValueError, match="^depth=1000000000000000: must be at most 300$"):
        import_network(Source(state, config))


def test_other_positions_are_refused():
    state, _ = small_original()
    state["pos_embed"] = torch.zeros(1, 16, 32)
    with pytest.raises(ValueError, match=r"1 that should be equal to others and are not \(pos_embed\)"):
        import_network(Source(state), arguments={"num_heads": 4})


def test_missing_and_unknown_names_are_listed():
    state, _ = small_original()
    arguments = {"resolution": 8, "num_heads": 4}
    del state["blocks.0.attn.qkv.bias"], state["t_embedder.mlp.2.weight"]
    state["head.weight"] = torch.ones(1)
    message = r"^keys: 2 missing \(t_embedder.mlp.2.weight, blocks.0.attn.qkv.bias\); 1 unknown \(head.weight\)$"
    with pytest.raises(ValueError, match=message):
        import_network(Source(state), arguments=arguments)
    del state["x_embedder.proj.weight"]
    with pytest.raises(ValueError, match=r"^keys: 1 missing \(x_embedder.proj.weight\)$"):
        import_network(Source(state), "dit", arguments)
    with pytest.raises(ValueError, match=r"^the names are neither DiT's nor EDM's"):
        import_network(Source(state))


def test_blocks_with_embedders_of_their_own_are_refused():
    theirs = DiTTransformer2DModel(**dit.to_diffusers(DIT))
    with pytest.raises(
        ValueError, match=r"\d+ that should be equal to others and are not \(transformer_blocks.1.norm1"
    ):
        import_network(Source(theirs.state_dict(), {"_class_name": dit.CLASS, **theirs.config}))


SONG = {
    "channels": 1,
    "resolution": 8,
    "num_classes": 3,
    "augment_dim": 9,
    "width": 16,
    "multipliers": [1, 2],
    "blocks": 2,
    "attention_resolutions": [4],
    "dropout": 0.0,
    "time_embedding": "positional",
    "time_multiplier": 1,
    "encoder": "standard",
    "resample_filter": [1, 1],
    "learned_variance": False,
}
NCSNPP = {"time_embedding": "fourier", "time_multiplier": 2, "encoder": "residual", "resample_filter": [1, 3, 3, 1]}


def edm_state(network, taps, prefix):
    """EDM's state dict of a network of ours, with the buffers of its resampling layers."""
    names = edm_names(network)
    state = {prefix + names[name]: tensor for name, tensor in network.state_dict().items()}
    line = torch.tensor(taps) / sum(taps)
    return state | {f"{prefix}enc.4x4_down.conv0.resample_filter": torch.outer(line, line)[None, None]}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("change", [{}, NCSNPP, {"num_classes": 0, "augment_dim": 0, "learned_variance": True}])
def test_edm(change, prefix):
    settings = SONG | change
    network = perturbed(SongUNet(**settings))
    state = edm_state(network, settings["resample_filter"], prefix)
    imported = import_network(Source(state))
    assert imported.format == "edm"
    assert imported.backbone == {"_target_": "denoiselab.backbones.song_unet.SongUNet", **settings}
    assert all(torch.equal(imported.state[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp"])
def test_the_published_networks_of_edm(architecture):
    shapes = json.loads((GOLDENS / "song_unet.json").read_text())["shapes"][architecture]
    line = torch.tensor([0.5, 0.5] if architecture == "ddpmpp" else [0.125, 0.375, 0.375, 0.125])
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    state |= {name: torch.outer(line, line)[None, None] for name in shapes if name.endswith(".resample_filter")}
    imported = import_network(Source(state))
    expected = {"width": 128, "multipliers": [2, 2, 2], "blocks": 4, "attention_resolutions": [16], "resolution": 32}
    assert imported.backbone | expected == imported.backbone


def test_edm_with_other_filters_or_tensors():
    network = SongUNet(**SONG)
    state = edm_state(network, [1, 1], "")
    with pytest.raises(
        ValueError, match=r"should be equal to others and are not \(enc.4x4_down.conv0.resample_filter\)"
    ):
        import_network(Source(state), arguments={"resample_filter": [1, 3]})
    del state["map_layer1.bias"]
    with pytest.raises(
        ValueError, match=r"^keys: 1 missing \(map_layer1.bias\); 1 unknown \(dec.8x8_aux_skip.weight\)$"
    ):
        import_network(Source(state | {"dec.8x8_aux_skip.weight": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"^keys: no enc.<side>x<side>_block<number>.conv1.weight is there"):
        import_network(Source({"enc.x": torch.ones(1)}))


@pytest.mark.parametrize(
    "node",
    [
        node_of(UNet),
        node_of(UNet, resolution=[8, 16], attention_resolutions=[16], num_classes=0, learned_variance=True),
        node_of(UNet, width=12, head_channels=None, scale_shift=False),
        node_of(DiT),
        node_of(DiT, num_classes=0, learned_variance=True),
    ],
    ids=["unet", "wide unet", "narrow unet", "dit", "unconditional dit"],
)
def test_to_diffusers_and_back_is_the_same_bit_by_bit(node, tmp_path):
    network = built(node)
    theirs = diffusers_model(node, network.state_dict())
    theirs.save_pretrained(tmp_path)
    imported = import_network(read(tmp_path))
    shift = {"frequency_shift": 1} if "hidden_size" in node else {}  # a model alone does not tell ours from theirs
    assert imported.backbone == node | shift
    assert imported.state.keys() == network.state_dict().keys()
    assert all(torch.equal(imported.state[name], tensor) for name, tensor in network.state_dict().items())
    again = diffusers_model(imported.backbone, imported.state)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (node_of(DiT, mlp_ratio=2.0), "mlp_ratio=2.0: DiTTransformer2DModel has 4"),
        (node_of(DiT, resolution=[8, 16]), "resolution=[8, 16]: DiTTransformer2DModel takes square images only"),
        (
            SONG | {"_target_": "denoiselab.backbones.song_unet.SongUNet"},
            "backbone=SongUNet: diffusers has UNet and DiT",
        ),
        ({"_target_": "mine.Net"}, "backbone=Net: diffusers has UNet and DiT"),
    ],
)
def test_what_diffusers_cannot_express(node, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        diffusers_model(node, {})


def test_the_settings_of_these_tests_are_networks_of_ours():
    assert UNet(**UNET)(torch.zeros(1, 1, 8, 8), torch.zeros(1), Condition(label=torch.tensor([0]))).shape == (
        1,
        1,
        8,
        8,
    )
