"""Weights under transformers' names: ViT, DeiT, MAE, DINOv2, BEiT and similar models are read, BEiT is written.

timm stores a block's query, key and value matrices as one matrix; transformers stores three. BEiT's keys have no bias
in either library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pecobook.errors import WeightsError

# Names in timm and in transformers, for layers and weights that are only renamed; {i} is the number of a block.
_HUGGINGFACE_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "rel_pos_bias.relative_position_bias_table": "shared_position_bias.relative_position_bias_table",
    "blocks.{i}.gamma_1": "layers.{i}.lambda_1",
    "blocks.{i}.gamma_2": "layers.{i}.lambda_2",
    "blocks.{i}.norm1": "layers.{i}.layernorm_before",
    "blocks.{i}.norm2": "layers.{i}.layernorm_after",
    "blocks.{i}.attn.relative_position_bias_table": ("layers.{i}.relative_position_bias.relative_position_bias_table"),
    "blocks.{i}.attn.q_bias": "layers.{i}.attention.q_proj.bias",
    "blocks.{i}.attn.v_bias": "layers.{i}.attention.v_proj.bias",
    "blocks.{i}.attn.proj": "layers.{i}.attention.o_proj",
    "blocks.{i}.mlp.fc1": "layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.fc2": "layers.{i}.mlp.fc2",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")

# How the names of transformers are rewritten, one rule after another: in files (`encoder.layer.0.intermediate.dense`)
# and in version 5's memory (`layers.0.mlp.fc1`).
_TIMM_NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.", ""),
        (r"^(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
        (r"^(encoder\.)?layers?\.(?=\d)", "blocks."),
        (r"\.(attention\.attention\.)?relative_position_bias\.", ".attn."),
        (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.lambda_(\d)$", r".gamma_\1"),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^(pooler\.)?layernorm\.", "norm."),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    )
]


def beit_to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a timm BEiT to the names of a transformers BeitModel.

    The final norm, `norm` or `fc_norm`, becomes `layernorm`; a head's weights keep the name `head`. Their names in the
    complete model depend on the type of model: see `pecobook.commands.export`.

    Raises:
        WeightsError: a weight has no counterpart in transformers.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(("k_bias", "relative_position_index")):  # zeros, and a table of indices
            continue
        number = match[1] if (match := re.match(r"blocks\.(\d+)\.", name)) else ""
        pattern = re.sub(r"^blocks\.\d+", "blocks.{i}", name)
        layer, _, kind = pattern.rpartition(".")
        if pattern == "blocks.{i}.attn.qkv.weight":
            for part, matrix in zip(_PROJECTIONS, value.chunk(3), strict=True):
                renamed[f"layers.{number}.attention.{part}.weight"] = matrix.contiguous()
        elif pattern in _HUGGINGFACE_NAMES:
            renamed[_HUGGINGFACE_NAMES[pattern].replace("{i}", number)] = value
        elif layer in _HUGGINGFACE_NAMES and kind in ("weight", "bias"):
            renamed[f"{_HUGGINGFACE_NAMES[layer]}.{kind}".replace("{i}", number)] = value
        elif name.startswith(("norm.", "fc_norm.")):
            renamed[f"layernorm.{name.rpartition('.')[2]}"] = value
        elif name.startswith("head."):
            renamed[name] = value
        else:
            raise WeightsError(f"transformers' BEiT has no weight that corresponds to '{name}'.")
    return renamed


def from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a transformers model to timm's names; unknown names stay."""
    prefix = next(name for name in state if "embeddings." in name).partition("embeddings.")[0]  # such as `vit.`
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        short = name.removeprefix(prefix)
        for pattern, replacement in _TIMM_NAMES:
            short = pattern.sub(replacement, short)
        renamed[short] = value
    for query in [name for name in renamed if name.endswith(".attn.q.weight")]:
        block = query.removesuffix("q.weight")
        renamed[f"{block}qkv.weight"] = torch.cat([renamed.pop(f"{block}{part}.weight") for part in "qkv"])
        biases = {part: renamed.pop(f"{block}{part}.bias", None) for part in "qkv"}
        if all(bias is not None for bias in biases.values()):
            renamed[f"{block}qkv.bias"] = torch.cat(list(biases.values()))  # type: ignore[arg-type]
        else:
            renamed |= {f"{block}{part}_bias": bias for part, bias in biases.items() if bias is not None}
    return renamed


def is_huggingface(state: dict[str, Tensor]) -> bool:
    """Return whether `state` contains the weights of a transformers model."""
    return any(re.search(r"\.attention\.(attention\.query|q_proj)\.weight$", name) for name in state) and any(
        "embeddings." in name for name in state
    )


def beit_config(state: dict[str, Tensor], *, image_size: int, patch_size: int, num_heads: int) -> dict[str, Any]:
    """Return the config.json of a transformers BEiT for weights under timm's names."""
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


def beit_processor(*, image_size: int, crop: float, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Return the content of preprocessor_config.json, which `AutoImageProcessor.from_pretrained` reads.

    BEiT's own processor squashes an image to a square. Perceiver's processor is the one in transformers that crops the
    central square first and then resizes it (bicubic, antialiased), as `data.views.center_crop` does; if the two round
    a side or a margin differently, the square is one pixel of the image smaller or shifted.

    Args:
        image_size: side of the network's input, in pixels.
        crop: side of the square, as a fraction of the image's shorter side.
        mean: mean for normalisation, RGB in [0, 1].
        std: standard deviation for normalisation, RGB in [0, 1].
    """
    side = round(image_size / crop, 6)
    return {
        "image_processor_type": "PerceiverImageProcessor",
        "do_convert_rgb": True,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
