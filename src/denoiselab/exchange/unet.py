"""Our UNet and diffusers' UNet2DModel: names and configs."""

from __future__ import annotations

from typing import Any

from denoiselab.backbones.layers import group_count, level_sides, levels_with_attention

CLASS = "UNet2DModel"

DIFFUSERS_NAMES = [  # ours → theirs
    (r"time_mlp\.0", "time_embedding.linear_1"),
    (r"time_mlp\.2", "time_embedding.linear_2"),
    (r"label_embedding", "class_embedding"),
    (r"norm_out", "conv_norm_out"),
    (r"^(down|up)\.", r"\1_blocks."),
    (r"\.blocks\.", ".resnets."),
    (r"downsample\.", "downsamplers.0."),
    (r"upsample\.", "upsamplers.0."),
    (r"middle\.block1", "mid_block.resnets.0"),
    (r"middle\.block2", "mid_block.resnets.1"),
    (r"middle\.attention", "mid_block.attentions.0"),
    (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.out", r"\1.to_out.0"),
    (r"\.embedding\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."),
]

OLD_NAMES = [  # of attention layers, in weights that were saved before 2023, google/ddpm-cifar10-32 among them
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
]

FIXED = {  # what our UNet is, in their words
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "add_attention": True,
    "class_embed_type": None,
}

DEFAULTS = {  # what a key that a config.json leaves out means
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}


def to_diffusers(ours: dict[str, Any]) -> dict[str, Any]:
    """The arguments of UNet2DModel for those of our UNet."""
    widths = [ours["width"] * multiplier for multiplier in ours["multipliers"]]
    attended = levels_with_attention(
        ours["attention_resolutions"], level_sides(ours["resolution"], len(ours["multipliers"]))
    )
    groups = group_count(ours["width"])
    return FIXED | {
        "sample_size": ours["resolution"],
        "in_channels": ours["channels"],
        "out_channels": ours["channels"] * (1 + ours.get("learned_variance", False)),
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attended],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)],
        "block_out_channels": widths,
        "layers_per_block": ours["blocks"],
        "dropout": ours["dropout"],
        "attention_head_dim": ours["head_channels"],
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "resnet_time_scale_shift": "scale_shift" if ours["scale_shift"] else "default",
        "num_class_embeds": ours["num_classes"] + 1 if ours["num_classes"] else None,
    }


def from_diffusers(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of our UNet for a config.json of UNet2DModel.

    Raises:
        ValueError: naming the first key whose value our UNet cannot express, and what it can.
    """
    theirs = DEFAULTS | config
    check_fixed(theirs, FIXED)
    widths = theirs["block_out_channels"]
    width, levels = widths[0], len(widths)
    if any(w % width for w in widths):
        raise ValueError(f"block_out_channels={list(widths)}: our UNet has multiples of the first")
    groups = group_count(width)
    check_fixed(theirs, {"norm_num_groups": groups})
    if theirs["resnet_time_scale_shift"] == "scale_shift" or theirs["attn_norm_num_groups"] is not None:
        check_fixed(theirs, {"attn_norm_num_groups": groups})  # else its attention in the middle has no norm
    if theirs["time_embedding_dim"] not in (None, 4 * width):
        raise ValueError(f"time_embedding_dim={theirs['time_embedding_dim']}: our UNet has {4 * width}")
    attended = [kind == "AttnDownBlock2D" for kind in theirs["down_block_types"]]
    check_fixed(
        theirs | {key: list(theirs[key]) for key in ("down_block_types", "up_block_types")},
        {
            "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attended],
            "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)],
        },
    )
    if theirs["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise ValueError(f"resnet_time_scale_shift={theirs['resnet_time_scale_shift']}: must be default or scale_shift")
    if theirs["sample_size"] is None:
        raise ValueError("sample_size=null: must be known, since our UNet is built for one resolution")
    resolution = theirs["sample_size"] if isinstance(theirs["sample_size"], int) else list(theirs["sample_size"])
    sides = level_sides(resolution, levels)
    return {
        "channels": theirs["in_channels"],
        "resolution": resolution,
        "num_classes": max(0, (theirs["num_class_embeds"] or 0) - 1),
        "width": width,
        "multipliers": [w // width for w in widths],
        "blocks": theirs["layers_per_block"],
        "attention_resolutions": [side for side, here in zip(sides, attended, strict=True) if here],
        "head_channels": theirs["attention_head_dim"],
        "dropout": float(theirs["dropout"]),
        "scale_shift": theirs["resnet_time_scale_shift"] == "scale_shift",
        "learned_variance": learned_variance(theirs["in_channels"], theirs["out_channels"]),
    }


def learned_variance(in_channels: int, out_channels: int | None) -> bool:
    """Whether the second half of the output's channels is a learned variance.

    Raises:
        ValueError: if the output has neither as many channels as the input nor twice as many.
    """
    if out_channels not in (None, in_channels, 2 * in_channels):
        raise ValueError(f"out_channels={out_channels}: must be in_channels={in_channels}, or twice that")
    return out_channels == 2 * in_channels


def check_fixed(theirs: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Refuse a config whose values are not those that our network stands for.

    Raises:
        ValueError: naming the first.
    """
    for key, value in fixed.items():
        if theirs[key] != value:
            raise ValueError(f"{key}={theirs[key]}: our network has {value} there and cannot express another")
