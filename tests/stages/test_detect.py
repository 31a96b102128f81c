from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.data.dense.detection import DetectionSource, open_detection
from pecobook.data.source import Splits
from pecobook.data.stream import Stream, collate
from pecobook.engine import launch
from pecobook.errors import ConfigError, DataError, PreflightError, WeightsError
from pecobook.models.dense.detector import Detections, Detector
from pecobook.models.weights import IMAGENET_MEAN, IMAGENET_STD, Backbone, create_network
from pecobook.recipes import detect as recipes
from pecobook.settings.detect import DetectConfig, DetectorConfig
from pecobook.settings.training import OptimConfig
from pecobook.settings.values import replace
from pecobook.stages.detect import DetectStage, detections_to_row, rows_to_detections
from pecobook.stages.training import train
from tests.coco import make_coco, read_coco, write_coco
from tests.runs import logged, losses

SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "max_steps": "6",
    "log_every": 1,
    "save_every": 100,
    "sample_every": 6,
    "workers": 0,
    "loggers": (),
    "precision": "fp32",
    "image_size": 48,
    "scales": (40,),
    "max_size": 48,
    "drop_path": 0.1,
    "detector": {"width": 16, "head_width": 32, "proposals": 60, "samples": 32, "detections": 10},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a backbone with random weights: four blocks of width 32, patches of 8 pixels."""
    folder = tmp_path_factory.mktemp("vit")
    name = "vit_tiny_patch16_224"
    args: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    network = create_network(name, num_classes=0, **args)
    Backbone(network, name, args, IMAGENET_MEAN, IMAGENET_STD, 32).save_pretrained(folder / "export")
    return folder


def settings(root: Path, vit: Path, **more: Any) -> DetectConfig:
    config: DetectConfig = replace(recipes.tiny(), {**SETTINGS, "data": str(root), "backbone": str(vit), **more})
    return config


def run(config: DetectConfig, out: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        return train(DetectStage, dataclasses.replace(config, out=str(out)))


def make(config: DetectConfig) -> tuple[DetectStage, Splits]:
    splits = DetectStage.open(config)
    torch.manual_seed(0)
    return DetectStage.build(config, splits), splits


def batch(config: DetectConfig, splits: Splits, count: int, *, training: bool) -> Batch:
    source, view = (
        (splits.train, DetectStage.view(config))
        if training
        else (splits.evaluation, DetectStage.evaluation_view(config))
    )
    stream = Stream(source, view, 0)
    return collate([stream[position] for position in range(count)])


def test_train__writes_results_that_pycocotools_reads_and_a_detector(root: Path, vit: Path, tmp_path: Path) -> None:
    out = run(settings(root, vit, **{"detector.score_threshold": 0.0}), tmp_path / "run")
    assert sorted(path.name for path in out.iterdir()) == [
        "average_precision.json",
        "checkpoints",
        "config.json",
        "curves.png",
        "data.parquet",
        "detections.json",
        "environment.json",
        "export",
        "metrics.jsonl",
        "samples",
        "train.log",
    ]
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["detections.png", "example.png"]
    last = logged(out)[-1]
    parts = ["box", "class", "mask", "objectness", "proposal_box"]
    assert last["loss"] == pytest.approx(sum(last[f"loss_{part}"] for part in parts), rel=1e-5)
    precision = json.loads((out / "average_precision.json").read_text())
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        with contextlib.redirect_stdout(io.StringIO()):
            reference = COCO(str(root / "val" / "instances.json"))
            results = json.loads((out / "detections.json").read_text())
            assert len(results) == 40  # ten of each image
            inputs = [{key: value for key, value in r.items() if kind == "bbox" or key != "bbox"} for r in results]
            coco_eval = COCOeval(reference, reference.loadRes(inputs), kind)
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
        assert last[f"evaluation/{name}_ap"] == pytest.approx(100 * coco_eval.stats[0])
        assert last[f"evaluation/{name}_ar"] == precision[f"{name}_ar"] == pytest.approx(100 * coco_eval.stats[8])
        assert precision[f"{name}_ar_10"] == pytest.approx(100 * coco_eval.stats[7])

    detector = Detector.from_pretrained(out)
    evaluation = cast("DetectionSource", open_detection(str(root)).evaluation)
    for index in range(len(evaluation)):
        detections = detector.predict(evaluation.read(index))
        expected = [result for result in results if result["image_id"] == evaluation.image_id(index)]
        corners = torch.tensor([result["bbox"] for result in expected])
        corners[:, 2:] += corners[:, :2]
        torch.testing.assert_close(detections.boxes, corners, atol=0.02, rtol=0)
        categories = [detector.category_ids[label - 1] for label in detections.labels.tolist()]
        assert categories == [result["category_id"] for result in expected]


def test_train__is_repeatable_and_learns(root: Path, vit: Path, tmp_path: Path) -> None:
    config = settings(root, vit, max_steps="16", sample_every=100)
    first, second = (losses(run(config, tmp_path / name)) for name in ("a", "b"))
    assert first == second
    assert len(first) == 16
    assert sum(first[-4:]) < sum(first[:4])


@pytest.mark.parametrize("jitter", [(), (0.5, 1.5)])
def test_train__boxes_only_if_the_data_has_no_masks(jitter: tuple[float, ...], vit: Path, tmp_path: Path) -> None:
    data = make_coco(tmp_path / "data", masks=False)
    out = run(settings(data, vit, max_steps="2", sample_every=2, jitter=jitter, precision="bf16"), tmp_path / "run")
    assert not Detector.from_pretrained(out).has_masks
    last = logged(out)[-1]
    assert "evaluation/box_ap" in last
    assert not any("mask" in name for name in last)


def test_forward__boxes_stay_float32_in_mixed_precision(root: Path, vit: Path) -> None:
    config = settings(root, vit)
    stage, splits = make(config)
    inputs = batch(config, splits, 4, training=True)
    converted = launch.precision_plugin("bf16", "cpu").convert_input(inputs)
    calls: list[Any] = []
    stage.detector.register_forward_pre_hook(lambda _module, arguments: calls.append(arguments))
    stage.train()(converted)
    source = cast("DetectionSource", splits.train)
    for number, target in enumerate(calls[0][1]):
        image = inputs["images"][number]
        assert target["boxes"].dtype == torch.float32
        assert target["masks"].shape[1:] == image.shape[1:]
        objects = source.objects(int(inputs["index"][number]))
        heights = (objects.boxes[:, 3] - objects.boxes[:, 1]) * (image.shape[1] / objects.size[0])
        torch.testing.assert_close(target["boxes"][:, 3] - target["boxes"][:, 1], heights)


def test_forward__rows_are_in_pixels_of_the_image(root: Path, vit: Path) -> None:
    config = settings(root, vit)
    stage, splits = make(config)
    inputs = batch(config, splits, 3, training=False)
    boxes = torch.tensor([[2.0, 4.0, 20.0, 24.0]])
    detections = Detections(boxes, torch.tensor([0.75]), torch.tensor([2]), torch.full((1, 28, 28), 0.4))
    stage.detector.forward = lambda *_: [detections]  # type: ignore[method-assign]
    output = stage.eval()(inputs)
    assert output.loss is None
    assert output.rows["boxes"].shape == (3, 10, 4)
    assert output.rows["masks"].shape == (3, 10, 28, 28)
    assert output.rows["masks"].dtype == torch.uint8
    for row, (number, unpacked) in enumerate(rows_to_detections({**output.rows, "index": torch.arange(3)})):
        assert number == row
        height, width = (int(side) for side in inputs["size"][row])
        view_shape = inputs["images"][row].shape
        scale = torch.tensor([width / view_shape[2], height / view_shape[1]]).repeat(2)
        torch.testing.assert_close(unpacked.boxes, boxes * scale)
        assert (unpacked.scores.tolist(), unpacked.labels.tolist()) == ([0.75], [2])
        assert unpacked.masks is not None
        torch.testing.assert_close(unpacked.masks, torch.full((1, 28, 28), 0.4))


def test_summarise__counts_every_image_once_and_perfect_detections_as_100(root: Path, vit: Path) -> None:
    stage, splits = make(settings(root, vit))
    source = cast("DetectionSource", splits.evaluation)
    rows: list[dict[str, Tensor]] = []
    order = [3, 1, 0, 2, 3]
    for index in order:
        objects, size = source.objects(index), source.size(index)
        count = len(objects.labels)
        perfect = Detections(objects.boxes, torch.full((count,), 0.9), objects.labels, torch.ones(count, 28, 28))
        rows.append(detections_to_row(perfect, size, size, 10))
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    metrics = stage.summarise({**stacked, "index": torch.tensor(order)}, {})
    assert metrics["box_ap"] == metrics["box_ar"] == pytest.approx(100)
    names = {f"{kind}_{metric}" for kind in ("box", "mask") for metric in ("ap", "ap50", "ap75", "ap_small", "ar")}
    assert set(metrics) == names


def test_preflight__reports_bad_data_with_all_other_problems(root: Path, vit: Path, tmp_path: Path) -> None:
    data = make_coco(tmp_path / "data")
    content = read_coco(data / "train")
    content["annotations"][2]["category_id"] = 5
    write_coco(data / "train", content)
    config = dataclasses.replace(settings(data, vit, max_steps="2"), backbone="")
    with pytest.raises(PreflightError) as caught:
        train(DetectStage, dataclasses.replace(config, out=str(tmp_path / "run")))
    assert "annotation 3 refers to category 5, which does not exist" in str(caught.value)
    assert "--backbone is missing" in str(caught.value)
    assert not (tmp_path / "run").exists()
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        config = settings(data, vit, max_steps="2", skip_bad=True, out=str(tmp_path / "run"))
        train(DetectStage, config)
    assert "--skip-bad left out: 1, the first: " in stderr.getvalue()


def test_check__settings_that_cannot_work(root: Path, vit: Path) -> None:
    with pytest.raises(ConfigError, match="--backbone is missing"):
        DetectStage.check(DetectConfig())
    with pytest.raises(WeightsError):
        DetectStage.check(settings(root, Path("timm:no_such_network")))
    with pytest.raises(ConfigError, match="--jitter takes two numbers"):
        DetectConfig(jitter=(2.0, 1.0))
    with pytest.raises(ConfigError, match="--scales takes one or more"):
        DetectConfig(scales=())
    with pytest.raises(DataError, match="--data is missing"):
        DetectStage.open(DetectConfig())
    assert DetectConfig(jitter=(0.1, 2.0), image_size=64).sides == (64, 64)


def test_recipes__the_papers_schedule() -> None:
    paper = recipes.paper_coco()
    assert (paper.optim.lr, paper.optim.layer_decay, paper.optim.weight_decay) == (4e-4, 0.75, 0.05)
    assert (paper.optim.schedule, paper.optim.milestones) == ("steps", ("8 epochs", "11 epochs"))
    assert (paper.max_steps, paper.batch_size, paper.drop_path, paper.sides) == ("12 epochs", 16, 0.1, (800, 1333))
    assert dataclasses.asdict(recipes.nuclei().detector) == dataclasses.asdict(
        DetectorConfig(width=64, head_width=256, proposals=500, samples=128, detections=200)
    )


def test_parameter_groups__hold_every_weight_once_at_its_rate(root: Path, vit: Path) -> None:
    stage, _ = make(settings(root, vit))
    groups = stage.parameter_groups(OptimConfig(layer_decay=0.5, weight_decay=0.1))
    scale = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(list(stage.parameters()))
    names = dict(stage.detector.named_parameters())
    assert {scale[id(p)] for name, p in names.items() if not name.startswith("pyramid.network.")} == {1.0}
    for block in range(4):
        assert scale[id(names[f"pyramid.network.blocks.{block}.mlp.fc1.weight"])] == 0.5 ** (4 - block)
    frozen, _ = make(settings(root, vit, **{"pyramid.frozen": True}))
    grouped = {id(p) for group in frozen.parameter_groups(OptimConfig()) for p in group["params"]}
    assert grouped == {id(p) for p in frozen.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in frozen.detector.pyramid.network.parameters())
