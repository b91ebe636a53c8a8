"""Small networks with random weights, ours and theirs, and what the original projects call their tensors."""

from __future__ import annotations

import torch

from denoiselab.backbones.dit import DiT
from denoiselab.backbones.unet import UNet

UNET = {
    "channels": 1,
    "resolution": 8,
    "num_classes": 3,
    "width": 16,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention_resolutions": [4],
    "head_channels": 16,
    "dropout": 0.0,
    "scale_shift": True,
    "learned_variance": False,
}
DIT = {
    "channels": 1,
    "resolution": 8,
    "num_classes": 3,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "learned_variance": False,
}
ARGUMENTS = {UNet: UNET, DiT: DIT}


def perturbed(network, scale=0.05):
    """The network with noise on every weight, so that none is zero, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return network.eval().requires_grad_(False)


def node_of(kind, **changes):
    """The config node of a small network."""
    return {"_target_": f"{kind.__module__}.{kind.__name__}", **ARGUMENTS[kind], **changes}


def built(node):
    """The network of a config node, with random weights, the same at each call."""
    torch.manual_seed(0)
    kind = {"UNet": UNet, "DiT": DiT}[node["_target_"].rpartition(".")[2]]
    return perturbed(kind(**{key: value for key, value in node.items() if key != "_target_"}))


def same_embedders(transformer):
    """A diffusers transformer whose blocks share their embedders, as all that come from the original code do."""
    embedders = [block.norm1.emb for block in transformer.transformer_blocks]
    for embedder in embedders:
        embedder.load_state_dict(embedders[0].state_dict())
    return transformer


def original_dit(state, depth):
    """The original code's state dict of a diffusers transformer's, written out by hand."""
    embedders = "transformer_blocks.0.norm1.emb."
    pairs = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": embedders + "timestep_embedder.linear_1",
        "t_embedder.mlp.2": embedders + "timestep_embedder.linear_2",
        "final_layer.linear": "proj_out_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
    }
    original = {"y_embedder.embedding_table.weight": state[embedders + "class_embedder.embedding_table.weight"]}
    for i in range(depth):
        theirs = f"transformer_blocks.{i}."
        pairs |= {
            f"blocks.{i}.attn.proj": theirs + "attn1.to_out.0",
            f"blocks.{i}.mlp.fc1": theirs + "ff.net.0.proj",
            f"blocks.{i}.mlp.fc2": theirs + "ff.net.2",
            f"blocks.{i}.adaLN_modulation.1": theirs + "norm1.linear",
        }
        for kind in ("weight", "bias"):
            qkv = [state[f"{theirs}attn1.to_{part}.{kind}"] for part in "qkv"]
            original[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    for ours, theirs in pairs.items():
        original |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return original
