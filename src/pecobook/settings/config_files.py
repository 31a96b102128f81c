"""Reading of `--config` files (JSON, YAML and TOML), and the line of each setting for error messages."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pecobook.errors import ConfigError, first_line
from pecobook.utils.json_files import read_json

_RETIRED = {"quantizer": ("learning", "ema")}
"""Settings removed since version 0.1.0: the group, the name, and the value that had no effect."""
_SETTING = re.compile(r"(?:Unknown setting '|--)([\w.-]+)")


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the content of a configuration file, or of the config.json in a folder.

    Names may contain dashes, as flags do, and dots instead of groups. Raises ConfigError, which names the line.
    """
    file = config_file(path)
    suffix = file.suffix.lower()
    try:
        if suffix in (".yaml", ".yml", ".toml"):
            content = _read_toml(file) if suffix == ".toml" else _read_yaml(file)
        else:
            content = read_json(file, error=ConfigError, remedy="Give the config.json of a run.")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"There is no configuration file '{file}'.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{file}' cannot be read: {first_line(error).rstrip('.')}.") from None
    return without_retired(_with_underscores(content))


def without_retired(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an earlier version without the removed ones; those whose value had an effect stay."""
    groups = {group: settings[group] for group in _RETIRED if isinstance(settings.get(group), dict)}
    kept = {group: {k: v for k, v in values.items() if (k, v) != _RETIRED[group]} for group, values in groups.items()}
    return settings | kept


def config_file(path: str | Path) -> Path:
    """Return the path itself if it is a file, or that of the config.json in a folder."""
    return Path(path) / "config.json" if Path(path).is_dir() else Path(path)


@contextlib.contextmanager
def errors_with_lines(path: str | Path) -> Iterator[None]:
    """Add the file name, and the line if found, to any ConfigError about a setting that is raised in this context."""
    try:
        yield
    except ConfigError as error:
        file = config_file(path)
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = []
        for message in str(error).splitlines():
            match = _SETTING.match(message)
            number = _line_of(text, match[1]) if match else 0
            lines.append(f"'{file}'{f', line {number}' if number else ''}: {message}" if match else message)
        raise ConfigError("\n".join(lines)) from None


def _line_of(text: str, setting: str) -> int:
    """Return the number of the line that sets, say, `optim.lr` (its name after those of its groups), or 0."""
    lines, found = text.splitlines(), 0
    for part in setting.split("."):
        name = re.sub("[-_]", "[-_]", part)
        pattern = re.compile(rf"""(?:^|[\s{{,.\["'])["']?{name}["']?\s*[:=\].]""")
        # The next part may stand on the line of the group itself, as in "optim.lr: 1" and "[optim]".
        found = next((n for n in range(max(found, 1), len(lines) + 1) if pattern.search(lines[n - 1])), 0)
        if not found:
            return 0
    return found


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:  # its message ends with the line and the column
        raise ConfigError(f"'{file}' is no TOML: {first_line(error).rstrip('.')}.") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses duplicate names, where YAML drops the first, and names that are not strings, such as a bare no."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = set()
            for key, _ in node.value:
                line, name = key.start_mark.line + 1, key.value
                if key.tag != "tag:yaml.org,2002:str":
                    raise ConfigError(f"'{file}', line {line}: a setting has a name of letters, not {name!r}.")
                if name in names:
                    raise ConfigError(f"'{file}', line {line}: '{name}' stands there twice.")
                names.add(name)
            content: dict[Any, Any] = super().construct_mapping(node, deep)
            return content

    text = file.read_text(encoding="utf-8")
    try:
        content = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"'{file}'{line}: this is no YAML: {error.problem}.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"'{file}' is no YAML: {first_line(error).rstrip('.')}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"'{file}' holds no settings, which are lines such as 'batch_size: 64'.")
    return content


def _with_underscores(value: Any) -> Any:
    if isinstance(value, dict):
        return {name.replace("-", "_"): _with_underscores(item) for name, item in value.items()}
    return value
