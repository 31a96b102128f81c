"""Atomic writes leave the old file or the new file, never a part of one and no temporary file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pecobook.utils.files import sync_folder, write_atomically, write_json


def test_write_atomically__writes_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, b"first")
    write_atomically(file, b"second")
    assert file.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_write_atomically__leaves_only_the_old_file_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error)):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_write_atomically__flushes_the_file_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        assert self.read_bytes() == b"data"
        assert self.parent == target.parent  # a rename over file systems would be a copy
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_atomically(tmp_path / "a", b"data")
    assert events == ["file", "rename", "folder"]


def test_write_atomically__overwrites_a_temporary_file_of_a_killed_process(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    (tmp_path / ".a.json.tmp").write_bytes(b"half")
    write_atomically(file, b"whole")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"whole"


def test_write_atomically__fails_for_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "a", b"")


def test_sync_folder__closes_its_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        sync_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_write_json__writes_indented_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"values": [1]})
    assert (tmp_path / "a.json").read_text() == '{\n  "values": [\n    1\n  ]\n}\n'
