"""What needs an extra says so before it works, and names the extra."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pecobook.data.images import open_images
from pecobook.engine.probing import open_probe
from pecobook.errors import PecobookError
from pecobook.settings.contrast import ContrastConfig


def command(name: str, **settings: object) -> Callable[[], object]:
    """Return a call of a command's Python function, which is imported when the packages are hidden."""
    import importlib

    return lambda: getattr(importlib.import_module(f"pecobook.commands.{name}"), name)(**settings)


CASES: dict[str, tuple[str, Callable[[], object]]] = {
    "probe": ("analysis", command("probe", backbone="timm:none", data="none")),
    "analyze": ("analysis", command("analyze", tokenizer="none", data="none", out="out")),
    "demo": ("analysis", command("demo", data="none", out="out")),
    "reproduce": ("analysis", command("reproduce", tables=("table4",), data="none", out="out")),
    "--probe-data": ("analysis", lambda: open_probe(ContrastConfig(data="none", probe_data="none"))),
    "--data photos": ("photos", lambda: open_images("photos")),
    "explore": ("analysis", command("explore", runs=("none",))),
}


@pytest.mark.parametrize("name", CASES)
def test_extras__what_is_missing_is_named_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("scipy", "skimage", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    extra, call = CASES[name]
    with pytest.raises(PecobookError, match=rf"{name} needs [\w\- ]+: pip install 'pecobook\[{extra}\]'\."):
        call()
    assert not list(tmp_path.iterdir())
