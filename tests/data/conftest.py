"""Fixtures of all tests of data: separate caches, and a folder of two classes."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from tests.data.sources import write


@pytest.fixture(autouse=True)
def _private_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    monkeypatch.setenv("PECOBOOK_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    for number in range(20):
        write(tmp_path / "pets" / ("cat", "dog")[number % 2] / "deep" / f"{number:02}.png", number)
    return tmp_path / "pets"
