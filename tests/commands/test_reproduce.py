"""`pecobook reproduce`: what it plans is what the paper's tables compare, and what it prints is what was measured."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import shlex
import statistics
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pecobook
from pecobook import cli
from pecobook.commands.jobs import Job, _seconds
from pecobook.commands.reproduce import command_line
from pecobook.commands.reproduce.budgets import Budget, budget
from pecobook.commands.reproduce.paper import TABLES, PaperTable, Row, chosen_tables
from pecobook.commands.reproduce.plan import Plan
from pecobook.commands.reproduce.rehearsal import _moved, describe, how_long, kind_of, rehearsed, work
from pecobook.commands.reproduce.tables import (
    Measured,
    comma_separated,
    gains_over_controls,
    lines_of,
    markdown,
    plot,
    remarks,
)
from pecobook.commands.reproduce.tables import measured as gather
from pecobook.data.images import open_images
from pecobook.errors import ConfigError, PreflightError
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import replace, to_dict
from pecobook.stages.codebook import CodebookStage
from tests.runs import SMALL


def make_plan(images: Path, *tables: str, **settings: Any) -> Plan:
    config = ReproduceConfig(tables=tables, data=str(images), out="unused", seeds=(0, 1), **settings)
    return Plan(config, chosen_tables(tables), open_images(str(images)))


def test_command_line__gives_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ReproduceConfig(
        tables=("table4", "table5"),
        data="two words",
        out="r",
        budget="small",
        length=0.25,
        seeds=(0, 3),
        transfer=False,
        network="timm:resnet50",
        network_layers=(1, "layer2"),
        backbone=BackboneConfig(name="vit_small_patch16_224", args='{"init_values": 0.1}'),
        compile=True,
    )
    found: list[ReproduceConfig] = []
    monkeypatch.setattr("pecobook.commands.reproduce.reproduce", found.append)
    words = shlex.split(command_line(asked))
    assert words[:2] == ["pecobook", "reproduce"]
    cli.main([*words[1:], "--out", "r"])
    assert found == [asked]
    told = command_line(ReproduceConfig(tables=("table7",), out="r", dry_run=True))
    assert told == "pecobook reproduce table7 --data photos --budget tiny --seeds 0 1 2"


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_plan__takes_another_backbone(images: Path, name: str) -> None:
    given = BackboneConfig(name="vit_small_patch16_224", args='{"init_values": 0.1}')
    settings = {"budget": name, "backbone": given, "micro_batch_size": 64, "compile": True}
    plan = make_plan(images, "tables1-2", **settings)
    for arm, command in {
        "vit-pixel-0": "pretrain",
        "vit-pixels-1": "pretrain",
        "network-backbone-0": "contrast",
    }.items():
        assert plan.jobs[arm].command == command
        assert plan.jobs[arm].config.model == given
    assert plan.jobs["classifier-vit-contrast-0"].config.backbone == plan.jobs["network-backbone-0"].config.out
    kind = "resnet" if name == "tiny" else "vit"
    assert plan.jobs[f"network-{kind}-0"].config.model != given, "it looks at images for the codebook, and stays"
    for job in plan.jobs.values():
        if job.command != "analyze":
            assert (job.config.micro_batch_size, job.config.compile) == (64, True)


def test_tables__have_the_papers_numbers() -> None:
    told = {name: {row.arm: row.paper for row in table.rows} for name, table in TABLES.items()}
    assert told["table4"] == {"dalle": (6.1, 18.2), "pixel": (10.2, 17.9), "perceptual": (29.7, 51.7)}
    assert [paper for (paper,) in told["table5"].values()] == [82.9, 84.0, 84.1, 84.1]
    assert [paper for (paper,) in told["table6"].values()] == [82.9, 82.9, 84.1]
    assert [paper for (paper,) in told["table7"].values()] == [82.9, 84.1, 83.9]
    assert [paper for (paper,) in told["table10"].values()] == [82.9, 84.1, 84.1, 83.6, 83.5]
    assert [paper for (paper,) in told["table12"].values()] == [83.6, 83.8, 84.1, 84.0, 84.1]
    assert told["tables1-2"]["perceptual"] == told["tables1-2"]["lite"] == (84.5,)


def test_chosen_tables__knows_both_versions() -> None:
    assert list(chosen_tables(("v1-table6", "table4", "v3-table4"))) == ["table5", "table4"]
    assert list(chosen_tables(("v1-table7", "table7"))) == ["v1-table7", "table7"]
    with pytest.raises(ConfigError, match=r"no table 'table44'.*table4"):
        chosen_tables(("table44",))


def test_plan__trains_each_run_once_and_in_order(images: Path) -> None:
    plan = make_plan(images, *TABLES, dalle="folder", more_data="photos")
    done: set[str] = set()
    for name, job in plan.jobs.items():
        assert set(job.needs) <= done, name
        done.add(name)
    codebooks = [to_dict(job.config) for name, job in plan.jobs.items() if name.startswith("codebook-")]
    bare = [json.dumps({**one, "out": ""}, sort_keys=True) for one in codebooks]
    assert len(set(bare)) == len(bare)  # no two train the same
    assert {job.config.seed for job in plan.jobs.values()} == {0, 1}
    for table in TABLES:  # each table alone is part of all
        for name in make_plan(images, table, dalle="folder", more_data="photos").jobs:
            assert name in plan.jobs or name.replace("analysis-", "judged-") in plan.jobs


def test_plan__controls_differ_in_weights_alone(images: Path) -> None:
    plan = make_plan(images, "table5")
    for network in ("perceptual", "vit", "supervised"):
        own = to_dict(plan.codebook_settings(network, 1)[0])
        for how, changed in (("random", {"weights": "random"}), ("shuffled", {"shuffle": True})):
            other = to_dict(plan.codebook_settings(f"{network}-{how}", 1)[0])
            assert other == {**own, "perceptual": {**own["perceptual"], **changed}}
    assert plan.canonical("resnet-random") == "perceptual-random"  # the ResNet is this budget's network of all rows
    assert plan.canonical("lambda-0.3") == "lambda-0.3"


def test_plan__arms_are_what_their_rows_say(images: Path) -> None:
    plan = make_plan(images, "table6", "table7", "table10", "table12", "tables1-2")
    arm = {name: plan.codebook_settings(name, 0)[0] for name in (
        "pixel", "perceptual", "classification", "contrastive", "adversarial", "lambda-0.3", "transformers",
        "half-stride", "half-width", "lite",
    )}  # fmt: skip
    assert arm["pixel"].perceptual.network == "none"
    assert arm["classification"].explicit.kind == "classification"
    assert arm["contrastive"].explicit.kind == "contrastive"
    assert arm["adversarial"].adversarial.weight == 0.4
    assert arm["lambda-0.3"].perceptual.weight == 0.3
    assert arm["transformers"].model.kind == "vit"
    assert arm["half-width"].model.decoder_width == 0.5
    assert arm["half-stride"].image_size * 2 == arm["perceptual"].image_size
    assert {one.image_size // one.model.stride for one in arm.values()} == {4}
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
        settings, needs = plan.codebook_settings(arm, 0)
        assert needs == ()
        CodebookStage(settings, num_classes=3)


def test_plan__at_the_papers_budget_is_the_papers(images: Path) -> None:
    own = budget("paper")
    plan = make_plan(images, *TABLES, budget="paper", dalle="folder")
    assert own.default == "vit"
    assert plan.codebook_settings("perceptual", 0)[0].perceptual.layers == (3, 6, 9, 12)
    assert plan.codebook_settings("supervised", 0)[0].perceptual.network == "torchvision:vgg16"
    assert plan.codebook_settings("half-depth", 0)[0].model.decoder_blocks == 1
    assert plan.jobs["vit-half-stride-0"].config.tokenizer_size == 112
    assert plan.jobs["vit-dalle-0"].config.tokenizer_size == 112
    assert plan.jobs["vit-dalle-0"].config.tokenizer == "dalle:folder"
    assert plan.jobs["classifier-vit-contrast-0"].config.backbone == plan.jobs["network-vit-0"].config.out


def test_plan__leaves_out_what_it_cannot_train(images: Path, tmp_path: Path) -> None:
    plan = make_plan(images, "table4", "table12", "v1-table7")
    assert plan.missing("dalle") == "--dalle FOLDER"
    assert plan.missing("more-data") == "--more-data SOURCE"
    assert not any("dalle" in name or "more-data" in name or "half-depth" in name for name in plan.jobs)
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        (tmp_path / f"{number}.png").write_bytes(file.read_bytes())
    bare = make_plan(tmp_path, "table6")
    assert bare.missing("classification") == "labels"
    assert not any(name.startswith("classifier-") for name in bare.jobs)


def measured() -> Measured:
    rows = (Row("pixel loss", "pixel", (82.9,)), Row("perceptual | loss", "perceptual", (84.1,)))
    table = PaperTable("Table 7", (("finetuned", "fine-tuned, %"), ("codeword_probe", "probe, %")), rows)
    pixel, own, control = [20.0, 22.0, 21.0], [30.0, 31.0, 35.0], [25.0, 24.0, 23.0]
    return Measured("table7", table, tuple(
        (row, {"finetuned": values, "codes_used": [512.0] * 3}, "") for row, values in zip(
            table.all_rows, (pixel, own, control, []), strict=True)
    ))  # fmt: skip


def test_tables__show_means_spread_and_the_paper() -> None:
    one = measured()
    header, rows = lines_of(one)
    assert header == ("", "fine-tuned, %", "paper", "probe, %", "codewords used")
    spread = statistics.stdev([30.0, 31.0, 35.0])
    assert rows[1] == ("perceptual | loss", f"32.0 ± {spread:.1f}", "84.1", "–", "512.0 ± 0.0")
    assert rows[2][0] == "perceptual | loss, random weights (control)"
    assert rows[3][1:3] == ("–", "–")
    told = gains_over_controls(one)
    assert told[0] == "fine-tuned, %: perceptual | loss minus pixel loss: 11.0 ± 2.6 (seeds: +10.0, +9.0, +14.0)"
    assert len(told) == 2  # nothing was measured of the shuffled control
    text = markdown([one], "how")
    assert all(line.count(" | ") <= 5 for line in text.splitlines())
    assert plot(one).startswith(b"\x89PNG")
    lines = list(csv.DictReader(io.StringIO(comma_separated([one]))))
    found = {(line["arm"], line["figure"]): line for line in lines}
    assert float(found["perceptual", "finetuned"]["mean"]) == 32.0
    assert found["perceptual", "finetuned"]["paper"] == "84.1"
    assert found["perceptual-random", "finetuned"]["paper"] == ""


def test_tables__say_why_figures_are_missing(images: Path, tmp_path: Path) -> None:
    assert make_plan(images, "table4").unmeasured(TABLES["table4"].figures) == []
    paper = make_plan(images, "table4", "table7", budget="paper", transfer=False)
    classified = "Not measured: reconstructions classified, % (needs --classifier)."
    assert paper.unmeasured(TABLES["table4"].figures) == [classified]
    described = describe(paper)
    assert classified in described
    assert "Not measured: fine-tuned, % (needs --transfer)." in described
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        (tmp_path / f"{number}.png").write_bytes(file.read_bytes())
    bare = make_plan(tmp_path, "table4", classifier="runs/classifier")
    assert len(bare.unmeasured(TABLES["table4"].figures)) == 2
    assert not any(name.startswith("judged-") for name in bare.jobs)
    (one,) = gather(bare, chosen_tables(("table4",)))
    header, rows = lines_of(one)
    assert header[:5] == ("", "linear probe of codewords, %", "paper", "reconstructions classified, %", "paper")
    assert rows[2][1:5] == ("–", "29.7", "–", "51.7")
    assert "reconstructions classified, % (needs labels)" in markdown([one], "how")
    assert plot(one).startswith(b"\x89PNG")


def test_tables__tell_how_well_the_classifier_does_on_originals() -> None:
    row, other = TABLES["table4"].rows[1:]
    values = {"classified": [20.0, 22.0], "originals": [70.0, 72.0]}
    alike = Measured("table4", TABLES["table4"], ((row, values, ""), (other, values, "")))
    assert remarks(alike) == ["Our classifier, on originals: 71.0 ± 1.4%."]
    assert not any("originals" in heading for heading in lines_of(alike)[0])
    apart = Measured("table4", TABLES["table4"], ((row, values, ""), (other, {**values, "originals": [60.0]}, "")))
    (told,) = remarks(apart)
    assert told == "Our classifier, on originals: 71.0 ± 1.4% (pixel loss alone), 60.0% (perceptual loss)."


def test_rehearsal__knows_what_takes_alike() -> None:
    assert kind_of("network-resnet-0") == "network-resnet"
    assert kind_of("codebook-lambda-0.3-12") == "codebook-lambda-0.3"
    assert kind_of("vit-vit-contrast-1") == "vit-vit-contrast"
    assert kind_of("judged-pixel-0") == kind_of("analysis-pixel-0") == "analysis"
    job = Job("codebook", dataclasses.replace(budget("tiny").codebook, max_steps="50"))
    assert work(job, "codebook-pixel-0", {"codebook-pixel": 2.0}) == 100.0
    moved = _moved({"a": "/x/runs/one", "b": ["/x/runs"], "c": {"d": "/y"}}, Path("/x/runs"), Path("/z"))
    assert moved == {"a": "/z/one", "b": ["/x/runs"], "c": {"d": "/y"}}


def small_budget() -> Budget:
    """The tiny budget with networks of a few thousand weights."""
    own = budget("tiny")
    return dataclasses.replace(
        own,
        contrast={name: replace(one, SMALL["contrast"]) for name, one in own.contrast.items()},
        codebook=replace(own.codebook, SMALL["codebook"]),
        layers={**own.layers, "resnet": (1, 2)},
    )


class InThisProcess:
    """Stands for a process that runs pecobook, and spares its imports; jobs as processes are tested with the demo."""

    returncode = 0

    def __init__(self, command: list[str], **_: object) -> None:
        assert command[1:3] == ["-m", "pecobook"]
        with contextlib.redirect_stderr(io.StringIO()):
            cli.main(command[3:])

    pid = 2**30  # of no process, so none is kept to some cores

    def poll(self) -> int:
        return 0


def test_reproduce__goes_on_and_refuses_other_settings(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pecobook.commands.reproduce.plan.budget", lambda _: small_budget())
    in_this_process = SimpleNamespace(Popen=InThisProcess, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("pecobook.commands.jobs.subprocess", in_this_process)
    out = ["--out", str(tmp_path / "r"), "--seeds", "0", "--no-transfer"]
    words = ["reproduce", "v1-table7", "--data", str(images), *out]
    cli.main([*words, "--dry-run"])
    assert "7 runs for 1 seeds" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    cli.main(words)
    told = capsys.readouterr().err
    assert "rehearsing" in told
    assert "about" in told
    cli.main([*words, "--dry-run"])
    assert "about 0s of computing" in capsys.readouterr().err
    rehearsal = json.loads((tmp_path / "r" / "rehearsal.json").read_text())
    arms = ("perceptual", "perceptual-random", "perceptual-shuffled")
    assert set(rehearsal) == {"network-resnet", "analysis", *(f"codebook-{arm}" for arm in arms)}
    lines = {(one["arm"], one["figure"]): one for one in csv.DictReader((tmp_path / "r" / "tables.csv").open())}
    line = lines["perceptual", "codeword_probe"]
    assert lines["perceptual", "finetuned"]["mean"] == ""
    analysis = json.loads((tmp_path / "r" / "runs" / "analysis-perceptual-0" / "analysis.json").read_text())
    assert float(line["mean"]) == analysis["tokenizers"][0]["codeword_probe"]
    assert "(needs --more-data SOURCE)" in (tmp_path / "r" / "tables.md").read_text()
    assert (tmp_path / "r" / "report.html").read_text().count("<table") >= 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r" / "runs").rglob("*.safetensors")}
    with contextlib.redirect_stderr(io.StringIO()):
        cli.main(words)  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "r" / "runs").rglob("*.safetensors")}
    with pytest.raises(SystemExit):
        cli.main([*words, "--length", "2"])
    assert "begun with other settings: length: 1.0 -> 2.0" in capsys.readouterr().err


def test_reproduce__says_before_anything_is_trained_what_a_network_lacks(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "table7", "--data", str(images), "--out", str(tmp_path / "r"), "--dry-run"]
    words += ["--network", "timm:resnet10t", "--network-weights", "random"]
    with pytest.raises(SystemExit):
        cli.main([*words, "--network-layers", "9"])
    assert "--network-layers 9: 'timm:resnet10t' has layers 1 to 4" in capsys.readouterr().err
    cli.main([*words, "--network-layers", "1", "2"])
    assert "will be known after a few steps" in capsys.readouterr().err


def test_how_long__is_known_of_a_rehearsed_folder(images: Path, tmp_path: Path) -> None:
    plan = make_plan(images, "table7")
    seconds = {kind_of(name): 0.1 for name in plan.jobs}
    assert how_long(plan, seconds).startswith("about")
    (tmp_path / "rehearsal.json").write_text(json.dumps({"codebook": 1.0, "analysis": 2.0}))  # of an earlier version
    assert "will be known" in how_long(plan, rehearsed(tmp_path))
    assert rehearsed(tmp_path / "none") == {}


def test_cost__leaves_out_the_time_between_an_interruption_and_its_resumption(tmp_path: Path) -> None:
    config = dataclasses.replace(budget("tiny").codebook, out=str(tmp_path))
    (tmp_path / "export").mkdir()
    for name, time in {"config.json": 1000, "environment.json": 1001, "export/config.json": 1300}.items():
        (tmp_path / name).write_text(json.dumps({"batch_size": 8}))
        os.utime(tmp_path / name, (time, time))
    lines = [
        {"step": 10, "images_per_second": 4.0},
        {"step": 10, "evaluation/psnr": 1},
        {"step": 20, "images_per_second": 2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _seconds(Job("codebook", config)) == 300
    os.utime(tmp_path / "environment.json", (9000, 9000))  # written again by the process that resumed
    os.utime(tmp_path / "export" / "config.json", (9100, 9100))
    assert _seconds(Job("codebook", config)) == 10 * 8 / 4 + 10 * 8 / 2


def test_reproduce__tells_all_problems(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(PreflightError) as caught:
        pecobook.reproduce(tables=("table99",), out=str(tmp_path))
    told = "\n".join(map(str, caught.value.problems))
    assert "no table 'table99'" in told
    assert "is not empty" in told
    with pytest.raises(ConfigError, match="different numbers"):
        ReproduceConfig(seeds=(0, 0))
