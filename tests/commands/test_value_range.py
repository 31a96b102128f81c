"""One range of values in a run, and in all that is made with its model."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pecobook import api, predict
from pecobook.data.tokens import read_bank_config
from pecobook.errors import PreflightError
from pecobook.models.tokenizer import PerceptualTokenizer
from tests.runs import losses, train


def write(folder: Path, high: int) -> Path:
    """Write twelve images of 16 bits in two classes, with values up to `high`."""
    generator = np.random.default_rng(0)
    for number in range(12):
        file = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        values = generator.integers(0, high + 1, (20, 24)).astype(np.uint16)
        values[0, 0] = high
        Image.fromarray(values).save(file)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("deep"), 4095)


@pytest.fixture(scope="module")
def run(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("codebook", deep, tmp_path_factory.mktemp("runs") / "codebook", max_steps="4")


def setting(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("value_range")


def bank(data: Path, run: Path, out: Path, **more: Any) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        return api.tokenize("tiny", data=str(data), tokenizer=str(run), out=str(out), image_size=16, workers=0, **more)


def test_a_run_and_its_export_record_the_range(run: Path, tmp_path: Path) -> None:
    assert setting(run) == setting(run / "export") == [0, 4095]
    tokenizer = PerceptualTokenizer.from_pretrained(run)
    assert list(tokenizer.value_range) == [0, 4095]
    tokenizer.save_pretrained(tmp_path / "again")
    assert setting(tmp_path / "again") == [0, 4095]


def test_auto_is_the_range_that_it_takes(run: Path, deep: Path, tmp_path: Path) -> None:
    stated = train("codebook", deep, tmp_path / "stated", max_steps="4", value_range=(0, 4095))
    assert losses(stated) == losses(run)
    full = train("codebook", deep, tmp_path / "full", max_steps="4", value_range=(0, 65535))
    assert losses(full) != losses(run)


def test_a_resumed_run_keeps_its_range(deep: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "data", 4095), tmp_path / "run"
    train("codebook", data, out, max_steps="2", save_every=1)
    write(data, 65535)  # auto would now take another range
    train("codebook", data, out, max_steps="2", resume=True, accept_data_change=True)
    assert setting(out) == [0, 4095]
    with pytest.raises(PreflightError, match="value-range: "):
        train("codebook", data, out, max_steps="2", resume=True, value_range=(0, 65535))


def test_later_commands_take_the_range_of_the_model(run: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", 1000)  # alone, these images would get 0..1023
    vit = train("pretrain", other, tmp_path / "vit", tokenizer=str(run), max_steps="2")
    assert setting(vit) == setting(vit / "export") == [0, 4095]
    classifier = train("finetune", other, tmp_path / "classifier", backbone=str(vit), max_steps="2")
    assert setting(classifier / "export") == [0, 4095]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        predict(str(classifier), str(other), out=str(tmp_path / "out"))
    assert f"Values of '{other}': 0..4095 becomes 0..255, as in the training of the given model." in stderr.getvalue()


def test_a_token_bank_of_another_range_is_refused(run: Path, deep: Path, tmp_path: Path) -> None:
    same, other = bank(deep, run, tmp_path / "same"), bank(deep, run, tmp_path / "other", value_range=(0, 65535))
    assert [read_bank_config(folder)["value_range"] for folder in (same, other)] == [[0, 4095], [0, 65535]]
    settings = {"tokenizer": str(run), "max_steps": "1", "min_crop": 0.2}
    train("pretrain", deep, tmp_path / "vit", tokens=str(same), **settings)
    with pytest.raises(PreflightError, match=r"value_range: \[0.0, 65535.0\] of the bank, \[0.0, 4095.0\] now"):
        train("pretrain", deep, tmp_path / "no", tokens=str(other), **settings)


def test_a_run_is_resumed_with_its_range_alone(images: Path, tmp_path: Path) -> None:
    out = train("codebook", images, tmp_path / "run", max_steps="2", save_every=1)
    assert setting(out) == ["auto"]  # all images have 8 bits
    with pytest.raises(PreflightError, match="value-range"):
        train("codebook", images, out, max_steps="2", resume=True, value_range=(0, 9))
    file = out / "config.json"
    settings = json.loads(file.read_text())
    del settings["value_range"]  # every run since 0.1.0 has it
    file.write_text(json.dumps(settings))
    with pytest.raises(PreflightError, match=r"of a version before 0\.1\.0"):
        train("codebook", images, out, max_steps="2", resume=True)
