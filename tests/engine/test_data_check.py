"""A run that resumes, and a run with a token bank, notice that the data changed; the same data never block them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pecobook.data import record
from pecobook.errors import DataError, PecobookError, RunFolderError
from tests.runs import inputs, logged, objects, shapes, train


def later(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 100 * 10**9))


@pytest.fixture
def copied(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "images"))


def contrast(data: Path, out: Path, steps: int, **more: Any) -> Path:
    return train("contrast", data, out, **{"max_steps": str(steps), "save_every": 2, **more})


def resumed(data: Path, out: Path, **more: Any) -> Path:
    return contrast(data, out, 4, **{"resume": True, **more})


@pytest.fixture
def begun(copied: Path, tmp_path: Path) -> Path:
    """A run of four steps, cut back to its second."""
    run = contrast(copied, tmp_path / "run", 4)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    return run


def test_resume__the_same_data_never_block(copied: Path, begun: Path, tmp_path: Path) -> None:
    contents = (begun / "data.parquet").read_bytes()
    for resume in (True, "auto"):
        resumed(copied, begun, resume=resume)
        assert (begun / "data.parquet").read_bytes() == contents
    for file in copied.rglob("*.png"):
        later(file)
    resumed(copied, begun)
    (begun / "data.parquet").unlink()  # a run of an earlier version
    resumed(copied, begun)
    assert (begun / "data.parquet").is_file()
    assert "has no record of its data yet" in (begun / "train.log").read_text()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resume__refuses_changed_data_and_names_them(resume: Any, copied: Path, begun: Path) -> None:
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    (copied / "red" / "0.png").unlink()
    shutil.copy(copied / "red" / "1.png", copied / "red" / "new.png")
    (copied / "blue" / "3.png").write_bytes((copied / "blue" / "3.png").read_bytes()[:-9])
    with pytest.raises(RunFolderError) as caught:
        resumed(copied, begun, resume=resume)
    first, second = str(caught.value).splitlines()
    assert first == (
        f"--data '{copied}' has changed since the run in '{begun}' began: "
        "1 added (red/new.png), 1 removed (red/0.png), 1 changed (blue/3.png)."
    )
    assert "--accept-data-change" in second
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_resume__accepts_a_change_once_and_records_it(copied: Path, begun: Path) -> None:
    shutil.copy(copied / "red" / "1.png", copied / "red" / "new.png")
    resumed(copied, begun, accept_data_change=True)
    assert [line["step"] for line in logged(begun)] == [1, 2, 3, 4]
    said = "--accept-data-change: "
    assert said in (begun / "train.log").read_text()
    assert "1 added (red/new.png)" in (begun / "train.log").read_text()
    (note,) = json.loads((begun / "environment.json").read_text())["data_notes"]
    assert note.startswith(said)
    resumed(copied, begun)  # the data are now those of the run
    assert json.loads((begun / "environment.json").read_text())["data_notes"] == [note]
    assert json.loads((begun / "config.json").read_text())["accept_data_change"] is False


def test_verify_data__sees_content_alone(copied: Path, tmp_path: Path) -> None:
    run = contrast(copied, tmp_path / "run", 4, verify_data=True)
    file = copied / "red" / "2.png"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[60] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(RunFolderError, match=r"1 changed \(red/2\.png\)"):
        resumed(copied, run, verify_data=True)


def test_overwrite__begins_a_new_record(copied: Path, begun: Path) -> None:
    (copied / "red" / "0.png").unlink()
    contrast(copied, begun, 2, overwrite=True)
    found = record.read(begun)
    assert found is not None
    assert len(found.names) == 23


def test_resume__sees_masks_and_annotations(vit_run: Path, tmp_path: Path) -> None:
    for command, source, pattern in (
        ("segment", shapes(), "train/masks/*.png"),
        ("detect", objects(), "train/instances.json"),
    ):
        data = Path(shutil.copytree(source, tmp_path / command))
        more = {"backbone": str(vit_run), "max_steps": "1"}
        run = train(command, data, tmp_path / f"{command}-run", **more)
        file = sorted(data.glob(pattern))[0]
        file.write_bytes(file.read_bytes() + b"\n")
        with pytest.raises(RunFolderError, match=f"1 changed .{file.relative_to(data)}"):
            train(command, data, run, **more, resume=True)


# ------------------------------------------------------------------------------------------------------- token banks


def bank_of(data: Path, codebook: Path, out: Path, **more: Any) -> Path:
    from tests.commands.test_tokenize import make_bank

    return make_bank(data, codebook, out, **more)


def pretrained(data: Path, codebook: Path, bank: Path, vit: Path, out: Path) -> Path:
    return train(
        "pretrain",
        data,
        out,
        **{**inputs("pretrain", codebook, vit), **{"tokens": str(bank), "max_steps": "1", "seed": 5, "min_crop": 0.3}},
    )


def test_tokens__a_bank_of_a_file_that_changed_in_place_is_stale(
    copied: Path, codebook_run: Path, vit_run: Path, tmp_path: Path
) -> None:
    bank = bank_of(copied, codebook_run, tmp_path / "bank")
    assert json.loads((bank / "config.json").read_text())["data"]
    pretrained(copied, codebook_run, bank, vit_run, tmp_path / "first")
    for file in copied.rglob("*.png"):
        later(file)
    pretrained(copied, codebook_run, bank, vit_run, tmp_path / "copy")
    shutil.copy(copied / "red" / "1.png", copied / "red" / "2.png")
    with pytest.raises(DataError, match=r"is of other images .* 1 changed \(red/2\.png\)"):
        pretrained(copied, codebook_run, bank, vit_run, tmp_path / "stale")
    assert not (tmp_path / "stale").exists()
    with pytest.raises(RunFolderError, match=r"1 changed \(red/2\.png\)[^$]*--accept-data-change"):
        bank_of(copied, codebook_run, bank, resume=True)
    bank_of(copied, codebook_run, bank, resume=True, accept_data_change=True)
    pretrained(copied, codebook_run, bank, vit_run, tmp_path / "accepted")
    (bank / "data.parquet").unlink()  # a bank of an earlier version
    pretrained(copied, codebook_run, bank, vit_run, tmp_path / "old")
    (copied / "red" / "2.png").unlink()
    with pytest.raises(PecobookError, match="is of other images than"):
        pretrained(copied, codebook_run, bank, vit_run, tmp_path / "names")


def test_tokens__an_image_that_could_not_be_read_may_be_repaired(
    copied: Path, codebook_run: Path, vit_run: Path, tmp_path: Path
) -> None:
    image = copied / "red" / "2.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:50])
    bank = bank_of(copied, codebook_run, tmp_path / "bank")
    image.write_bytes(whole)
    pretrained(copied, codebook_run, bank, vit_run, tmp_path / "run")


def test_tokenize__a_bank_of_other_names_cannot_be_accepted(copied: Path, codebook_run: Path, tmp_path: Path) -> None:
    bank = bank_of(copied, codebook_run, tmp_path / "bank")
    (copied / "red" / "2.png").unlink()
    with pytest.raises(RunFolderError, match=r"1 removed \(red/2\.png\)") as caught:
        bank_of(copied, codebook_run, bank, resume=True, accept_data_change=True)
    assert "--accept" not in str(caught.value)
