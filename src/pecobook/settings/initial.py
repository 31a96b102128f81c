"""Settings implied by `--init`: the network whose weights a training starts from.

They are read from the config.json of a run or of its export. If it cannot be read, nothing is implied; loading the
weights then reports why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pecobook.settings.changes import complete
from pecobook.settings.tokenizer import TokenizerConfig
from pecobook.settings.values import to_dict
from pecobook.utils.json_files import OBJECT, TEXT, WHOLE, Schema, read_if_valid

_BACKBONE: Schema = {"kind": TEXT, "name": TEXT, "args": OBJECT}
_TOKENIZER: Schema = {"kind": TEXT, "model": OBJECT, "num_codewords": WHOLE}
_RUN: Schema = {"command": TEXT, "model": OBJECT}


def network_of(changes: dict[str, Any], command: str) -> dict[str, Any]:
    """Return the name and arguments of the backbone that `init` in `changes` names, for contrast or pretrain.

    A run of the same command has the network as it was trained, any other run as it was exported. A ViT of `contrast`
    keeps the positions of other weights and learns them.

    Args:
        changes: the settings that the user gave.
        command: name of the command that starts.
    """
    init = str(changes.get("init") or "")
    if not init or "name" in _given(changes):
        return {}
    learns_positions = {"fixed_positions": False} if command == "contrast" else {}
    if init.startswith("timm:"):
        return {"model.name": init.removeprefix("timm:"), "model.args": "{}", **learns_positions}
    run = read_if_valid(Path(init) / "config.json", _RUN)
    if run is not None and run["command"] == command:
        kept: dict[str, Any] = {name: run[name] for name in ("fixed_positions", "visible_only") if name in run}
        return {**_dotted(run, "model"), **_dotted(run, "decoder"), **kept}
    exported = _export(init, _BACKBONE)
    if exported is None:
        return {}
    args = {name: value for name, value in exported["args"].items() if name != "img_size"}
    return {"model.name": exported["name"], "model.args": json.dumps(args), **learns_positions}


def tokenizer_of(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the shape of the tokenizer that `init` names in `changes`, the settings that the user gave.

    `replace` lets other settings in `changes` override them.
    """
    init = str(changes.get("init") or "")
    exported = _export(init, _TOKENIZER) if init else None
    if exported is None or exported["kind"] != "tokenizer":
        return {}
    model = complete({"model": exported["model"]}, to_dict(TokenizerConfig()))["model"]
    return {**_dotted({"model": model}, "model"), "quantizer.num_codewords": exported["num_codewords"]}


def _export(init: str, schema: Schema) -> dict[str, Any] | None:
    """Return the config.json of an export folder or of a run's export, or None if there is none."""
    for folder in (Path(init) / "export", Path(init)):
        content = read_if_valid(folder / "config.json", schema)
        if content is not None:
            return content
    return None


def _dotted(settings: dict[str, Any], group: str) -> dict[str, Any]:
    values = settings.get(group)
    return {f"{group}.{name}": value for name, value in values.items()} if isinstance(values, dict) else {}


def _given(changes: dict[str, Any]) -> set[str]:
    """Return the names of the `model` settings in `changes`, which may be nested or dotted."""
    nested = changes.get("model")
    dotted = {name.partition(".")[2] for name in changes if name.startswith("model.")}
    return {*(nested if isinstance(nested, dict) else ()), *dotted}
