"""Our DiT, diffusers' DiTTransformer2DModel and the original code (Peebles & Xie 2023): names and configs.

The original network embeds the time at the frequencies 10000^(−i/128), i from 0 to 127; diffusers has 10000^(−i/127) in their
place (`frequency_shift` 0 and 1). No weights make up for that, and outputs differ by percents. The published weights were
trained with the former, so that what diffusers' DiTPipeline computes with them is off. An import computes what its source
computes, unless it is told otherwise.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from denoiselab.backbones.dit import position_embedding
from denoiselab.condition import height_width
from denoiselab.exchange.unet import check_fixed, learned_variance

CLASS = "DiTTransformer2DModel"
OLD_CLASS = "Transformer2DModel"  # as the published weights' config.json says

DIFFUSERS_NAMES = [  # ours → theirs; they repeat the embedders in every block
    (r"^patches\.", "pos_embed.proj."),
    (r"^time_mlp\.0\.", "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1."),
    (r"^time_mlp\.2\.", "transformer_blocks.*.norm1.emb.timestep_embedder.linear_2."),
    (r"^label_embedding\.", "transformer_blocks.*.norm1.emb.class_embedder.embedding_table."),
    (r"^final\.modulation\.", "proj_out_1."),
    (r"^final\.linear\.", "proj_out_2."),
    (r"^blocks\.(\d+)\.qkv\.", r"transformer_blocks.\1.attn1.to_{q,k,v}."),
    (r"^blocks\.(\d+)\.out\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"^blocks\.(\d+)\.mlp\.0\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"^blocks\.(\d+)\.mlp\.2\.", r"transformer_blocks.\1.ff.net.2."),
    (r"^blocks\.(\d+)\.modulation\.", r"transformer_blocks.\1.norm1.linear."),
]
LABELS = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
DIFFUSERS_POSITIONS = "pos_embed.pos_embed"

ORIGINAL_NAMES = [  # ours → theirs
    (r"^patches\.", "x_embedder.proj."),
    (r"^time_mlp\.", "t_embedder.mlp."),
    (r"^label_embedding\.", "y_embedder.embedding_table."),
    (r"^final\.modulation\.", "final_layer.adaLN_modulation.1."),
    (r"^final\.linear\.", "final_layer.linear."),
    (r"^(blocks\.\d+)\.qkv\.", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.out\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.2\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.modulation\.", r"\1.adaLN_modulation.1."),
]
ORIGINAL_POSITIONS = "pos_embed"

FIXED = {  # what our DiT is, in diffusers' words
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
NORM_EPS = 1e-6  # of the original code; diffusers takes 1e-5 in one of two norms unless its config says otherwise

DEFAULTS = {  # what a key that a config.json leaves out means
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}

SHIFT = 1  # of diffusers' time embedding
NOTE = (
    f"as in {CLASS} the time embedding has frequency shift 1; the original code has 0, with which the published weights were "
    "trained: for these say arguments={frequency_shift:0}"
)

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the sizes S, B, L and XL (Peebles & Xie 2023, table 1)


def to_diffusers(ours: dict[str, Any]) -> dict[str, Any]:
    """The arguments of DiTTransformer2DModel for those of our DiT.

    Raises:
        ValueError: if theirs cannot express ours.
    """
    if ours.get("mlp_ratio", 4.0) != 4:
        raise ValueError(f"mlp_ratio={ours['mlp_ratio']}: {CLASS} has 4 and cannot express another")
    sides = ours["resolution"] if isinstance(ours["resolution"], list) else [ours["resolution"]]
    if len(set(sides)) > 1:
        raise ValueError(f"resolution={sides}: {CLASS} takes square images only")
    return FIXED | {
        "norm_eps": NORM_EPS,
        "num_attention_heads": ours["num_heads"],
        "attention_head_dim": ours["hidden_size"] // ours["num_heads"],
        "in_channels": ours["channels"],
        "out_channels": ours["channels"] * (1 + ours.get("learned_variance", False)),
        "num_layers": ours["depth"],
        "sample_size": sides[0],
        "patch_size": ours["patch_size"],
        "num_embeds_ada_norm": max(1, ours["num_classes"]),  # theirs has at least one
    }


def from_diffusers(config: dict[str, Any], pipeline: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of our DiT for a config.json of DiTTransformer2DModel.

    Args:
        config: the config.
        pipeline: model_index.json, which holds the frequency shift in the pipelines that we write.
        state: the weights; a table of one label that is all zero is no label at all.

    Raises:
        ValueError: naming the first key whose value our DiT cannot express, and what it can.
    """
    theirs = DEFAULTS | config
    check_fixed(theirs, FIXED)
    if theirs["norm_eps"] not in (NORM_EPS, DEFAULTS["norm_eps"]):  # too small to tell apart
        raise ValueError(f"norm_eps={theirs['norm_eps']}: our network has {NORM_EPS} there and cannot express another")
    labels = state.get(LABELS.format(0))
    unconditional = theirs["num_embeds_ada_norm"] == 1 and labels is not None and not labels.any()
    return {
        "channels": theirs["in_channels"],
        "resolution": theirs["sample_size"],
        "num_classes": 0 if unconditional else theirs["num_embeds_ada_norm"],
        "patch_size": theirs["patch_size"],
        "hidden_size": theirs["num_attention_heads"] * theirs["attention_head_dim"],
        "depth": theirs["num_layers"],
        "num_heads": theirs["num_attention_heads"],
        "mlp_ratio": 4.0,
        "frequency_shift": pipeline.get("frequency_shift", SHIFT),
        "learned_variance": learned_variance(theirs["in_channels"], theirs["out_channels"]),
    }


def from_original(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of our DiT that the original names and shapes tell.

    `num_heads` is known for the published sizes, `resolution` from the table of positions, of a square image; what is
    not known is left out.

    Raises:
        ValueError: listing the tensors that are needed for this and missing.
    """
    needed = ("x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"keys: {len(missing)} missing ({', '.join(missing)})")
    hidden_size, channels, patch_size, _ = state[needed[0]].shape
    labels = state.get("y_embedder.embedding_table.weight")
    found: dict[str, Any] = {
        "channels": channels,
        "num_classes": 0 if labels is None else len(labels) - 1,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))),
        "mlp_ratio": len(state[needed[2]]) / hidden_size,
        "learned_variance": learned_variance(channels, len(state[needed[1]]) // patch_size**2),
    }
    if ORIGINAL_POSITIONS in state:
        found["resolution"] = patch_size * round(state[ORIGINAL_POSITIONS].shape[1] ** 0.5)
    if hidden_size in HEADS:
        found["num_heads"] = HEADS[hidden_size]
    return found


def positions(ours: dict[str, Any]) -> Tensor:
    """The table of positions, which is no weight, of shape (1, patches, hidden_size)."""
    height, width = (side // ours["patch_size"] for side in height_width(ours["resolution"]))
    return position_embedding(ours["hidden_size"], height, width)


def no_labels(ours: dict[str, Any]) -> dict[str, Tensor]:
    """The tables of one label and none that diffusers needs where ours has none: zeros."""
    table = torch.zeros(2, ours["hidden_size"])
    return {LABELS.format(i): table for i in range(ours["depth"])}
