"""Parquet files and hub data sets: columns, labels, splits, and the errors if they cannot be opened."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pecobook.data.decode import BadImage
from pecobook.data.images import check_labels, open_images
from pecobook.data.source import ImageSource
from pecobook.errors import DataError
from tests.data.sources import labels, make_parquet, names, png, values, write


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


@pytest.mark.parametrize(("listed", "classes"), [("cow\nant\nbee\n", ("cow", "ant", "bee")), ("cow\n", ("ant", "cow"))])
def test_texts_are_sought_in_classes_txt(tmp_path: Path, listed: str, classes: tuple[str, ...]) -> None:
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": ["ant", "cow"]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": [png(1)], "label": ["ant"]}), tmp_path / "test.parquet")
    (tmp_path / "classes.txt").write_text(listed)
    splits = open_images(str(tmp_path))
    assert (splits.train.classes, labels(splits.train), labels(splits.evaluation)) == (classes, ["ant", "cow"], ["ant"])


@pytest.mark.parametrize(
    ("column", "classes", "problem"),
    [
        (["b", "a", "b"], ("a", "b"), ""),
        ([7, 100, 7], ("7", "100"), ""),
        ([9.0, 10.0, 9.0], ("9", "10"), ""),
        ([True, False, True], ("False", "True"), ""),
        ([0, None, 1], None, r"1 of 3 images of train have no label, the first: .*train.parquet row 1$"),
        ([0, -1, 1], None, r"1 of 3 images of train have no label, the first: .*train.parquet row 1$"),
        ([0.0, 1.0, float("nan")], None, r"1 of 3 images of train have no label, the first: .*train.parquet row 2$"),
        (["a", "b", " "], None, r"1 of 3 images of train have no label, the first: .*train.parquet row 2$"),
        ([-1, -1, -1], None, "no image of train has one$"),
        ([None, None, None], None, "no image of train has one$"),
        ([1.0, 0.5, 2.0], None, r"the column 'label' holds 0.5 in .*train.parquet row 1, which is no class$"),
        ([3, 3, 3], None, "all images of train have the one class '3'$"),
        ([[1], [2], [3]], None, r"the column 'label' holds List.*, which is no class$"),
        (None, None, "there is no column 'label', only image$"),
    ],
)
def test_parquet_labels(
    tmp_path: Path, column: list[Any] | None, classes: tuple[str, ...] | None, problem: str
) -> None:
    data: dict[str, Any] = {"image": [png(1), png(2), png(3)]}
    pq.write_table(pa.table(data if column is None else data | {"label": column}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": [png(1)]}), tmp_path / "test.parquet")
    splits = open_images(str(tmp_path))
    assert splits.train.classes == classes
    assert (splits.train.labels is None) == (classes is None)
    assert re.search(problem, splits.train.unlabelled)
    if problem:
        with pytest.raises(DataError, match="has no labels that can be used: " + problem.removesuffix("$")):
            check_labels(splits, "x")


def test_a_column_of_labels_under_another_name_is_named(tmp_path: Path) -> None:
    columns = {"id": [0, 1], "image": [png(1), png(2)], "fine_label": [0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    splits = open_images(str(tmp_path))
    assert splits.train.classes is None
    assert splits.notes == (
        "The labels of train are not used: there is no column 'label', only id, image, fine_label: rename 'fine_label' "
        "to 'label' if it holds the classes.",
    )


def test_a_missing_label_of_a_held_out_image_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": [0, 1]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": [png(3), png(4)], "label": [0, None]}), tmp_path / "test.parquet")
    splits = open_images(str(tmp_path))
    problem = f"1 of 2 images of test have no label, the first: {tmp_path / 'test.parquet'} row 1"
    assert splits.train.labels is not None
    assert splits.notes == (f"The labels of test are not used: {problem}.",)
    with pytest.raises(DataError, match=rf"for its held-out images \(test\): {problem}"):
        check_labels(splits, "x")


def test_a_parquet_file_that_is_replaced_under_the_same_time(tmp_path: Path) -> None:
    path, fingerprints = tmp_path / "d.parquet", set()
    for first in (1, 5):
        columns = {"image": [png(first), png(first + 1)], "label": [first, first + 1]}
        pq.write_table(pa.table(columns), path)
        os.utime(path, ns=(10**18, 10**18))
        splits = open_images(str(path))
        both = [(value, label) for s in (splits.train, splits.evaluation) for value, label in pairs(s)]
        assert sorted(both) == [(first, str(first)), (first + 1, str(first + 1))]
        fingerprints.add(splits.train.fingerprint)
    assert len(fingerprints) == 2


def pairs(source: ImageSource) -> list[tuple[int, str]]:
    return list(zip(values(source), labels(source) or [], strict=True))


@pytest.mark.parametrize("form", ["text", "struct"])
def test_paths_are_looked_up_beside_the_parquet_file(tmp_path: Path, form: str) -> None:
    write(tmp_path / "set" / "images" / "a.png", 1)
    write(tmp_path / "set" / "images" / "b.png", 2)
    write(tmp_path / "c.png", 3)
    paths = ["images/a.png", "images\\b.png", str(tmp_path / "c.png"), "/home/me/images/b.png", "images/none.png"]
    column = paths if form == "text" else [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"image": column}), tmp_path / "set" / "train.parquet")
    pq.write_table(pa.table({"image": column[:1]}), tmp_path / "set" / "test.parquet")
    splits = open_images(str(tmp_path / "set"))
    assert values(splits.train.subset(range(4))) == [1, 2, 3, 2]
    with pytest.raises(BadImage, match=r"row 4: .*set/images/none.png: No such file"):
        splits.train.read(4)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("a\0b.png", r"row 1: 'a\\x00b.png' is no path of an image"),
        ("x" * 5000, r"row 1: .*/x{40}\.\.\. \(5,000 characters\): File name too long"),
        ("s3://b/a.png", "row 1: s3://b/a.png is an address, not a file"),
    ],
)
def test_texts_that_are_no_paths(tmp_path: Path, path: str, problem: str) -> None:
    write(tmp_path / "a.png", 7)
    pq.write_table(pa.table({"image": [f"file://{tmp_path}/a.png", path]}), tmp_path / "train.parquet")
    store = open_images(str(tmp_path / "train.parquet")).train._store
    assert int(store.read(0)[0, 0, 0]) == 7
    with pytest.raises(BadImage, match=problem):
        store.read(1)


def test_a_column_names_the_splits(tmp_path: Path) -> None:
    columns = {"image": [png(n) for n in range(6)], "label": ["a", "b"] * 3}
    pq.write_table(
        pa.table(columns | {"split": ["test", "train", "train", "Train", "test", None]}), tmp_path / "a.parquet"
    )
    splits = open_images(str(tmp_path / "a.parquet"))
    assert (values(splits.train), labels(splits.train)) == ([1, 2, 3], ["b", "a", "b"])
    assert (values(splits.evaluation), labels(splits.evaluation)) == ([0, 4], ["a", "a"])
    assert (splits.evaluation_name, splits.left_out) == ("test", {"whose column 'split' names no split": 1})
    pq.write_table(pa.table(columns | {"split": ["1", "2"] * 3}), tmp_path / "a.parquet")
    assert open_images(str(tmp_path / "a.parquet")).evaluation_name == "held-out 10% of train"


def test_columns_that_are_not_read_may_differ(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(0), png(1)], "label": [0, 1]}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"extra": ["x"], "label": [1], "image": [png(2)]}), tmp_path / "train-1.parquet")
    pq.write_table(pa.table({"image": [png(3)]}), tmp_path / "test.parquet")
    train = open_images(str(tmp_path)).train
    assert (values(train), labels(train)) == ([0, 1, 2], ["0", "1", "1"])
    for number in (2, 0):  # the first file that lacks the column is named, wherever it stands
        pq.write_table(pa.table({"image": [png(4)]}), tmp_path / f"train-{number}.parquet")
        splits = open_images(str(tmp_path))
        assert f"train-{number}.parquet' does not have one column 'label'" in splits.train.unlabelled
        assert splits.notes == (f"The labels of train are not used: {splits.train.unlabelled}.",)


def test_two_columns_of_one_name_and_a_damaged_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    column = pa.array([png(0), png(1)])
    pq.write_table(pa.table([column, column], names=["image", "image"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'a.parquet'\) has more than one column 'image'"):
        open_images(str(tmp_path))
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": column}), tmp_path / "b.parquet")
    data = bytearray((tmp_path / "b.parquet").read_bytes())
    data[4:60] = bytes(56)
    (tmp_path / "b.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be loaded: .*\nThe file '.*b.parquet' is damaged\."):
        open_images(str(tmp_path))
    assert capfd.readouterr() == ("", "")  # `datasets` prints neither its error nor a progress bar


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("1 dog\n0 cat\n2: an owl", ["cat", "dog", "an owl"]),
        ("crane\ndog\ncrane", ["crane (0)", "dog", "crane (2)"]),
        ("7 of 9\nfoo\n3", ["7 of 9", "foo", "3"]),
    ],
)
def test_names_in_classes_txt(tmp_path: Path, lines: str, expected: list[str]) -> None:
    pq.write_table(pa.table({"image": [png(0), png(1), png(2)], "label": [0, 1, 2]}), tmp_path / "test.parquet")
    pq.write_table(pa.table({"image": [png(0), png(1), png(2)], "label": [2, 1, 0]}), tmp_path / "train.parquet")
    (tmp_path / "classes.txt").write_text(lines)
    splits = open_images(str(tmp_path))
    assert (labels(splits.train), labels(splits.evaluation)) == (expected[::-1], expected)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_table_of_paths_beside_its_images(tmp_path: Path, kind: Any) -> None:
    paths = [str(write(tmp_path / "img" / f"{n}.png", n).relative_to(tmp_path)) for n in range(4)]
    table = pa.table({"image": pa.array(paths).cast(kind), "label": ["a", "b"] * 2})
    pq.write_table(table, tmp_path / "train.parquet")
    splits = open_images(str(tmp_path))
    assert (values(splits.train), labels(splits.train), splits.left_out) == ([0, 1, 3], ["a", "b", "b"], {})


def test_tables_and_images_in_one_folder(tmp_path: Path) -> None:
    make_parquet(tmp_path)
    write(tmp_path / "preview.png")
    splits = open_images(str(tmp_path))
    assert (len(splits.train), splits.left_out) == (11, {"image file beside parquet files": 1})
    for number in range(20):
        write(tmp_path / "a" / f"{number}.png")
    splits = open_images(str(tmp_path))
    assert (len(splits.train), splits.left_out) == (19, {"parquet file beside image files": 1})


def test_files_without_a_split_are_counted(tmp_path: Path) -> None:
    for name in ("train.parquet", "imagenet_val.parquet", "valencia.parquet", "testaccio.parquet"):
        pq.write_table(pa.table({"image": [png(1), png(2)]}), tmp_path / name)
    (tmp_path / "about.md").touch()
    splits = open_images(str(tmp_path))
    assert splits.evaluation_name == "validation"
    assert splits.left_out == {"in files that name no split, beside files that do": 4, "extension .md": 1}
    (note,) = open_images(str(tmp_path / "imagenet_val.parquet")).notes
    assert "Nothing is named train beside 'imagenet_val.parquet'" in note


def test_parquet_errors(tmp_path: Path) -> None:
    pq.write_table(pa.table({"images": [png(1)], "y": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'image'; it has images, y\. Did you mean 'images'"):
        open_images(str(tmp_path))
    pq.write_table(pa.table({"image": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="must hold encoded images"):
        open_images(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a.parquet' cannot be read as parquet"):
        open_images(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": [0, 3]}), tmp_path / "a.parquet")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"label 3 of .*a.parquet row 1 \(1 like this\), but .* 2 class names"):
        open_images(str(tmp_path / "a.parquet"))


def test_parquet_files_that_differ_or_are_empty(tmp_path: Path) -> None:
    empty = pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
    pq.write_table(empty, tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0.parquet' has no rows"):
        open_images(str(tmp_path))
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": [0, 1]}), tmp_path / "train-1.parquet")
    train = open_images(str(tmp_path)).train
    assert (train.classes, train.identify(0)) == (("0", "1"), f"{tmp_path / 'train-1.parquet'} row 0")
    pq.write_table(pa.table({"image": [png(1)], "label": [float("nan")]}), tmp_path / "train-2.parquet")
    with pytest.raises(DataError, match=r"'label' holds int64 in '.*-1.parquet', but double in '.*-2.parquet'"):
        open_images(str(tmp_path))


def test_an_address_is_no_path(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["https://example.org/a.png"] * 2}), tmp_path / "a.parquet")
    with pytest.raises(BadImage, match=r"row 0: https://example.org/a.png is an address, not a file; download"):
        open_images(str(tmp_path)).train.read(0)


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


def test_hub_splits_that_stay_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = hub(training=[1, 2], training_extra=[3, 4, 5], dev=[6], unsupervised=[7])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    splits = open_images("hf:x/y")
    assert (values(splits.train), values(splits.evaluation), splits.evaluation_name) == ([1, 2], [6], "validation")
    assert splits.left_out == {"in the hub's split 'training_extra'": 3, "in the hub's split 'unsupervised'": 1}


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
