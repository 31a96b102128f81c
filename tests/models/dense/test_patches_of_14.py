"""Patches of 14 pixels, as in ViT-H: levels at strides 3.5, 7, 14 and 28, and exact places in both models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from pecobook.models.dense.detector import Detector, _Anchors, _roi_align
from pecobook.models.dense.pyramid import FeaturePyramid, build_pyramid, describe_pyramid
from pecobook.models.dense.segmenter import Segmenter
from pecobook.models.network_traits import network_traits
from pecobook.models.weights import Backbone
from pecobook.settings.dense import PyramidConfig
from pecobook.settings.detect import DetectorConfig
from pecobook.settings.segment import SegmentConfig, SegmenterConfig, SegmentTestConfig

NAME = "vit_huge_patch14_224"
ARGS: dict[str, Any] = {"img_size": 56, "embed_dim": 24, "depth": 6, "num_heads": 2}
STRIDES = (3.5, 7, 14, 28)


def network() -> nn.Module:
    torch.manual_seed(0)
    backbone: nn.Module = timm.create_model(NAME, num_classes=0, **ARGS, **network_traits(NAME).any_size)
    nn.init.normal_(backbone.pos_embed)  # type: ignore[arg-type]
    return backbone.eval()


def parts(size: int = 56) -> tuple[FeaturePyramid, dict[str, Any]]:
    pyramid = FeaturePyramid(network(), size).eval()
    backbone = Backbone(pyramid.network, NAME, ARGS, (0.5,) * 3, (0.5,) * 3, 56)
    return pyramid, describe_pyramid(backbone, PyramidConfig(), size)


def pictures(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("height", "width"), [(56, 56), (28, 84), (112, 70), (50, 57), (224, 14)])
def test_levels__cover_whole_patches(height: int, width: int) -> None:
    pyramid = parts()[0]
    assert list(pyramid.strides) == list(STRIDES)
    rows, columns = -(-height // 14), -(-width // 14)
    shapes = [tuple(level.shape[1:]) for level in pyramid(pictures(height, width))]
    assert shapes == [
        (24, 4 * rows, 4 * columns),
        (24, 2 * rows, 2 * columns),
        (24, rows, columns),
        (24, -(-rows // 2), -(-columns // 2)),
    ]


@pytest.mark.parametrize("side", [56, 112, 98])
def test_levels__are_timms_blocks_with_timms_positions(side: int) -> None:
    reference = network()
    reference.set_input_size(img_size=side)  # type: ignore[operator]
    blocks = reference.forward_intermediates(pictures(side, side), indices=[1, 3, 5], intermediates_only=True)  # type: ignore[operator]
    pyramid = parts()[0]
    levels = pyramid(pictures(side, side))
    torch.testing.assert_close(levels[0], pyramid.scale[0](blocks[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(levels[2], blocks[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(levels[3], nn.functional.max_pool2d(blocks[2], 2, ceil_mode=True), rtol=1e-4, atol=1e-4)


def test_levels__of_other_sizes_are_those_of_the_padded_image() -> None:
    pyramid, picture = parts()[0], pictures(50, 57)
    padded = torch.zeros(1, 3, 56, 70)
    padded[:, :, :50, :57] = picture
    for first, second in zip(pyramid(picture), pyramid(padded), strict=True):
        assert torch.equal(first, second)


class _Places(nn.Module):
    """Gives for each cell of the finest map the place of its centre in pixels: column, row."""

    def forward(self, levels: list[Tensor]) -> Tensor:
        rows, columns = levels[0].shape[2:]
        y, x = (torch.arange(rows) + 0.5) * 3.5, (torch.arange(columns) + 0.5) * 3.5
        return torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)])[None]


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize(("height", "width"), [(56, 56), (50, 57), (43, 112), (60, 71)])
def test_segmenter__scores_stand_at_their_pixels(height: int, width: int, mode: str) -> None:
    """A head that tells the place of each cell must tell the place of each pixel after all resizing and cutting."""
    model = Segmenter(*parts(), classes=("column", "row"), config=SegmenterConfig(auxiliary_width=0)).eval()
    model.head = _Places()  # type: ignore[assignment]
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    if mode == "slide":  # a single window: places count from the window's corner
        image = image[:, :56, :56]
    scores = model.scores([image], SegmentTestConfig(mode=mode))
    assert scores.shape == (2, *image.shape[1:])
    x, y = np.arange(image.shape[2]) + 0.5, np.arange(image.shape[1]) + 0.5
    inside = slice(2, -4)  # beyond the outermost centres, interpolation repeats the border
    np.testing.assert_allclose(scores[0, 0, inside], x[inside], atol=1e-3)
    np.testing.assert_allclose(scores[1, inside, 0], y[inside], atol=1e-3)


def test_anchors__stand_at_multiples_of_the_stride() -> None:
    levels = [torch.zeros(1, 1, round(112 / stride), round(168 / stride)) for stride in STRIDES]
    (anchors,) = _Anchors(STRIDES)(ImageList(torch.zeros(1, 3, 112, 168), [(112, 168)]), levels)
    expected = []
    for stride, level in zip(STRIDES, levels, strict=True):
        y, x = np.mgrid[: level.shape[2], : level.shape[3]] * float(stride)
        expected.append(np.stack([x, y], -1).reshape(-1, 1, 2).repeat(3, 1).reshape(-1, 2))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    np.testing.assert_allclose(centres, np.concatenate(expected), atol=1e-4)
    sides = (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt()
    assert sides[1] == 28  # eight strides of 3.5 pixels
    assert sides[-2] == 8 * 28


def test_pool__reads_each_level_at_its_stride() -> None:
    """Levels whose cells hold the place of their centre: the mean over a box is the box's centre."""
    places = {}
    for number, stride in enumerate(STRIDES):
        centres = (torch.arange(round(1120 / stride)) + 0.5) * stride
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"))
        places[str(number)] = grid[None]
    corners = 100 + 300 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corners, corners + torch.logspace(1, 2.8, 40)[:, None]], 1)
    pool = _roi_align(STRIDES, 7)
    pooled = pool(places, [boxes], [(1120, 1120)])
    levels = pool.map_levels([boxes])
    assert set(levels.tolist()) == {0, 1, 2, 3}
    # torchvision takes the corner of a cell for its centre, at every stride: half a cell.
    half = torch.tensor(STRIDES)[levels][:, None] / 2
    torch.testing.assert_close(pooled.mean((2, 3)) - half, (boxes[:, :2] + boxes[:, 2:]) / 2, rtol=0, atol=1e-2)


def detector() -> Detector:
    heads = DetectorConfig(width=16, head_width=32, proposals=60, samples=32, detections=10, score_threshold=0.0)
    torch.manual_seed(1)
    model = Detector(*parts(), classes=("disc",), category_ids=(1,), masks=True, sides=(70, 100), config=heads)
    return model.eval()


def test_detector__pads_to_two_patches_and_finds_boxes_in_the_image() -> None:
    model = detector()
    batch = model.pad_to_batch([torch.zeros(3, 60, 90, dtype=torch.uint8), torch.zeros(3, 57, 20, dtype=torch.uint8)])
    assert batch.tensors.shape == (2, 3, 84, 112)
    image = (255 * torch.rand(3, 77, 45, generator=torch.Generator().manual_seed(2))).byte()
    found = model.predict(image)
    assert len(found.scores)
    assert float(found.boxes.min()) >= 0
    assert float(found.boxes[:, 2].max()) <= 45.01
    assert float(found.boxes[:, 3].max()) <= 77.01


@pytest.mark.parametrize("kind", ["segmenter", "detector"])
def test_export__is_the_same_model(kind: str, tmp_path: Path) -> None:
    image = (255 * torch.rand(3, 61, 75, generator=torch.Generator().manual_seed(2))).byte()
    if kind == "detector":
        model = detector()
        model.save_pretrained(tmp_path / "export")
        again = Detector.from_pretrained(tmp_path / "export")
        torch.testing.assert_close(again.predict(image).boxes, model.predict(image).boxes)
        return
    segmenter = Segmenter(*parts(), classes=("a", "b"), config=SegmenterConfig(auxiliary_width=0)).eval()
    segmenter.save_pretrained(tmp_path / "export")
    test = SegmentTestConfig()
    scores = Segmenter.from_pretrained(tmp_path / "export").scores([image], test)
    torch.testing.assert_close(scores, segmenter.scores([image], test))


def test_build_pyramid__takes_it() -> None:
    config = SegmentConfig(backbone="timm:vit_small_patch14_dinov2", weights="random", image_size=56)
    pyramid, _ = build_pyramid(config)
    assert (list(pyramid.strides), pyramid.patch) == (list(STRIDES), 14)
    assert pyramid(pictures(60, 40))[0].shape == (1, 384, 20, 12)
