"""Who made a weights file, and hence which mean and deviation its images were normalised with.

timm's settings for a name are those of timm's own weights: `vit_base_patch16_224` was trained with mean 0.5, but
DINO's, MAE's and DeiT's files, which fit the same network, with ImageNet's mean.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecobook.settings.images import IMAGENET_MEAN, IMAGENET_STD
from pecobook.utils.json_files import NUMBER, OBJECT, list_of, read_if_valid

_HALF = (0.5, 0.5, 0.5)

# Beginnings of the names under which these projects publish their files. All of them use ImageNet's mean and deviation.
_PUBLISHED = re.compile(r"(dino|dinov2|mae|deit|deit3|moco|mocov3|ibot|swav)[_.-]", re.IGNORECASE)
_PUBLISHED_AS = {"dino": "DINO", "dinov2": "DINOv2", "mae": "MAE", "deit": "DeiT", "deit3": "DeiT", "ibot": "iBOT"}


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation that a network expects of its input, RGB in [0, 1], and why."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    reason: str

    def line(self, network: str) -> str:
        """Return a line for the user."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{network} reads images minus mean {mean}, divided by std {std}: {self.reason}."


def imagenet_maker(state: dict[str, Tensor], wrapper: tuple[str, ...], path: str) -> str:
    """Return the project that wrote a file, if it is one of those that use ImageNet's mean; otherwise an empty string.

    Args:
        state: all weights of the file, under the names of the file.
        wrapper: names of the dictionaries in the file that contain `state`, outermost first.
        path: path of the file.
    """
    names = tuple(state)
    parts = {part for name in names for part in name.split(".")[:3]}
    if parts & {"base_encoder", "momentum_encoder", "encoder_q"}:
        return "MoCo"
    if {"teacher", "student"} & (set(wrapper) | parts) or any("head.last_layer." in name for name in names):
        return "DINO"
    if any(name.split(".")[-1].startswith("decoder_") or ".decoder_" in f".{name}" for name in names):
        return "MAE"
    has_layer_scale = any(name.endswith("blocks.0.ls1.gamma") for name in names)
    if any(name.endswith("register_tokens") for name in names) or (has_layer_scale and "mask_token" in parts):
        if "storage_tokens" in parts:
            return ""  # DINOv3, whose networks for satellite images have a mean of their own, which timm's tag states
        return "DINOv2"
    if parts & {"dist_token", "head_dist"}:
        return "DeiT"
    is_plain_vit = "cls_token" in parts and any(name.endswith("blocks.0.attn.qkv.weight") for name in names)
    is_beit = any("relative_position" in name or name.endswith("gamma_1") for name in names)
    if not is_plain_vit or is_beit:
        return ""
    if _fixed_positions(state) is not None:
        return "MAE or MoCo v3 (their positions are fixed sines and cosines)"
    if wrapper and wrapper[-1] in ("model", "model_ema"):
        return f"DeiT or MAE (plain ViT weights under the key '{wrapper[-1]}')"
    match = _PUBLISHED.match(Path(path).name)
    return f"{_PUBLISHED_AS.get(match[1].lower(), match[1])} by the file's name" if match else ""


def maker_args(state: dict[str, Tensor]) -> dict[str, int]:
    """Return arguments for timm that no shape of a file's weights shows: MoCo v3's ViT-S has 12 heads, timm's 6."""
    width = next((value.shape[-1] for name, value in state.items() if name.endswith("base_encoder.cls_token")), 0)
    table = _fixed_positions(state)
    if table is not None and torch.allclose(table[0].chunk(2)[0], table[1].chunk(2)[0], atol=1e-3):
        # A linear probe's file has no momentum encoder, but MoCo v3's order: first all of the row, then of the column.
        width = table.shape[1]
    return {"num_heads": 12} if width == 384 else {}


def activation_note(network: nn.Module, name: str, weights: str | None) -> str:
    """Return a line if CLIP's weights would be read into a network with another activation; otherwise an empty string.

    OpenAI's, MetaCLIP's and DFN's networks have QuickGELU, others have GELU, and no shape of the weights shows it.

    Args:
        network: the timm network.
        name: timm's name of the network.
        weights: None for timm's own weights, `random`, or a file.
    """
    import timm

    architecture, _, tag = name.partition(".")
    other = architecture.replace("_clip_", "_clip_quickgelu_")
    if weights == "random" or "quickgelu" in architecture or other == architecture or not timm.is_model(other):
        return ""
    if weights is not None:
        return f"timm:{name} has GELU; OpenAI's, MetaCLIP's and DFN's CLIP have QuickGELU: for these give timm:{other}."
    settings = getattr(network, "pretrained_cfg", None) or {}
    if not any("QuickGELU" in note for note in settings.get("notes") or ()):
        return ""
    return f"timm:{name} has GELU, but its weights were trained with QuickGELU: give timm:{other}{tag and '.'}{tag}."


def _fixed_positions(state: dict[str, Tensor]) -> Tensor | None:
    """Return the patches' positions (N, D) if they are sines and cosines of row and column: sin^2 + cos^2 = 1."""
    table = next((value for name, value in state.items() if name.endswith("pos_embed") and value.ndim == 3), None)
    if table is None or table.shape[1] < 3 or table.shape[2] % 4:
        return None
    patches = table[0, -(math.isqrt(table.shape[1]) ** 2) :].float()  # class tokens, which come first, have zeros
    a, b, c, d = patches.square().chunk(4, 1)
    orders = ((a + b, c + d), (a + c, b + d))  # sine and cosine of an axis side by side (MAE, MoCo v3), or both sines
    is_fixed = any(all(float((total - 1).abs().max()) < 1e-3 for total in order) for order in orders)
    return patches if is_fixed else None


def neighbour_normalisation(path: str) -> Normalisation | None:
    """Return the normalisation in a configuration next to a weights file: transformers', OpenCLIP's, timm's hub's or
    pecobook's.
    """
    for name, within, keys in (
        ("preprocessor_config.json", "", ("image_mean", "image_std")),
        ("open_clip_config.json", "preprocess_cfg", ("mean", "std")),
        ("config.json", "pretrained_cfg", ("mean", "std")),
    ):
        content = read_if_valid(Path(path).parent / name, {within: OBJECT.or_none}) or {}
        values: list[Any] = [content.get(key, (content.get(within) or {}).get(key)) for key in keys]
        if all(map(list_of(NUMBER, 3).holds, values)):
            mean, std = (tuple(float(number) for number in value) for value in values)
            return Normalisation(mean, std, f"so says {name} beside the file")
    return None


def neighbour_network(path: str, name: str, args: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return timm's name and arguments of the network that config.json next to a weights file describes; None without.

    Args:
        path: path of the weights file.
        name: timm's name of the network that the file is for; transformers' configuration states only its heads.
        args: arguments that timm built this network with.
    """
    content = read_if_valid(Path(path).parent / "config.json") or {}
    stated, stated_args = content.get("architecture") or content.get("name"), content.get("model_args")
    heads = content.get("num_attention_heads")
    if isinstance(stated, str):
        stated_args = stated_args or content.get("args")
        return stated, stated_args if isinstance(stated_args, dict) else {}
    return (name, args | {"num_heads": heads}) if isinstance(heads, int) else None


def timm_normalisation(network: nn.Module, name: str, *, of_file: bool = False) -> Normalisation:
    """Return timm's settings for a network; with `of_file`, the reason says that the file did not state them."""
    settings = getattr(network, "pretrained_cfg", None) or {}
    mean, std = tuple(settings.get("mean", IMAGENET_MEAN)), tuple(settings.get("std", IMAGENET_STD))
    reason = f"timm's settings of {name}"
    if of_file and mean != IMAGENET_MEAN:
        reason += ", since the file does not say who made it (if it wants others, give --mean and --std)"
    return Normalisation(mean, std, reason)


def file_normalisation(
    state: dict[str, Tensor], wrapper: tuple[str, ...], path: str, network: nn.Module, name: str
) -> Normalisation:
    """Return the normalisation for a weights file for `name`: from a configuration next to the file, from its maker, or
    timm's for the name.
    """
    beside = neighbour_normalisation(path)
    if beside is not None:
        return beside
    if path.endswith(".npz"):
        return Normalisation(_HALF, _HALF, "the file is one of Google's .npz files, which use these")
    maker = imagenet_maker(state, wrapper, path)
    if maker:
        return Normalisation(IMAGENET_MEAN, IMAGENET_STD, f"ImageNet's, since the weights are those of {maker}")
    return timm_normalisation(network, name, of_file=True)


def with_flags(text: str, prefix: str) -> str:
    """Return a line for the user of a command whose flags are `prefix` + mean and std."""
    return text.replace("--mean", f"{prefix}mean").replace("--std", f"{prefix}std")


def overridden(found: Normalisation, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Normalisation:
    """Return `found` with the mean and the deviation that the user gave."""
    if not mean and not std:
        return found
    flags = " and ".join(name for name, value in (("--mean", mean), ("--std", std)) if value)
    other = "" if mean and std else f"; the other is from {found.reason}"
    return Normalisation(tuple(mean or found.mean), tuple(std or found.std), f"so say {flags}{other}")
