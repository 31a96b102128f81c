"""The file with the statistics of the originals for rFID: mean, covariance, and their provenance."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pecobook.analysis.fid import Gaussian
from pecobook.errors import DataError, first_line
from pecobook.utils.files import write_atomically
from pecobook.utils.json_files import parse_object

Provenance: TypeAlias = dict[str, Any]
_FEATURES = 2048


def write_statistics(file: Path, statistics: Gaussian, provenance: Provenance) -> None:
    """Write the statistics under the names that FID programs read, `mu` and `sigma`, with their provenance."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"mu": statistics.mean, "sigma": statistics.covariance, "count": statistics.num_images}
    np.savez(buffer, **arrays, provenance=np.array(json.dumps(provenance)))
    write_atomically(file.expanduser(), buffer.getvalue())


def read_statistics(file: Path, provenance: Provenance) -> tuple[Gaussian, str]:
    """Read a statistics file.

    Returns:
        the statistics, and a description of them, without provenance if the file is from elsewhere.

    Raises:
        DataError: the file is damaged, or its statistics belong to other images, another size or other weights.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            mean, covariance = (content[name].astype(np.float64) for name in ("mu", "sigma"))
            count = int(content["count"]) if "count" in content else 0
            own = parse_object(str(content["provenance"])) if "provenance" in content else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = first_line(error).strip("\"'").rstrip(".")
        raise DataError(f"--statistics '{file}' cannot be read ({reason}): delete it, or name another file.") from None
    if mean.shape != (_FEATURES,) or covariance.shape != (_FEATURES, _FEATURES):
        raise DataError(f"--statistics '{file}' holds mu {mean.shape} and sigma {covariance.shape}, not 2048 features.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"--statistics '{file}' holds values that are not finite: delete it, or name another file.")
    if own is None:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        return Gaussian(mean, covariance, count), f"of others (SHA-256 {digest}), of images and a crop not known here"
    if changed := [name for name, value in provenance.items() if own.get(name) != value]:
        name = changed[0]
        values = f"{_short(own.get(name))} of the file, {_short(provenance[name])} now"
        text = f"--statistics '{file}' does not fit: {name}: {values}"
        raise DataError(f"{text}. Delete it, or name another file.")
    return Gaussian(mean, covariance, count), f"of the same {count:,} images, cropped alike"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
