from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pecobook.data.views import colour_draws
from pecobook.errors import ConfigError
from pecobook.recipes import recipe
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import replace
from pecobook.stages.moco import MocoStage
from tests.runs import SMALL, export_bytes, logged, losses, train, without_norm

VIT = BackboneConfig(name="vit_tiny_patch16_224", args='{"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}')


def make(**more: Any) -> MocoStage:
    config: ContrastConfig = replace(recipe("contrast", "tiny"), {**SMALL["contrast"], "out": "unused"})
    torch.manual_seed(0)
    return MocoStage(dataclasses.replace(config, **more))


def batch(count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    views = torch.randint(256, (2, count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    colours = [torch.stack([colour_draws(10 * number + index) for index in range(count)]) for number in (0, 1)]
    return {"view0": views[0], "view1": views[1], "colour0": colours[0], "colour1": colours[1]}


@pytest.mark.parametrize("model", [None, VIT])
def test_forward__the_momentum_encoder_never_gets_gradients(model: BackboneConfig | None) -> None:
    stage = make(**({"model": model} if model else {}))
    output = stage(batch())
    output.loss.backward()
    momentum_parameters = [*stage.momentum_backbone.parameters(), *stage.momentum_projector.parameters()]
    assert momentum_parameters
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in momentum_parameters)
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in stage.named_parameters() if parameter.grad is not None} == trained
    assert not any(name.startswith("momentum") for name in trained)
    groups = stage.parameter_groups(stage.config.optim)
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert 0 <= float(output.metrics["accuracy"]) <= 100


def test_forward__a_network_whose_features_widen_after_pooling() -> None:
    stage = make(model=BackboneConfig(name="mobilenetv3_small_050"))
    assert stage.backbone.num_features != stage.backbone.head_hidden_size
    assert stage(batch()).loss.isfinite()


@pytest.mark.filterwarnings("error")
def test_forward__one_held_out_image_has_nothing_to_measure() -> None:
    """The right key would be the only one: a loss of 0 and an accuracy of 100 would say nothing."""
    stage = make().eval()
    assert stage(batch(1)).loss is None
    assert stage(batch(1)).metrics == {}
    assert set(stage(batch(2)).metrics) == {"accuracy", "spread"}


def test_train__few_held_out_images_support_no_claim(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(16):
        Image.new("RGB", (9, 9), (16 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    run = train("contrast", tmp_path / "images", tmp_path / "run", max_steps="1", sample_every="1")
    said = (run / "train.log").read_text()
    assert "step 1, 1 held-out image, too few for any claim: nothing could be measured" in said


def test_forward__loss_is_symmetric_in_the_views() -> None:
    stage, inputs = make(blur=(0.0, 0.0), solarise=(0.0, 0.0)), batch()
    swapped = {name.translate({48: "1", 49: "0"}): value for name, value in inputs.items()}
    assert stage(inputs).loss.item() == pytest.approx(stage(swapped).loss.item(), rel=1e-5)


def test_train__micro_batches_learn_as_the_whole_batch(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pecobook.stages.moco.mlp", without_norm)
    # A large epsilon keeps Adam from amplifying the rounding of gradients near zero.
    more: dict[str, Any] = {"model.name": VIT.name, "model.args": VIT.args, "optim.eps": 1e-3}
    whole = train("contrast", images, tmp_path / "whole", **more)
    parts = train("contrast", images, tmp_path / "parts", **more, micro_batch_size=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    split, full = ([line["accuracy"] for line in logged(run) if "accuracy" in line] for run in (parts, whole))
    assert split == pytest.approx(full)


def test_train__micro_batches_resume_bit_for_bit(images: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"micro_batch_size": 2, "save_every": 4}
    run = train("contrast", images, tmp_path / "run", **more)
    before = export_bytes(run)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    train("contrast", images, run, **more, resume=True)
    assert export_bytes(run) == before


def test_stage__freezes_the_patch_projection_if_set() -> None:
    def trains(stage: MocoStage) -> bool:
        return any(p.requires_grad for p in stage.backbone.patch_embed.parameters())  # type: ignore[union-attr]

    assert not trains(make(model=VIT))
    assert trains(make(model=VIT, freeze_patch_embed=False))


def test_after_step__moves_the_momentum_encoder_by_the_formula() -> None:
    stage = make(momentum=0.9)
    names = dict(stage.named_parameters())
    for name, parameter in names.items():
        if not name.startswith("momentum"):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter))
    before = {name: value.clone() for name, value in names.items()}
    step, total = 3, 10
    stage.after_step(step, total)
    m = 1 - (1 - 0.9) * (math.cos(math.pi * (step - 1) / total) + 1) / 2  # MoCo v3: from 0.9 up to 1
    num_moved = 0
    for name, value in names.items():
        if name.startswith("momentum_"):
            expected = m * before[name] + (1 - m) * before[name.removeprefix("momentum_")]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
            num_moved += int(not torch.equal(value, before[name]))
        else:
            assert torch.equal(value, before[name])
    assert num_moved > 10


def test_after_step__the_first_step_uses_the_configured_momentum() -> None:
    stage = make(momentum=0.0)
    with torch.no_grad():
        for parameter in stage.backbone.parameters():
            parameter.fill_(3.0)
    stage.after_step(1, 10)
    assert all((parameter == 3).all() for parameter in stage.momentum_backbone.parameters())


def test_warning__when_features_collapse() -> None:
    stage = make()
    assert "collapsed" in (stage.warning({"spread": 0.01}, 100) or "")
    assert stage.warning({"spread": 0.01}, 99) is None
    assert stage.warning({"spread": 0.9}, 100) is None


def test_check__contrast_needs_two_images() -> None:
    for name in ("batch_size", "micro_batch_size"):
        config: ContrastConfig = replace(recipe("contrast", "tiny"), {**SMALL["contrast"], name: 1})
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: .* at least 2 images"):
            MocoStage.check(config)
