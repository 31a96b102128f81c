"""Files of classes as people and tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pecobook.data.dense.class_files import ClassFile, find_class_file, read_classes
from pecobook.data.dense.segmentation import open_segmentation
from pecobook.data.dense.segmentation_check import verify
from pecobook.data.dense.segmentation_classes import IGNORE, MaskClasses, make_classes, parse_values
from pecobook.errors import ConfigError
from tests.data.dense.masks import png, rewrite, train_of
from tests.shapes import shape, write_shapes

ADE20K = (
    "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1576\t11664\t1172\t1\twall\n2\t0.1072\t6046\t612\t1\tbuilding, edifice\n"
)
CVAT = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\n"


@pytest.mark.parametrize(
    ("text", "names", "colours", "values"),
    [
        (ADE20K, ("wall", "building, edifice"), None, (1, 2)),
        ("Idx,Ratio,Train,Val,Stuff,Name\n1,0.2,3,4,1,wall;x\n2,0.1,3,4,1,sky\n", ("wall;x", "sky"), None, (1, 2)),
        (ADE20K.replace("\t", "   "), ("wall", "building, edifice"), None, (1, 2)),
        (CVAT, ("background", "road"), [[0, 0, 0], [128, 64, 128]], None),
        ("Pixel Value, Class\n0, background\n1, road\n", ("background", "road"), None, (0, 1)),
        ("name,r,g,b\nroad,128,64,128\nsky,1,2,3\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("id,name,r,g,b\n0,road,128,64,128\n1,sky,1,2,3\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("0 background\n255 road sign\n", ("background", "road sign"), None, (0, 255)),
        ("0: sky\n1: road\n", ("sky", "road"), None, (0, 1)),
        ("0 road 128 64 128\n1 sky 1 2 3\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("0 128 64 128 road\n1 1 2 3 sky\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("64 128 64\tAnimal\n192 0 128\tArchway\n", ("Animal", "Archway"), [[64, 128, 64], [192, 0, 128]], None),
        ("road #804080\nsky #010203\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("# classes\nsky\nroad\n", ("sky", "road"), None, None),
        ("lane 1\nlane 2\n", ("lane 1", "lane 2"), None, None),
        ("0\n1\n", ("0", "1"), None, None),
        ("__ignore__\n_background_\ncat\n", ("_background_", "cat"), None, None),
        ("1 sky\nroad\n", ("1 sky", "road"), None, None),
    ],
)
def test_read_classes__forms(tmp_path: Path, text: str, names: Any, colours: Any, values: Any) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    found = read_classes(file)
    assert (found.names, found.values) == (names, values)
    assert (None if found.colours is None else found.colours.tolist()) == colours


def test_read_classes__json(tmp_path: Path) -> None:
    file = tmp_path / "id2label.json"
    for content, expected in (
        (["sky", "road"], ClassFile(("sky", "road"))),
        ({"1": "road", "0": "sky"}, ClassFile(("sky", "road"), None, (0, 1))),
        ({"road": 1, "sky": 0}, ClassFile(("sky", "road"), None, (0, 1))),
    ):
        file.write_text(json.dumps(content))
        assert read_classes(file) == expected
    for text in ("{", "[1]", '{"a": "b"}', "{}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="JSON"):
            read_classes(file)


def test_read_classes__refuses_other_files(tmp_path: Path) -> None:
    for name, text, reason in (
        ("data.yaml", "names: [a]", r"\.yaml is not read"),
        ("a.txt", "road 128 64 128 255\nsky 1 2 3 255", "has four numbers"),
        ("b.csv", "id,name\n0,sky\nx,road", "does not have the columns"),
        ("empty.txt", "\n", "empty.txt' is empty"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=reason):
            read_classes(tmp_path / name)


def test_read_classes__refuses_other_encodings(tmp_path: Path) -> None:
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "classes.txt").write_bytes("café\nsky\n".encode(encoding))
        with pytest.raises(ConfigError, match="cannot be read: it is not text in UTF-8"):
            read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize(
    "name", ["Classes.TXT", "labels.txt", "train/_Classes.csv", "ObjectInfo150.txt", "ADE/objectInfo150.txt"]
)
def test_find_class_file__in_any_case(tmp_path: Path, name: str) -> None:
    assert find_class_file(tmp_path) is None
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("sky\n")
    assert find_class_file(tmp_path) == tmp_path / name


def test_open__ade20k_with_its_own_file_of_classes(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").unlink()
    (root / "objectInfo150.txt").write_text(ADE20K + "3\t0.1\t1\t1\t1\tsky\n")
    assert find_class_file(root) == root / "objectInfo150.txt"
    rewrite(root, lambda values: png(np.where(values == 255, 0, values + 1), 8))
    result = verify(open_segmentation(str(root)))
    assert (result.problems, result.notes) == ((), ())
    assert result.splits.notes == (f"The classes are those of {root / 'objectInfo150.txt'}.",)
    truth = shape(0)[1].astype(int)
    assert np.array_equal(train_of(result).sample(0)[1].numpy(), np.where(truth == 255, -1, truth))


def test_read_classes__names_and_colours(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("sky \nroad sign\n\n")
    assert read_classes(file) == ClassFile(("sky", "road sign"))
    file.write_text("name,r,g,b\nsky,1,2,3\nroad sign\t255 0 9\n")
    names, colours, _, _ = read_classes(file)
    assert names == ("sky", "road sign")
    assert colours is not None
    file.write_bytes(b"\xef\xbb\xbf1 2 3\tsky\r\n255 0 9\troad sign\r\n")  # as in CamVid, and as Windows writes text
    assert read_classes(file)[0] == names
    assert np.array_equal(read_classes(file)[1], colours)  # type: ignore[arg-type]
    assert colours is not None
    assert colours.tolist() == [[1, 2, 3], [255, 0, 9]]
    for text in ("sky 1 2 3\nroad\n", "sky 1 2 300\nroad 1 2 3\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="not a valid 'name R G B'"):
            read_classes(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_classes(tmp_path / "none.txt")
    file.write_text("sky\n\nroad\n")
    with pytest.raises(ConfigError, match="line 2 is blank"):
        read_classes(file)


def test_make_classes__an_ignored_value_is_not_a_class() -> None:
    names = ("sky", "void", "road")
    made = make_classes(ClassFile(names), mask_values=(), ignore=("void", "255"))
    assert made == MaskClasses(("sky", "road"), (0, 2), (1, 255))
    assert make_classes(ClassFile(names), mask_values=(), ignore=("1",)) == MaskClasses(("sky", "road"), (0, 2), (1,))
    # A value in --mask-values is a class, even if --ignore contains it by default.
    made = make_classes(None, mask_values=("0", "255"), ignore=("255",))
    assert made is not None
    assert made.table()[[0, 255, 7]].tolist() == [0, 1, IGNORE - 1]
    assert make_classes(None, mask_values=(), ignore=("255",)) is None
    many = make_classes(ClassFile(tuple(f"c{n}" for n in range(300))), mask_values=(), ignore=("255",))
    assert many is not None
    assert len(many.names) == 300  # including the 256th
    with pytest.raises(ConfigError, match="Two classes are called 'sky'"):
        make_classes(ClassFile(("sky", "sky")), mask_values=(), ignore=())
    for text in ("70000", "²"):
        with pytest.raises(ConfigError, match="--ignore"):
            make_classes(ClassFile(names), mask_values=(), ignore=(text,))
    with pytest.raises(
        ConfigError, match="--ignore 'void' is a name, but the classes have no names: give --classes FILE"
    ):
        make_classes(None, mask_values=(), ignore=("255", "void"))
    made = make_classes(None, mask_values=("0-2",), ignore=("class 1",))  # the names contain the values
    assert made == MaskClasses(("class 0", "class 2"), (0, 2), (1,))
    with pytest.raises(ConfigError, match="--ignore 'nothing'"):
        make_classes(ClassFile(names), mask_values=(), ignore=("nothing",))
    with pytest.raises(ConfigError, match="names 2 pixel values, and the file of classes 3: give"):
        make_classes(ClassFile(names), mask_values=("0", "4"), ignore=())


def test_parse_values() -> None:
    assert parse_values(("0", "7", "10-12")) == (0, 7, 10, 11, 12)
    for text in ("-1", "x", "1-99999"):
        with pytest.raises(ConfigError, match="--mask-values"):
            parse_values((text,))
