"""What tokenizers and runs are called in tables and in names of files."""

from __future__ import annotations

from collections.abc import Sequence


def unique_names(sources: Sequence[str]) -> list[str]:
    """Last parts of paths, longer where two are alike; numbered where even whole paths are."""
    parts = [[part for part in source.replace(":", "/").split("/") if part] or [source] for source in sources]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(own)} ({number})" for number, own in enumerate(parts, start=1)]


def file_part(number: int, name: str) -> str:
    """A name as part of a file's name: letters, digits, `-`, `.` and `_`, no longer than 64; the number keeps it apart
    from all others.
    """
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-._") else "-" for letter in name)
    return f"{number}-{plain[-60:]}"
