from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pecobook.data.dense.coco_values import encode_segment
from pecobook.data.dense.detection import Objects
from pecobook.data.dense.views import (
    Geometry,
    detection_test_view,
    detection_view,
    mask_boxes,
    move_boxes,
    move_image,
    move_masks,
    random_geometry,
    view_objects,
)
from pecobook.utils.images import fitted_size
from tests.coco import uncompressed


def scene(boxes: list[list[int]], height: int, width: int, *, masks: bool = True) -> tuple[Tensor, Objects]:
    """An image with a filled rectangle for each box, the first in the first channel, ...; the masks are the same."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    inside = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes):
        image[number % 3, top:bottom, left:right] = 255
        inside[number, top:bottom, left:right] = 1
    segments = [encode_segment(uncompressed(mask.numpy())) for mask in inside] if masks else None
    labels = torch.arange(1, len(boxes) + 1)
    return image, Objects(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), labels, segments, (height, width))


BOXES = [[4, 6, 20, 30], [30, 10, 50, 22], [2, 34, 58, 38]]

ANY: dict[str, dict[str, Any]] = {
    "one scale": {"scales": (40,), "max_size": 1000},
    "scales": {"scales": (20, 40, 80), "max_size": 90},
    "jitter": {"scales": (1,), "max_size": 1, "jitter": (0.3, 3.0), "canvas": 48},
}


@pytest.mark.parametrize("name", list(ANY))
def test_training_view__boxes_are_those_of_the_moved_masks(name: str) -> None:
    image, objects = scene(BOXES, 40, 60)
    sizes, kinds = set(), set()
    for key in range(60):
        view = detection_view(image, objects, key, **ANY[name])
        pixels, boxes, labels, masks = (view[part][0] for part in ("images", "boxes", "labels", "masks"))
        assert pixels.dtype == masks.dtype == torch.uint8
        assert len(boxes) == len(labels) == len(masks)
        assert masks.shape[1:] == pixels.shape[1:]
        sizes.add(tuple(pixels.shape))
        kinds.add(tuple(labels.tolist()))
        assert (mask_boxes(masks) - boxes).abs().max() <= 1.0  # a mask's edge is on a pixel
        for mask, label in zip(masks, labels.tolist(), strict=True):  # the object's colour lies under its mask
            assert float(pixels[label - 1][mask > 0].float().mean()) > 128
        again = detection_view(image, objects, key, **ANY[name])
        assert all(torch.equal(again[part][0], view[part][0]) for part in view)
    assert len(sizes) == {"one scale": 1, "scales": 3, "jitter": 1}[name]
    assert (len(kinds) > 1) == (name == "jitter")


def test_training_view__flips_half_of_the_views() -> None:
    image, objects = scene([[0, 0, 10, 10]], 40, 60)
    lefts = [float(detection_view(image, objects, k, scales=(40,), max_size=60)["boxes"][0][0, 0]) for k in range(200)]
    assert set(lefts) == {0.0, 50.0}
    assert 70 < lefts.count(0.0) < 130


@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(2, 20), st.integers(2, 15)),
        min_size=1,
        max_size=4,
    )
)
def test_view__flipped_twice_is_the_image_itself(boxes: list[tuple[int, int, int, int]]) -> None:
    image, objects = scene([[x, y, x + w, y + h] for x, y, w, h in boxes], 40, 60)
    masks = objects.masks()
    assert masks is not None
    flip = Geometry(40, 60, flip=True)
    assert torch.equal(move_image(move_image(image, flip), flip), image)
    assert torch.equal(move_masks(move_masks(masks, flip), flip), masks)
    assert torch.equal(move_boxes(move_boxes(objects.boxes, (40, 60), flip), (40, 60), flip), objects.boxes)
    assert torch.equal(mask_boxes(move_masks(masks, flip)), move_boxes(objects.boxes, (40, 60), flip))


def test_view_objects__what_vanishes_is_dropped_and_what_is_cut_fits_its_box() -> None:
    _, objects = scene([[0, 0, 10, 10], [20, 0, 40, 40], [45, 0, 60, 40]], 40, 60)
    found = view_objects(objects, Geometry(40, 60, left=30, canvas=16))  # sees columns 30 to 45, rows 0 to 15
    assert found["labels"].tolist() == [2, 3]
    assert found["boxes"].tolist() == [[0, 0, 10, 16], [15, 0, 16, 16]]
    # An L whose foot is cut off: its box shrinks to the stem.
    mask = np.zeros((40, 60), dtype=bool)
    mask[0:40, 5:10] = mask[30:40, 5:50] = True
    corner = Objects(
        torch.tensor([[5.0, 0, 50, 40]]), torch.tensor([1]), [encode_segment(uncompressed(mask))], (40, 60)
    )
    assert view_objects(corner, Geometry(40, 60, canvas=20))["boxes"].tolist() == [[5, 0, 10, 20]]
    # Too small to see.
    tiny = scene([[0, 0, 2, 2]], 40, 60)[1]
    assert {name: len(value) for name, value in view_objects(tiny, Geometry(10, 15)).items()} == {
        "boxes": 0,
        "labels": 0,
        "masks": 0,
    }


def test_view__of_an_image_without_objects_and_of_boxes_alone() -> None:
    image, objects = scene([], 40, 60)
    for how in ANY.values():
        view = detection_view(image, objects, 3, **how)
        assert view["boxes"][0].shape == (0, 4)
        assert view["masks"][0].shape == (0, *view["images"][0].shape[1:])
    image, objects = scene(BOXES, 40, 60, masks=False)
    view = detection_view(image, objects, 3, **ANY["one scale"])
    assert "masks" not in view
    assert view["boxes"][0].shape == (3, 4)


def test_random_geometry__jitter_covers_its_range() -> None:
    found = [random_geometry(40, 60, key, scales=(1,), max_size=1, jitter=(0.5, 2.0), canvas=100) for key in range(400)]
    widths = [one.width for one in found]
    assert 50 <= min(widths) < 55
    assert 195 < max(widths) <= 200
    assert all(one.height == pytest.approx(one.width * 40 / 60, abs=1) for one in found)
    large = [one for one in found if one.width > 120]
    assert {one.left > 0 for one in large} == {True, False} or min(one.left for one in large) < 5
    assert max(one.left + one.shown[1] - one.width for one in large) == 0
    assert all(one.left == 0 for one in found if one.width <= 100)


def test_jitter__pads_with_grey_at_the_right_and_the_bottom() -> None:
    image = torch.full((3, 20, 30), 200, dtype=torch.uint8)
    moved = move_image(image, Geometry(20, 30, canvas=40))
    assert moved.shape == (3, 40, 40)
    assert bool((moved[:, :20, :30] == 200).all())
    grey = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]
    assert bool((moved[:, 20:] == grey).all())
    assert bool((moved[:, :, 30:] == grey).all())


def test_evaluation_view__resizes_alone() -> None:
    image, objects = scene(BOXES, 40, 60)
    view = detection_test_view(image, objects, 5, short=80, long=100)
    assert view["images"][0].shape == (3, 67, 100)
    assert view["size"].tolist() == [40, 60]
    assert torch.equal(view["images"][0], detection_test_view(image, objects, 6, short=80, long=100)["images"][0])


def test_fitted_size__as_mmdetection() -> None:
    assert fitted_size(480, 640, 800, 1333) == (800, 1067)
    assert fitted_size(300, 640, 800, 1333) == (625, 1333)
    assert fitted_size(640, 480, 800, 1333) == (1067, 800)
    assert fitted_size(1, 5000, 10, 10) == (1, 10)
