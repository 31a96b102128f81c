"""`pecobook reproduce`: the plan has the runs of the paper's tables, and the tables have the measured values."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
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
from pecobook.commands.jobs import Job, Outcome, job_seconds
from pecobook.commands.paper_tables import TABLES, Arm, PaperTable, Row, chosen_tables
from pecobook.commands.reproduce.budgets import Budget, make_budget
from pecobook.commands.reproduce.listing import command_words, describe, kind_of
from pecobook.commands.reproduce.rehearsal import job_duration, move_paths, read_rehearsal, remaining_time
from pecobook.commands.reproduce.tables import (
    MeasuredTable,
    comma_separated,
    gains_over_controls,
    header_and_rows,
    markdown,
    measured_tables,
    plot,
    remarks,
)
from pecobook.errors import ConfigError, PreflightError
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import replace
from tests.commands.test_reproduce_plan import make_plan
from tests.runs import SMALL

SHORT_AND_LONG = ("dalle", "lite", "perceptual")


def test_command_line__gives_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ReproduceConfig(
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
    configs: list[ReproduceConfig] = []
    monkeypatch.setattr("pecobook.commands.reproduce.reproduce", configs.append)
    words = shlex.split(shlex.join(command_words(config)))
    assert words[:2] == ["pecobook", "reproduce"]
    cli.main([*words[1:], "--out", "r"])
    assert configs == [config]
    line = shlex.join(command_words(ReproduceConfig(tables=("table7",), out="r", dry_run=True)))
    assert line == "pecobook reproduce table7 --data photos --budget tiny --seeds 0 1 2"


def test_tables__have_the_papers_numbers() -> None:
    numbers = {name: {row.arm: row.paper for row in table.rows} for name, table in TABLES.items()}
    assert numbers["table4"] == {"dalle": (6.1, 18.2), "pixel": (10.2, 17.9), "perceptual": (29.7, 51.7)}
    assert [paper for (paper,) in numbers["table5"].values()] == [82.9, 84.0, 84.1, 84.1]
    assert [paper for (paper,) in numbers["table6"].values()] == [82.9, 82.9, 84.1]
    assert [paper for (paper,) in numbers["table7"].values()] == [82.9, 84.1, 83.9]
    assert [paper for (paper,) in numbers["table10"].values()] == [82.9, 84.1, 84.1, 83.6, 83.5]
    assert [paper for (paper,) in numbers["table12"].values()] == [83.6, 83.8, 84.1, 84.0, 84.1]
    pairs = {arm: (numbers["tables1-2"][arm][0], numbers["tables1-2"][f"{arm}@800"][0]) for arm in SHORT_AND_LONG}
    assert pairs == {"dalle": (82.8, 83.2), "perceptual": (84.1, 84.5), "lite": (84.0, 84.5)}  # Table 2
    others = {"deit": 81.8, "scratch": 82.3, "dino": 82.8, "moco": 83.2, "mae@1600": 83.6}  # Table 1
    assert {arm: numbers["tables1-2"][arm][0] for arm in others} == others
    assert [row.paper for row in TABLES["table1-large"].all_rows] == [(82.6,), (84.1,), (85.9,), (85.2,), (86.5,)]
    assert [row.paper for row in TABLES["table1-huge"].all_rows] == [(83.1,), (86.9,), (87.8,), (87.5,), (88.3,)]


def test_arms__name_epochs_and_the_vit() -> None:
    for text, arm in {
        "perceptual": Arm("perceptual", 300, "base"),
        "lambda-0.3@800": Arm("lambda-0.3", 800, "base"),
        "mae@300@huge-448": Arm("mae", 300, "huge-448"),
    }.items():
        assert Arm.parse(text) == arm
        assert arm.name == text
    assert Arm.parse("mae@300").name == "mae"


def test_chosen_tables__has_tables_of_both_versions() -> None:
    assert list(chosen_tables(("v1-table6", "table4", "v3-table4"))) == ["table5", "table4"]
    assert list(chosen_tables(("v1-table7", "table7"))) == ["v1-table7", "table7"]
    with pytest.raises(ConfigError, match=r"no table 'table44'.*table4"):
        chosen_tables(("table44",))


def example_table() -> MeasuredTable:
    rows = (Row("pixel loss", "pixel", (82.9,)), Row("perceptual | loss", "perceptual", (84.1,)))
    table = PaperTable("Table 7", (("finetuned", "fine-tuned, %"), ("codeword_probe", "probe, %")), rows)
    pixel, perceptual, control = [20.0, 22.0, 21.0], [30.0, 31.0, 35.0], [25.0, 24.0, 23.0]
    codes = {0: 512.0, 1: 512.0, 2: 512.0}
    measured = [
        (row, {"finetuned": dict(enumerate(values)), "codes_used": codes}, "")
        for row, values in zip(table.all_rows, (pixel, perceptual, control, []), strict=True)
    ]
    return MeasuredTable("table7", table, tuple(measured))


def test_tables__have_means_deviations_and_the_papers_numbers() -> None:
    measured = example_table()
    header, rows = header_and_rows(measured)
    assert header == ("", "fine-tuned, %", "paper", "probe, %", "codewords used")
    deviation = statistics.stdev([30.0, 31.0, 35.0])
    assert rows[1] == ("perceptual | loss", f"32.0 ± {deviation:.1f}", "84.1", "–", "512.0 ± 0.0")
    assert rows[2][0] == "perceptual | loss, random weights (control)"
    assert rows[3][1:3] == ("–", "–")
    gains = gains_over_controls(measured)
    interval = "+11.0 [+4.4, +17.6] (seeds: +10.0, +9.0, +14.0)"
    shown = "not shown (p 0.056 after Holm's correction)"  # 3 times 0.0187: the shuffled control is part of the family
    assert gains[0] == f"Primary: fine-tuned, %: perceptual | loss minus pixel loss: {interval}: {shown}"
    assert len(gains) == 2  # the shuffled control was not measured
    text = markdown([measured], "how")
    assert all(line.count(" | ") <= 5 for line in text.splitlines())
    assert plot(measured).startswith(b"\x89PNG")
    reader = csv.DictReader(io.StringIO(comma_separated([measured])))
    lines = {(line["arm"], line["figure"]): line for line in reader}
    assert float(lines["perceptual", "finetuned"]["mean"]) == 32.0
    assert lines["perceptual", "finetuned"]["paper"] == "84.1"
    assert lines["perceptual-random", "finetuned"]["paper"] == ""


def test_tables__explain_missing_figures(images: Path, unlabelled_images: Path) -> None:
    assert make_plan(images, "table4").unmeasured(TABLES["table4"].figures) == []
    paper = make_plan(images, "table4", "table7", budget="paper", transfer=False)
    classified = "Not measured: reconstructions classified, % (needs --classifier)."
    assert paper.unmeasured(TABLES["table4"].figures) == [classified]
    described = describe(paper)
    assert classified in described
    assert "Not measured: fine-tuned, % (needs --transfer)." in described
    unlabelled = make_plan(unlabelled_images, "table4", classifier="runs/classifier")
    assert len(unlabelled.unmeasured(TABLES["table4"].figures)) == 3
    assert not any(name.startswith("judged-") for name in unlabelled.jobs)
    (measured,) = measured_tables(unlabelled)
    header, rows = header_and_rows(measured)
    assert header[:5] == ("", "linear probe of codewords, %", "paper", "reconstructions classified, %", "paper")
    assert rows[2][1:5] == ("–", "29.7", "–", "51.7")
    assert (header[5], rows[2][5]) == ("probe with position removed, %", "–")
    assert "reconstructions classified, % (needs labels)" in markdown([measured], "how")
    assert plot(measured).startswith(b"\x89PNG")


def test_tables__have_the_accuracy_of_the_classifier_on_originals() -> None:
    pixel, perceptual = TABLES["table4"].rows[1:]
    values = {"classified": {0: 20.0, 1: 22.0}, "originals": {0: 70.0, 1: 72.0}}
    equal = MeasuredTable("table4", TABLES["table4"], ((pixel, values, ""), (perceptual, values, "")))
    assert remarks(equal) == ["Our classifier, on originals: 71.0 ± 1.4%."]
    assert not any("originals" in heading for heading in header_and_rows(equal)[0])
    other_values = {**values, "originals": {0: 60.0}}
    different = MeasuredTable("table4", TABLES["table4"], ((pixel, values, ""), (perceptual, other_values, "")))
    (remark,) = remarks(different)
    assert remark == "Our classifier, on originals: 71.0 ± 1.4% (pixel loss alone), 60.0% (perceptual loss)."


def test_rehearsal__estimates_by_kind_of_run_and_writes_below_its_own_folder() -> None:
    assert kind_of("network-resnet-0") == "network-resnet"
    assert kind_of("codebook-lambda-0.3-12") == "codebook-lambda-0.3"
    assert kind_of("vit-mae@1600-1") == "vit-mae@1600"
    assert kind_of("judged-pixel-0") == kind_of("analysis-pixel-0") == "analysis"
    job = Job("codebook", dataclasses.replace(make_budget("tiny").codebook, max_steps="50"))
    assert job_duration(job, "codebook-pixel-0", {"codebook-pixel": 2.0}) == 100.0
    moved = move_paths({"a": "/x/runs/one", "b": ["/x/runs"], "c": {"d": "/y"}}, Path("/x/runs"), Path("/z"))
    assert moved == {"a": "/z/one", "b": ["/x/runs"], "c": {"d": "/y"}}


def small_budget(small: dict[str, dict[str, Any]] = SMALL) -> Budget:
    """The tiny budget with networks of a few thousand weights."""
    tiny = make_budget("tiny")
    return dataclasses.replace(
        tiny,
        contrast={name: replace(config, small["contrast"]) for name, config in tiny.contrast.items()},
        codebook=replace(tiny.codebook, small["codebook"]),
        layers={**tiny.layers, "resnet": (1, 2)},
    )


class InThisProcess:
    """Replaces a process and its slow imports by a call in this process; the demo's test runs jobs as processes."""

    returncode = 0

    def __init__(self, command: list[str], **_: object) -> None:
        assert command[1:3] == ["-m", "pecobook"]
        with contextlib.redirect_stderr(io.StringIO()):
            cli.main(command[3:])

    pid = 2**30  # no process has this number, so the cores of none are changed

    def poll(self) -> int:
        return 0


def test_reproduce__resumes_and_refuses_other_settings(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pecobook.commands.reproduce.plan.make_budget", lambda _: small_budget())
    monkeypatch.setattr("pecobook.commands.reproduce.rehearsal._WORTH", 0)  # short runs are not rehearsed
    in_this_process = SimpleNamespace(Popen=InThisProcess, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("pecobook.commands.jobs.subprocess", in_this_process)
    out = ["--out", str(tmp_path / "r"), "--seeds", "0", "--no-transfer"]
    words = ["reproduce", "v1-table7", "--data", str(images), *out]
    cli.main([*words, "--dry-run"])
    assert "7 runs for 1 seed" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    cli.main(words)
    printed = capsys.readouterr().err
    assert "rehearsing" in printed
    assert "about" in printed
    cli.main([*words, "--dry-run"])
    assert "about 0s of computing" in capsys.readouterr().err
    rehearsal = json.loads((tmp_path / "r" / "rehearsal.json").read_text())
    arms = ("perceptual", "perceptual-random", "perceptual-shuffled")
    assert set(rehearsal) == {"network-resnet", "analysis", *(f"codebook-{arm}" for arm in arms)}
    reader = csv.DictReader((tmp_path / "r" / "tables.csv").open())
    lines = {(line["arm"], line["figure"]): line for line in reader}
    assert lines["perceptual", "finetuned"]["mean"] == ""
    analysis = json.loads((tmp_path / "r" / "runs" / "analysis-perceptual-0" / "analysis.json").read_text())
    (metrics,) = analysis["tokenizers"]
    for figure, value in {
        "codeword_probe": metrics["codeword_probe"],
        "crossed_probe": metrics["crossed_probe"],
        "position": 100 * metrics["position"]["share"],
        "null_position": 100 * metrics["position"]["null_share"],
    }.items():
        assert float(lines["perceptual", figure]["mean"]) == pytest.approx(value, abs=1e-3)
    assert "| position in codes, % |" in (tmp_path / "r" / "tables.md").read_text()
    assert "(needs --more-data SOURCE)" in (tmp_path / "r" / "tables.md").read_text()
    assert (tmp_path / "r" / "report.html").read_text().count("<table") >= 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r" / "runs").rglob("*.safetensors")}
    old = {"seconds": 1.0, "tokenizers": [{"codeword_probe": 50.0, "codes_used": 2, "psnr": 9.0}]}
    for file in (tmp_path / "r" / "runs").rglob("analysis.json"):
        file.write_text(json.dumps(old))  # as an earlier version wrote it
    with contextlib.redirect_stderr(io.StringIO()):
        cli.main(words)  # nothing is left to do
    assert "| position in codes, % |" not in (tmp_path / "r" / "tables.md").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "r" / "runs").rglob("*.safetensors")}
    with pytest.raises(SystemExit):
        cli.main([*words, "--length", "2"])
    assert "begun with other settings: length: 1.0 -> 2.0" in capsys.readouterr().err


def test_reproduce__names_what_failed_and_writes_the_tables_of_the_rest(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(jobs: dict[str, Job], _out: Path, _gpus: int, **_: object) -> Outcome:
        folder = jobs["analysis-classification-0"].out
        folder.mkdir(parents=True)
        metrics = {"name": "classification", "codeword_probe": 12.5, "codes_used": 2, "psnr": 9.0}
        (folder / "analysis.json").write_text(json.dumps({"seconds": 1.0, "tokenizers": [metrics]}))
        (folder / "report.html").touch()
        return Outcome({"network-resnet-0": "no luck"}, {"codebook-perceptual-0": "network-resnet-0"})

    monkeypatch.setattr("pecobook.commands.reproduce.run_all", run)
    monkeypatch.setattr("pecobook.commands.reproduce.rehearsal.rehearse", lambda *_: {})
    out = tmp_path / "two words"
    words = ["reproduce", "table6", "--data", str(images), "--out", str(out), "--seeds", "0", "--no-transfer"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert f"The run 'network-resnet-0' failed; the whole output is in {out}/logs/network-resnet-0.log:" in printed
    assert "Not run, since they need it: codebook-perceptual-0." in printed
    text = (out / "tables.md").read_text()
    assert "runs are not finished, and the tables leave them out:**" in text
    assert "\n- `network-resnet-0`: failed\n" in text
    assert "\n- `codebook-perceptual-0`: needs `network-resnet-0`\n" in text
    assert "\n- `codebook-classification-0`: not finished\n" in text
    assert "network-resnet-0" in (out / "report.html").read_text()
    monkeypatch.delattr("pecobook.commands.reproduce.run_all")  # so that nothing can run
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--no-train"])
    assert ended.value.code == 2
    assert "The tables leave out " in capsys.readouterr().err


def test_reproduce__writes_the_plan_as_files_and_runs_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("pecobook.commands.reproduce.run_all")
    out, lines, script = tmp_path / "out", tmp_path / "plan.txt", tmp_path / "plan.sh"
    words = ["reproduce", "table7", "--data", str(images), "--out", str(out), "--seeds", "0"]
    for _ in range(2):  # a plan is written again after a failure
        cli.main([*words, "--commands", str(lines), "--slurm", str(script)])
        assert json.loads((out / "reproduce.json").read_text())["budget"] == "tiny"
    assert lines.read_text().startswith("# The plan of: pecobook reproduce table7 ")
    subprocess.run(["bash", "-n", str(script)], check=True)
    capsys.readouterr()
    cli.main([*words, "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert [job["command"] for job in plan["jobs"]] == [
        line.partition("  # ")[0] for line in lines.read_text().splitlines()[4:-1]
    ]
    lines.write_text("years of work")
    with pytest.raises(SystemExit):
        cli.main([*words, "--commands", str(lines)])
    assert f"--commands '{lines}' exists already: name another file." in capsys.readouterr().err
    assert lines.read_text() == "years of work"
    with pytest.raises(ConfigError, match="--json prints the plan: give --dry-run too"):
        ReproduceConfig(json=True)


def test_reproduce__plans_jobs_that_start_in_any_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, elsewhere = tmp_path / "it's here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    (here / "my data").symlink_to(images)
    monkeypatch.chdir(here)
    words = ["reproduce", "table7", "--budget", "tiny", "--seeds", "0"]
    cli.main([*words, "--data", "my data", "--out", "t", "--commands", "plan.txt"])
    naming = ("--data", "--out", "--tokenizer", "--backbone", "--perceptual.network")
    for line in Path("plan.txt").read_text().splitlines()[4:]:
        parts = shlex.split(line, comments=True)
        named = {Path(value) for flag, value in itertools.pairwise(parts) if flag in naming}
        assert len(named) >= 2
        assert all(path.is_relative_to(here) for path in named), line
    monkeypatch.chdir(elsewhere)  # the folder of tables goes on
    cli.main([*words, "--data", "../it's here/my data", "--out", "../it's here/t", "--commands", "plan.txt"])
    assert "begun with other settings" not in capsys.readouterr().err


def test_reproduce__checks_the_layers_of_a_network_before_training(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "table7", "--data", str(images), "--out", str(tmp_path / "r"), "--dry-run"]
    words += ["--network", "timm:resnet10t", "--network-weights", "random"]
    with pytest.raises(SystemExit):
        cli.main([*words, "--network-layers", "9"])
    assert "--network-layers 9: 'timm:resnet10t' has layers 1 to 4" in capsys.readouterr().err
    cli.main([*words, "--network-layers", "1", "2"])
    assert "will be known after a few steps" in capsys.readouterr().err


def test_remaining_time__is_estimated_after_a_rehearsal(images: Path, tmp_path: Path) -> None:
    plan = make_plan(images, "table7")
    seconds = {kind_of(name): 0.1 for name in plan.jobs}
    assert remaining_time(plan, seconds).startswith("about")
    (tmp_path / "rehearsal.json").write_text(json.dumps({"codebook": 1.0, "analysis": 2.0}))  # of an earlier version
    assert "will be known" in remaining_time(plan, read_rehearsal(tmp_path))
    assert read_rehearsal(tmp_path / "none") == {}


def test_job_seconds__leaves_out_the_time_between_an_interruption_and_its_resumption(tmp_path: Path) -> None:
    config = dataclasses.replace(make_budget("tiny").codebook, out=str(tmp_path))
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
    assert job_seconds(Job("codebook", config)) == 300
    os.utime(tmp_path / "environment.json", (9000, 9000))  # written again by the process that resumed
    os.utime(tmp_path / "export" / "config.json", (9100, 9100))
    assert job_seconds(Job("codebook", config)) == 10 * 8 / 4 + 10 * 8 / 2


def test_reproduce__reports_all_problems(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(PreflightError) as caught:
        pecobook.reproduce(tables=("table99",), out=str(tmp_path))
    problems = "\n".join(map(str, caught.value.problems))
    assert "no table 'table99'" in problems
    assert "is not empty" in problems
    with pytest.raises(ConfigError, match="different numbers"):
        ReproduceConfig(seeds=(0, 0))
