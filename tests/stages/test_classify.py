from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pecobook import api
from pecobook.analysis.confusion import confusion_picture
from pecobook.analysis.semantics import joint_counts
from pecobook.data.images import open_images
from pecobook.data.views import random_erasing
from pecobook.errors import ConfigError, PecobookError
from pecobook.recipes import recipe
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.training import OptimConfig
from pecobook.settings.values import replace
from pecobook.stages.classify import ClassifyStage, mix
from tests.runs import SMALL, logged, train


def settings(vit: Path, **more: Any) -> FinetuneConfig:
    config: FinetuneConfig = replace(recipe("finetune", "tiny"), {**SMALL["finetune"], "backbone": str(vit)})
    return dataclasses.replace(config, **{"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0, **more})


def make(vit: Path, classes: int = 3, **more: Any) -> ClassifyStage:
    torch.manual_seed(0)
    stage = ClassifyStage(settings(vit, **more), tuple(f"class {number}" for number in range(classes)))
    torch.nn.init.normal_(stage.network.get_classifier().weight)  # type: ignore[operator]
    return stage


def batch(count: int = 6, classes: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "image": torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
        "label": torch.arange(count) % classes,
        "index": torch.arange(count),
    }


def test_forward__smoothed_cross_entropy_in_training(vit_run: Path) -> None:
    stage, inputs = make(vit_run, label_smoothing=0.3), batch()
    with torch.no_grad():
        images = (inputs["image"].float() / 255 - stage.mean) / stage.std
        scores = stage.network(images).log_softmax(1)
        targets = torch.full((6, 3), 0.1)
        targets[range(6), inputs["label"].tolist()] = 0.8
        assert float(stage.train()(inputs).loss) == pytest.approx(float(-(targets * scores).sum(1).mean()), rel=1e-5)
        exact = -scores[range(6), inputs["label"].tolist()].mean()
        output = stage.eval()(inputs)
    assert float(output.loss) == pytest.approx(float(exact), rel=1e-5)
    metrics = stage.summarise(output.rows, {})
    assert metrics == pytest.approx({"top1": 100 * float((scores.argmax(1) == inputs["label"]).float().mean())})


def test_forward__top5_with_enough_classes(vit_run: Path) -> None:
    stage = make(vit_run, classes=7).eval()
    with torch.no_grad():
        rows = stage(batch(7, 7)).rows
        images = (batch(7, 7)["image"].float() / 255 - stage.mean) / stage.std
        order = stage.network(images).argsort(1, descending=True)
    assert torch.equal(rows["classes"], order[:, :5])
    labels = torch.arange(7)[:, None]
    expected = {"top1": (order[:, :1] == labels).any(1), "top5": (order[:, :5] == labels).any(1)}
    metrics = stage.summarise(rows, {})
    assert metrics == pytest.approx({name: 100 * float(hit.float().mean()) for name, hit in expected.items()})


def numbered(count: int = 4, size: int = 8) -> tuple[Tensor, Tensor]:
    """Return images whose pixels all have the value b + 1, and their one-hot classes b."""
    images = torch.arange(1.0, count + 1).view(count, 1, 1, 1).expand(count, 3, size, size).contiguous()
    return images, torch.eye(count)


def test_mix__mixup_blends_images_and_targets_alike() -> None:
    images, targets = numbered()
    shares = set()
    for seed in range(5):
        torch.manual_seed(seed)
        mixed, soft = mix(images, targets, mixup=1.0, cutmix=0.0)
        for b in range(4):
            share = float(soft[b, b])
            assert float(soft[b, 3 - b]) == pytest.approx(1 - share, abs=1e-6)
            expected = share * (b + 1) + (1 - share) * (4 - b)
            torch.testing.assert_close(mixed[b], torch.full((3, 8, 8), expected))
        shares.add(round(float(soft[0, 0]), 4))
    assert len(shares) == 5


def test_mix__cutmix_gives_the_area_that_was_pasted() -> None:
    images, targets = numbered(size=16)
    areas = set()
    for seed in range(12):
        torch.manual_seed(seed)
        mixed, soft = mix(images, targets, mixup=0.0, cutmix=1.0)
        for b in range(4):
            pasted = mixed[b] == 4 - b
            assert bool((pasted | (mixed[b] == b + 1)).all())
            area = float(pasted.float().mean())
            assert float(soft[b, 3 - b]) == pytest.approx(area, abs=1e-6)
            assert float(soft[b].sum()) == pytest.approx(1.0)
            rows, columns = pasted[0].any(1).nonzero(), pasted[0].any(0).nonzero()
            if len(rows):  # one rectangle
                height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
                assert height * width == int(pasted[0].sum())
        areas.add(area)
    assert len(areas) >= 5
    assert torch.equal(images, numbered(size=16)[0])  # the inputs are not changed


def test_mix__chooses_mixup_or_cutmix_with_equal_chances() -> None:
    images, targets = numbered()
    kinds = []
    for seed in range(60):
        torch.manual_seed(seed)
        mixed, _ = mix(images, targets, mixup=1.0, cutmix=1.0)
        kinds.append(bool((mixed == mixed.round()).all()))  # CutMix keeps whole numbers
    assert 15 < sum(kinds) < 45


def test_mix__without_either_returns_the_batch() -> None:
    images, targets = numbered()
    mixed, soft = mix(images, targets, mixup=0.0, cutmix=0.0)
    assert mixed is images
    assert soft is targets


def test_parameter_groups__hold_every_weight_once_and_rates_fall_by_layer(vit_run: Path) -> None:
    stage = make(vit_run)
    groups = stage.parameter_groups(OptimConfig(layer_decay=0.5, weight_decay=0.1))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = dict(stage.network.named_parameters())
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(names)
    depth = len(stage.network.blocks)  # type: ignore[arg-type]
    head = next(name for name in names if name.startswith("head") and name.endswith("weight"))
    assert scale[id(names[head])] == 1.0
    assert scale[id(names["patch_embed.proj.weight"])] == 0.5 ** (depth + 1)
    for block in range(depth):
        assert scale[id(names[f"blocks.{block}.mlp.fc1.weight"])] == 0.5 ** (depth - block)


def test_stage__starts_from_the_backbones_weights_and_a_head_near_zero(vit_run: Path) -> None:
    stage = ClassifyStage(settings(vit_run), ("a", "b"))
    exported = load_file(vit_run / "export" / "model.safetensors")
    state = stage.network.state_dict()
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], exported["blocks.1.mlp.fc1.weight"])
    assert torch.equal(state["fc_norm.weight"], exported["fc_norm.weight"])
    with torch.no_grad():
        assert stage.eval().network(torch.randn(2, 3, 16, 16)).abs().max() < 1e-2
    untrained = ClassifyStage(settings(vit_run, weights="random"), ("a", "b"))
    assert not torch.equal(untrained.network.state_dict()["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])


def test_run__random_weights_learn_at_one_rate_and_the_run_resumes(
    images: Path, vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"backbone": str(vit_run), "weights": "random", "max_steps": "2"}
    run = train("finetune", images, tmp_path / "run", **flags)
    assert "random, so all layers learn at one rate" in (run / "train.log").read_text()
    config = json.loads((run / "config.json").read_text())
    assert config["optim"]["layer_decay"] == 1
    train("finetune", images, run, **flags, resume=True)
    with pytest.raises(PecobookError, match=r"optim\.layer-decay: 1\.0 -> 0\.75"):
        train("finetune", images, run, **flags, resume=True, **{"optim.layer_decay": 0.75})
    slow = {**SMALL["finetune"], **flags, "optim.layer_decay": 0.75}
    api.finetune("tiny", data=str(images), dry_run=True, **slow)
    assert "--optim.layer-decay 0.75 slows the lower layers" in capsys.readouterr().err


def test_view__augmentation_depends_on_the_key_and_not_on_global_generators(vit_run: Path) -> None:
    view = ClassifyStage.view(settings(vit_run, rand_augment="rand-m9-mstd0.5-inc1"))
    image = torch.randint(256, (3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.random()
    random.seed(3)
    np.random.seed(3)
    first = [view(image, key)["image"] for key in range(6)]
    assert (random.random(), np.random.random()) == expected
    assert all(torch.equal(view(image, key)["image"], first[key]) for key in range(6))
    assert len({crop.numpy().tobytes() for crop in first}) == 6
    assert all(crop.shape == (3, 16, 16) and crop.dtype == torch.uint8 for crop in first)


def test_random_erasing__fills_rectangles_by_torchs_generator() -> None:
    images = torch.full((40, 3, 16, 16), 7.0)
    torch.manual_seed(2)
    erased = random_erasing(images.clone(), 0.5)
    torch.manual_seed(2)
    assert torch.equal(random_erasing(images.clone(), 0.5), erased)
    changed = (erased != 7).all(1)  # (40, 16, 16)
    share = float(changed.any((1, 2)).float().mean())
    assert 0.25 < share < 0.75
    for mask in changed[changed.any((1, 2))]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert bool(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all())  # one rectangle
    assert torch.equal(random_erasing(images.clone(), 0.0), images)


def test_average__follows_the_weights_and_is_evaluated_and_exported(vit_run: Path, tmp_path: Path) -> None:
    stage = make(vit_run, average=0.9)
    assert stage.averaged is not None
    stage.averaged.load_state_dict(stage.network.state_dict())
    before = {name: value.clone() for name, value in stage.network.state_dict().items()}
    with torch.no_grad():
        for parameter in stage.network.parameters():
            parameter.add_(0.1)  # a large shift makes the logits so ill-conditioned that processors differ in them
    stage.after_step(1, 100)  # decay 2 / 11 at first
    for name, value in stage.averaged.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] + 0.1 * 9 / 11)
    stage.after_step(1000, 2000)
    for name, value in stage.averaged.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] + 0.1 * (1 - 0.9 * (2 / 11)))
    with torch.no_grad():
        inputs = batch()
        images = (inputs["image"].float() / 255 - stage.mean) / stage.std
        expected = F.cross_entropy(stage.averaged.eval()(images), inputs["label"])
        assert float(stage.eval()(inputs).loss) == pytest.approx(float(expected), rel=1e-5)
    stage.export(tmp_path, stage.state_dict())
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in stage.averaged.state_dict().items())
    grouped = {id(p) for group in stage.parameter_groups(OptimConfig()) for p in group["params"]}
    assert grouped == {id(p) for p in stage.network.parameters()}


def test_train__writes_predictions_and_a_confusion_picture(images: Path, vit_run: Path, tmp_path: Path) -> None:
    run = train("finetune", images, tmp_path / "run", backbone=str(vit_run), average=0.5)
    table = pq.read_table(run / "predictions.parquet").to_pylist()
    held_out = open_images(str(images)).evaluation
    assert [row["image"] for row in table] == [held_out.identify(index) for index in range(len(held_out))]
    assert held_out.labels is not None
    assert held_out.classes is not None
    num_correct = 0
    for row, label in zip(table, held_out.labels, strict=True):
        assert row["label"] == held_out.classes[label]
        assert row["prediction"] == row["best"][0]
        assert row["correct"] == (row["label"] == row["prediction"])
        assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-4)
        num_correct += row["correct"]
    assert logged(run)[-1]["evaluation/top1"] == pytest.approx(100 * num_correct / len(table))
    assert (run / "samples" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_train__an_unreadable_held_out_image_is_listed_and_not_counted(
    images: Path, vit_run: Path, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        shutil.copytree(images, tmp_path / "data" / split)
    broken = tmp_path / "data" / "test" / "green" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    run = train("finetune", tmp_path / "data", tmp_path / "run", backbone=str(vit_run), max_steps="2")
    table = pq.read_table(run / "predictions.parquet").to_pylist()
    assert len(table) == 23
    assert not any(row["image"].endswith("green/3.png") for row in table)
    num_correct = sum(row["correct"] for row in table)
    assert logged(run)[-1]["evaluation/top1"] == pytest.approx(100 * num_correct / 23)
    log = (run / "train.log").read_text()
    assert log.count("skipped: ") == 1
    assert "1 image could not be read" in log


def test_evaluate__the_loss_leaves_out_repeated_images(vit_run: Path) -> None:
    stage, inputs = make(vit_run).eval(), batch()
    first_two = {name: value[:2] for name, value in inputs.items()}
    with torch.no_grad():
        expected = float(stage(first_two).loss)
        marked = {**inputs, "repeated": torch.arange(len(inputs["label"])) > 1}
        assert float(stage(marked).loss) == pytest.approx(expected)


def test_joint_counts__count_rows_by_label() -> None:
    counts = joint_counts(torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 0, 2]), 3, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
    assert confusion_picture([0, 1], [1, 1], ("$a_", "<b>")).startswith(b"\x89PNG")  # type: ignore[arg-type]


def test_evaluation_view__is_the_central_crop(vit_run: Path) -> None:
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[:, 8:24, 16:32] = 200
    view = ClassifyStage.evaluation_view(settings(vit_run, eval_crop=0.5))(image, 0)["image"]
    assert torch.equal(view, torch.full((3, 16, 16), 200, dtype=torch.uint8))


@pytest.mark.parametrize("policy", ["m9", "rand-x9"])
def test_check__refuses_a_policy_that_timm_does_not_know(policy: str, vit_run: Path) -> None:
    with pytest.raises(ConfigError, match="is not a valid timm policy"):
        ClassifyStage.check(settings(vit_run, rand_augment=policy))


def test_check__needs_a_backbone() -> None:
    with pytest.raises(ConfigError, match="--backbone is missing"):
        ClassifyStage.check(FinetuneConfig())
