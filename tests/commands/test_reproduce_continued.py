"""`pecobook reproduce` over many commands: sources that come later, changed data, and tables of some of the runs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from pecobook import cli
from pecobook.commands.paper_tables import TABLES, chosen_tables
from pecobook.commands.reproduce import _begin
from pecobook.commands.reproduce.duel import reading
from pecobook.commands.reproduce.listing import as_json, commands
from pecobook.commands.reproduce.plan import Plan
from pecobook.commands.reproduce.rehearsal import _short_job
from pecobook.commands.reproduce.slurm import script
from pecobook.commands.reproduce.tables import (
    MeasuredTable,
    comma_separated,
    gains_over_controls,
    header_and_rows,
    measured_tables,
)
from pecobook.commands.resumed_folder import resumed_folder
from pecobook.data.images import open_images
from pecobook.errors import RunFolderError
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.training import BackboneConfig
from tests.commands.test_reproduce_plan import make_plan


def test_reproduce__takes_the_source_of_another_table_later(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    words = ["reproduce", "table7", "--data", str(images), "--out", str(out), "--seeds", "0", "--no-transfer"]

    def plan(*flags: str) -> str:
        """Write the plan with these flags; return what was refused."""
        capsys.readouterr()
        try:
            cli.main([*words, "--commands", str(tmp_path / "plan.txt"), *flags])
        except SystemExit:
            return capsys.readouterr().err
        return ""

    assert plan() == ""
    assert plan("--dino", "timm:first") == ""
    assert json.loads((out / "reproduce.json").read_text())["dino"] == "timm:first"
    assert plan() == "", "other tables need no such network"
    assert "begun with other settings: dino: timm:first -> timm:second" in plan("--dino", "timm:second")
    assert plan("--segmentation-ignore", "11") == ""
    said = plan("--segmentation-ignore", "12")
    assert "begun with other settings: segmentation-ignore: ['11'] -> ['12']" in said
    assert "begun with other settings: supervised:" in plan("--supervised", "timm:resnet10t"), "it changes a row"


def write_analysis(out: Path, name: str, **metrics: Any) -> None:
    """Write what a finished analysis leaves."""
    folder = out / "runs" / name
    folder.mkdir(parents=True)
    content = {"seconds": 60.0, "tokenizers": [{"codes_used": 2, "psnr": 9.0, **metrics}]}
    (folder / "analysis.json").write_text(json.dumps(content))
    (folder / "report.html").touch()


def read_csv(out: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    """Return values and seeds from tables.csv, by table, arm and figure."""
    lines = csv.DictReader((out / "tables.csv").open())
    return {(line["table"], line["arm"], line["figure"]): (line["values"], line["seeds"]) for line in lines}


def test_reproduce__writes_the_tables_of_earlier_commands_too(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, weights = tmp_path / "r", tmp_path / "dalle"
    monkeypatch.setattr("pecobook.commands.reproduce.check_given", lambda *_, **_more: None)
    weights.mkdir()

    def write_tables(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["reproduce", *words, "--data", str(images), "--out", str(out), "--no-train", "--no-transfer"])
        assert ended.value.code == 2  # runs of these tables are missing
        return capsys.readouterr().err

    write_tables("table7", "--seeds", "0")
    for seed in (0, 1, 2):
        write_analysis(out, f"analysis-pixel-{seed}", codeword_probe=10.0 + seed)
        write_analysis(out, f"judged-dalle-{seed}", codeword_probe=5.0 + seed, classifier={"reconstructions": 1.0})
    write_tables("table4", "--seeds", "1", "--dalle", str(weights))
    first = read_csv(out)
    assert first["table7", "pixel", "codeword_probe"] == ("10.000", "0")
    assert first["table4", "dalle", "codeword_probe"] == ("6.000", "1")
    said = write_tables("table7", "--seeds", "2")  # names neither table 4 nor its weights
    assert "The tables leave out" in said
    assert "codebook-pixel-0" not in said.rpartition("The tables leave out")[2], "it was asked for by another command"
    last = read_csv(out)
    assert {key: last[key] for key in first if key[0] == "table4"} == {
        key: value for key, value in first.items() if key[0] == "table4"
    }
    assert last["table7", "pixel", "codeword_probe"] == ("10.000 12.000", "0 2")
    text = (out / "tables.md").read_text()
    assert text.index(TABLES["table4"].title) < text.index(TABLES["table7"].title)
    assert "`pecobook reproduce table4 --data " in text
    assert "`pecobook reproduce table7 --data " in text
    assert "--seeds 0 2 --no-transfer" in text
    assert "\n- `codebook-pixel-0`: not finished\n" in text
    page = (out / "report.html").read_text()
    assert all(TABLES[name].title in page for name in ("table4", "table7"))


def test_reproduce__reports_tables_whose_images_are_gone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the command that trains on other images needs them."""
    out, gone = tmp_path / "r", str(tmp_path / "gone")
    config = ReproduceConfig(tables=("table3",), data=str(images), out=str(out), seeds=(0,), detection_data=gone)
    plan = Plan(config, chosen_tables(config.tables), open_images(str(images)), opens=False)
    _begin(plan)
    assert plan.missing_for_figure("box_ap") == ""
    words = ["reproduce", "table7", "--data", str(images), "--out", str(out), "--seeds", "0", "--no-train"]
    with pytest.raises(SystemExit):
        cli.main(words)
    assert TABLES["table3"].title in (out / "tables.md").read_text()
    assert "COCO box AP, % (needs" not in (out / "tables.md").read_text()
    (out / "reproduce.json").write_text((out / "reproduce.json").read_text().replace('"table3 0 transfer"', "3"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "which is not a list of a text. Restore it" in capsys.readouterr().err


def test_resumed_folder__leaves_the_settings_of_the_command_as_they_are(tmp_path: Path) -> None:
    new, old = {"network": "a", "dino": ""}, {"network": "a", "dino": "timm:first"}
    (tmp_path / "m.json").write_text(json.dumps(old))

    def join(settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return settings if settings["dino"] else settings | {"dino": other["dino"]}

    folder = resumed_folder(str(tmp_path), new, {"network": "", "dino": ""}, join, marker="m.json")
    folder.check()
    assert new == {"network": "a", "dino": ""}
    assert folder.check_resume is not None
    assert folder.check_resume({"network": "a"}) == new
    assert folder.check_resume(old) == old
    with pytest.raises(RunFolderError, match="network: b -> a"):
        folder.check_resume({"network": "b"})


def test_plan__needs_no_analysis_where_one_with_a_classifier_is_finished(images: Path, tmp_path: Path) -> None:
    write_analysis(tmp_path, "judged-pixel-0", codeword_probe=20.0, classifier={"reconstructions": 30.0})
    plan = make_plan(images, "table7", out=str(tmp_path))
    assert {name for name in plan.jobs if "-pixel-" in name and name.startswith(("judged", "analysis"))} == {
        "judged-pixel-0", "analysis-pixel-1",
    }  # fmt: skip
    (measured,) = measured_tables(plan)
    assert measured.rows[0][1]["codeword_probe"] == {0: 20.0}


def test_tables__have_an_analysis_until_that_with_a_classifier_is_finished(images: Path, tmp_path: Path) -> None:
    write_analysis(tmp_path, "analysis-pixel-1", codeword_probe=20.0)
    plan = make_plan(images, "table4", out=str(tmp_path))
    assert "judged-pixel-1" in plan.jobs
    assert "analysis-pixel-1" not in plan.jobs
    (measured,) = measured_tables(plan)
    assert [row.arm for row, _, _ in measured.rows][1] == "pixel"
    assert measured.rows[1][1]["codeword_probe"] == {1: 20.0}


def test_tables__leave_out_figures_that_are_no_numbers(images: Path, tmp_path: Path) -> None:
    for seed, probe in enumerate((math.nan, 20.0)):
        write_analysis(tmp_path, f"analysis-pixel-{seed}", codeword_probe=probe, psnr=math.inf)
    (measured,) = measured_tables(make_plan(images, "table7", out=str(tmp_path), transfer=False))
    header, rows = header_and_rows(measured)
    assert rows[0][header.index("linear probe of codewords, %")] == "20.0"
    assert "PSNR, dB" not in header


def test_plan__trains_nothing_on_labels_that_are_missing(unlabelled_images: Path) -> None:
    plan = make_plan(unlabelled_images, "tables1-2", "table3", "table5", "table6")
    assert {job.command for job in plan.jobs.values()} == {"codebook", "contrast", "analyze"}
    assert not any("classification" in name for name in plan.jobs)
    for arm in ("scratch", "supervised", "supervised-random", "supervised-shuffled"):
        assert plan.missing_for_arm(arm) == "labels"
    public = make_plan(unlabelled_images, "table5", budget="paper")
    assert public.codebook_settings("supervised-random", 0)[0].perceptual.network == "torchvision:vgg16"
    assert public.missing_for_arm("supervised-random") == "", "a public network needs no labels of ours"


def test_plan__trains_nothing_on_labels_that_the_held_out_images_lack(tmp_path: Path, images: Path) -> None:
    files = sorted(images.rglob("*.png"))
    names = ("train/a", "train/a", "train/b", "train/b", "val")  # ImageNet's val/ is flat
    for number, (folder, file) in enumerate(zip(names, files, strict=False)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f"{number}.png").write_bytes(file.read_bytes())
    plan = make_plan(tmp_path, "tables1-2", "table4", "table11")
    assert plan.splits.train.labels is not None
    assert {job.command for job in plan.jobs.values()} == {"codebook", "contrast", "analyze"}
    assert "Not measured: fine-tuned, % (needs labels)." in plan.left_out()


def test_plan__names_no_network_unused_that_is_the_default(images: Path) -> None:
    given = {"supervised": "torchvision:vgg16", "backbone": BackboneConfig(name="beit_base_patch16_224")}
    plan = make_plan(images, "table5", budget="paper", dino="timm:vit", **given)
    assert [line for line in plan.left_out() if "used" in line] == ["Not used by these tables: --dino timm:vit."]


def test_plan__reads_all_images_with_the_given_value_range(images: Path) -> None:
    plan = make_plan(images, "table4", "table11", dalle="folder", value_range=(0, 4095))
    assert {job.config.value_range for job in plan.jobs.values()} == {(0, 4095)}


def test_plan__begun_runs_go_on_with_accepted_data_in_every_form(images: Path, tmp_path: Path) -> None:
    plan = make_plan(images, "table7", out=str(tmp_path), accept_data_change=True)
    begun = plan.jobs["codebook-pixel-1"].out
    begun.mkdir(parents=True)
    (begun / "config.json").touch()
    entries = {job["name"]: job["command"] for job in json.loads(as_json(plan))["jobs"]}
    assert [name for name, line in entries.items() if "--accept-data-change" in line] == ["codebook-pixel-1"]
    for text in (commands(plan), script(plan)):
        assert text.count(f"{entries['codebook-pixel-1']} ") == 1
    short = _short_job(plan.jobs["codebook-pixel-1"], (), tmp_path / "runs", tmp_path / "rehearsal")
    short.out.mkdir(parents=True)
    (short.out / "config.json").touch()
    assert short.words[-1] == "--accept-data-change"


def test_slurm__commands_with_other_seeds_write_other_logs(images: Path) -> None:
    logs: list[set[str]] = []
    for seeds in ((0, 1), (2,), (1000, 1001), (123_456_789,)):
        text = script(make_plan(images, "table4", transfer=False, seeds=seeds))
        arrays = re.findall(r"=\$\(submit (\S+) (\S+) ", text)
        logs.append({f"{kind}-{index}" for kind, indices in arrays for index in indices.split(",")} - {"tables-0"})
        assert all(int(name.rpartition("-")[2]) < 1000 for name in logs[-1])
    assert "codebook-pixel-2" in logs[1]
    assert {"codebook-pixel+part1-0", "codebook-pixel+part1-1"} <= logs[2]
    assert len(set.union(*logs)) == sum(map(len, logs))


@pytest.mark.parametrize(("given", "gpus"), [({"budget": "paper"}, 8), ({"gpus_per_run": 16}, 16), ({}, 1)])
def test_slurm__gives_a_run_its_gpus(images: Path, given: dict[str, str], gpus: int) -> None:
    assert f"\ngpus=${{GPUS:-{gpus}}} " in script(make_plan(images, "table4", transfer=False, **given))


def test_tables__have_one_primary_figure_before_and_after_its_runs_are_finished(images: Path) -> None:
    table = TABLES["table7"]
    probe = {"pixel": {0: 10.0, 1: 11.0, 2: 12.0}, "perceptual": {0: 30.0, 2: 33.0}}
    rows = tuple((row, {"codeword_probe": probe[row.arm]}, "") for row in table.rows if row.arm in probe)
    heading = dict(table.figures)["codeword_probe"]
    (gain,) = gains_over_controls(MeasuredTable("table7", table, rows))
    assert gain.startswith(f"Secondary: {heading}: "), "fine-tuning stays the primary figure"
    (gain,) = gains_over_controls(MeasuredTable("table7", table, rows, primary=heading))
    assert gain.startswith(f"Primary: {heading}: ")
    assert measured_tables(make_plan(images, "table7"))[0].primary == "fine-tuned, %"
    assert measured_tables(make_plan(images, "table7", transfer=False))[0].primary == heading
    lines = csv.DictReader(io.StringIO(comma_separated([MeasuredTable("table7", table, rows)])))
    seeds = {line["arm"]: (line["values"], line["seeds"]) for line in lines if line["figure"] == "codeword_probe"}
    assert seeds == {"pixel": ("10.000 11.000 12.000", "0 1 2"), "perceptual": ("30.000 33.000", "0 2")}


def test_tables__name_the_network_that_stands_for_a_row(images: Path) -> None:
    plan = make_plan(images, "table5", "table7", network="timm:vgg11", network_layers=(1,))
    five, seven = measured_tables(plan)
    assert five.remarks[-1] == "The row 'self-supervised ResNet' has the network timm:vgg11."
    assert not any("vgg11" in line for line in seven.remarks)


def test_gains__count_the_comparisons_whose_runs_are_not_finished(images: Path) -> None:
    """Table 7 compares the perceptual loss with three others, in one figure if no ViT is trained."""
    plan = make_plan(images, "table7", transfer=False)
    (measured,) = measured_tables(plan)
    probe: dict[str, dict[int, float]] = {"perceptual": {0: 35.6, 1: 35.0, 2: 35.1}}
    probe["pixel"] = dict.fromkeys(range(3), 30.0)

    def gains() -> list[str]:
        rows = tuple((row, {"codeword_probe": probe.get(row.arm, {})}, "") for row, _, _ in measured.rows)
        return gains_over_controls(dataclasses.replace(measured, rows=rows))

    (gain,) = gains()
    assert gain.endswith("shown to be higher (p 0.0038 after Holm's correction)")  # 3 times 0.00127
    probe["perceptual-random"] = {0: 34.0}
    gain, other = gains()
    assert gain.endswith("shown to be higher (p 0.0038 after Holm's correction)")
    assert other.endswith("not judged, one seed has no interval")
    probe["perceptual-random"] |= {1: 34.0, 2: 30.0}
    probe["perceptual-shuffled"] = {0: 30.0, 1: 36.0, 2: 33.0}
    assert gains()[0] == gain, "the last runs take nothing back"


def test_reading__does_not_deny_the_power_of_a_control_that_is_not_measured() -> None:
    arms = {"pixel": {0: 50.0, 1: 51.0}, "supervised": {0: 51.0, 1: 52.0}}
    assert reading(arms)[1:] == ["The other control is not measured, so the power is not known."]
    assert "no power" in reading(arms | {"classification": {0: 51.0, 1: 52.0}})[1]
