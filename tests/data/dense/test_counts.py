from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
from pycocotools.coco import COCO

from pecobook.data.dense.detection import DetectionSource, open_detection
from pecobook.data.dense.segmentation_classes import MaskClasses, pixels_per_value, sum_masks
from tests.coco import make_coco
from tests.shapes import shape


def test_objects_per_class__agrees_with_pycocotools(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    train = cast("DetectionSource", open_detection(str(root)).train)
    reference = COCO(str(root / "train" / "instances.json"))
    expected = {
        name: len(reference.getAnnIds(catIds=[number], iscrowd=False))
        for name, number in (("disc", 3), ("square $x_", 17), ("never", 90))
    }
    assert train.objects_per_class() == expected
    assert sum(expected.values()) > 10
    part = train.subset([3, 1])
    labels = [int(label) for index in range(2) for label in part.objects(index).labels]
    assert part.objects_per_class() == {"disc": labels.count(1), "square $x_": labels.count(2), "never": 0}
    assert train.left_out == {"crowds (iscrowd 1)": 1}


def test_sum_masks__counts_pixels_of_values_and_classes() -> None:
    masks = [shape(number)[1].astype(np.int64) for number in range(3)]
    counts = sum_masks(MaskClasses(("ground", "red", "never"), (0, 1, 7), (255,)), map(pixels_per_value, masks))
    expected = np.bincount(np.stack(masks).ravel())
    assert (counts.masks, counts.ignored) == (3, 3 * 56)
    assert counts.values == {0: expected[0], 1: expected[1], 2: expected[2], 255: 3 * 56}
    assert counts.classes == {"ground": expected[0], "red": expected[1], "never": 0}
