from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pecobook.config import OptimConfig, replace
from pecobook.errors import ConfigError
from pecobook.recipes import recipe
from pecobook.stages.classify import KIND, ClassifyStage, FinetuneConfig, mix
from tests.runs import SMALL


def settings(vit: Path, **more: Any) -> FinetuneConfig:
    config: FinetuneConfig = replace(recipe("finetune", "tiny"), {**SMALL["finetune"], "backbone": str(vit)})
    return dataclasses.replace(config, **{"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, **more})


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
    }


def test_forward__smoothed_cross_entropy_in_training(vit_run: Path) -> None:
    stage, given = make(vit_run, label_smoothing=0.3), batch()
    with torch.no_grad():
        images = (given["image"].float() / 255 - stage.mean) / stage.std
        scores = stage.network(images).log_softmax(1)
        targets = torch.full((6, 3), 0.1)
        targets[range(6), given["label"].tolist()] = 0.8
        assert float(stage.train()(given).loss) == pytest.approx(float(-(targets * scores).sum(1).mean()), rel=1e-5)
        exact = -scores[range(6), given["label"].tolist()].mean()
        output = stage.eval()(given)
    assert float(output.loss) == pytest.approx(float(exact), rel=1e-5)
    assert float(output.metrics["top1"]) == pytest.approx(
        100 * float((scores.argmax(1) == given["label"]).float().mean())
    )
    assert "top5" not in output.metrics


def test_forward__top5_with_enough_classes(vit_run: Path) -> None:
    stage = make(vit_run, classes=7).eval()
    with torch.no_grad():
        metrics = stage(batch(7, 7)).metrics
    assert metrics["top1"] <= metrics["top5"] < 100.1
    assert float(metrics["top5"]) * 7 / 100 == pytest.approx(round(float(metrics["top5"]) * 7 / 100), abs=1e-4)


def numbered(count: int = 4, size: int = 8) -> tuple[Tensor, Tensor]:
    """Image b is b + 1 everywhere; its class is b."""
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
    assert torch.equal(images, numbered(size=16)[0])  # what was given is left alone


def test_mix__chooses_one_of_the_two_by_a_fair_coin() -> None:
    images, targets = numbered()
    kinds = []
    for seed in range(60):
        torch.manual_seed(seed)
        mixed, _ = mix(images, targets, mixup=1.0, cutmix=1.0)
        kinds.append(bool((mixed == mixed.round()).all()))  # CutMix keeps whole numbers
    assert 15 < sum(kinds) < 45


def test_mix__none_leaves_the_batch() -> None:
    images, targets = numbered()
    mixed, soft = mix(images, targets, mixup=0.0, cutmix=0.0)
    assert mixed is images
    assert soft is targets


def test_parameter_groups__rates_fall_by_layer_and_hold_every_weight_once(vit_run: Path) -> None:
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


def test_stage__begins_with_the_weights_of_its_backbone_and_a_quiet_head(vit_run: Path) -> None:
    from safetensors.torch import load_file

    stage = ClassifyStage(settings(vit_run), ("a", "b"))
    exported = load_file(vit_run / "export" / "model.safetensors")
    own = stage.network.state_dict()
    assert torch.equal(own["blocks.1.mlp.fc1.weight"], exported["blocks.1.mlp.fc1.weight"])
    assert torch.equal(own["fc_norm.weight"], exported["norm.weight"])
    with torch.no_grad():
        assert stage.eval().network(torch.randn(2, 3, 16, 16)).abs().max() < 1e-2
    fresh = ClassifyStage(settings(vit_run, weights="random"), ("a", "b"))
    assert not torch.equal(fresh.network.state_dict()["blocks.1.mlp.fc1.weight"], own["blocks.1.mlp.fc1.weight"])


def test_view__augmentation_is_a_function_of_the_key_and_leaves_the_generator(vit_run: Path) -> None:
    view = KIND.view(settings(vit_run, rand_augment=9, random_erasing=0.5))
    image = torch.randint(256, (3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    first = [view(image, key)["image"] for key in range(6)]
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn)
    assert all(torch.equal(view(image, key)["image"], first[key]) for key in range(6))
    assert len({crop.numpy().tobytes() for crop in first}) == 6
    assert all(crop.shape == (3, 16, 16) and crop.dtype == torch.uint8 for crop in first)


def test_check__needs_a_backbone() -> None:
    with pytest.raises(ConfigError, match="--backbone is missing"):
        KIND.check(FinetuneConfig())
