"""`pecobook reproduce` over many commands: sources that come later, changed data, and tables of some of the runs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from pecobook import cli
from pecobook.commands.paper_tables import TABLES
from pecobook.commands.reproduce.duel import reading
from pecobook.commands.reproduce.listing import as_json, commands
from pecobook.commands.reproduce.rehearsal import _short_job
from pecobook.commands.reproduce.slurm import script
from pecobook.commands.reproduce.tables import MeasuredTable, comma_separated, gains_over_controls, measured_tables
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


def test_plan__trains_nothing_on_labels_that_are_missing(unlabelled_images: Path) -> None:
    plan = make_plan(unlabelled_images, "tables1-2", "table3", "table5", "table6")
    assert {job.command for job in plan.jobs.values()} == {"codebook", "contrast", "analyze"}
    assert not any("classification" in name for name in plan.jobs)
    for arm in ("scratch", "supervised", "supervised-random", "supervised-shuffled"):
        assert plan.missing_for_arm(arm) == "labels"
    public = make_plan(unlabelled_images, "table5", budget="paper")
    assert public.codebook_settings("supervised-random", 0)[0].perceptual.network == "torchvision:vgg16"
    assert public.missing_for_arm("supervised-random") == "", "a public network needs no labels of ours"


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


def test_reading__does_not_deny_the_power_of_a_control_that_is_not_measured() -> None:
    arms = {"pixel": {0: 50.0, 1: 51.0}, "supervised": {0: 51.0, 1: 52.0}}
    assert reading(arms)[1:] == ["The other control is not measured, so the power is not known."]
    assert "no power" in reading(arms | {"classification": {0: 51.0, 1: 52.0}})[1]
