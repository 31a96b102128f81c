"""Tables 3, 8 and 11 of `pecobook reproduce`: segmentation, detection, visible patches, attacks."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pecobook import cli
from pecobook.commands.jobs import Job, job_seconds
from pecobook.commands.paper_tables import TABLES, Arm
from pecobook.commands.reproduce import _with_full_paths
from pecobook.commands.reproduce.budgets import Budget, VitRuns, make_budget, with_backbone
from pecobook.commands.reproduce.transfers import TRANSFERS, transfer_figures
from pecobook.errors import ConfigError, DataError, RunFolderError
from pecobook.recipes import recipe
from pecobook.settings.predict import PredictConfig
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import replace
from tests.clips import write_moving
from tests.commands.test_reproduce import InThisProcess, small_budget
from tests.commands.test_reproduce_plan import make_plan
from tests.runs import SMALL, objects, shapes


def dense() -> dict[str, Any]:
    return {"segmentation_data": str(shapes()), "detection_data": str(objects())}


def test_tables__have_the_papers_numbers() -> None:
    numbers = {name: {row.arm: row.paper for row in TABLES[name].rows} for name in ("table3", "table8", "table11")}
    assert numbers["table3"] == {
        "deit": (47.4, 44.1, 39.8),
        "moco": (47.3, 44.9, 40.4),
        "dalle@800": (47.1, 46.3, 41.1),
        "mae@800": (47.6, 46.8, 41.9),
        "mae@1600": (48.1, 47.2, 42.0),
        "pixel@800": (),
        "perceptual@800": (48.5, 47.8, 42.6),
    }
    assert numbers["table8"]["mae@800"] == (83.4, 47.6, 46.8, 41.9)
    assert numbers["table8"]["perceptual@800@visible"] == (84.2, 48.2, 47.3, 42.2)
    assert numbers["table11"] == {
        "deit": (81.8, 46.2, 50.2),
        "moco": (83.2, 51.8, 54.9),
        "dalle": (82.8, 50.2, 53.2),
        "mae@1600": (83.6, 37.2, 42.2),
        "pixel": (),
        "perceptual": (84.1, 52.5, 55.3),
    }


def test_controls__keep_the_length_and_the_vit_of_their_arm() -> None:
    assert Arm.parse("perceptual@800").control("random") == "perceptual-random@800"
    controls = [row.arm for row in TABLES["table8"].all_rows if row.control]
    assert controls == ["perceptual-random@800@visible", "perceptual-shuffled@800@visible"]


def test_plan__table3_trains_the_pretrained_vits_on_their_own_images(images: Path) -> None:
    plan = make_plan(images, "table3", segmentation_ignore=("255", "green"), **dense())
    segment, detect = (plan.jobs[f"{kind}-perceptual@800-1"] for kind in ("segment", "detect"))
    vit = plan.jobs["vit-perceptual@800-1"]
    for job, data in ((segment, shapes()), (detect, objects())):
        assert (job.config.data, job.config.backbone, job.config.seed) == (str(data), vit.config.out, 1)
        assert job.needs == ("vit-perceptual@800-1",)
        assert job.config.max_steps == "100"
    assert segment.config.ignore == ("255", "green")
    assert detect.config.max_steps == plan.budget.transfers["detect"].max_steps
    assert not any(name.startswith("classifier-") for name in plan.jobs)  # no figure of the table needs one


def test_plan__table3_tests_on_all_images_at_every_budget(images: Path) -> None:
    """The recipes' own tests are of 64 and 16 images, and a table shows their figures without saying so."""
    for budget in ("tiny", "small"):
        plan = make_plan(images, "table3", budget=budget, **dense())
        assert [plan.jobs[f"{kind}-moco-0"].config.evaluation_images for kind in ("segment", "detect")] == [5000, 5000]


def test_plan__table3_at_budget_paper(images: Path) -> None:
    plan = make_plan(images, "table3", budget="paper", detection_data=str(objects()))
    job = plan.jobs["detect-deit-0"]
    assert job.needs == ("classifier-deit-0",)  # from scratch there is no other pre-training
    assert job.config.backbone == plan.jobs["classifier-deit-0"].config.out
    assert job.config.scales == recipe("detect", "paper").scales
    assert int(job.config.max_steps) < 100  # 12 epochs of these few images, not of --data
    assert "segment-deit-0" not in plan.jobs
    remarks = plan.unmeasured(TABLES["table3"].figures)
    assert remarks == ["Not measured: ADE20K mIoU, % (needs --segmentation-data SOURCE)."]


def test_plan__measures_nothing_dense_without_images_or_transfer(images: Path, unlabelled_images: Path) -> None:
    assert not {"segment", "detect"} & {name.partition("-")[0] for name in make_plan(images, "table3").jobs}
    plan = make_plan(images, "table3", transfer=False, **dense())
    assert not {"segment", "vit"} & {name.partition("-")[0] for name in plan.jobs}
    assert plan.missing_for_figure("box_ap") == plan.missing_for_figure("bim") == "--transfer"
    unlabelled = make_plan(unlabelled_images, "table3", "table11", **dense())
    kinds = {name.partition("-")[0] for name in unlabelled.jobs}
    assert "segment" in kinds  # masks are labels of their own
    assert not {"classifier", "attack"} & kinds
    assert unlabelled.missing_for_figure("mi-fgsm") == "labels"


@pytest.fixture
def unlabelled_images(tmp_path: Path, images: Path) -> Path:
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        (folder / f"{number}.png").write_bytes(file.read_bytes())
    return folder


def test_plan__names_the_flag_of_images_that_do_not_exist(images: Path) -> None:
    with pytest.raises(DataError, match="--detection-data"):
        make_plan(images, "table3", detection_data="nothing-here")
    with pytest.raises(ConfigError, match="--segmentation-ignore 'violet'"):
        make_plan(images, "table3", segmentation_data=str(shapes()), segmentation_ignore=("violet",))


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_plan__table8_differs_from_maes_pretraining_in_the_target_alone(images: Path, name: str) -> None:
    plan = make_plan(images, "table8", budget=name)
    accelerated, mae = (plan.jobs[f"vit-{arm}-0"].config for arm in ("perceptual@800@visible", "mae@800"))
    assert (accelerated.target, mae.target) == ("tokens", "pixels")
    tokenizer = plan.jobs["codebook-perceptual-0"].config.out
    same = {"target": "pixels", "tokenizer": "", "tokenizer_size": 0, "tokens": "", "out": mae.out}
    assert accelerated.tokenizer == tokenizer
    assert replace(accelerated, same) == mae
    assert mae.visible_only
    banks = {job.out: job.config for job in plan.jobs.values() if job.command == "tokenize"}
    if name == "paper":  # 800 epochs: the views of a bank are those of its pre-training
        crops = {plan.jobs[f"vit-{arm}-0"].config.min_crop for arm in ("perceptual@800@visible", "perceptual@800")}
        assert {config.min_crop for config in banks.values()} == crops == {0.2, 0.08}
    classifiers = [plan.jobs[f"classifier-{arm}-0"].config for arm in ("perceptual@800@visible", "mae@800")]
    assert dataclasses.replace(classifiers[0], backbone="", out="") == dataclasses.replace(
        classifiers[1], backbone="", out=""
    )


def test_with_backbone__also_for_visible_patches() -> None:
    budget = with_backbone(make_budget("tiny"), BackboneConfig(name="vit_small_patch16_224"))
    assert budget.vits["visible"].pretrain.model.name == "vit_small_patch16_224"
    assert budget.vits["visible"].pretrain.target == "tokens"


def test_plan__table11_attacks_every_classifier(images: Path) -> None:
    plan = make_plan(images, "table11")
    job = plan.jobs["attack-mae@1600-1"]
    assert (job.command, job.needs) == ("predict", ("classifier-mae@1600-1",))
    assert job.config.run == plan.jobs["classifier-mae@1600-1"].config.out
    assert (job.config.images, job.config.attack.names) == (str(images), ("bim", "mi-fgsm"))
    assert (job.config.attack.eps, job.config.attack.steps) == (2.0, 20)


def test_transfer_figures__of_finished_jobs(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "evaluation/miou": 3.0}\n{"step": 2, "evaluation/miou": 41.5, "evaluation/box_ap": 7.0}\n'
    )
    config = recipe("segment", "tiny")
    job = Job("segment", replace(config, {"out": str(tmp_path)}))
    assert transfer_figures(job, TRANSFERS["segment"]) == {"miou": 41.5}
    assert transfer_figures(job, TRANSFERS["detect"]) == {"box_ap": 7.0, "mask_ap": None}  # data without masks
    assert not Job("predict", PredictConfig(out=str(tmp_path))).finished
    content = {"accuracy": {"clean": 80.0, "bim": 10.0, "mi-fgsm": 20.0}, "seconds": 12.5}
    (tmp_path / "robustness.json").write_text(json.dumps(content))
    attack = Job("predict", PredictConfig(out=str(tmp_path)))
    assert attack.finished
    assert transfer_figures(attack, TRANSFERS["attack"]) == {"bim": 10.0, "mi-fgsm": 20.0}
    assert job_seconds(attack) == 12.5


@pytest.mark.parametrize("content", [None, "", '{"step": 2, "loss": 1.0, "evaluation/miou": 4', '{"step": 2}\n'])
def test_transfer_figures__of_a_damaged_run_are_no_empty_cell(tmp_path: Path, content: str | None) -> None:
    """A cell that is silently empty looks as if its run were not asked for."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    job = Job("segment", replace(recipe("segment", "tiny"), {"out": str(tmp_path)}))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl' is missing or damaged.* Delete '.*export' and start"):
        transfer_figures(job, TRANSFERS["segment"])


SHORT = {command: {**settings, "max_steps": "3"} for command, settings in SMALL.items()}


def smallest_budget() -> Budget:
    """`small_budget` with ViTs, segmentation and detection of a few thousand weights as well."""
    budget = small_budget(SHORT)
    base, pretrain = budget.vits["base"], SHORT["pretrain"]
    runs = VitRuns(
        replace(base.pretrain, pretrain),
        replace(base.mae, {**pretrain, "drop_path": 0.0, "decoder": {"depth": 1, "width": 32, "num_heads": 2}}),
        replace(base.moco, SHORT["contrast"]),
        replace(base.finetune, SHORT["finetune"]),
        {},
    )
    dense = {name: replace(config, SHORT.get(name, SHORT["finetune"])) for name, config in budget.transfers.items()}
    visible = dataclasses.replace(runs, pretrain=dataclasses.replace(runs.mae, target="tokens"))
    return dataclasses.replace(budget, vits={"base": runs, "visible": visible}, transfers=dense)


def test_reproduce__writes_the_tables(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pecobook.commands.reproduce.plan.make_budget", lambda _: smallest_budget())
    in_this_process = SimpleNamespace(Popen=InThisProcess, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("pecobook.commands.jobs.subprocess", in_this_process)
    table = dataclasses.replace(TABLES["table8"], rows=TABLES["table8"].rows[:2], controls=())
    attacked = dataclasses.replace(TABLES["table11"], rows=TABLES["table11"].rows[3:4], controls=())
    monkeypatch.setitem(TABLES, "table8", table)
    monkeypatch.setitem(TABLES, "table11", attacked)
    flags = ["--segmentation-data", str(shapes()), "--detection-data", str(objects()), "--seeds", "0"]
    cli.main(["reproduce", "table8", "table11", "--data", str(images), *flags, "--out", str(tmp_path / "r")])
    lines = {
        (line["table"], line["arm"], line["figure"]): line["mean"]
        for line in csv.DictReader((tmp_path / "r" / "tables.csv").open())
    }
    for arm in ("mae@800", "perceptual@800@visible"):
        for figure in ("finetuned", "miou", "box_ap", "mask_ap"):
            assert 0 <= float(lines["table8", arm, figure]) <= 100
    for figure in ("finetuned", "bim", "mi-fgsm"):
        assert 0 <= float(lines["table11", "mae@1600", figure]) <= 100
    text = (tmp_path / "r" / "tables.md").read_text()
    assert "| COCO box AP, % | paper |" in text
    assert "| 42.2 |" in text


def test_reproduce__refuses_masks_that_do_not_exist_before_training(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "table3", "--data", str(images), "--segmentation-data", str(tmp_path / "no")]
    with pytest.raises(SystemExit):
        cli.main([*words, "--out", str(tmp_path / "r")])
    assert "--segmentation-data" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_plan__table9_trains_classifiers_of_clips(images: Path, tmp_path: Path) -> None:
    clips = write_moving(tmp_path / "clips", train=5)
    plan = make_plan(images, "table9", budget="paper", kinetics=str(clips), ssv2=str(clips), dalle="weights")
    peco, deit = plan.jobs["ssv2-perceptual@800-0"], plan.jobs["ssv2-deit-0"]
    assert (peco.command, peco.config.data) == ("finetune", str(clips))
    assert peco.config.backbone == plan.jobs["vit-perceptual@800-0"].config.out
    assert deit.config.backbone == plan.jobs["classifier-deit-0"].config.out
    assert (deit.config.optim.lr, deit.config.head_rate, peco.config.optim.lr) == (1e-4, 10, 1.2e-3)
    for job in (peco, deit):
        assert (job.config.clip.sampling, job.config.clip.flip) == ("segments", False)
        assert "--clip.no-flip" in job.words or "paper-video-ssv2" in job.words
        assert cli.parse(recipe(*job.words[:2]), list(job.words[2:]), "finetune").clip == job.config.clip
        assert int(job.config.max_steps) == 2  # 15 epochs of 10 clips, not of --data
    assert plan.jobs["kinetics-deit-0"].config.clip == recipe("finetune", "paper-video").clip
    only = make_plan(images, "table9", kinetics=str(clips))
    assert "kinetics-perceptual@800-0" in only.jobs
    assert not any(name.startswith("ssv2") for name in only.jobs)
    assert only.unmeasured(TABLES["table9"].figures) == [
        "Not measured: Something-Something v2, % (needs --ssv2 FOLDER)."
    ]
    with pytest.raises(DataError, match="--kinetics 'nowhere' is no folder"):
        make_plan(images, "table9", kinetics="nowhere")


def test_reproduce__gives_full_paths_to_patterns_and_not_to_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "random", "tiny", "shards"):
        (tmp_path / folder).mkdir()
    (tmp_path / "shards" / "x-000.tar").touch()
    pattern = "shards/x-{000..000}.tar"
    words = {"data": "photos", "network": "timm:resnet10t", "network_weights": "random"}
    config = ReproduceConfig(**words, more_data=pattern, kinetics="shards", ssv2="missing-{0..1}", out="o")  # type: ignore[arg-type]
    full = {"more_data": str(tmp_path / pattern), "kinetics": str(tmp_path / "shards"), "out": str(tmp_path / "o")}
    assert _with_full_paths(config) == replace(config, full)
