"""Files of other projects: which network in them is read, and with which normalisation."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models.feature_networks import load_feature_network
from pecobook.models.makers import activation_note
from pecobook.models.networks import create_network
from pecobook.models.weights import Backbone, load_backbone
from pecobook.recipes import recipe
from pecobook.settings.images import IMAGENET_MEAN, IMAGENET_STD

NAME = "test_vit"  # timm's settings of the name: mean 0.5
HALF = (0.5, 0.5, 0.5)


def vit(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(NAME, num_classes=0, **more)
    return network.eval()


def prefixed(prefix: str, state: dict[str, Tensor], shift: float = 0.0) -> dict[str, Tensor]:
    return {prefix + name: value + shift for name, value in state.items()}


def dino(state: dict[str, Tensor]) -> dict[str, Any]:
    """DINO's full checkpoint: student and teacher with heads, the optimizer, settings."""
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2)}
    return {
        "student": prefixed("module.backbone.", state, 1.0) | prefixed("module.", head),
        "teacher": prefixed("backbone.", state) | head,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def mae(state: dict[str, Tensor]) -> dict[str, Any]:
    decoder = {"decoder_embed.weight": torch.zeros(2, 2), "decoder_pos_embed": torch.zeros(1, 5, 4)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.zeros(2), "mask_token": torch.zeros(1, 1, 4)}
    return {"model": {**state, **decoder}, "args": argparse.Namespace(mask_ratio=0.75)}


def fixed_positions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE's published file has no decoder, but a table of sines and cosines."""
    table = torch.zeros_like(state["pos_embed"])
    rows = math.isqrt(table.shape[1])
    table[0, -rows * rows :] = build_sincos2d_pos_embed([rows, rows], dim=table.shape[2])
    return {**state, "pos_embed": table}


def with_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}


LAYOUTS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "dino": (dino, IMAGENET_MEAN),
    "mae": (mae, IMAGENET_MEAN),
    "deit": (lambda state: {"model": with_head(state)}, IMAGENET_MEAN),
    "deit in training": (lambda state: {"model": prefixed("", state, 1.0), "model_ema": state}, IMAGENET_MEAN),
    "timm in training": (lambda state: {"state_dict": prefixed("", state, 1.0), "state_dict_ema": state}, HALF),
    "compiled": (lambda state: prefixed("_orig_mod.", state), HALF),
    "compiled under ddp": (lambda state: {"state_dict": prefixed("module._orig_mod.", state)}, HALF),
    "dinov2": (
        lambda state: {"model": prefixed("student.backbone.", state, 1.0) | prefixed("teacher.backbone.", state)},
        IMAGENET_MEAN,
    ),
    "average and network side by side": (
        lambda state: {"state_dict": prefixed("model.", state, 1.0) | prefixed("ema_model.module.", state)},
        HALF,
    ),
    "under a key of PyTorch's tutorial": (lambda state: {"model_state_dict": state, "epoch": 3}, HALF),
    "under a key of nobody": (lambda state: {"my weights": state, "epoch": 3}, HALF),
    "parameters": (lambda state: {name: nn.Parameter(value) for name, value in state.items()}, HALF),
    "with numbers of NumPy": (lambda state: {"state_dict": state, "best": np.float64(0.3), "epoch": 4}, HALF),
    "plain": (with_head, HALF),
}


@pytest.mark.parametrize("zipped", [True, False])  # False: as PyTorch wrote files before 1.6
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout__gives_the_network_and_the_normalisation_of_its_maker(
    tmp_path: Path, layout: str, zipped: bool
) -> None:
    network, (wrap, mean) = vit(), LAYOUTS[layout]
    torch.save(wrap(network.state_dict()), tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    backbone = load_backbone(f"timm:{NAME}", weights=str(tmp_path / "weights.pth"))
    images = torch.rand(1, 3, 160, 160)
    assert torch.equal(backbone.network.eval()(images), network(images))
    assert backbone.mean == mean
    assert backbone.std == (IMAGENET_STD if mean == IMAGENET_MEAN else HALF)


def test_notes__say_what_was_taken_and_why(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    torch.save(dino(vit().state_dict()), file)
    assert load_backbone(f"timm:{NAME}", weights=str(file)).notes == (
        f"Of '{file}' 'teacher' is read; left aside: student, optimizer, epoch, args, dino_loss, head (2).",
        f"timm:{NAME} reads images minus mean 0.485 0.456 0.406, divided by std 0.229 0.224 0.225: ImageNet's, since "
        "the weights are those of DINO.",
    )
    torch.save(vit().state_dict(), file)
    (note,) = load_backbone(f"timm:{NAME}", weights=str(file)).notes
    assert note.endswith(
        f"timm's settings of timm:{NAME}, since the file does not say who made it (if it wants others, give --mean "
        "and --std)."
    )


CLIP = "vit_base_patch16_clip_224"
CLIP_FILE = "timm:{} has GELU; OpenAI's, MetaCLIP's and DFN's CLIP have QuickGELU: for these give timm:{}."


@pytest.mark.parametrize(
    ("name", "weights", "note"),
    [
        (f"{CLIP}.openai", None, "has GELU, but its weights were trained with QuickGELU: give timm:{}.openai."),
        (f"{CLIP}.laion2b", None, ""),  # trained with GELU
        (f"{CLIP}.openai", "random", ""),
        ("vit_base_patch16_clip_quickgelu_224.openai", None, ""),
        (CLIP, "model.safetensors", CLIP_FILE.format(CLIP, "vit_base_patch16_clip_quickgelu_224")),
        ("vit_base_patch16_224", "model.safetensors", ""),
    ],
)
def test_activation__of_clips_weights(name: str, weights: str | None, note: str) -> None:
    with torch.device("meta"):
        network = create_network(name, num_classes=0)
    found = activation_note(network, name, weights)
    assert found.endswith(note.format("vit_base_patch16_clip_quickgelu_224")) if note else not found


def test_vqkd__predicts_clip_with_the_activation_it_was_trained_with() -> None:
    name = recipe("codebook", "vqkd").target_features.removeprefix("timm:")
    with torch.device("meta"):
        network = create_network(name, num_classes=0)
    activations = {type(module).__name__ for module in network.modules() if "gelu" in type(module).__name__.lower()}
    assert activations == {"QuickGELU"}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["moco", "mae"])
def test_positions__that_are_fixed_are_of_mae_or_moco(tmp_path: Path, order: tuple[int, ...]) -> None:
    state = fixed_positions(vit().state_dict())
    quarters = state["pos_embed"].chunk(4, 2)
    torch.save({**state, "pos_embed": torch.cat([quarters[n] for n in order], 2)}, tmp_path / "weights.pth")
    assert load_backbone(f"timm:{NAME}", weights=str(tmp_path / "weights.pth")).mean == IMAGENET_MEAN


def test_name__of_a_published_file_tells_its_maker(tmp_path: Path) -> None:
    # DINO's published backbones are plain state dicts without a head.
    torch.save(vit().state_dict(), tmp_path / "dino_vitsmall16_pretrain.pth")
    assert load_backbone(f"timm:{NAME}", weights=str(tmp_path / "dino_vitsmall16_pretrain.pth")).mean == IMAGENET_MEAN


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        ("config.json", {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}),
        ("open_clip_config.json", {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}),
        ("config.json", {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}),
    ],
    ids=["transformers", "timm", "open_clip", "pecobook"],
)
def test_configuration__beside_the_file_is_read(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    save_file(vit().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / file).write_text(json.dumps(content))
    backbone = load_backbone(f"timm:{NAME}", weights=str(tmp_path / "model.safetensors"))
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert backbone.notes[-1].endswith(f"so says {file} beside the file.")


def test_flags__win_over_everything(tmp_path: Path) -> None:
    torch.save(dino(vit().state_dict()), tmp_path / "dino.pth")
    file, mean, std = str(tmp_path / "dino.pth"), (0.1, 0.2, 0.3), (0.7, 0.8, 0.9)
    both = load_backbone(f"timm:{NAME}", weights=file, mean=mean, std=std)
    assert (both.mean, both.std) == (mean, std)
    one = load_backbone(f"timm:{NAME}", weights=file, mean=mean)
    assert (one.mean, one.std) == (mean, IMAGENET_STD)
    assert load_backbone(f"timm:{NAME}", weights="random", std=std).std == std
    Backbone(vit(), NAME, {}, HALF, HALF, 160).save_pretrained(tmp_path / "run" / "export")
    assert load_backbone(str(tmp_path / "run"), mean=mean).mean == mean
    assert load_feature_network(f"timm:{NAME}", (1,), file, mean=mean).mean == mean


def test_perceptual_network__is_normalised_by_its_file(tmp_path: Path) -> None:
    torch.save(dino(vit().state_dict()), tmp_path / "dino.pth")
    network = load_feature_network(f"timm:{NAME}", (1, 2), str(tmp_path / "dino.pth"))
    assert network.mean == IMAGENET_MEAN
    torch.save(vit().state_dict(), tmp_path / "plain.pth")
    plain = load_feature_network(f"timm:{NAME}", (1, 2), str(tmp_path / "plain.pth"))
    assert plain.mean == HALF
    assert plain.notes[-1].endswith("give --perceptual.mean and --perceptual.std).")


# ------------------------------------------------------------------------------------------------- sizes and formats


@pytest.mark.parametrize("kind", ["vit", "beit"])
@pytest.mark.parametrize("size", [64, 96])
def test_file__at_another_size_is_resized_once(tmp_path: Path, kind: str, size: int) -> None:
    name = {"vit": "vit_tiny_patch16_224", "beit": "beit_base_patch16_224"}[kind]
    torch.manual_seed(0)
    more: dict[str, Any] = {"vit": {}, "beit": {"init_values": 0.1}}[kind]
    network: Any = timm.create_model(name, num_classes=0, img_size=64, **more)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    torch.save({"model": network.state_dict()}, tmp_path / "weights.pth")
    backbone = load_backbone(f"timm:{name}", weights=str(tmp_path / "weights.pth"), image_size=size)
    if size != 64:
        network.set_input_size(img_size=size)
    images = torch.rand(1, 3, size, size)
    assert_close(backbone.network.eval()(images), network.eval()(images), atol=1e-5, rtol=1e-4)
    assert backbone.image_size == size


def test_file__at_another_size_of_a_network_that_timm_does_not_resize(tmp_path: Path) -> None:
    network = timm.create_model("cait_xxs24_224", num_classes=0)
    ramp = torch.linspace(0, 1, 14).repeat_interleave(14)[:, None]  # from the first row to the last
    network.pos_embed.data[0] = ramp
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = load_backbone("timm:cait_xxs24_224", weights=str(tmp_path / "weights.pth"), image_size=112)
    table = backbone.network.get_parameter("pos_embed")[0, :, 0].view(7, 7)
    assert_close(table.std(1), torch.zeros(7), atol=1e-5, rtol=0)
    assert (table[1:, 0] > table[:-1, 0]).all()


def test_file__without_a_size_keeps_its_own(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = load_backbone("timm:vit_tiny_patch16_224", weights=str(tmp_path / "weights.pth"))
    assert backbone.image_size == backbone.args["img_size"] == 64
    assert torch.equal(backbone.network.get_parameter("pos_embed"), network.pos_embed)


def augreg(network: Any) -> dict[str, Any]:
    """The weights of a ViT under the names and in the shapes of Google's files."""
    arrays: dict[str, Any] = {
        "embedding/kernel": network.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": network.patch_embed.proj.bias,
        "cls": network.cls_token,
        "Transformer/posembed_input/pos_embedding": network.pos_embed,
        "Transformer/encoder_norm/scale": torch.full_like(network.norm.weight, 3.0),
        "Transformer/encoder_norm/bias": network.norm.bias,
    }
    for number, block in enumerate(network.blocks):
        start, heads = f"Transformer/encoderblock_{number}/", block.attn.num_heads
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays |= {start + theirs + "/scale": getattr(block, ours).weight}
            arrays |= {start + theirs + "/bias": getattr(block, ours).bias}
        qkv = block.attn.qkv
        parts = zip(("query", "key", "value"), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)
        for part, weight, bias in parts:
            place = f"{start}MultiHeadDotProductAttention_1/{part}/"
            arrays |= {place + "kernel": weight.t().reshape(64, heads, -1), place + "bias": bias.reshape(heads, -1)}
        place = f"{start}MultiHeadDotProductAttention_1/out/"
        arrays |= {place + "kernel": block.attn.proj.weight.t(), place + "bias": block.attn.proj.bias}
        for index, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            place = f"{start}MlpBlock_3/Dense_{index}/"
            arrays |= {place + "kernel": layer.weight.t(), place + "bias": layer.bias}
    return {key: value.detach().numpy() for key, value in arrays.items()}


def test_npz__is_read_as_timm_reads_it(tmp_path: Path) -> None:
    network: Any = vit()
    np.savez(tmp_path / "augreg.npz", **augreg(network))
    backbone = load_backbone(f"timm:{NAME}", weights=str(tmp_path / "augreg.npz"), pool_mean=True)
    assert backbone.network.get_parameter("fc_norm.weight")[0] == 3
    assert_close(backbone.network.get_parameter("blocks.0.attn.qkv.weight"), network.blocks[0].attn.qkv.weight)
    assert backbone.mean == HALF
    Backbone(vit(), NAME, {}, IMAGENET_MEAN, IMAGENET_STD, 160).save_pretrained(tmp_path / "run" / "export")
    of_run = load_backbone(str(tmp_path / "run"), weights=str(tmp_path / "augreg.npz"))
    assert of_run.network.get_parameter("norm.weight")[0] == 3
    assert of_run.mean == HALF
    with pytest.raises(WeightsError, match=r"do not fit this network"):
        load_backbone("timm:vit_tiny_patch16_224", weights=str(tmp_path / "augreg.npz"))
    with pytest.raises(WeightsError, match=r"reads no \.npz file"):
        load_backbone("timm:test_resnet", weights=str(tmp_path / "augreg.npz"))


@pytest.mark.parametrize("more", [{"depth": 7}, {"patch_size": 8}])
def test_npz__of_another_depth_or_patch_size_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    """timm would read the first blocks of a deeper network, and resample the patches."""
    np.savez(tmp_path / "other.npz", **augreg(vit(**more)))
    with pytest.raises(WeightsError, match=r"patches and blocks hold [\d,]+ numbers, not [\d,]+"):
        load_backbone(f"timm:{NAME}", weights=str(tmp_path / "other.npz"))


def test_npz__of_all_blocks_in_one_array_is_read(tmp_path: Path) -> None:
    """big_vision stacks the blocks, and counts their parts otherwise."""
    network: Any = vit()
    arrays, names = (
        augreg(network),
        {"LayerNorm_2": "LayerNorm_1", "Attention_1": "Attention_0", "MlpBlock_3": "MlpBlock_0"},
    )
    inside = {f"params/img/{name}": value for name, value in arrays.items() if "encoderblock" not in name}
    inside["params/img/pos_embedding"] = inside.pop("params/img/Transformer/posembed_input/pos_embedding")
    for name in [name for name in arrays if "encoderblock_0/" in name]:
        stacked = np.stack([arrays[name.replace("block_0", f"block_{n}")] for n in range(len(network.blocks))])
        for old, new in names.items():
            name = name.replace(old, new)
        inside[f"params/img/{name.replace('block_0', 'block')}"] = stacked
    inside["params/txt/Encoder_0/encoderblock/LayerNorm_0/scale"] = np.zeros((3, 64), np.float32)
    np.savez(tmp_path / "siglip.npz", **inside)
    backbone = load_backbone(f"timm:{NAME}", weights=str(tmp_path / "siglip.npz"))
    images = torch.rand(1, 3, 160, 160)
    network.norm.weight.data.fill_(3.0)
    assert_close(backbone.network.eval()(images), network(images))


def test_checkpoint__with_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("code of a file ran",)

    torch.save({"state_dict": vit().state_dict(), "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="pecobook runs no code from a file"):
        load_backbone(f"timm:{NAME}", weights=str(tmp_path / "evil.pth"))
