"""`pecobook compare`: the numbers and the differences are those of the runs' own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pecobook import cli
from pecobook.commands.compare import compare, read_run
from pecobook.errors import PecobookError
from tests.runs import logged


def copy_of(run: Path, out: Path, /, **changed: object) -> Path:
    """Write a run folder with other settings and losses twice as large."""
    out.mkdir(parents=True)
    settings = json.loads((run / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | changed))
    lines = [line | {"loss": 2 * line["loss"]} if "loss" in line else line for line in logged(run)]
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return out


def test_compare__has_the_last_evaluations_and_the_settings_that_differ(
    codebook_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((codebook_run / "config.json").read_text())
    other = copy_of(
        codebook_run, tmp_path / "lr=0.5" / "b", seed=7, optim=settings["optim"] | {"lr": 0.5}, out="elsewhere"
    )
    out = tmp_path / "comparison"
    cli.main(["compare", f"first={codebook_run}", f"second={other}", "--out", str(out)])
    content = json.loads((out / "compare.json").read_text())
    assert sorted(content["different"]) == ["optim.lr", "seed"]
    assert [run["name"] for run in content["runs"]] == ["first", "second"]
    last = [line for line in logged(codebook_run) if "evaluation/psnr" in line][-1]
    assert content["runs"][0]["last"]["psnr"] == last["evaluation/psnr"]
    assert content["runs"][0]["last"]["step"] == last["step"]
    rows = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["optim.lr", str(settings["optim"]["lr"]), "0.5"] in rows
    assert (out / "pictures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "optim.lr" in (out / "report.html").read_text()


def test_compare__of_different_commands(codebook_run: Path, vit_run: Path, tmp_path: Path) -> None:
    out = compare(runs=(str(codebook_run), str(vit_run)), out=str(tmp_path / "c"), metrics=("loss",))
    different = json.loads((out / "compare.json").read_text())["different"]
    assert {"tokenizer", "quantizer.num-codewords"} <= set(different)
    with pytest.raises(PecobookError, match="is not empty"):
        compare(runs=(str(codebook_run),), out=str(out))
    compare(runs=(str(codebook_run), str(codebook_run)), out=str(out), overwrite=True)
    content = json.loads((out / "compare.json").read_text())
    assert content["different"] == []
    assert content["runs"][1]["name"] == f"{codebook_run.name} (2)"


def test_compare__reads_a_run_that_a_kill_cut_off(codebook_run: Path, tmp_path: Path) -> None:
    run = copy_of(codebook_run, tmp_path / "cut")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9999, "loss": 1')
    assert read_run(str(run)).last_evaluation["step"] < 9999


def test_compare__names_all_that_is_wrong_before_it_writes(codebook_run: Path, tmp_path: Path) -> None:
    empty = copy_of(codebook_run, tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("")
    with pytest.raises(PecobookError) as error:
        compare(runs=(str(tmp_path), str(empty)), out=str(tmp_path / "c"))
    assert "is no run folder" in str(error.value)
    assert "has logged nothing yet" in str(error.value)
    with pytest.raises(PecobookError, match=r"no run logged 'los'; these are logged: .*loss"):
        compare(runs=(str(codebook_run),), metrics=("los",), out=str(tmp_path / "c"))
    with pytest.raises(PecobookError, match="Runs are missing"):
        compare(out=str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
