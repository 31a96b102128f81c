"""Reads class names, with their pixel values and colours, from the files that people and tools write.

road                            a name on each line, in the order of the pixel values
0 road, 0: road                 a pixel value and a name
road 128 64 128                 a name and the colour R G B; also the colour first, or after a pixel value
name,r,g,b                      a table with a header, such as class_dict.csv and Roboflow's _classes.csv
Idx Ratio Train Val Stuff Name  ADE20K's objectInfo150.txt
# label:color_rgb:parts:actions CVAT's labelmap.txt
{"0": "road"}, ["road"]         JSON
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pecobook.data.names import inside_wrapper
from pecobook.errors import ConfigError, first_line

_FILES = (
    *("classes.txt", "class_names.txt", "classes.csv", "class_dict.csv", "_classes.csv", "train/_classes.csv"),
    *("labels.txt", "labelmap.txt", "label_colors.txt", "objectInfo150.txt", "object150_info.csv", "id2label.json"),
    "classes.json",
)
_VALUE_HEADERS = ("idx", "index", "id", "value", "pixel value", "pixel", "label id")
_NAME_HEADERS = ("name", "class", "label", "category", "class name", "class_name")
_COLOUR_HEADERS = (("r", "g", "b"), ("red", "green", "blue"))
_NUMBER = r"(\d{1,3})"
_SEPARATOR = r"[\s,;]+"
_COLOUR = _SEPARATOR.join([_NUMBER] * 3)
_INDEXED = re.compile(r"(\d{1,5})\s*[\s,;:=]\s*(\S.*)")


class ClassFile(NamedTuple):
    """The content of a file of classes."""

    names: tuple[str, ...]
    colours: npt.NDArray[np.uint8] | None = None
    """(n, 3); None if the file has no colours."""
    values: tuple[int, ...] | None = None
    """Pixel value of each class; None if the file states none, so that they are 0, 1, 2, ..."""
    ignored: tuple[int, ...] = ()
    """Pixel values that the file's format assigns to no class."""


def find_class_file(root: Path) -> Path | None:
    """Return the class file in a data set's folder, or None; case does not matter.

    An archive may have added one more folder around the data set.
    """
    tops = dict.fromkeys((root, inside_wrapper(root))) if root.is_dir() else ()
    for top in tops:
        files = {
            str(file.relative_to(top)).lower(): file for at in ("", "train/") for file in sorted(top.glob(at + "*.*"))
        }
        found = (files.get(name.lower()) for name in _FILES)
        if file := next((file for file in found if file is not None and file.is_file()), None):
            return file
    return None


def read_classes(path: Path) -> ClassFile:
    """Read a class file in one of the forms above.

    Raises:
        ConfigError: the file cannot be read, a line is blank, or lines have different forms.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8: save it so"
        raise ConfigError(f"--classes '{path}' cannot be read: {reason}.") from None
    if not text:
        raise ConfigError(f"--classes '{path}' is empty: give a file with a name on each line.")
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml", ".xml", ".pbtxt", ".pkl", ".npy"):
        raise ConfigError(f"--classes '{path}': {suffix} is not read. Give a text file with a name on each line.")
    if suffix == ".json":
        return _from_json(path, text)
    lines = [line.strip() for line in text.splitlines()]
    if "" in lines:
        raise ConfigError(f"--classes '{path}': line {lines.index('') + 1} is blank, but every line must name a class.")
    if lines and lines[0].replace(" ", "").startswith("#label:color_rgb"):
        lines = [line.split(":", 2)[0] + " " + line.split(":", 2)[1] for line in lines[1:] if line.count(":") >= 2]
    if lines and lines[0] == "__ignore__":  # labelme's name of the value -1, which 8 bits hold as 255
        lines = lines[1:]
    table = _from_table(path, lines)
    return table or _from_lines(path, [line for line in lines if not re.match(r"#(\s|$)", line)])


def _from_json(path: Path, text: str) -> ClassFile:
    """Read a list of names, or an object from pixel values to names (or from names to values)."""
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--classes '{path}' is not valid JSON: {first_line(error)}.") from None
    if isinstance(content, list) and content and all(isinstance(name, str) for name in content):
        return ClassFile(tuple(content))
    if isinstance(content, dict) and content:
        pairs = [(key, value) for key, value in content.items() if isinstance(value, str) and key.isdecimal()]
        pairs = pairs or [(str(v), k) for k, v in content.items() if isinstance(v, int) and not isinstance(v, bool)]
        if len(pairs) == len(content) and all(value.isdecimal() for value, _ in pairs):
            pairs.sort(key=lambda pair: int(pair[0]))
            return ClassFile(tuple(name for _, name in pairs), None, tuple(int(value) for value, _ in pairs))
    raise ConfigError(
        f"--classes '{path}': give a JSON list of names, or an object from pixel values to names, or a text file."
    )


def _from_table(path: Path, lines: list[str]) -> ClassFile | None:
    """Read a table with a header; return None if the first line is not a header."""
    if lines and lines[0].lower().split()[:2] == ["idx", "ratio"]:  # ADE20K's own; names hold spaces and commas
        lines = ["\t".join(line.split(None, 5)) for line in lines]
    delimiter = next((mark for mark in "\t,;" if lines and mark in lines[0]), None)
    if delimiter is None:
        return None
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)]
    header = [cell.lower() for cell in rows[0]]
    name = next((header.index(word) for word in _NAME_HEADERS if word in header), None)
    value = next((header.index(word) for word in _VALUE_HEADERS if word in header), None)
    colour = next(([header.index(w) for w in words] for words in _COLOUR_HEADERS if set(words) <= set(header)), None)
    if name is None or (value is None and colour is None) or header == ["name", "r", "g", "b"]:
        return None  # no header, or that of a file for _from_lines
    used = [name, *([] if value is None else [value]), *(colour or [])]
    for line, row in zip(lines[1:], rows[1:], strict=False):
        if len(row) <= max(used) or not all(row[column].isdecimal() for column in used[1:]):
            raise ConfigError(f"--classes '{path}': the line '{line}' does not have the columns '{lines[0]}'.")
    colours = [[int(row[column]) for column in colour or []] for row in rows[1:]]
    if any(max(channels, default=0) > 255 for channels in colours):
        raise ConfigError(f"--classes '{path}': a colour is above 255.")
    return ClassFile(
        tuple(row[name] for row in rows[1:]),
        np.array(colours, np.uint8) if colour else None,
        None if value is None or colour else tuple(int(row[value]) for row in rows[1:]),
        (0,) if header[:2] == ["idx", "ratio"] else (),  # ADE20K: 0 is everything else
    )


def _from_lines(path: Path, lines: list[str]) -> ClassFile:
    """Read one class per line."""
    lines = [
        re.sub(r"#([0-9a-fA-F]{6})\b", lambda match: " ".join(map(str, bytes.fromhex(match[1]))), line)
        for line in lines
    ]
    lines = [line for line in lines if not re.fullmatch(r"name\W+r\W+g\W+b", line, re.IGNORECASE)]
    four = re.compile(rf"\d{{1,5}}{_SEPARATOR}{_COLOUR}{_SEPARATOR}(\S.*)")
    has_colours = any(re.fullmatch(rf"(.*?\D){_SEPARATOR}{_COLOUR}|{_COLOUR}{_SEPARATOR}.*", line) for line in lines)
    indexed = [_INDEXED.fullmatch(line) for line in lines]
    values = [int(match[1]) for match in indexed if match]
    has_values = len(values) == len(lines) and len(set(values)) == len(values) > 0
    if has_values and (all(four.fullmatch(line) for line in lines) or not has_colours):
        rest = [match[2] for match in indexed if match]
        names, colours = _names_and_colours(path, rest)
        return ClassFile(names, colours, None if colours is not None else tuple(values))
    names, colours = _names_and_colours(path, lines)
    if has_values and all(_INDEXED.fullmatch(name) for name in names):  # 0 road 128 64 128
        names = tuple(match[2] for name in names if (match := _INDEXED.fullmatch(name)))
    return ClassFile(names, colours)


def _names_and_colours(path: Path, lines: list[str]) -> tuple[tuple[str, ...], npt.NDArray[np.uint8] | None]:
    """Read lines of `name`, `name R G B` or `R G B name`."""
    lines = [re.sub(rf"^({_COLOUR}){_SEPARATOR}(.+)$", r"\5 \1", line) for line in lines]
    matches = [re.fullmatch(rf"(.*?){_SEPARATOR}{_COLOUR}", line) for line in lines]
    if not any(matches):
        return tuple(lines), None
    for line, match in zip(lines, matches, strict=True):
        if match is None or max(int(match[channel]) for channel in (2, 3, 4)) > 255:
            raise ConfigError(f"--classes '{path}': the line '{line}' is not a valid 'name R G B' like other lines.")
    complete = [match for match in matches if match is not None]
    if len(complete) > 1 and all(re.search(rf"{_SEPARATOR}\d+$", match[1]) for match in complete):
        raise ConfigError(f"--classes '{path}': the line '{lines[0]}' has four numbers; give 'name R G B'.")
    colours = np.array([[int(match[channel]) for channel in (2, 3, 4)] for match in complete], np.uint8)
    return tuple(match[1] for match in complete), colours
