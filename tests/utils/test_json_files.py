"""The reader of JSON files: what it refuses, and that nothing else reads files of ours."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import pecobook
from pecobook.errors import DataError
from pecobook.utils.json_files import (
    COUNT,
    NUMBER,
    OBJECT,
    SWITCH,
    TEXT,
    WHOLE,
    list_of,
    metric_lines,
    read_if_valid,
    read_json,
)

SCHEMA: dict[str, Any] = {
    "views": WHOLE,
    "seed": COUNT,
    "crop": NUMBER,
    "name": TEXT,
    "masks": SWITCH,
    "args": OBJECT,
    "grid": list_of(WHOLE, 2),
    "size": WHOLE.or_none,
    "colour": {"hue": NUMBER},
}
GOOD = """{"views": 3, "seed": 0, "crop": 0.5, "name": "", "masks": false, "args": {}, "grid": [2, 3],
           "size": null, "colour": {"hue": 1}, "more": 1}"""


def test_read_json__returns_a_file_that_fits(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    assert read_if_valid(file, SCHEMA) is None
    file.write_text(GOOD)
    content = read_json(file, SCHEMA)
    assert (content["views"], content["grid"], content["more"]) == (3, [2, 3], 1)
    assert read_if_valid(file, SCHEMA) == content


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"views": 3,', "", "has no 'views', a whole number above 0"),
        ('"views": 3', '"views": null', "has no 'views', a whole number above 0"),
        ('"views": 3', '"views": 0', "has 'views' 0, which is not a whole number above 0"),
        ('"views": 3', '"views": true', "has 'views' true, which is not a whole number above 0"),
        ('"views": 3', '"views": 3.0', "has 'views' 3.0, which is not a whole number above 0"),
        ('"seed": 0', '"seed": -1', "has 'seed' -1, which is not a whole number of 0 or above"),
        ('"seed": 0', '"seed": 1e400', "has 'seed' Infinity"),
        ('"crop": 0.5', '"crop": NaN', "has 'crop' NaN, which is not a finite number"),
        ('"name": ""', '"name": 3', "has 'name' 3, which is not a text"),
        ('"masks": false', '"masks": 0', "has 'masks' 0, which is not true or false"),
        ('"args": {}', '"args": []', "has 'args' [], which is not an object"),
        ('"grid": [2, 3]', '"grid": [2]', "has 'grid' [2], which is not a list of 2 times a whole number above 0"),
        ('"grid": [2, 3]', '"grid": [2, "3"]', "has 'grid' [2, \"3\"]"),
        ('"size": null', '"size": "huge"', "has 'size' \"huge\", which is not a whole number above 0"),
        ('"colour": {"hue": 1}', '"colour": 1', "has no object 'colour'"),
        ('{"hue": 1}', "{}", "has no 'colour.hue', a finite number"),
        (GOOD, "[1]", "does not hold a JSON object"),
        (GOOD, "", "cannot be read: Expecting value"),
        (GOOD, "[" * 100_000, "cannot be read: "),
    ],
)
def test_read_json__names_the_file_the_field_the_value_and_the_remedy(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    file = tmp_path / "config.json"
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(DataError) as caught:
        read_json(file, SCHEMA, error=DataError, remedy="Make it again.")
    assert str(caught.value).startswith(f"'{file}' {problem}")
    assert str(caught.value).endswith(". Make it again.")
    assert "\n" not in str(caught.value)
    assert read_if_valid(file, SCHEMA) is None


def test_metric_lines__leaves_out_what_a_crash_cut_or_damaged(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 2}\n[1]\n{"step": "2"}\n\xff\n{"loss": 3}\n{"step": 3}\n{"step": 4, "lo')
    assert metric_lines(file) == [('{"step": 1, "loss": 2}', {"step": 1, "loss": 2}), ('{"step": 3}', {"step": 3})]


# Modules that read JSON of users and of other programs, texts of flags, or lines that the same process wrote.
FOREIGN = ("data/", "settings/training.py", "settings/values.py", "models/network_traits.py", "commands/predict/")


def test_no_other_module_reads_json() -> None:
    root = Path(pecobook.__file__).parent
    modules = {
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.load", "json.loads")
    }
    assert {module for module in modules if not module.startswith(FOREIGN)} == {"utils/json_files.py"}
