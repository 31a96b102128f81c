from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy import interpolate
from torch import Tensor, nn

from pecobook.engine.optim import dense_groups
from pecobook.errors import WeightsError
from pecobook.models.dense.pyramid import (
    FeaturePyramid,
    build_pyramid,
    describe_pyramid,
    from_windows,
    rebuild_pyramid,
    to_windows,
)
from pecobook.models.dense.relative_positions import relative_position_index
from pecobook.models.network_traits import network_traits
from pecobook.models.weights import Backbone
from pecobook.settings.dense import PyramidConfig
from pecobook.settings.segment import SegmentConfig
from pecobook.settings.training import OptimConfig

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 6, "num_heads": 2}
SHARED = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
KINDS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beit-shared": ("beit_base_patch16_224", SHARED),
    "beit-absolute": ("beit_base_patch16_224", {"use_abs_pos_emb": True}),
}


def network(kind: str, **more: Any) -> nn.Module:
    """A ViT whose position tables are not the zeros they begin as."""
    name, args = KINDS[kind]
    torch.manual_seed(0)
    backbone: nn.Module = timm.create_model(
        name, num_classes=0, **{**VIT, **args, **more}, **network_traits(name).any_size
    )
    for key, table in backbone.named_parameters():
        if "relative_position" in key or "pos_embed" in key:
            nn.init.normal_(table)
    return backbone.eval()


def pyramid(kind: str, image_size: int = 32, **config: Any) -> FeaturePyramid:
    return FeaturePyramid(network(kind), image_size, PyramidConfig(**config)).eval()


def pictures(height: int = 32, width: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_forward__four_maps_of_the_blocks_at_four_strides(kind: str) -> None:
    model, x = pyramid(kind), pictures()
    maps = model(x)
    assert list(model.strides) == [1, 2, 4, 8]
    assert [tuple(features.shape) for features in maps] == [(2, 24, 32 // s, 32 // s) for s in model.strides]
    # Blocks 2, 3, 4 and 6 of 6, by timm's own forward, at the network's own size: nothing is interpolated.
    expected = network(kind).forward_intermediates(x, indices=[1, 2, 3, 5], intermediates_only=True)  # type: ignore[operator]
    torch.testing.assert_close(maps[2], expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps[3], nn.functional.max_pool2d(expected[3], 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps[1], model.scale[1](expected[1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps[0], model.scale[0](expected[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_forward__a_larger_size_as_timm_resizes_positions_for_it(kind: str) -> None:
    reference = network(kind)
    reference.set_input_size(img_size=56)  # type: ignore[operator]
    expected = reference.forward_intermediates(pictures(56, 56), indices=[3], intermediates_only=True)  # type: ignore[operator]
    torch.testing.assert_close(pyramid(kind, 56)(pictures(56, 56))[2], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 3])
def test_forward__any_size_and_shape(kind: str, window: int) -> None:
    model = pyramid(kind, 48, window=window)
    for height, width in ((48, 48), (20, 44), (45, 31), (64, 24), (3, 50)):
        shapes = [tuple(features.shape[2:]) for features in model(pictures(height, width, 1))]
        rows, columns = -(-height // 4), -(-width // 4)
        assert shapes[2] == (rows, columns)
        assert shapes[0] == (4 * rows, 4 * columns)


def test_relative_table__is_resized_by_beits_geometric_scheme() -> None:
    """BEiT's own interpolation, derived again: source places grow geometrically until they span the target."""
    before = network("beit").blocks[0].attn.relative_position_bias_table.detach().double().numpy()  # type: ignore
    after = pyramid("beit", 56).network.blocks[0].attn.relative_position_bias_table.detach()  # type: ignore
    source, target = 2 * 8 - 1, 2 * 14 - 1
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (source // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > target // 2 else (ratio, high)
    steps = np.cumsum([ratio**power for power in range(source // 2)])
    places = np.concatenate([-steps[::-1], [0], steps])
    wanted = np.arange(-(target // 2), target // 2 + 1)
    for head in range(2):
        values = before[:-3, head].reshape(source, source)
        # timm interpolates linearly where BEiT's first code took a cubic spline, which swings between the places.
        lines = interpolate.RegularGridInterpolator(
            (places, places), values, "linear", bounds_error=False, fill_value=None
        )
        expected = lines(np.stack(np.meshgrid(wanted, wanted, indexing="ij"), -1))
        resized = after[:-3, head].reshape(target, target).numpy()
        np.testing.assert_allclose(resized, expected, rtol=1e-4, atol=1e-4)
        near = resized[target // 2 - 1 : target // 2 + 2, target // 2 - 1 : target // 2 + 2]
        # A step of one patch keeps its meaning, which stretching the table evenly would not do.
        np.testing.assert_allclose(near, values[6:9, 6:9], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after[-3:], before[-3:], rtol=1e-6)


def test_relative_position_index__by_hand() -> None:
    index = relative_position_index((2, 1), (3, 2))  # table of 5 x 3 offsets
    assert index.tolist() == [[17, 15, 15], [16, 7, 4], [16, 10, 7]]
    attention = network("beit").blocks[0].attn  # type: ignore
    assert torch.equal(relative_position_index((8, 8), (8, 8)), attention.relative_position_index)
    # Farther than the table reaches: its farthest.
    far = relative_position_index((4, 1), (2, 1))
    assert far[1:, 1:].tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]


def test_windows__and_back() -> None:
    x = torch.randn(2, 2 + 5 * 7, 3)
    windows = to_windows(x, (5, 7), 3, 2)
    assert windows.shape == (2 * 2 * 3, 2 + 9, 3)
    torch.testing.assert_close(windows[0, 2:], x[0, 2:].view(5, 7, 3)[:3, :3].reshape(9, 3))
    assert not windows[-1, 2 + 1 : 2 + 3].any()  # beyond the last column
    torch.testing.assert_close(from_windows(windows, (5, 7), 3, 2), x)


@pytest.mark.parametrize("kind", KINDS)
def test_window__of_the_whole_grid_is_no_window(kind: str) -> None:
    torch.testing.assert_close(pyramid(kind, window=8)(pictures())[2], pyramid(kind)(pictures())[2])


@pytest.mark.parametrize("kind", ["vit", "beit"])
def test_window__blocks_see_their_own_window_alone(kind: str) -> None:
    model = pyramid(kind, window=4)
    assert model.body.windowed == [False, True, True, False, True, False] or sum(model.body.windowed) == 2  # type: ignore
    model.body.windowed = [True] * 6
    first = model.body.network.blocks[1].attn
    tokens = torch.randn(1, 1 + 64, 24)
    other = tokens.clone()
    other[:, 1:].view(1, 8, 8, 24)[:, :, 4:] = 0
    model.body.grid = (8, 8)
    if kind == "beit":
        model.body.relative.prepare((8, 8))  # type: ignore
    a, b = (first(value)[:, 1:].view(8, 8, 24) for value in (tokens, other))
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("kind", [*KINDS, "resnet18", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_050"])
def test_every_parameter_has_a_gradient(kind: str) -> None:
    """Or data-parallel training would wait for it."""
    backbone = network(kind) if kind in KINDS else timm.create_model(kind, num_classes=0)
    model = FeaturePyramid(backbone, 48).train()
    sum(features.square().mean() for features in model(pictures(48, 40))).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    groups = dense_groups(model.network, [model.scale], OptimConfig())
    assert {id(value) for group in groups for value in group["params"]} == {id(value) for value in model.parameters()}


def test_resnet__its_own_four_stages() -> None:
    model = FeaturePyramid(timm.create_model("resnet18", num_classes=0), 64).eval()
    assert (model.channels, model.strides) == ((64, 128, 256, 512), (4, 8, 16, 32))
    assert [tuple(features.shape[1:]) for features in model(pictures(64, 96))] == [
        (64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "beit-shared"])
def test_checkpointing__changes_nothing(kind: str) -> None:
    results = []
    for checkpointing in (False, True):
        model = pyramid(kind, checkpointing=checkpointing, window=4).train()
        sum(features.square().mean() for features in model(pictures())).backward()
        results.append([value.grad for value in model.parameters()])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


def test_frozen__stays_as_it_is() -> None:
    model = FeaturePyramid(timm.create_model("resnet18", num_classes=0), 64, PyramidConfig(frozen=True)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(pictures(64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # BatchNorm too
    assert dense_groups(model.network, [model.scale], OptimConfig(), frozen=True) == []
    vit = FeaturePyramid(network("vit"), 32, PyramidConfig(frozen=True)).train()
    sum(features.mean() for features in vit(pictures())).backward()
    assert all(value.grad is None for value in vit.network.parameters())
    assert all(value.grad is not None for value in vit.scale.parameters())


def test_parameter_groups__the_backbone_learns_slower_from_layer_to_layer() -> None:
    model = pyramid("vit")
    groups = dense_groups(model.network, [model.scale], OptimConfig(layer_decay=0.5))
    scales = {id(value): group.get("lr_scale", 1.0) for group in groups for value in group["params"]}
    blocks: Any = model.network.blocks
    rates = [scales[id(block.attn.qkv.weight)] for block in blocks]
    assert rates == pytest.approx([0.5 ** (6 - number) for number in range(6)])
    assert scales[id(model.network.pos_embed)] == pytest.approx(0.5**7)


@pytest.mark.parametrize(
    ("name", "args", "config", "message"),
    [
        ("vit_tiny_patch16_224", {**VIT, "patch_size": 2}, {}, "patches of 2"),
        ("vit_tiny_patch16_224", {**VIT, "depth": 1}, {}, "1 blocks"),
        ("resnet18", {}, {"window": 4}, "no attention"),
        ("vit_small_patch16_rope_224", {}, {"window": 4}, "rotary"),
        ("efficientvit_m0", {}, {}, "four strides"),
    ],
)
def test_refuses__what_has_no_pyramid(name: str, args: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        FeaturePyramid(timm.create_model(name, num_classes=0, **args), 32, PyramidConfig(**config))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_rebuild__is_the_inverse_of_describe(name: str) -> None:
    config = PyramidConfig(window=7)
    kind = "beit" if name.startswith("beit") else "vit"
    model = FeaturePyramid(network(kind), 48, config).eval()
    backbone = Backbone(model.network, name, VIT, (0.5,) * 3, (0.5,) * 3, 32)
    again = rebuild_pyramid(describe_pyramid(backbone, config, 48)).eval()
    again.load_state_dict(model.state_dict())
    for first, second in zip(model(pictures(48, 36)), again(pictures(48, 36)), strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kind", ["vit", "beit"])
def test_forward__of_two_blocks(kind: str) -> None:
    model = FeaturePyramid(network(kind, depth=2), 32).eval()
    expected = network(kind, depth=2).forward_intermediates(pictures(), indices=[0, 1], intermediates_only=True)  # type: ignore[operator]
    maps = model(pictures())
    torch.testing.assert_close(maps[2], expected[0])
    torch.testing.assert_close(maps[3], nn.functional.max_pool2d(expected[1], 2))


def test_build_pyramid__by_name() -> None:
    config = SegmentConfig(backbone="timm:vit_tiny_patch16_224", weights="random", image_size=64, drop_path=0.1)
    model, backbone = build_pyramid(config)
    assert (backbone.name, model.strides) == ("vit_tiny_patch16_224", (4, 8, 16, 32))
    assert model(pictures(64, 80, 1))[0].shape == (1, 192, 16, 20)
