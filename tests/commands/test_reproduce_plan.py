"""The plan of `pecobook reproduce`: its runs and their settings, what it costs, and the plan as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pecobook.commands.paper_tables import TABLES, chosen_tables
from pecobook.commands.reproduce.plan import Plan
from pecobook.data.images import open_images
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import to_dict
from pecobook.stages.codebook import CodebookStage


def make_plan(images: Path, *tables: str, **settings: Any) -> Plan:
    config = ReproduceConfig(tables=tables, data=str(images), out="unused", seeds=(0, 1), **settings)
    return Plan(config, chosen_tables(tables), open_images(str(images)))


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_plan__takes_another_backbone(images: Path, name: str) -> None:
    backbone = BackboneConfig(name="vit_small_patch16_224", args='{"init_values": 0.1}')
    settings = {"budget": name, "backbone": backbone, "micro_batch_size": 64, "compile": True}
    plan = make_plan(images, "tables1-2", **settings)
    for arm, command in {
        "vit-pixel-0": "pretrain",
        "vit-pixels-1": "pretrain",
        "network-backbone-0": "contrast",
    }.items():
        assert plan.jobs[arm].command == command
        assert plan.jobs[arm].config.model == backbone
    assert plan.jobs["classifier-vit-contrast-0"].config.backbone == plan.jobs["network-backbone-0"].config.out
    kind = "resnet" if name == "tiny" else "vit"
    assert plan.jobs[f"network-{kind}-0"].config.model != backbone, "the perceptual network stays"
    for job in plan.jobs.values():
        if job.command != "analyze":
            assert (job.config.micro_batch_size, job.config.compile) == (64, True)


def test_plan__trains_each_run_once_and_in_order(images: Path) -> None:
    plan = make_plan(images, *TABLES, dalle="folder", more_data="photos")
    earlier: set[str] = set()
    for name, job in plan.jobs.items():
        assert set(job.needs) <= earlier, name
        earlier.add(name)
    codebooks = [to_dict(job.config) for name, job in plan.jobs.items() if name.startswith("codebook-")]
    without_out = [json.dumps({**config, "out": ""}, sort_keys=True) for config in codebooks]
    assert len(set(without_out)) == len(without_out)  # no training is planned twice
    assert {job.config.seed for job in plan.jobs.values()} == {0, 1}
    for table in TABLES:  # each table alone is part of all
        for name in make_plan(images, table, dalle="folder", more_data="photos").jobs:
            assert name in plan.jobs or name.replace("analysis-", "judged-") in plan.jobs


def test_plan__controls_differ_only_in_the_weights(images: Path) -> None:
    plan = make_plan(images, "table5")
    for network in ("perceptual", "vit", "supervised"):
        settings = to_dict(plan.codebook_settings(network, 1)[0])
        for how, changed in (("random", {"weights": "random"}), ("shuffled", {"shuffle": True})):
            control = to_dict(plan.codebook_settings(f"{network}-{how}", 1)[0])
            assert control == {**settings, "perceptual": {**settings["perceptual"], **changed}}
    assert plan.canonical("resnet-random") == "perceptual-random"  # the ResNet is the default network of this budget
    assert plan.canonical("lambda-0.3") == "lambda-0.3"


def test_plan__waits_for_no_job_when_the_supervised_network_is_given(images: Path) -> None:
    plan = make_plan(images, "table4", supervised="runs/classifier")
    assert plan.jobs["judged-pixel-0"].config.classifier == "runs/classifier"
    assert plan.jobs["judged-pixel-0"].needs == ("codebook-pixel-0",)


def test_plan__arms_have_the_settings_of_their_rows(images: Path) -> None:
    plan = make_plan(images, "table6", "table7", "table10", "table12", "tables1-2")
    arm = {name: plan.codebook_settings(name, 0)[0] for name in (
        "pixel", "perceptual", "classification", "contrastive", "adversarial", "lambda-0.3", "transformers",
        "half-stride", "half-width", "lite",
    )}  # fmt: skip
    assert arm["pixel"].perceptual.network == "none"
    assert arm["classification"].explicit.kind == "classification"
    assert arm["contrastive"].explicit.kind == "contrastive"
    assert arm["adversarial"].adversarial.weight == 0.4
    assert arm["lambda-0.3"].perceptual.weight == pytest.approx(0.3 * arm["perceptual"].perceptual.weight)
    assert arm["transformers"].model.kind == "vit"
    assert arm["half-width"].model.decoder_width == 0.5
    assert arm["half-stride"].image_size * 2 == arm["perceptual"].image_size
    assert {config.image_size // config.model.stride for config in arm.values()} == {4}
    assert plan.jobs["vit-half-stride-0"].config.tokenizer_size == 16
    assert plan.jobs["vit-perceptual-0"].config.tokenizer_size == 0
    assert plan.jobs["vit-pixels-0"].config.target == "pixels"
    assert plan.jobs["classifier-scratch-0"].config.weights == "random"
    assert plan.jobs["classifier-scratch-0"].config.optim.layer_decay == 1
    assert plan.jobs["classifier-pixels-0"].config.optim.layer_decay == 0.75
    moco = plan.jobs["network-backbone-0"].config
    assert plan.jobs["classifier-vit-contrast-0"].config.backbone == moco.out
    assert moco.model == plan.jobs["vit-pixels-0"].config.model  # all rows of Table 1 fine-tune one architecture


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_plan__every_tokenizer_can_be_built(images: Path, name: str) -> None:
    plan = make_plan(
        images, *TABLES, budget=name, network="timm:resnet10t", network_layers=(1, 2), network_weights="random"
    )
    for arm in ("perceptual", "classification", "contrastive", "adversarial", "transformers", "half-stride", "lite"):
        settings, network_job = plan.codebook_settings(arm, 0)
        assert network_job == ""
        CodebookStage(settings, num_classes=3)


def test_plan__at_budget_paper_has_the_papers_settings(images: Path) -> None:
    plan = make_plan(images, *TABLES, budget="paper", dalle="folder")
    assert plan.budget.default == "vit"
    assert plan.codebook_settings("perceptual", 0)[0].perceptual.layers == (3, 6, 9, 12)
    assert plan.codebook_settings("supervised", 0)[0].perceptual.network == "torchvision:vgg16"
    assert plan.codebook_settings("half-depth", 0)[0].model.decoder_blocks == 1
    assert plan.jobs["vit-half-stride-0"].config.tokenizer_size == 112
    assert plan.jobs["vit-dalle-0"].config.tokenizer_size == 112
    assert plan.jobs["vit-dalle-0"].config.tokenizer == "dalle:folder"
    assert plan.jobs["classifier-vit-contrast-0"].config.backbone == plan.jobs["network-vit-0"].config.out


def test_plan__leaves_out_arms_that_it_cannot_train(images: Path, unlabelled_images: Path) -> None:
    plan = make_plan(images, "table4", "table12", "v1-table7")
    assert plan.missing_for_arm("dalle") == "--dalle FOLDER"
    assert plan.missing_for_arm("more-data") == "--more-data SOURCE"
    assert not any("dalle" in name or "more-data" in name or "half-depth" in name for name in plan.jobs)
    unlabelled = make_plan(unlabelled_images, "table6")
    assert unlabelled.missing_for_arm("classification") == "labels"
    assert not any(name.startswith("classifier-") for name in unlabelled.jobs)
