from __future__ import annotations

import math
import re

import pytest
import torch
from diffusers import DiTTransformer2DModel

from denoiselab.backbones.dit import DiT, position_embedding
from denoiselab.condition import Condition

SMALL = {
    "channels": 3,
    "resolution": 8,
    "num_classes": 5,
    "patch_size": 2,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
}


def test_position_embedding_closed_form():
    dim, height, width = 8, 2, 3
    want = []
    for row in range(height):
        for column in range(width):
            want.append([])
            for place in (column, row):
                for function in (math.sin, math.cos):
                    want[-1] += [function(place * 10000 ** (-i / (dim // 4))) for i in range(dim // 4)]
    torch.testing.assert_close(position_embedding(dim, height, width), torch.tensor([want]), rtol=0, atol=1e-6)


def load_diffusers(net, state):
    """Fills a DiT from the weights of a DiTTransformer2DModel, which repeats the embedders in every block."""
    first = "transformer_blocks.0.norm1.emb."
    names = {
        "patches": "pos_embed.proj",
        "time_mlp.0": first + "timestep_embedder.linear_1",
        "time_mlp.2": first + "timestep_embedder.linear_2",
        "label_embedding": first + "class_embedder.embedding_table",
        "final.modulation": "proj_out_1",
        "final.linear": "proj_out_2",
    }
    for i in range(len(net.blocks)):
        theirs = f"transformer_blocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [state[f"{theirs}attn1.to_{part}.{kind}"] for part in "qkv"]
            state[f"{theirs}qkv.{kind}"] = torch.cat(qkv)
        names |= {
            f"blocks.{i}.qkv": theirs + "qkv",
            f"blocks.{i}.out": theirs + "attn1.to_out.0",
            f"blocks.{i}.mlp.0": theirs + "ff.net.0.proj",
            f"blocks.{i}.mlp.2": theirs + "ff.net.2",
            f"blocks.{i}.modulation": theirs + "norm1.linear",
        }
    split = [(name, *name.rsplit(".", 1)) for name in net.state_dict()]
    net.load_state_dict({name: state[f"{names[module]}.{kind}"] for name, module, kind in split})


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_is_the_published_network(shift, learned_variance):
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=3,
        out_channels=6 if learned_variance else 3,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    embedders = [block.norm1.emb for block in theirs.transformer_blocks]
    for embedder in embedders:
        embedder.load_state_dict(embedders[0].state_dict())
        embedder.time_proj.downscale_freq_shift = shift  # diffusers has 1 here, the paper's code 0
    ours = DiT(**SMALL, learned_variance=learned_variance, frequency_shift=shift).eval()
    load_diffusers(ours, theirs.state_dict())

    x, t, label = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 7.0, 850.0]), torch.tensor([0, 4, -1])
    with torch.no_grad():
        got = ours(x, t, Condition(label=label))
        want = theirs(x, t, label.where(label >= 0, 5)).sample
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"),
    [((384, 12, 6), 33), ((768, 12, 12), 130), ((1024, 24, 16), 458), ((1152, 28, 16), 675)],
)
def test_parameter_counts_of_the_paper(size, millions):
    hidden_size, depth, num_heads = size
    with torch.device("meta"):
        net = DiT(
            channels=4,
            resolution=32,
            num_classes=1000,
            patch_size=2,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
        )
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1e6 * millions, rel=5e-3)


def test_initialisation_of_the_paper():
    torch.manual_seed(0)
    net = DiT(**SMALL)
    for name, p in net.named_parameters():
        if name.endswith("bias") or "modulation" in name or name.startswith("final"):
            assert not p.any(), name
        elif "time_mlp" in name or "label" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            matrix = p.flatten(1)
            bound = math.sqrt(6 / sum(matrix.shape))
            assert 0.9 * bound < p.abs().max() <= bound, name
    output = net(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 900.0]), Condition(label=torch.tensor([0, -1])))
    assert not output.any()


def test_positions_are_no_state():
    assert not any("positions" in name for name in DiT(**SMALL).state_dict())


def test_another_resolution_is_refused():
    net = DiT(**SMALL | {"resolution": [4, 16]})
    with pytest.raises(AssertionError, match=r"grid of \(2, 8\)"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1), Condition(label=torch.tensor([0])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels=0: must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1: must be at least 0"),
        ({"depth": 0}, "depth=0: must be at least 1"),
        ({"num_heads": 0}, "num_heads=0: must be at least 1"),
        ({"frequency_shift": 2}, "frequency_shift=2: must be 0 or 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0: must be above 0"),
        ({"patch_size": 3}, "patch_size=3: must divide the resolution 8x8"),
        ({"patch_size": 0}, "patch_size=0: must divide the resolution 8x8"),
        ({"resolution": [8, 6], "patch_size": 4}, "patch_size=4: must divide the resolution 8x6"),
        ({"hidden_size": 50}, "hidden_size=50: must be a multiple of num_heads=4 and of 4"),
        (
            {"hidden_size": 51, "num_heads": 3},
            "hidden_size=51: must be a multiple of num_heads=3 and of 4",
        ),
        ({"hidden_size": 0}, "hidden_size=0: must be a multiple of num_heads=4 and of 4"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DiT(**SMALL | change)
