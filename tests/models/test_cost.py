"""The cost of jobs: operations of an image are those of the docstrings of recipes, which were counted in training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pecobook.models.cost import TERAFLOPS, Cost, job_cost, known_flop
from pecobook.recipes import recipe, story
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.predict import PredictConfig
from pecobook.settings.probe import ProbeConfig
from pecobook.settings.tokenize import TokenizeConfig
from pecobook.settings.values import replace, to_dict
from pecobook.utils.files import write_json

VIT = {"perceptual.network": "timm:vit_base_patch16_224"}


def gflop(command: str, config: Any) -> float:
    """Return the operations per training image, in 10^9."""
    flop = known_flop(command, config)
    assert flop is not None
    return flop / 1e9


@pytest.mark.parametrize(
    ("command", "name", "changes"),
    [
        ("contrast", "paper", {}),
        ("contrast", "paper-resnet50", {}),
        ("contrast", "imagenette", {}),
        ("codebook", "paper", VIT),
        ("codebook", "paper-lite", VIT),
        ("codebook", "paper-resnet50", {"perceptual.network": "timm:resnet50"}),
        ("codebook", "paper-vgg16", {}),
        ("codebook", "imagenette-224", {"perceptual.network": "none"}),
        ("codebook", "vqkd", {}),
        ("codebook", "modern-dinov3", {}),
        ("pretrain", "paper", {"tokens": "bank"}),
        ("pretrain", "paper-vit-l", {"tokens": "bank"}),
        ("finetune", "paper", {"backbone": "timm:vit_base_patch16_224"}),
        ("segment", "paper-ade20k", {"backbone": "timm:beit_base_patch16_224"}),
        ("detect", "paper-coco", {"backbone": "timm:beit_base_patch16_224"}),
    ],
)
def test_known_flop__is_that_of_the_recipe(command: str, name: str, changes: dict[str, Any]) -> None:
    match = re.search(r"Cost: ([\d.]+) GFLOP for an image", story(command, name))
    assert match is not None
    assert gflop(command, replace(recipe(command, name), changes)) == pytest.approx(float(match[1]), rel=0.03)


def test_known_flop__of_a_training_with_the_tokenizer_of_a_run(tmp_path: Path) -> None:
    run = replace(recipe("codebook", "tiny"), {"perceptual.network": "none"})
    write_json(tmp_path / "config.json", to_dict(run))
    config = replace(recipe("pretrain", "tiny"), {"tokenizer": str(tmp_path)})
    alone = known_flop("pretrain", replace(config, {"tokens": "bank"}))
    autoencoder = known_flop("codebook", run)
    both = known_flop("pretrain", config)
    assert alone is not None
    assert autoencoder is not None
    assert both is not None
    assert alone < both < alone + autoencoder / 3  # the encoder alone, forward
    assert known_flop("pretrain", replace(config, {"tokenizer": "taming:no-such-file"})) is None


def test_job_cost__of_a_bank_and_of_pre_training_from_it() -> None:
    codebook = replace(recipe("codebook", "paper"), {"out": "runs/codebook", "max_steps": "10"})
    others = {"runs/codebook": codebook}
    bank = TokenizeConfig(tokenizer="runs/codebook", views=15)
    cost = job_cost("tokenize", bank, 1000, 100, others)
    views = 15 * 1000 + 100
    assert cost.flop is not None
    assert cost.flop == pytest.approx(66e9 * views, rel=0.02)  # docs/pretraining.md
    assert cost.disk == views * 392
    assert cost.hours == pytest.approx(cost.flop / (1e12 * TERAFLOPS["tokenize"]) / 3600)
    online = replace(recipe("pretrain", "paper"), {"tokenizer": "runs/codebook", "max_steps": "10", "compile": True})
    costs = [job_cost("pretrain", replace(online, {"tokens": tokens}), 1000, 100, others) for tokens in ("", "bank")]
    (with_tokenizer, from_bank) = [cost.flop for cost in costs]
    assert with_tokenizer == pytest.approx(175e9 * 10 * 2048, rel=0.03)
    assert from_bank == pytest.approx(108e9 * 10 * 2048, rel=0.03)


def test_job_cost__of_visible_patches_alone_is_less() -> None:
    whole = replace(recipe("pretrain", "paper"), {"model.name": "vit_base_patch16_224", "model.args": "{}"})
    whole = replace(whole, {"target": "pixels", "mask.num_masked": 147})
    visible = gflop("pretrain", replace(whole, {"visible_only": True}))
    # A quarter of the ViT, and the decoder: 8 blocks of width 512 on 196 patches, each 12 w^2 + 2 N w products forward.
    decoder = whole.decoder
    products = decoder.depth * 196 * (12 * decoder.width**2 + 2 * 196 * decoder.width)
    assert visible == pytest.approx(gflop("pretrain", whole) / 4 + 3 * 2 * products / 1e9, rel=0.05)


def test_job_cost__of_segmentation_is_that_which_is_published_for_beit() -> None:
    """605 GMAC and 163 million parameters of BEiT-B with UperNet at 512 pixels (arXiv 2201.03545, table 5)."""
    config = replace(recipe("segment", "paper-ade20k"), {"backbone": "timm:beit_base_patch16_224", "max_steps": "10"})
    auxiliary = 2 * 9 * 768 * 256 * 32**2  # a convolution on the third map, of which the publication does not speak
    forward = gflop("segment", config) / 3 - auxiliary / 1e9
    assert forward == pytest.approx(2 * 605, rel=0.01)
    cost = job_cost("segment", config, 0, 0, {})
    copies = 3 * config.keep_checkpoints + 1
    assert cost.disk == pytest.approx(4 * 163e6 * copies, rel=0.01)


def test_job_cost__of_a_probe_and_of_attacks_counts_their_passes() -> None:
    forward = 35.1e9  # of ViT-B/16 at 224 pixels
    probe = ProbeConfig(backbone="timm:vit_base_patch16_224", max_train=800, max_test=500)
    assert job_cost("probe", probe, 1000, 200, {}).flop == pytest.approx(1000 * forward, rel=0.02)
    classifier = replace(recipe("finetune", "paper"), {"backbone": "timm:vit_base_patch16_224"})
    attacked = replace(PredictConfig(run="runs/a"), {"attack.names": ("bim", "mi-fgsm"), "attack.steps": 20})
    passes = 1 + 2 * (20 * 3 + 1)  # each step goes forward and back to the pixels
    cost = job_cost("predict", attacked, 1000, 200, {"runs/a": classifier})
    assert cost.flop == pytest.approx(200 * passes * forward, rel=0.02)


def test_job_cost__of_unknown_networks_and_small_images_is_not_invented() -> None:
    assert job_cost("tokenize", TokenizeConfig(tokenizer="owner/name"), 10, 10, {}) == Cost(None, None, 0.0)
    assert job_cost("segment", recipe("segment", "tiny"), 10, 10, {}) == Cost(None, None, 0.0)  # without a backbone
    gone = replace(recipe("contrast", "tiny"), {"model.name": "gone"})
    assert job_cost("contrast", gone, 10, 10, {}) == Cost(None, None, 0.0)
    small = job_cost("codebook", recipe("codebook", "tiny"), 10, 10, {})
    assert small.flop is not None
    assert small.hours is None  # images of 32 pixels do not keep a GPU busy
    analysis = AnalyzeConfig(tokenizer="runs/codebook")
    assert job_cost("analyze", analysis, 10, 10, {"runs/codebook": recipe("codebook", "tiny")}).hours is None
