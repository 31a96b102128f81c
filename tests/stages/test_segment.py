from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pecobook.data.dense.segmentation_classes import IGNORE
from pecobook.data.source import Splits
from pecobook.engine.ahead import loss_weights
from pecobook.errors import ConfigError, DataError, PreflightError, WeightsError
from pecobook.models.dense.segmenter import Segmenter, best_classes
from pecobook.recipes import recipe
from pecobook.settings.segment import SegmentConfig
from pecobook.settings.values import replace
from pecobook.stages.segment import SegmentStage
from pecobook.stages.training import preflight
from tests.runs import SMALL, logged, losses, shapes, train
from tests.shapes import write_shapes


def settings(vit: Path, **more: Any) -> SegmentConfig:
    values = {**SMALL["segment"], "backbone": str(vit), "data": str(shapes()), "out": "run", **more}
    config: SegmentConfig = replace(recipe("segment", "tiny"), values)
    return config


def make(vit: Path, **more: Any) -> tuple[SegmentStage, Splits]:
    config = settings(vit, **{"drop_path": 0.0, **more})
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):
        splits = SegmentStage.open(config)
    stage = SegmentStage.build(config, splits)
    assert isinstance(stage, SegmentStage)
    return stage, splits


def batch(stage: SegmentStage, splits: Splits, count: int = 3) -> dict[str, Any]:
    view = SegmentStage.view(stage.config)
    samples = [view(*splits.train.sample(number), number) for number in range(count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def test_forward__cross_entropy_of_counted_pixels_and_of_the_auxiliary_head(vit_run: Path) -> None:
    stage, splits = make(vit_run, **{"colours.jitter": 0.0})
    inputs = batch(stage, splits)
    inputs["mask"][:, :5] = IGNORE
    output = stage.train()(inputs)
    main, auxiliary = stage.model(inputs["image"].float() / 255)
    expected = []
    for logits in (main, auxiliary):
        scores = F.interpolate(logits, (24, 24), mode="bilinear").log_softmax(1)
        picked = scores.gather(1, inputs["mask"].clamp_min(0).long()[:, None])[:, 0]
        expected.append(-picked[inputs["mask"] != IGNORE].mean())
    assert float(output.loss) == pytest.approx(float(expected[0] + 0.4 * expected[1]), rel=1e-4)
    assert float(output.metrics["auxiliary"]) == pytest.approx(float(expected[1]), rel=1e-4)


def test_loss_count__makes_two_halves_weigh_as_the_whole_batch(vit_run: Path) -> None:
    stage, splits = make(vit_run, **{"colours.jitter": 0.0})
    inputs = batch(stage, splits, 4)
    inputs["mask"][:2, :22] = IGNORE  # the first half has few counted pixels
    halves: list[Any] = [{name: value[part] for name, value in inputs.items()} for part in (slice(0, 2), slice(2, 4))]
    stage.train()
    for module in stage.modules():  # BatchNorm depends on the images beside, on purpose
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    whole = stage(inputs)
    gradients = torch.autograd.grad(whole.loss, list(stage.model.head.parameters()))
    parts, weights = loss_weights(stage, iter(halves), 2, 1)
    outputs = [stage(part) for part in parts]
    loss = sum(weight * output.loss for weight, output in zip(weights, outputs, strict=True)) / 2
    assert float(loss) == pytest.approx(float(whole.loss), rel=1e-5)
    plain = sum(float(output.loss) for output in outputs) / 2
    assert plain != pytest.approx(float(whole.loss), rel=1e-3)
    split = torch.autograd.grad(loss, list(stage.model.head.parameters()))
    for ours, expected in zip(split, gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_forward__a_batch_without_a_counted_pixel(vit_run: Path) -> None:
    stage, splits = make(vit_run)
    inputs = batch(stage, splits)
    inputs["mask"][:] = IGNORE
    output = stage.train()(inputs)
    output.loss.backward()
    assert float(output.loss) == 0


def test_evaluate__counts_pixels_at_the_size_of_each_mask(vit_run: Path) -> None:
    stage, splits = make(vit_run)
    stage.eval()
    image, mask = splits.evaluation.sample(0)
    with torch.no_grad():
        output = stage({"images": [image, image[:, :30]], "masks": [mask, mask[:30]]})
        predicted = best_classes(stage.model.scores([image], stage.config.test), (40, 56))
    counts = output.rows["counts"][0]
    assert int(counts.sum()) == int((mask != IGNORE).sum() + (mask[:30] != IGNORE).sum())
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for true_class, predicted_class in zip(mask.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if true_class != IGNORE:
            expected[true_class, predicted_class] += 1
    with torch.no_grad():
        assert torch.equal(stage({"images": [image], "masks": [mask]}).rows["counts"][0], expected)
    assert list(output.pictures) == ["image", "truth", "predicted"]
    assert all(value.shape == (2, 3, 24, 24) for value in output.pictures.values())
    inputs = {"images": [image, image], "masks": [mask, mask], "repeated": torch.tensor([False, True])}
    with torch.no_grad():
        assert torch.equal(stage(inputs).rows["counts"][0], expected)  # another rank counts the repeated image
    metrics = stage.summarise({"counts": torch.stack([expected, expected])}, {})
    assert metrics["pixel_accuracy"] == pytest.approx(100 * float(expected.diagonal().sum() / expected.sum()))


def test_check__fsdp_and_sliding_windows_exclude_each_other(vit_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = settings(vit_run, strategy="fsdp", devices="2", **{"test.mode": "slide"})
    with pytest.raises(ConfigError, match=r"--strategy fsdp .* give --strategy ddp or --test\.mode whole") as caught:
        SegmentStage.check(windows)
    assert len(str(caught.value).splitlines()) == 1
    for change in ({"strategy": "ddp"}, {"devices": "1"}, {"test.mode": "whole"}):
        SegmentStage.check(replace(windows, change))


def test_train__an_unreadable_held_out_image_is_listed_and_not_counted(vit_run: Path, tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "shapes", val=3)
    broken = root / "val" / "images" / "101.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    more: dict[str, Any] = {"verify": False, "classes": str(root / "classes.txt"), "max_steps": "2"}
    run = train("segment", root, tmp_path / "run", backbone=str(vit_run), **more)
    log = (run / "train.log").read_text()
    assert log.count("skipped: ") == 1
    assert "101" in log
    for folder in ("images", "masks"):
        next((root / "val" / folder).glob("101.*")).unlink()
    without = train("segment", root, tmp_path / "without", backbone=str(vit_run), **more)
    last, expected = (
        {name: value for name, value in logged(folder)[-1].items() if name.startswith("evaluation/")}
        for folder in (run, without)
    )
    assert last == pytest.approx(expected)


def test_evaluate__at_several_sizes(vit_run: Path) -> None:
    stage, splits = make(vit_run, **{"test.scales": (1.0, 0.5, 2.0), "test.flip": True})
    view = SegmentStage.evaluation_view(stage.config)
    samples = [view(*splits.evaluation.sample(number), 0) for number in range(2)]
    inputs = {name: [item for sample in samples for item in sample[name]] for name in ("images", "masks")}
    assert len(inputs["images"]) == 6
    with torch.no_grad():
        output = stage.eval()(inputs)
    assert int(output.rows["counts"].sum()) == sum(int((mask != IGNORE).sum()) for mask in inputs["masks"])
    assert 0 < float(output.loss) < 10


@pytest.mark.slow
def test_train__compiled(vit_run: Path, tmp_path: Path) -> None:
    run = train("segment", shapes(), tmp_path / "run", backbone=str(vit_run), compile=True, max_steps="2")
    assert len(losses(run)) == 2


def test_parameter_groups__hold_every_weight_once_and_heads_have_the_full_rate(vit_run: Path) -> None:
    stage, _ = make(vit_run, **{"optim.layer_decay": 0.5})
    groups = stage.parameter_groups(stage.config.optim)
    scale = {id(value): group.get("lr_scale", 1.0) for group in groups for value in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(list(stage.parameters()))
    assert all(scale[id(value)] == 1.0 for value in stage.model.head.parameters())
    assert scale[id(stage.model.pyramid.network.blocks[-1].attn.qkv.weight)] == 0.5  # type: ignore


def test_train__learns_shapes_and_writes_scores_and_pictures(vit_run: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": "60", "head_width": 16, "optim.lr": 0.004, "scales": (0.8, 1.25)}
    run = train("segment", shapes(), tmp_path / "run", backbone=str(vit_run), **more)
    run_losses = losses(run)
    assert sum(run_losses[-5:]) < 0.5 * sum(run_losses[:5])
    scores = json.loads((run / "classes.json").read_text())
    assert scores["scores"]["pixel_accuracy"] > 85
    assert list(scores["iou"]) == ["ground", "red", "green"]
    assert {"confusion.png", "step-00000060.png"} <= {file.name for file in (run / "samples").iterdir()}
    model = Segmenter.from_pretrained(run)
    picture = torch.full((3, 30, 40), 60, dtype=torch.uint8)
    assert float((model.predict(picture) == 0).float().mean()) > 0.9


def test_train__a_frozen_backbone_with_window_attention_keeps_its_weights(vit_run: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": "2", "pyramid.window": 2, "pyramid.frozen": True}
    run = train("segment", shapes(), tmp_path / "run", backbone=str(vit_run), **more)
    after = Segmenter.from_pretrained(run).pyramid.network.state_dict()
    before = Segmenter.from_pretrained(
        train("segment", shapes(), tmp_path / "one", backbone=str(vit_run), **{**more, "max_steps": "1"})
    ).pyramid.network.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


# ----------------------------------------------------------------------------------------------------- before the run


def test_preflight__reports_bad_pairs_and_leaves_them_out_with_skip_bad(
    vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_shapes(tmp_path / "data")
    Image.fromarray(np.full((40, 56), 9, np.uint8)).save(root / "train/masks/2.png")
    (root / "train/masks/3.png").write_bytes(b"")
    out = str(tmp_path / "run")
    with pytest.raises(PreflightError, match=r"train/masks/2.png holds the value 9.*\n.*--ignore.*--skip-bad"):
        preflight(SegmentStage, settings(vit_run, data=str(root), out=out))
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    splits = preflight(SegmentStage, settings(vit_run, data=str(root), out=out, skip_bad=True)).splits
    assert len(splits.train) == 10
    stderr = capsys.readouterr().err
    assert stderr.count("train/masks/2.png") == stderr.count("train/masks/3.png") == 1
    splits = preflight(SegmentStage, settings(vit_run, data=str(root), out=out, ignore=("9", "255"))).splits
    assert len(splits.train) == 11


def test_preflight__no_usable_pair(vit_run: Path, tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "data")
    for file in (root / "val" / "masks").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(PreflightError, match="no pair that can be used to evaluate"):
        preflight(SegmentStage, settings(vit_run, data=str(root), out=str(tmp_path / "run")))


def test_open__refuses_masks_from_which_nothing_can_be_learned(vit_run: Path, tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "single")
    for file in root.rglob("masks/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(file)) == 1, 255, 0).astype(np.uint8)).save(file)
    with pytest.raises(DataError, match="'ground' alone has pixels in the training masks"):
        SegmentStage.open(settings(vit_run, data=str(root)))
    root = write_shapes(tmp_path / "broken")
    for number in range(11):
        (root / f"train/masks/{number}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="1 of 12 training pairs can be used"):
        SegmentStage.open(settings(vit_run, data=str(root)))
    assert len(SegmentStage.open(settings(vit_run, data=str(root), skip_bad=True)).train) == 1


def test_report__names_classes_without_held_out_pixels(
    vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, splits = make(vit_run)
    (tmp_path / "samples").mkdir()
    counts = torch.tensor([[[7, 0, 0], [0, 0, 0], [0, 0, 0]]])
    stage.report(tmp_path, {"counts": counts}, splits.evaluation)
    scores = json.loads((tmp_path / "classes.json").read_text())
    assert scores["scores"]["miou"] == 100
    assert scores["without_pixels"] == ["red", "green"]
    assert "1 of 3 classes have held-out pixels, so that the mean IoU says nothing" in capsys.readouterr().err


def test_open__no_verify_needs_the_classes(vit_run: Path, tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "data")
    assert len(SegmentStage.open(settings(vit_run, data=str(root), verify=False)).train) == 12
    (root / "classes.txt").unlink()
    with pytest.raises(ConfigError, match="--no-verify"):
        SegmentStage.open(settings(vit_run, data=str(root), verify=False))
    with pytest.raises(DataError, match="--data is missing"):
        SegmentStage.open(settings(vit_run, data=""))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"backbone": ""}, ConfigError, "--backbone is missing"),
        ({"backbone": "timm:efficientvit_m0", "weights": "random", "drop_path": 0.0}, WeightsError, "four strides"),
        ({"pyramid.window": -1}, ConfigError, "--pyramid.window"),
        ({"micro_batch_size": 1}, ConfigError, "must hold 2 images"),
        ({"backbone": "timm:hiera_tiny_224", "weights": "random"}, WeightsError, "cannot form a pyramid"),
        ({"scales": (2.0, 0.5)}, ConfigError, "--scales"),
    ],
)
def test_check__refuses(vit_run: Path, more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SegmentStage.check(settings(vit_run, **more))


def test_recipes__load() -> None:
    paper = recipe("segment", "paper-ade20k")
    assert (paper.image_size, paper.batch_size, paper.max_steps, paper.drop_path) == (512, 16, "160000", 0.2)
    assert (paper.optim.lr, paper.optim.layer_decay, paper.optim.schedule, paper.optim.warmup) == (
        3e-4, 0.65, "poly", "1500"
    )  # fmt: skip
    assert paper.dropout == 0.1
    assert paper.colours.hue == 18 / 180  # mmsegmentation's 18 are of OpenCV's 180 hues: 36 degrees
