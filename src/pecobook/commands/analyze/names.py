"""Names of tokenizers and runs in tables and in file names."""

from __future__ import annotations

from collections.abc import Sequence


def unique_names(sources: Sequence[str]) -> list[str]:
    """Return the last parts of paths, with as many parts as needed to be unique; equal paths are numbered."""
    parts = [[part for part in source.replace(":", "/").split("/") if part] or [source] for source in sources]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part)} ({number})" for number, part in enumerate(parts, start=1)]


def file_part(number: int, name: str) -> str:
    """Convert a name to a part of a file name with letters, digits, `-`, `.` and `_`, at most 64 characters.

    The number makes the part unique.
    """
    safe = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-._") else "-" for letter in name)
    return f"{number}-{safe[-60:]}"
