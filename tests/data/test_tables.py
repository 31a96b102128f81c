"""Parquet files and hub data sets: columns, labels, splits, and the errors if they cannot be opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pecobook.data.decode import BadImage
from pecobook.data.images import open_images
from pecobook.errors import DataError
from tests.data.sources import labels, make_parquet, names, png, values


def test_parquet(tmp_path: Path) -> None:
    splits = open_images(str(make_parquet(tmp_path)))
    assert splits.evaluation_name == "held-out 10% of train"
    assert sorted(values(splits.train) + values(splits.evaluation)) == list(range(12))
    assert splits.train.classes == ("0", "1", "2")
    for source in (splits.train, splits.evaluation):
        assert labels(source) == [str(value % 3) for value in values(source)]
        assert names(source) == [f"{tmp_path / 'data.parquet'} row {value}" for value in values(source)]


@pytest.mark.parametrize("folder", ["a [1]", "b{x}", "c*"])
def test_parquet_in_a_folder_that_looks_like_a_pattern(tmp_path: Path, folder: str) -> None:
    path = make_parquet(tmp_path / folder)
    make_parquet(tmp_path / "cat", count=3)
    for source in (path, path.parent):
        assert len(open_images(str(source)).train) == 11


def test_parquet_folder_with_splits_and_class_names(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant"])})
    for split, numbers in {
        "train-0": [0, 1],
        "train-1": [2],
        "test": [3],
        "validation": [4],
        "x": [5],
    }.items():
        rows = {
            "image": [{"bytes": png(n), "path": None} for n in numbers],
            "label": [n % 2 for n in numbers],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    splits = open_images(str(tmp_path))
    assert splits.evaluation_name == "test"
    assert splits.train.classes == ("zebra", "ant")
    assert labels(splits.train) == ["zebra", "ant", "zebra"]
    assert values(splits.train) == [0, 1, 2]
    assert splits.train.identify(2).endswith("train-1.parquet row 0")
    assert (values(splits.evaluation), labels(splits.evaluation)) == ([3], ["ant"])
    assert len(open_images(str(tmp_path / "train-0.parquet")).train) == 1  # a single file holds all images


def test_parquet_binary_column_and_classes_txt(tmp_path: Path) -> None:
    table = pa.table({"image": [png(1), png(2), None], "label": [2, 0, 0]})
    pq.write_table(table, tmp_path / "data.parquet")
    (tmp_path / "classes.txt").write_text("n01\tcat\nn02\tdog\nn03\tcow\n")
    splits = open_images(str(tmp_path))
    assert splits.train.classes == ("cat", "dog", "cow")
    labels_read: dict[int | str, str] = {}
    for source in (splits.train, splits.evaluation):
        for index, label in enumerate(labels(source) or []):
            try:
                labels_read[int(source.read(index)[0, 0, 0])] = label
            except BadImage as error:
                labels_read[error.reason] = label
    assert labels_read == {1: "cow", 2: "cat", "no image in this row": "cat"}


@pytest.mark.parametrize(
    ("column", "classes"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([7, 100, 7], ("7", "100")),
        ([0, None, 1], None),
        ([-1, -1, -1], None),
        ([0.5, 1.0, 2.0], None),
        (None, None),
    ],
)
def test_parquet_labels(tmp_path: Path, column: list[Any] | None, classes: tuple[str, ...] | None) -> None:
    data: dict[str, Any] = {"image": [png(1), png(2), png(3)]}
    pq.write_table(pa.table(data if column is None else data | {"label": column}), tmp_path / "d.parquet")
    train = open_images(str(tmp_path)).train
    assert train.classes == classes
    assert (train.labels is None) == (classes is None)


def test_parquet_errors(tmp_path: Path) -> None:
    pq.write_table(pa.table({"images": [png(1)], "y": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'image'; it has images, y\. Did you mean 'images'"):
        open_images(str(tmp_path))
    pq.write_table(pa.table({"image": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="must hold encoded images"):
        open_images(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"cannot be read"):
        open_images(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": [0, 3]}), tmp_path / "a.parquet")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"label 3 of .*a.parquet row 1 \(1 like this\), but .* 2 class names"):
        open_images(str(tmp_path / "a.parquet"))


def hub(**splits: list[int]) -> datasets.DatasetDict:
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"])})
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {
                    "img": [{"bytes": png(max(n, 0)), "path": None} for n in numbers],
                    "fine": [n % 2 if n >= 0 else -1 for n in numbers],
                },
                features=features,
            )
            for name, numbers in splits.items()
        }
    )


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def load_dataset(name: str, config: str | None = None) -> datasets.DatasetDict:
        requests.append((name, config))
        return hub(train=[1, 2, 3], test=[4, 5])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = open_images("hf:some/images:small")
    open_images("hf:some/images")
    assert requests == [("some/images", "small"), ("some/images", None)]
    assert splits.evaluation_name == "test"
    assert (values(splits.train), labels(splits.train)) == ([1, 2, 3], ["b", "a", "b"])
    assert (values(splits.evaluation), splits.evaluation.classes) == ([4, 5], ("a", "b"))
    assert splits.train.identify(1) == "some/images train row 1"


def test_hub_with_unlabelled_test(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = hub(train=[1, 2], validation=[3], test=[-1, -1])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    assert open_images("hf:x/y").evaluation_name == "validation"


def test_hub_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"(?s)'hf:x/y' cannot be loaded.*Couldn't reach.*Check the name.*network"):
        open_images("hf:x/y")
    text = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: text)
    with pytest.raises(DataError, match="no column 'image'; it has text"):
        open_images("hf:x/y")
