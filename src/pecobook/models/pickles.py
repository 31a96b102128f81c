"""Third-party pickles, from which only tensors are read: no class in a file is instantiated and no code runs."""

from __future__ import annotations

import contextlib
import pickletools
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pecobook.errors import WeightsError

# Python modules whose objects training scripts save next to the weights, or in a network: settings, numbers, devices.
# They are not instantiated.
_SETTINGS_MODULES = (
    *("argparse", "numpy", "pathlib", "omegaconf", "yacs", "mmengine", "mmcv", "ml_collections"),
    *("torch", "functools", "collections", "timm", "torchvision", "transformers", "lightning", "pytorch_lightning"),
)


def load_tensors(file: Path) -> Any:
    """Load a torch.save file: only the weights of a network pickled in a zip, nothing of any other object.

    Raises:
        Exception: any that torch raises for a damaged file, or for one that calls anything outside the known modules.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        names = _names_of_objects(file)
        if not names:
            raise
        with torch.serialization.safe_globals([_stub(name) for name in names]):
            return _with_weights(torch.load(file, map_location="cpu", weights_only=True))


def _names_of_objects(file: Path) -> Collection[str]:
    """Return the names of all classes and functions in a torch.save file; none for any other file."""
    if zipfile.is_zipfile(file):
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    names = set[str]()
    with contextlib.suppress(ValueError), file.open("rb") as opened:  # before PyTorch 1.6: four pickles, then numbers
        for _ in range(4):
            parts = pickletools.genops(opened)
            names |= {str(name).replace(" ", ".") for kind, name, _ in parts if kind.name == "GLOBAL"}
    return names


class _Unread:
    """Stands for an object of any class in a file, which is not instantiated; a network's weights are kept.

    A pickled network is a tree of objects that hold `_parameters`, `_buffers` and `_modules`.
    """

    own: Mapping[str, Any] = MappingProxyType({})
    parts: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            own = {**state.get("_parameters", {}), **state.get("_buffers", {})}
            computed = state.get("_non_persistent_buffers_set", ())  # such as tables of indices
            self.own = {name: value for name, value in own.items() if name not in computed}
            self.parts = state.get("_modules", {})

    def weights(self) -> dict[str, Tensor]:
        """Return the weights under the names of a state dict."""
        found = {name: value for name, value in self.own.items() if isinstance(value, Tensor)}
        for name, part in self.parts.items():
            if isinstance(part, _Unread):
                found |= {f"{name}.{key}": value for key, value in part.weights().items()}
        return found


class _UnreadSettings(_Unread):
    """Stands for an object of `_SETTINGS_MODULES`, which files create by a call; other calls refuse the file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class _UnreadCall(_Unread):
    def __init__(self, *_: Any, **__: Any) -> None:
        raise WeightsError(f"it calls {type(self).__name__}")


def _stub(name: str) -> Any:
    """Return a separate class for each name in a file, since torch finds the name through the class."""
    if name == "builtins.set":
        return set, name
    harmless = name.split(".")[0] in _SETTINGS_MODULES
    return type(name, (_UnreadSettings if harmless else _UnreadCall,), {}), name


def _with_weights(content: Any) -> Any:
    """Return the content of a file, with each network replaced by its weights."""
    if isinstance(content, _Unread):
        return content.weights()
    return {name: _with_weights(value) for name, value in content.items()} if isinstance(content, dict) else content
