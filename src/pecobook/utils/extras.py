"""Packages that only some commands need, installed by pecobook's extras."""

from __future__ import annotations

from importlib.util import find_spec

from pecobook.errors import ConfigError

_MODULES = {
    "analysis": {"sklearn": "scikit-learn", "scipy": "scipy"},
    "onnx": {"onnx": "onnx", "onnxscript": "onnxscript"},
    "video": {"av": "av"},
    "photos": {"skimage": "scikit-image", "sklearn": "scikit-learn"},
}


def require(extra: str, what: str) -> None:
    """Raise ConfigError, which names `what` and the remedy, if a package of an extra is not installed."""
    missing = [package for module, package in _MODULES[extra].items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"{what} needs {' and '.join(missing)}: pip install 'pecobook[{extra}]'.")
