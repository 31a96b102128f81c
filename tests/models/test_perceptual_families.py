"""Perceptual networks of today, small and with random weights, and sums of several networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pecobook.errors import ConfigError
from pecobook.models import weights
from pecobook.models.networks import create_network
from pecobook.models.perceptual import PerceptualDistance, PerceptualSum, build_perceptual_distance
from pecobook.settings.perceptual import PerceptualConfig

_SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_IMAGENET = (0.485, 0.456, 0.406)
# timm's name, arguments, prefix tokens, patch, own side, and mean of the input.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int, int, tuple[float, ...]]] = {
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", _SMALL, 5, 14, 518, _IMAGENET),
    "DINOv3": ("vit_small_patch16_dinov3", _SMALL, 5, 16, 256, _IMAGENET),
    "SigLIP": ("vit_base_patch16_siglip_224", _SMALL, 0, 16, 224, (0.5, 0.5, 0.5)),
    "SAM": ("samvit_base_patch16", {**_SMALL, "global_attn_indexes": (1,)}, 0, 16, 1024, _IMAGENET),
    "EVA-02": ("eva02_tiny_patch14_224", _SMALL, 1, 14, 224, (0.48145466, 0.4578275, 0.40821073)),
}


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the networks of FAMILIES small, through the same functions as the large ones."""
    small = {name: arguments for name, arguments, *_ in FAMILIES.values()}

    def create(name: str, download: bool = False, /, **arguments: Any) -> torch.nn.Module:
        return create_network(name, download, **{**small.get(name.removeprefix("timm:"), {}), **arguments})

    monkeypatch.setattr(weights, "create_network", create)


def pictures(seed: int, side: int = 64) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_distance__of_todays_networks(family: str) -> None:
    name, _, prefix, patch, own_size, mean = FAMILIES[family]
    side = 8 * patch
    distance = PerceptualDistance(f"timm:{name}", (1, 2), "random", input_size=side)
    assert distance.mean.flatten().tolist() == pytest.approx(mean)
    x, y = pictures(0), pictures(1).requires_grad_()
    assert distance(x, x).item() == 0
    value = distance(x, y)
    value.backward()
    assert value.item() > 0
    assert y.grad is not None
    assert (y.grad.abs().sum((0, 1)) > 0).all()  # every pixel counts
    assert all(parameter.grad is None for parameter in distance.parameters())
    # The features are the outputs of the blocks without class token and registers, row by row.
    network: Any = distance.network.network
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for block in network.blocks]
    with torch.no_grad():
        maps = distance.network(x.new_ones(1, 3, side, side) * torch.linspace(0, 1, side))
    for handle in handles:
        handle.remove()
    for feature, tokens in zip(maps, outputs, strict=True):
        assert feature.shape == (1, 32, 8, 8)
        assert_close(feature.flatten(2).transpose(1, 2), tokens.reshape(1, -1, 32)[:, prefix:])
    assert distance.check_image_size(64, 64) == [(32, 8, 8)] * 2
    assert distance.input_notes(side) == ()
    line = f"reads images resized from 64 to {side} pixels"
    assert line in distance.input_notes(64)[0]
    # Without a size, the network's own.
    assert PerceptualDistance(f"timm:{name}", (1,), "random").input_size == own_size


def test_input_size__is_whole_patches() -> None:
    message = r"--perceptual.input-size 250: 'timm:vit_small_.*' has patches of 14 pixels: give 252"
    with pytest.raises(ConfigError, match=message):
        PerceptualDistance("timm:vit_small_patch14_reg4_dinov2", (1,), "random", input_size=250)


def test_also__adds_networks_each_with_its_settings() -> None:
    first = "timm:vit_small_patch16_dinov3"
    config = PerceptualConfig(
        network=first,
        weights="random",
        layers=(1, 2),
        normalisation="layernorm",
        input_size=64,
        also=(
            "timm:resnet10t weights=random layers=1,3 weight=0.25 normalisation=none mean=0,0,0 std=1,1,1",
            "timm:vit_base_patch16_siglip_224 weights=random input-size=32",
        ),
    )
    total = build_perceptual_distance(config, seed=2)
    assert isinstance(total, PerceptualSum)
    parts = [
        (1.0, PerceptualDistance(first, (1, 2), "random", seed=2, normalisation="layernorm", input_size=64)),
        (
            0.25,
            PerceptualDistance(
                "timm:resnet10t", (1, 3), "random", seed=2, normalisation="none", mean=(0, 0, 0), std=(1, 1, 1)
            ),
        ),
        (
            1.0,
            PerceptualDistance(
                "timm:vit_base_patch16_siglip_224", (1, 2), "random", seed=2, normalisation="layernorm", input_size=32
            ),
        ),
    ]
    x, y = pictures(0), pictures(1)
    expected = sum(weight * part(x, y) for weight, part in parts)
    assert_close(total(x, y), expected)
    assert_close(total.distance_to_features(total.features(x), y), expected)
    assert total.per_layer(x, y).shape == (6, 1)
    assert len(total.check_image_size(64, 64)) == 6
    assert not total.train().distances[1].training
    assert len(total.input_notes(64)) == 1  # the third network alone reads another size


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("timm:resnet10t layers", "takes NETWORK NAME=VALUE ... in quotes, not 'timm:resnet10t layers'"),
        (
            "timm:resnet10t layer=1",
            "--perceptual.also 'timm:resnet10t': Unknown setting 'layer'. Did you mean 'layers'",
        ),
        ("timm:resnet10t layers=0", "takes one or more layers"),
        ("timm:resnet10t weight=0", "weight must be above 0, not 0"),
        ("timm:resnet10t weight=x", "takes a number, not 'x'"),
    ],
)
def test_also__that_is_wrong(also: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PerceptualConfig(network="timm:resnet10t", layers=(1,), also=(also,))
    assert message in str(error.value)
    with pytest.raises(ConfigError, match=r"adds to --perceptual.network, which is none"):
        PerceptualConfig(network="none", also=("timm:resnet10t",))
