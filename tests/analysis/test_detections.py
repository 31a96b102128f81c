from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from pecobook.analysis.detections import average_precision, coco_results, detections_picture, evaluate_detections
from pecobook.data.dense.detection import DetectionSource, open_detection
from pecobook.models.dense.detector import Detections, shift_half_pixel
from tests.coco import make_coco, read_coco


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco") / "data", train=4, val=9)


@pytest.fixture
def source(root: Path) -> DetectionSource:
    return cast("DetectionSource", open_detection(str(root)).evaluation)


def perfect(source: DetectionSource, index: int) -> Detections:
    """Return the labelled objects of an image as detections, with masks of 28 x 28."""
    objects = source.objects(index)
    masks = objects.masks()
    assert masks is not None
    small = project_masks_on_boxes(shift_half_pixel(masks), objects.boxes, torch.arange(len(masks)), 28)
    return Detections(objects.boxes, torch.full((len(masks),), 0.9), objects.labels, small)


def noisy(source: DetectionSource, index: int) -> Detections:
    """Return the labelled objects at shifted positions, and a false detection."""
    generator = torch.Generator().manual_seed(index)
    one = perfect(source, index)
    extra = torch.tensor([[1.0, 1.0, 12.0, 14.0]])
    boxes = torch.cat([one.boxes + 3 * torch.rand(one.boxes.shape, generator=generator), extra])
    scores = torch.rand(len(boxes), generator=generator)
    labels = torch.cat([one.labels, torch.tensor([1 + index % 3])])
    masks = torch.cat([cast("torch.Tensor", one.masks), torch.ones(1, 28, 28)])
    return Detections(boxes, scores, labels, masks)


def test_evaluate__perfect_detections_have_an_average_precision_of_100(source: DetectionSource) -> None:
    found = [(index, perfect(source, index)) for index in range(len(source))]
    metrics, _ = evaluate_detections(source, found)
    assert metrics["box_ap"] == metrics["box_ap50"] == metrics["box_ar"] == pytest.approx(100)
    assert metrics["mask_ap"] == pytest.approx(100)
    assert not any("large" in name for name in metrics)  # there are no large objects
    nothing = torch.zeros(0)
    empty = Detections(nothing.view(0, 4), nothing, nothing.long(), nothing.view(0, 28, 28))
    metrics, results = evaluate_detections(source, [(index, empty) for index in range(len(source))])
    assert (metrics["box_ap"], metrics["mask_ap"], results) == (0.0, 0.0, [])


@pytest.mark.parametrize(("name", "kind"), [("box", "bbox"), ("mask", "segm")])
def test_evaluate__agrees_with_pycocotools_on_the_written_files(
    name: str, kind: str, source: DetectionSource, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, results = evaluate_detections(source, [(index, noisy(source, index)) for index in range(len(source))])
    assert capsys.readouterr().out == ""
    kept = [{key: value for key, value in one.items() if kind == "bbox" or key != "bbox"} for one in results]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(root / "val" / "instances.json"))
        job = COCOeval(reference, reference.loadRes(str(tmp_path / "results.json")), kind)
        job.evaluate()
        job.accumulate()
        job.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar")
    expected = dict(zip((*names, "ar_small", "ar_medium", "ar_large"), 100 * job.stats, strict=True))
    assert 5 < expected["ap"] < 95
    for what, value in expected.items():
        if value < 0:
            assert f"{name}_{what}" not in metrics
        else:
            assert metrics[f"{name}_{what}"] == pytest.approx(value)


def test_evaluate__counts_only_the_evaluated_images(source: DetectionSource, root: Path) -> None:
    metrics, results = evaluate_detections(source, [(4, perfect(source, 4)), (2, perfect(source, 2))])
    assert metrics["box_ap"] == pytest.approx(100)
    assert {one["image_id"] for one in results} == {source.image_id(2), source.image_id(4)}
    categories = {one["id"] for one in read_coco(root / "val")["categories"]}
    assert {one["category_id"] for one in results} <= categories - {90}


def test_coco_results__use_the_ids_of_the_annotations(source: DetectionSource) -> None:
    one = perfect(source, 3)
    results = coco_results(77, source.size(3), one, (3, 17, 90))
    assert json.loads(json.dumps(results)) == results
    for result, box, label in zip(results, one.boxes.tolist(), one.labels.tolist(), strict=True):
        assert result["image_id"] == 77
        assert result["category_id"] == (3, 17, 90)[label - 1]
        assert result["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        assert result["segmentation"]["size"] == list(source.size(3))
    assert (
        "segmentation" not in coco_results(77, (9, 9), Detections(one.boxes, one.scores, one.labels, None), (3, 17))[0]
    )


def test_average_precision__counts_max_detections() -> None:
    boxes = [[10.0 * (n % 20), 10.0 * (n // 20), 8.0, 8.0] for n in range(150)]
    truth: dict[str, Any] = {
        "images": [{"id": 1, "height": 200, "width": 200}],
        "annotations": [
            {"id": n + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 64.0, "iscrowd": 0}
            for n, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "x"}],
    }
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5} for box in boxes]
    assert average_precision(truth, results, "bbox")["ar"] == pytest.approx(100 * 100 / 150)
    assert average_precision(truth, results, "bbox", max_detections=150)["ar"] == pytest.approx(100)
    assert "id" not in results[0]  # the input is unchanged


def test_detections_picture__draws_both_sides(source: DetectionSource) -> None:
    columns: dict[str, Any] = {"$labelled_": [], "detected": []}
    for index in range(3):
        image, objects = source.sample(index)
        whole = Detections(objects.boxes, torch.ones(len(objects.labels)), objects.labels, objects.masks())
        columns["$labelled_"].append((image, whole))
        columns["detected"].append((image, noisy(source, index)))
    png = detections_picture(columns, source.classes)
    assert png.startswith(b"\x89PNG")
    assert png == detections_picture(columns, source.classes)
    boxes = {
        name: [(i, Detections(d.boxes, d.scores, d.labels, None)) for i, d in part] for name, part in columns.items()
    }
    assert detections_picture(boxes, source.classes) != png
    assert np.frombuffer(png, np.uint8).size > 1000
