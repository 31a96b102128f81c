"""Mistakes on the command line end with code 2 and a sentence, before anything is written; see `tests.mistakes`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pecobook import api, cli
from tests.mistaken_inputs import make_folder
from tests.mistakes import MISTAKES
from tests.runs import codebook_run, train, vit_run

__all__ = ["codebook_run", "vit_run"]  # the fixtures


@pytest.fixture(scope="module")
def folder(images: Path, codebook_run: Path, vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("mistakes")
    classifier = train("finetune", images, base / "classifier", backbone=str(vit_run))
    settings = {"image_size": 16, "views": 2, "workers": 0, "batch_size": 8, "precision": "fp32"}
    bank = api.tokenize("tiny", data=str(images), tokenizer=str(codebook_run), out=str(base / "bank"), **settings)
    (base / "folder").mkdir()
    make_folder(base / "folder", images, codebook_run, vit_run, classifier, bank)
    return base / "folder"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file and folder."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(("typed", "value", "remedy"), MISTAKES, ids=[mistake[0][:80] for mistake in MISTAKES])
def test_main__answers_a_mistake_in_at_most_three_lines_and_writes_nothing(
    typed: str,
    value: str,
    remedy: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PECOBOOK_TRACEBACK", raising=False)
    before = contents(folder)
    with pytest.raises(SystemExit) as caught:
        cli.main(shlex.split(typed))
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("pecobook: ")
    assert len(err.splitlines()) <= 3
    assert value in err
    assert remedy in err
    assert contents(folder) == before


def test_mistakes__are_all_different() -> None:
    assert len({typed for typed, _, _ in MISTAKES}) == len(MISTAKES) > 300
