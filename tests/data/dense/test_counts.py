from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from pecobook.data.dense.counts import count_masks, objects_per_class
from pecobook.data.dense.detection import DetectionSource, open_detection
from pecobook.data.dense.segmentation import SegmentationSource, open_segmentation
from tests.coco import make_coco
from tests.shapes import shape, write_shapes


def test_objects_per_class__agrees_with_pycocotools(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    train = cast("DetectionSource", open_detection(str(root)).train)
    reference = COCO(str(root / "train" / "instances.json"))
    expected = {
        name: len(reference.getAnnIds(catIds=[number], iscrowd=False))
        for name, number in (("disc", 3), ("square $x_", 17), ("never", 90))
    }
    assert objects_per_class(train) == expected
    assert sum(expected.values()) > 10
    part = train.subset([3, 1])
    labels = [int(label) for index in range(2) for label in part.objects(index).labels]
    assert objects_per_class(part) == {"disc": labels.count(1), "square $x_": labels.count(2), "never": 0}
    assert train.left_out == {"crowds (iscrowd 1)": 1}


def test_count_masks__counts_pixels_of_values_and_classes(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "train/masks/3.png").write_bytes(b"broken")
    source = cast("SegmentationSource", open_segmentation(str(root)).train)
    indices = [n for n in range(len(source)) if source.identify(n) in ("train/images/1.jpg", "train/images/3.jpg")]
    counts = count_masks(source, indices)
    expected = np.bincount(shape(1)[1].ravel(), minlength=256)
    assert (counts.masks, counts.unreadable, counts.ignored, counts.unknown) == (1, 1, 56, 0)
    assert counts.values == {0: expected[0], 1: expected[1], 2: expected[2], 255: 56}
    assert counts.classes == {"ground": expected[0], "red": expected[1], "green": expected[2]}
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(root / "train/masks/3.png")
    assert count_masks(source, indices).unknown == 40 * 56
