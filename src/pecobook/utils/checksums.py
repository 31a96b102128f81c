"""Checksums of the files that pecobook reads weights and codes from: a flipped bit is noticed on reading.

The checksum of FILE is stored next to it as FILE.sha256, in the format of coreutils, so that `sha256sum --check
FILE.sha256` verifies it too. A file without a checksum, as written by older versions, is read unverified.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pecobook.utils.files import write_atomically

SKIP_VARIABLE = "PECOBOOK_SKIP_CHECKSUMS"
"""Environment variable; if it is 1, no file is verified. Verifying takes about a second per 1.4 GB."""


def checksums_skipped() -> bool:
    """Return whether the user switched verification off."""
    return os.environ.get(SKIP_VARIABLE) == "1"


def checksum_file(file: Path) -> Path:
    """Return the path of the checksum of a file."""
    return file.with_name(f"{file.name}.sha256")


def write_with_checksum(file: Path, data: bytes) -> None:
    """Write a file and its checksum atomically.

    A process killed in between leaves a new file's checksum without the file, or a replaced file without a checksum,
    but never a file with another file's checksum.
    """
    digest = hashlib.sha256(data).hexdigest()
    if file.exists():
        checksum_file(file).unlink(missing_ok=True)
        write_atomically(file, data)
        _write_checksum(file, digest)
    else:
        _write_checksum(file, digest)
        write_atomically(file, data)


def add_checksum(file: Path) -> None:
    """Write the checksum of an existing file."""
    _write_checksum(file, _digest(file))


def damage(files: Iterable[Path]) -> str | None:
    """Return a sentence on the first file that does not match its checksum; None if all do.

    The files are read in parallel threads.

    Raises:
        PermissionError: this user may not read a file, which says nothing about its content.
    """
    if checksums_skipped():
        return None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next((sentence for sentence in pool.map(_damage, files) if sentence), None)


def _damage(file: Path) -> str | None:
    try:
        expected = checksum_file(file).read_text().split()[0]
        if _digest(file) == expected:
            return None
    except FileNotFoundError:
        return None  # no checksum, or no file: the reader of the file reports it
    except PermissionError:
        raise
    except (OSError, IndexError, UnicodeDecodeError) as error:
        path = getattr(error, "filename", None) or (file if isinstance(error, OSError) else checksum_file(file))
        return f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}."
    return f"'{file}' is damaged: its bytes are not those that were written (SHA-256 in '{checksum_file(file).name}')."


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_checksum(file: Path, digest: str) -> None:
    write_atomically(checksum_file(file), f"{digest}  {file.name}\n".encode())
