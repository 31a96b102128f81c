"""The plan of `pecobook reproduce`: its runs and their settings, what it costs, and the plan as files."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pecobook import cli
from pecobook.commands.paper_tables import TABLES, chosen_tables
from pecobook.commands.reproduce.listing import as_json, command_line, commands, describe
from pecobook.commands.reproduce.plan import Plan, num_views
from pecobook.commands.reproduce.slurm import script
from pecobook.commands.reproduce.transfers import TransferData
from pecobook.data.images import open_images
from pecobook.recipes import RECIPES
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import replace, to_dict
from pecobook.stages.codebook import CodebookStage


def make_plan(images: Path, *tables: str, **settings: Any) -> Plan:
    fixed = {"tables": tables, "data": str(images), "out": "unused", "seeds": (0, 1)}
    config = ReproduceConfig(**{**fixed, **settings})
    return Plan(config, chosen_tables(tables), open_images(str(images)))


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_plan__takes_another_backbone(images: Path, name: str) -> None:
    backbone = BackboneConfig(name="vit_small_patch16_224", args='{"init_values": 0.1}')
    settings = {"budget": name, "backbone": backbone, "micro_batch_size": 64, "compile": True}
    plan = make_plan(images, "tables1-2", **settings)
    for arm, command in {
        "vit-pixel-0": "pretrain",
        "vit-mae@1600-1": "pretrain",
        "vit-moco-0": "contrast",
    }.items():
        assert plan.jobs[arm].command == command
        assert plan.jobs[arm].config.model == backbone
    assert plan.jobs["classifier-moco-0"].config.backbone == plan.jobs["vit-moco-0"].config.out
    assert plan.jobs["classifier-scratch-0"].config.backbone == plan.jobs["vit-moco-0"].config.out
    assert plan.jobs["classifier-scratch-0"].config.weights == "random"
    kind = "resnet" if name == "tiny" else "vit"
    assert plan.jobs[f"network-{kind}-0"].config.model != backbone, "the perceptual network stays"
    for job in plan.jobs.values():
        if job.command in RECIPES:
            assert (job.config.micro_batch_size, job.config.compile) == (64, True)


def test_plan__trains_each_run_once_and_in_order(images: Path) -> None:
    given: dict[str, Any] = {"dalle": "folder", "more_data": "photos", "budget": "small"}
    plan = make_plan(images, *TABLES, **given)
    earlier: set[str] = set()
    for name, job in plan.jobs.items():
        assert set(job.needs) <= earlier, name
        earlier.add(name)
    codebooks = [to_dict(job.config) for name, job in plan.jobs.items() if name.startswith("codebook-")]
    without_out = [json.dumps({**config, "out": ""}, sort_keys=True) for config in codebooks]
    assert len(set(without_out)) == len(without_out)  # no training is planned twice
    assert {name.rpartition("-")[2] for name in plan.jobs} == {"0", "1"}
    for name, job in plan.jobs.items():  # attacks draw nothing
        assert job.command == "predict" or job.config.seed == int(name[-1])
    for table in TABLES:  # each table alone is part of all
        for name, job in make_plan(images, table, **given).jobs.items():
            assert name.replace("analysis-", "judged-") in plan.jobs or plan.jobs[name] == job, "a name has one meaning"


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
    mae = plan.jobs["vit-mae@1600-0"].config
    assert (mae.target, mae.visible_only, mae.mask.kind, mae.mask.num_masked) == ("pixels", True, "random", 12)  # of 16
    short, long = (plan.jobs[f"vit-perceptual{epochs}-0"].config for epochs in ("", "@800"))
    same = {"out": short.out, "tokens": short.tokens}  # as many views as the length wants
    assert replace(long, {**same, "max_steps": "200", "save_every": 66, "sample_every": 200}) == short
    assert (long.max_steps, mae.max_steps) == ("533", "1067")  # 8/3 and 16/3 of 200
    assert "codebook-perceptual@800-0" not in plan.jobs
    assert "analysis-perceptual@800-0" not in plan.jobs
    assert plan.jobs["classifier-scratch-0"].config.weights == "random"
    assert plan.jobs["classifier-scratch-0"].config.optim.layer_decay == 1
    assert plan.jobs["classifier-perceptual-0"].config.optim.layer_decay == 0.75
    moco = plan.jobs["vit-moco-0"].config
    assert plan.jobs["classifier-moco-0"].config.backbone == moco.out
    assert moco.model == mae.model == short.model  # all rows of Table 1 fine-tune one architecture
    assert plan.missing_for_arm("dino") == "--dino timm:vit_base_patch16_224.dino"
    assert plan.missing_for_arm("deit") == "another --budget"


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
    plan = make_plan(images, *TABLES, budget="paper", dalle="folder", dino="timm:vit_base_patch16_224.dino")
    assert plan.budget.default == "vit"
    assert plan.codebook_settings("perceptual", 0)[0].perceptual.layers == (3, 6, 9, 12)
    assert plan.codebook_settings("supervised", 0)[0].perceptual.network == "torchvision:vgg16"
    assert plan.codebook_settings("half-depth", 0)[0].model.decoder_blocks == 1
    assert plan.jobs["vit-half-stride-0"].config.tokenizer_size == 112
    assert plan.jobs["vit-dalle-0"].config.tokenizer_size == 112
    assert plan.jobs["vit-dalle-0"].config.tokenizer == "dalle:folder"
    moco = plan.jobs["vit-moco-0"].config
    lengths = (plan.budget.vits["base"].moco.max_steps, plan.budget.contrast["vit"].max_steps)
    assert lengths == ("300 epochs", "100 epochs")  # in Table 1, and for the codebook
    assert moco.optim.warmup == "40 epochs"
    assert plan.jobs["classifier-moco-0"].config.backbone == moco.out
    mae = plan.jobs["vit-mae@1600-0"].config
    assert (mae.model.name, mae.visible_only, mae.mask.num_masked) == ("vit_base_patch16_224", True, 147)  # 75% of 196
    scratch, deit = (plan.jobs[f"classifier-{arm}-0"].config for arm in ("scratch", "deit"))
    assert scratch.backbone == deit.backbone == "timm:vit_base_patch16_224"
    assert scratch.weights == deit.weights == "random"
    assert scratch.optim.layer_decay == deit.optim.layer_decay == 1
    assert (scratch.optim.weight_decay, deit.optim.weight_decay) == (0.3, 0.05)
    assert plan.jobs["classifier-mae@1600-0"].config.optim.lr == 2e-3
    assert plan.jobs["classifier-dino-0"].config.backbone == "timm:vit_base_patch16_224.dino"
    assert plan.jobs["vit-perceptual@800@large-0"].config.model.name == "beit_large_patch16_224"
    assert plan.jobs["vit-moco@300@large-0"].config.model.name == "vit_large_patch16_224"
    assert (
        plan.jobs["classifier-perceptual@800@large-0"].config.max_steps
        == plan.jobs["classifier-mae@1600@large-0"].config.max_steps
    )
    huge, codes = plan.jobs["vit-mae@1600@huge-0"].config, plan.jobs["vit-perceptual@800@huge-0"].config
    assert (huge.model.name, huge.mask.num_masked) == ("vit_huge_patch14_224", 192)  # 75% of 256
    assert (codes.model.name, codes.mask.num_masked, codes.tokenizer_size) == ("vit_huge_patch14_224", 98, 256)
    at_448 = plan.jobs["classifier-perceptual@800@huge-448-0"].config
    assert (at_448.image_size, at_448.backbone) == (448, codes.out)  # pre-trained once, fine-tuned at two sizes
    assert "vit-perceptual@800@huge-448-0" not in plan.jobs
    assert plan.jobs["classifier-scratch@300@large-0"].config.backbone == "timm:vit_large_patch16_224"


def test_plan__at_budget_paper_analyses_all_images(images: Path) -> None:
    source = open_images(str(images))
    source.train.classes = tuple(map(str, range(1000)))  # as many as ImageNet-1K
    config = ReproduceConfig(tables=("table4",), budget="paper", out="unused", seeds=(0,))
    plan = Plan(config, chosen_tables(("table4",)), source)
    analysis = plan.jobs["judged-perceptual-0"].config
    assert analysis.classifier == "timm:deit_tiny_patch16_224"
    assert min(analysis.max_train, analysis.max_test) > 1_281_167
    assert plan.unmeasured(TABLES["table4"].figures) == []
    named = Plan(replace(config, {"classifier": "runs/c"}), plan.tables, source)
    assert named.jobs["judged-perceptual-0"].config.classifier == "runs/c"
    tiny = make_plan(images, "table4").jobs["judged-perceptual-0"].config
    assert (tiny.max_train, tiny.max_test) == (10_000, 2000)


def test_plan__shortens_warm_up_and_milestones_with_the_training(images: Path) -> None:
    words = {"budget": "paper", "detection_data": "coco", "length": 0.1}
    source: Any = SimpleNamespace(train=ImageNet(), evaluation=ImageNet())
    tables = chosen_tables(("table8",))
    config = ReproduceConfig(tables=("table8",), out="unused", seeds=(0,), **words)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        coco = {"detect": TransferData(118_287, {"data": "coco"})}
        patch.setattr("pecobook.commands.reproduce.plan.transfer_data", lambda *_: coco)
        jobs = Plan(config, tables, source).jobs
    classifier, vit, detector = (jobs[f"{kind}-perceptual@800-0"].config for kind in ("classifier", "vit", "detect"))
    assert int(classifier.optim.warmup) / int(classifier.max_steps) == pytest.approx(0.2, abs=1e-3)
    assert int(vit.optim.warmup) == 626  # a tenth of 10 epochs, whatever the length of the arm
    shares = [int(milestone) / int(detector.max_steps) for milestone in detector.optim.milestones]
    assert shares == pytest.approx([8 / 12, 11 / 12], abs=1e-3)
    whole = make_plan(images, "table7", budget="paper")
    assert whole.jobs["classifier-pixel-0"].config.optim.warmup == "20 epochs"
    tiny = make_plan(images, "table7", length=0.5)
    assert tiny.jobs["classifier-pixel-0"].config.optim.warmup == "10%"


def test_plan__runs_nothing_for_a_table_without_its_data(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not make_plan(images, "table3").jobs
    assert make_plan(images, "table8").jobs, "its first column needs no other data"
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "table3", "--data", str(images), "--out", "unused", "--dry-run"])
    said = capsys.readouterr().err
    assert "There is nothing to run.\nNot measured: ADE20K mIoU, % (needs --segmentation-data SOURCE)." in said


def test_preflight__checks_what_no_job_makes(
    images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vit = {"backbone.name": "vit_tiny_patch16_224"}
    for table, flags, said in (
        ("table4", {"dalle": "nowhere"}, "--dalle: 'nowhere' contains no encoder.pkl"),
        ("table4", {"classifier": "nowhere"}, "--classifier: There is no run 'nowhere'"),
        ("table4", {"classifier": "timm:test_vit"}, "--classifier timm:test_vit has 1000 classes"),
        ("table4", {"supervised": "nowhere"}, "--supervised: There is no run 'nowhere'"),
        ("table4", {"network": "nowhere"}, "--network: 'nowhere' is neither a run folder nor a network"),
        ("tables1-2", {"dino": "nowhere"}, "--dino: 'nowhere' is neither a run folder nor a network"),
        ("v1-table7", {"more-data": "nowhere"}, "--more-data 'nowhere': 'nowhere' does not exist"),
        ("table7", {"backbone.name": "nowhere"}, "--backbone.name: timm has no network 'nowhere'"),
        ("table7", vit, "makes 2 x 2 patches of 32 pixels, and the tokenizer 4 x 4 codes"),
        ("table4", {"commands": "plan", "slurm": "./plan"}, "--commands and --slurm name one file"),
        ("table4", {"commands": "plan", "supervised": "a\nb"}, "has a line break"),
        ("table9", {}, "There is nothing to run.\nNot measured: Kinetics-400, % (needs --kinetics FOLDER)."),
    ):
        words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        with pytest.raises(SystemExit):
            cli.main(
                ["reproduce", table, "--data", str(images), "--out", "unused", "--seeds", "0", "--dry-run", *words]
            )
        assert said in capsys.readouterr().err, flags
    assert not list(tmp_path.iterdir())


def test_plan__leaves_out_arms_that_it_cannot_train(images: Path, unlabelled_images: Path) -> None:
    plan = make_plan(images, "table4", "table12", "v1-table7")
    assert plan.missing_for_arm("dalle") == "--dalle FOLDER"
    assert plan.missing_for_arm("more-data") == "--more-data SOURCE"
    assert not any("dalle" in name or "more-data" in name or "half-depth" in name for name in plan.jobs)
    needs = "a budget whose decoder has two blocks to halve"
    left_out = [
        "Not trained: DALL-E (needs --dalle FOLDER).",
        f"Not trained: convolutions, decoder of half the depth (needs {needs}).",
        "Not trained: on more images (needs --more-data SOURCE).",
    ]
    assert plan.left_out() == json.loads(as_json(plan))["left_out"] == left_out
    assert "\n".join(plan.left_out()) in describe(plan)
    unlabelled = make_plan(unlabelled_images, "table6")
    assert unlabelled.missing_for_arm("classification") == "labels"
    assert not any(name.startswith("classifier-") for name in unlabelled.jobs)


class ImageNet:
    """As many images as ImageNet-1K."""

    labels, classes = (0,), ("thing",)

    def __len__(self) -> int:
        return 1_281_167


def test_plan__trains_vits_from_banks_where_they_save_time(images: Path) -> None:
    config = ReproduceConfig(tables=("tables1-2",), budget="paper", out="unused", seeds=(0, 1))
    source: Any = SimpleNamespace(train=ImageNet(), evaluation=ImageNet())
    paper = Plan(config, chosen_tables(config.tables), source)
    assert {name.rpartition("-")[0] for name in paper.jobs if name.startswith("bank-perceptual-")} == {
        "bank-perceptual-224px-15views",  # for 300 epochs
        "bank-perceptual-224px-40views",  # for 800 epochs
        *(f"bank-perceptual-{how}-224px-15views" for how in ("random", "shuffled")),
    }
    job, bank = paper.jobs["vit-perceptual-1"], paper.jobs["bank-perceptual-224px-15views-1"]
    assert job.config.tokens == bank.config.out
    assert job.needs == ("bank-perceptual-224px-15views-1", "codebook-perceptual-1")
    assert bank.needs == ("codebook-perceptual-1",)
    assert (bank.config.views, bank.config.seed, bank.config.tokenizer) == (15, 1, job.config.tokenizer)
    assert paper.jobs["vit-mae@1600-0"].config.tokens == ""
    online = Plan(replace(config, {"views": 0}), paper.tables, source)
    assert not any(name.startswith("bank-") for name in online.jobs)
    assert make_plan(images, "table7", views=3).jobs["vit-pixel-0"].needs[0] == "bank-pixel-32px-3views-0"


@pytest.mark.parametrize(("epochs", "views"), [(1, 0), (7.9, 0), (8, 4), (19, 4), (100, 5), (300, 15), (800, 40)])
def test_num_views__grows_with_the_length(epochs: float, views: int) -> None:
    assert num_views(epochs) == views


def test_plan__every_command_line_gives_the_settings_of_its_job(images: Path) -> None:
    plan = make_plan(images, *TABLES, budget="paper", data="IMAGE NET", dalle="D", dino="timm:d", out="my runs")
    for name, job in plan.jobs.items():
        if name.endswith("-1"):
            _, command, *words = shlex.split(command_line(job))
            settings = cli._settings(command, words)
            same = {"resume": False, "overwrite": False}
            assert to_dict(settings) | same == to_dict(job.config) | same, name


def test_listing__has_every_job_with_its_command_needs_hours_and_disk(images: Path) -> None:
    plan = make_plan(images, "table7", budget="paper", compile=True)
    entries = {entry["name"]: entry for entry in json.loads(as_json(plan))["jobs"]}
    assert entries.keys() == plan.jobs.keys()
    codebook = entries["codebook-pixel-0"]
    num_images = int(plan.jobs["codebook-pixel-0"].config.max_steps) * 128
    assert codebook["flop"] == pytest.approx(588e9 * num_images, rel=0.01)
    assert codebook["gpu_hours"] == pytest.approx(588e9 * num_images / 227e12 / 3600, abs=1e-3)
    assert codebook["needs"] == []
    assert not codebook["finished"]
    assert codebook["command"].startswith("pecobook codebook paper --data ")
    total = sum(cost.hours or 0.0 for cost in plan.costs.values())
    assert f"What is left takes about {total:.2g} GPU-hours of an H200" in describe(plan)
    assert "  2 x codebook-pixel: " in describe(plan, every_arm=True).replace("     2 x", "  2 x")


def test_commands__are_lines_with_their_needs(images: Path) -> None:
    plan = make_plan(images, "table7", out="two words/t")
    lines = commands(plan).splitlines()
    assert lines[0].startswith("# The plan of: pecobook reproduce table7 --data ")
    before: set[str] = set()
    for line in lines[4:-1]:
        command, _, comment = line.rpartition("  # ")
        name, _, needs = comment.partition(" after ")
        assert shlex.split(command)[1:] == list(plan.jobs[name].words)
        assert set(needs.split()) == set(plan.jobs[name].needs) <= before
        before.add(name)
    assert before == plan.jobs.keys()
    assert lines[-1].endswith("--no-train  # tables after all")
    assert "--out 'two words/t'" in lines[-1]


def test_slurm__divides_what_an_array_cannot_hold(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pecobook.commands.reproduce.slurm._MOST_TASKS", 2)
    plan = make_plan(images, "table4", seeds=(7, 8, 9), transfer=False)
    submitted = re.findall(r"(job\d+)=\$\(submit (\S+) (\S+) \S+ \"(.*)\" <<", script(plan))
    arrays = {name: (variable, indices, waits) for variable, name, indices, waits in submitted}
    assert arrays["codebook-pixel+part3"][1] == "1"
    assert arrays["codebook-pixel+part4"][1] == "0,1"
    (need,) = re.findall(r"aftercorr:\$(job\d+)$", arrays["codebook-perceptual+part4"][2])
    assert need == arrays["network-resnet+part4"][0]
    assert f"\n1) srun --kill-on-bad-exit=1 {command_line(plan.jobs['codebook-pixel-9'])} ;;\n" in script(plan)


_SBATCH = """#!/bin/bash
number=$(($(cat "$FAKE/count" 2> /dev/null || echo 100) + 1))
echo $number > "$FAKE/count"
printf '%s\\n' "$@" > "$FAKE/$number.options"
cat > "$FAKE/$number.script"
echo $number
"""


def test_slurm__submits_arrays_that_wait_seed_by_seed(images: Path, tmp_path: Path) -> None:
    plan = make_plan(images, "table5", out=str(tmp_path / "it's 100%"), views=2)
    finished = plan.jobs["codebook-pixel-1"].out
    (finished / "export").mkdir(parents=True)
    (finished / "export" / "config.json").touch()
    (tmp_path / "sbatch").write_text(_SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "GPUS": "2"}
    words = ["bash", "-s", "--", "--partition=a b"]
    done = subprocess.run(words, input=script(plan), env=environment, text=True, capture_output=True, check=True)
    submitted: dict[str, tuple[dict[str, str], str, str]] = {}
    for file in sorted(tmp_path.glob("*.options")):
        options = dict(option.removeprefix("--").partition("=")[::2] for option in file.read_text().splitlines())
        text = file.with_suffix(".script").read_text()
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        submitted[options["job-name"]] = options, text, file.stem
    options, text, number = submitted["vit-pixel"]
    assert (options["array"], options["gpus-per-node"], options["partition"]) == ("0,1", "2", "a b")
    assert set(options["dependency"].removeprefix("aftercorr:").split(":")) == {
        submitted["bank-pixel-32px-2views"][2],
        submitted["codebook-pixel"][2],
    }
    assert options["output"] == f"{tmp_path}/it's 100%%/logs/vit-pixel-%a.out"
    assert (tmp_path / "it's 100%" / "logs").is_dir()
    assert submitted["judged-pixel" if "judged-pixel" in submitted else "analysis-pixel"][0]["gpus-per-node"] == "1"
    codebook = submitted["codebook-pixel"][1]
    assert "\n1) : ;;\n" in codebook, "a finished task keeps its place"
    (line,) = [line for line in codebook.splitlines() if line.startswith("0) ")]
    assert shlex.split(line.removesuffix(" ;;"))[2:] == [
        "--kill-on-bad-exit=1", "pecobook", *plan.jobs["codebook-pixel-0"].words
    ]  # fmt: skip
    waits = submitted["tables"][0]["dependency"].split(":")
    assert waits[0] == "afterany"
    assert set(waits[1:]) == {entry[2] for name, entry in submitted.items() if name != "tables"}
    assert f"Job {submitted['tables'][2]} writes the tables" in done.stdout
    assert number in waits
