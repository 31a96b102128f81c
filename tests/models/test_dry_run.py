"""What networks can do, asked from the networks; dry runs; and whether hidden pixels reach visible patches."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pecobook.analysis.features import layer_features
from pecobook.commands.extract import check_reads
from pecobook.errors import PecobookError, WeightsError
from pecobook.models.dense.pyramid import build_pyramid
from pecobook.models.dry_run import dry_run, leaks
from pecobook.models.masked_check import check_network
from pecobook.models.masked_vit import MaskedImageModel, VisibleOnlyModel
from pecobook.models.network_traits import network_traits
from pecobook.models.weights import Backbone, load_backbone
from pecobook.settings.images import IMAGENET_MEAN, IMAGENET_STD
from pecobook.settings.pretrain import DecoderConfig, MaskConfig, PretrainConfig
from pecobook.settings.segment import SegmentConfig
from tests.runs import train

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}

# Name: is a plain transformer, is built for one size, can pool the mean of its patches.
TRAITS = {
    "vit_base_patch16_224": (True, True, True),
    "beit_base_patch16_224": (True, True, True),
    "eva02_tiny_patch14_224": (True, True, True),
    "flexivit_small": (True, True, True),
    "aimv2_large_patch14_224": (True, True, True),
    "deit_tiny_distilled_patch16_224": (True, True, False),
    "swin_tiny_patch4_window7_224": (False, True, False),
    "cait_xxs24_224": (False, True, False),
    "hiera_tiny_224": (False, True, False),
    "resnet18": (False, False, False),
    "no_such_network": (False, False, False),
}


@pytest.mark.parametrize("name", TRAITS)
def test_traits__are_those_of_the_module(name: str) -> None:
    traits = network_traits(f"timm:{name}")
    assert (traits.is_plain, traits.takes_size, traits.pools_mean) == TRAITS[name]


def test_masked_run__of_a_flexivit_is_used_by_the_mean_of_its_patches(tmp_path: Path) -> None:
    network = timm.create_model("flexivit_small", num_classes=0, **SMALL)
    backbone = Backbone(network, "flexivit_small", SMALL, IMAGENET_MEAN, IMAGENET_STD, 32, target="tokens")
    backbone.save_pretrained(tmp_path / "export")
    pooled = load_backbone(str(tmp_path), pool_mean=True, image_size=64)
    assert pooled.args == {**SMALL, "global_pool": "avg", "img_size": 64}
    assert pooled.network(torch.zeros(1, 3, 64, 64)).shape == (1, 24)


# ------------------------------------------------------------------------------------------------------------ dry run


class Part(nn.Module):
    """A network with a batch norm, dropout and a weight that only some modes use."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.layer, self.norm, self.spare = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(self.layer(x)))
        if self.kind == "value":
            x = x * float(x.detach().mean())  # which the meta device does not know
        y: Tensor = x if self.kind == "unused" else self.spare(x)
        return y


def test_dry_run__changes_nothing() -> None:
    part = Part()
    before, noise = {name: value.clone() for name, value in part.state_dict().items()}, torch.get_rng_state()
    assert dry_run(part, (torch.ones(2, 4),), network="part", purpose="learn").is_meta
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
    assert all(parameter.grad is None for parameter in part.parameters())
    assert torch.equal(torch.get_rng_state(), noise)
    # A network that needs values runs for real, and is as unchanged.
    part.kind = "value"
    assert not dry_run(part, (torch.ones(2, 4),), network="part", purpose="learn").is_meta
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)


def test_dry_run__names_the_network_and_the_reason() -> None:
    message = r"'part' cannot learn: mat1 and mat2 shapes cannot be multiplied .*\. Choose another network\.$"
    with pytest.raises(WeightsError, match=message):
        dry_run(Part(), (torch.ones(2, 5),), network="part", purpose="learn")
    with pytest.raises(WeightsError, match=r"multiplied .*\. Give less\.$"):
        dry_run(Part(), (torch.ones(2, 5),), network="part", purpose="learn", remedy="Give less.")
    message = r"'part' cannot learn: its weight 'spare.weight' and 1 more would get no gradient"
    with pytest.raises(WeightsError, match=message):
        dry_run(Part("unused"), (torch.ones(2, 4),), network="part", purpose="learn")
    dry_run(Part("unused"), (torch.ones(2, 4),), network="part", purpose="read", backward=False)


# --------------------------------------------------------------------------------------------------------------- leak


def is_leaking(network: nn.Module, side: int, *, visible_only: bool = False, whole: bool = False) -> bool:
    model: Any = (
        VisibleOnlyModel(network, 5, DecoderConfig(depth=1, width=16, num_heads=2))
        if visible_only
        else MaskedImageModel(network, 5)
    )
    rows, columns = model.grid
    mask = torch.zeros(2, rows, columns, dtype=torch.bool)
    mask[:, 0, 1] = mask[:, 1, 0] = True
    return leaks(model.train(), torch.rand(2, 3, side, side), mask, 2, patch=side // rows, whole=whole)


class Centred(nn.Module):
    def forward(self, patches: Tensor) -> Tensor:
        return patches - patches.mean(1, keepdim=True)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("visible_only", [False, True])
def test_leaks__where_patches_overlap_or_share_statistics(visible_only: bool, whole: bool) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, drop_path_rate=0.5, **SMALL)
    assert not is_leaking(plain, 32, visible_only=visible_only, whole=whole)
    shared = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)
    shared.patch_embed.norm = Centred()
    assert is_leaking(shared, 32, visible_only=visible_only, whole=whole)
    overlapping = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)
    overlapping.patch_embed.proj = nn.Conv2d(3, 24, 10, stride=8, padding=1)
    assert is_leaking(overlapping, 32, visible_only=visible_only, whole=whole)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 1}, "lets pixels of hidden patches reach visible patches"),
        ("deit_tiny_distilled_patch16_224", SMALL, "can only be used by its class token"),
        ("vit_tiny_patch16_224", SMALL, ""),
        ("beit_base_patch16_224", SMALL | {"init_values": 0.1}, ""),
    ],
)
def test_check_network__of_pretraining(name: str, args: dict[str, Any], message: str) -> None:
    model = MaskedImageModel(timm.create_model(name, num_classes=0, **args), 5)
    config = PretrainConfig(image_size=64 if "_r_" in name else 32, mask=MaskConfig(num_masked=2))
    with pytest.raises(WeightsError, match=message) if message else contextlib.nullcontext():
        check_network(config, model)


# -------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        (
            "finetune",
            {"backbone": "timm:test_convnext", "weights": "random", "image_size": 16},
            "'timm:test_convnext' cannot",
        ),
        ("pretrain", {"model.name": "swin_tiny_patch4_window7_224"}, "'swin_tiny_patch4_window7_224' cannot be pre-"),
        # ResNets take neither an image size nor, of VGGs, a rate of stochastic depth; the user wrote neither.
        (
            "pretrain",
            {"model.name": "resnet18", "model.args": "{}"},
            "'resnet18' cannot be pre-trained by masked modelling: ResNet has no patches to mask",
        ),
        (
            "pretrain",
            {"model.name": "vgg11", "model.args": "{}"},
            "'vgg11' cannot be pre-trained by masked modelling: VGG has no patches to mask",
        ),
        (
            "contrast",
            {"model.name": "test_convnext", "image_size": 16},
            "'test_convnext' cannot learn from images of 16 pixels (it is made for 160): ",
        ),
        (
            "finetune",
            {"backbone": "timm:inception_v3", "weights": "random", "image_size": 64, "drop_path": 0.0},
            "Kernel size can't be greater than actual input size. Give --image-size 299, or another network.",
        ),
        (
            "finetune",
            {"backbone": "timm:vit_tiny_patch16_224", "weights": "random", "image_size": 54},
            "whole patches of 16 pixels leave out the last 6 pixels of every row and column. Give --image-size 48.",
        ),
        ("contrast", {"model.name": "vit_tiny_patch16_224", "image_size": 26}, "the last 10 pixels of every row"),
        (
            "finetune",
            {"backbone": "timm:vgg11", "weights": "random", "drop_path": 0.1},
            "timm's 'vgg11' has no stochastic depth: give --drop-path 0.",
        ),
        (
            "codebook",
            {"perceptual.network": "timm:cait_xxs24_224", "perceptual.weights": "random", "perceptual.input_size": 64},
            "'timm:cait_xxs24_224' cannot read images of",
        ),
    ],
)
def test_preflight__refuses_a_network_by_name_before_the_run_folder_exists(
    command: str, more: dict[str, Any], message: str, images: Path, tmp_path: Path
) -> None:
    if command in ("pretrain", "contrast"):
        more = {**more, "model.args": "{}"}
    if command == "pretrain":
        more = {**more, "target": "pixels", "image_size": 224}
    with pytest.raises(PecobookError) as caught:
        train(command, images, tmp_path / "run", **more)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_check_reads__refuses_what_whole_patches_leave_out() -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **(SMALL | {"img_size": 38}))
    images = torch.rand(1, 3, 38, 38)
    cut = images.clone()
    cut[..., 32:] = cut[..., 32:, :] = 0
    assert torch.equal(network.eval()(images), network(cut))  # timm reads neither the last columns nor the last rows
    with pytest.raises(WeightsError, match="Give --image-size 40"):
        check_reads(network, 38, "timm:vit_tiny_patch16_224")


def test_finetune__of_a_distilled_network_trains_both_heads(images: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    more: dict[str, Any] = {"backbone": "timm:deit_tiny_distilled_patch16_224", "weights": "random", "max_steps": "1"}
    run = train("finetune", images, tmp_path / "run", **more, image_size=32)
    assert (run / "train.log").read_text().count("reads images minus mean 0.485") == 1
    state = load_file(run / "export" / "model.safetensors")
    for head in ("head", "head_dist"):
        assert 0 < float(state[f"{head}.weight"].abs().max()) < 0.02, head  # both begin near zero
    assert load_backbone(str(run)).network(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


def random_network(name: str, side: int = 96) -> SegmentConfig:
    return SegmentConfig(backbone=f"timm:{name}", weights="random", image_size=side, drop_path=0.0)


def test_pyramid__of_a_swin_takes_any_size() -> None:
    pyramid, _ = build_pyramid(random_network("swin_tiny_patch4_window7_224"))
    assert [tuple(x.shape[2:]) for x in pyramid.eval()(torch.zeros(1, 3, 70, 49))] == [(18, 13), (9, 7), (5, 4), (3, 2)]
    maps = pyramid(torch.zeros(1, 3, 96, 64))
    assert [tuple(x.shape[1:]) for x in maps] == [(96, 24, 16), (192, 12, 8), (384, 6, 4), (768, 3, 2)]


def test_pyramid__of_overlapping_patches_has_the_strides_of_the_network() -> None:
    pyramid, _ = build_pyramid(random_network("pvt_v2_b0"))
    maps = pyramid.eval()(torch.zeros(1, 3, 96, 64))
    assert [tuple(x.shape[1:]) for x in maps] == [(32, 24, 16), (64, 12, 8), (160, 6, 4), (256, 3, 2)]


def test_pyramid__refuses_a_network_that_reads_squares_alone() -> None:
    message = (
        r"'timm:sam2_hiera_tiny' cannot form a pyramid for images of any size: .*\. Choose another network, such as"
    )
    with pytest.raises(WeightsError, match=message):
        build_pyramid(random_network("sam2_hiera_tiny", 64))


@pytest.mark.parametrize(("name", "features"), [("test_vit_relpos", "block 1 mean"), ("test_resnet", "output")])
def test_probe__reads_networks_with_and_without_class_tokens(name: str, features: str) -> None:
    network = timm.create_model(name, num_classes=0).eval()
    side = network.pretrained_cfg["input_size"][-1]
    layers = layer_features(network, torch.zeros(2, 3, side, side), every_layer=True)
    assert features in layers
    assert not any("class" in layer for layer in layers)
