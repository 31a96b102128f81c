from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pecobook.utils import checksums
from pecobook.utils.checksums import SKIP_VARIABLE, add_checksum, checksum_file, damage, write_with_checksum


def test_damage__notices_every_flipped_bit_and_every_other_length(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    write_with_checksum(file, b"weights!")
    assert damage([file]) is None
    for position in range(64):
        data = bytearray(b"weights!")
        data[position // 8] ^= 1 << position % 8
        file.write_bytes(data)
        assert "a.bin' is damaged" in (damage([file]) or "")
    for other in (b"", b"weights", b"\0" * 8):
        file.write_bytes(other)
        assert damage([file])


def test_checksum__is_that_of_coreutils(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"weights!")
    add_checksum(file)
    assert (tmp_path / "a.bin.sha256").read_text() == f"{hashlib.sha256(b'weights!').hexdigest()}  a.bin\n"


def test_damage__names_the_damaged_file_among_many(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.bin" for number in range(20)]
    for file in files:
        write_with_checksum(file, file.name.encode())
    files[13].write_bytes(b"13.bin\0")
    assert "13.bin' is damaged" in (damage(files) or "")


def test_damage__is_silent_without_a_checksum_and_where_it_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "old.bin"
    file.write_bytes(b"of an older version")
    assert damage([file, tmp_path / "missing.bin"]) is None
    checksum_file(file).write_text("0" * 64)
    assert damage([file])
    monkeypatch.setenv(SKIP_VARIABLE, "1")
    assert damage([file]) is None


@pytest.mark.parametrize("text", ["", "\n"])
def test_damage__reports_an_empty_checksum(tmp_path: Path, text: str) -> None:
    write_with_checksum(tmp_path / "a.bin", b"x")
    (tmp_path / "a.bin.sha256").write_text(text)
    assert "a.bin.sha256' cannot be read" in (damage([tmp_path / "a.bin"]) or "")


@pytest.mark.parametrize("replaces", [False, True])
def test_write_with_checksum__killed_in_between_never_leaves_a_false_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    file, written = tmp_path / "a.bin", list[Path]()
    if replaces:
        write_with_checksum(file, b"before")

    def write_once(path: Path, data: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(data)

    monkeypatch.setattr("pecobook.utils.checksums.write_atomically", write_once)
    with pytest.raises(KeyboardInterrupt):
        write_with_checksum(file, b"weights!")
    # A file that is missing is written again; a file that is there would stay without a checksum.
    assert written == [file if replaces else checksum_file(file)]
    assert damage([file]) is None


def test_damage__of_a_file_that_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a checkpoint would be set aside, and the advice be to delete the file."""
    file = tmp_path / "a.bin"
    write_with_checksum(file, b"x")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(checksums, "_digest", refuse)  # root may read any file
    with pytest.raises(PermissionError):
        damage([file])


def test_damage__names_what_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    write_with_checksum(file, b"x")
    file.unlink()
    file.mkdir()
    assert damage([file]) == f"'{file}' cannot be read: Is a directory."
    file.rmdir()
    write_with_checksum(file, b"x")
    checksum_file(file).unlink()
    checksum_file(file).mkdir()
    assert damage([file]) == f"'{checksum_file(file)}' cannot be read: Is a directory."
