"""BEiT's weights under the names of transformers (version 5), and back: for export, and for files that come from there.

timm keeps the query, key and value matrices of a block in one; transformers keeps three. Keys have no bias in either.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from pecobook.errors import WeightsError

# timm's name to that of transformers, for what is only renamed; {i} is the number of a block.
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "rel_pos_bias.relative_position_bias_table": "shared_position_bias.relative_position_bias_table",
    "blocks.{i}.gamma_1": "layers.{i}.lambda_1",
    "blocks.{i}.gamma_2": "layers.{i}.lambda_2",
    "blocks.{i}.norm1.weight": "layers.{i}.layernorm_before.weight",
    "blocks.{i}.norm1.bias": "layers.{i}.layernorm_before.bias",
    "blocks.{i}.norm2.weight": "layers.{i}.layernorm_after.weight",
    "blocks.{i}.norm2.bias": "layers.{i}.layernorm_after.bias",
    "blocks.{i}.attn.relative_position_bias_table": ("layers.{i}.relative_position_bias.relative_position_bias_table"),
    "blocks.{i}.attn.q_bias": "layers.{i}.attention.q_proj.bias",
    "blocks.{i}.attn.v_bias": "layers.{i}.attention.v_proj.bias",
    "blocks.{i}.attn.proj.weight": "layers.{i}.attention.o_proj.weight",
    "blocks.{i}.attn.proj.bias": "layers.{i}.attention.o_proj.bias",
    "blocks.{i}.mlp.fc1.weight": "layers.{i}.mlp.fc1.weight",
    "blocks.{i}.mlp.fc1.bias": "layers.{i}.mlp.fc1.bias",
    "blocks.{i}.mlp.fc2.weight": "layers.{i}.mlp.fc2.weight",
    "blocks.{i}.mlp.fc2.bias": "layers.{i}.mlp.fc2.bias",
}
_BACK = {theirs: ours for ours, theirs in _NAMES.items()}
_PARTS = ("q_proj", "k_proj", "v_proj")


def beit_to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a timm BEiT under the names of a transformers BeitModel.

    The last norm, `norm` or `fc_norm`, comes out as `layernorm`; a head as `head`. What goes where depends on the
    model: see `pecobook.commands.export`.

    Raises:
        WeightsError: a weight has no counterpart.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(("k_bias", "relative_position_index")):  # zeros, and a table of places
            continue
        pattern, number = _numbered(name, "blocks")
        if pattern == "blocks.{i}.attn.qkv.weight":
            for part, matrix in zip(_PARTS, value.chunk(3), strict=True):
                found[f"layers.{number}.attention.{part}.weight"] = matrix.contiguous()
        elif pattern in _NAMES:
            found[_NAMES[pattern].replace("{i}", number)] = value
        elif name.startswith(("norm.", "fc_norm.")):
            found[f"layernorm.{name.rpartition('.')[2]}"] = value
        elif name.startswith("head."):
            found[name] = value
        else:
            raise WeightsError(f"transformers' BEiT has no place for '{name}'.")
    return found


def beit_from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformers BEiT, with or without the prefix `beit.`, under timm's names; heads left out."""
    state = {name.removeprefix("beit."): value for name, value in state.items()}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        pattern, number = _numbered(name, "layers")
        if pattern == "layers.{i}.attention.q_proj.weight":
            parts = [state[f"layers.{number}.attention.{part}.weight"] for part in _PARTS]
            found[f"blocks.{number}.attn.qkv.weight"] = torch.cat(parts)
        elif pattern in _BACK:
            found[_BACK[pattern].replace("{i}", number)] = value
        elif name.startswith(("layernorm.", "pooler.layernorm.")):
            found[f"norm.{name.rpartition('.')[2]}"] = value
    return found


def is_huggingface_beit(state: dict[str, Tensor]) -> bool:
    """Whether these are weights of transformers' BEiT, of version 5."""
    return any(name.endswith("layers.0.attention.q_proj.weight") for name in state)


def _numbered(name: str, word: str) -> tuple[str, str]:
    """`blocks.3.norm1.bias` to (`blocks.{i}.norm1.bias`, `3`); other names as they are."""
    match = re.match(rf"{word}\.(\d+)\.", name)
    return (name.replace(f"{word}.{match[1]}.", f"{word}.{{i}}.", 1), match[1]) if match else (name, "")


def beit_config(state: dict[str, Tensor], *, image_size: int, patch_size: int, num_heads: int) -> dict[str, Any]:
    """The config.json of a transformers BEiT for weights under timm's names."""
    width = state["cls_token"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    return {
        "model_type": "beit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": image_size,
        "patch_size": patch_size,
        "num_channels": state["patch_embed.proj.weight"].shape[1],
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in state else 0.0,
        "use_absolute_position_embeddings": "pos_embed" in state,
        "use_relative_position_bias": "blocks.0.attn.relative_position_bias_table" in state,
        "use_shared_relative_position_bias": "rel_pos_bias.relative_position_bias_table" in state,
        "use_mean_pooling": True,
    }
