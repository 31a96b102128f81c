from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pecobook.errors import RunFolderError
from pecobook.utils.folder_lock import LOCK_FILES, FolderLock, content

_TAKE = """
import sys
from pathlib import Path
from pecobook.errors import RunFolderError
from pecobook.utils.folder_lock import FolderLock
try:
    FolderLock(Path(sys.argv[1]))
    print("taken")
except RunFolderError as error:
    print(error)
"""

_FORK = """
import os, sys, time
from pathlib import Path
from pecobook.utils.folder_lock import FolderLock
held = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def take_elsewhere(folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", _TAKE, str(folder)], capture_output=True, text=True).stdout


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_lock__keeps_a_second_process_out_until_released(tmp_path: Path) -> None:
    held = FolderLock(tmp_path)
    assert "Another process is writing" in take_elsewhere(tmp_path)
    with pytest.raises(RunFolderError, match="Another process"):
        FolderLock(tmp_path)
    held.release()
    assert take_elsewhere(tmp_path) == "taken\n"


def test_lock__leaves_no_file_behind(tmp_path: Path) -> None:
    held = FolderLock(tmp_path)
    assert names(tmp_path) == {".lock"} <= LOCK_FILES
    held.release()
    assert names(tmp_path) == set()
    FolderLock(tmp_path).release()
    assert names(tmp_path) == set()


def test_lock__is_not_kept_by_a_forked_data_worker(tmp_path: Path) -> None:
    """A worker outlives a killed trainer, and the folder is free at once nevertheless."""
    with subprocess.Popen([sys.executable, "-c", _FORK, str(tmp_path)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        try:
            with pytest.raises(RunFolderError, match="Another process"):
                FolderLock(tmp_path)
            trainer.kill()
            trainer.wait()
            FolderLock(tmp_path).release()
            os.kill(worker, 0)  # the worker is still alive
        finally:
            os.kill(worker, 9)


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_lock__works_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("fcntl.flock", flock)
    held = FolderLock(tmp_path)
    with pytest.raises(RunFolderError, match=r"Another process is writing .*\n.* delete '.*/\.soft-lock'"):
        FolderLock(tmp_path)
    assert names(tmp_path) <= LOCK_FILES
    held.release()
    assert names(tmp_path) == set()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("reason", [errno.EIO, errno.EINVAL, errno.EPERM])
def test_lock__says_where_no_lock_can_be_had_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(RunFolderError, match=rf"cannot be locked: .*{os.strerror(reason)}.*\nSet PECOBOOK_NO_LOCK=1"):
        FolderLock(tmp_path)
    assert names(tmp_path) == set()
    monkeypatch.setenv("PECOBOOK_NO_LOCK", "1")
    with FolderLock(tmp_path), FolderLock(tmp_path, part="1-of-2"):
        assert names(tmp_path) == set()


def test_lock__raises_an_error_of_writing_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "missing")


@pytest.mark.parametrize("soft", [False, True])
def test_lock__parts_exclude_each_other_and_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: bool
) -> None:
    if soft:

        def flock(*_: object) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr("fcntl.flock", flock)
    with FolderLock(tmp_path, part="1-of-3"):
        FolderLock(tmp_path, part="2-of-3").release()
        FolderLock(tmp_path, shared=True).release()  # to begin or to finish the folder
        with pytest.raises(RunFolderError, match=r"Another process is writing part 1/3 of .* name another --shard"):
            FolderLock(tmp_path, part="1-of-3")
        for part in ("1-of-2", ""):
            with pytest.raises(RunFolderError, match=r"part 1/3 of .*divide the folder into as many parts"):
                FolderLock(tmp_path, part=part)
        assert content(tmp_path) == []
    (tmp_path / ".lock-4-of-5").touch()  # of a process that was killed
    FolderLock(tmp_path).release()
    assert names(tmp_path) == set()


def test_lock__waits_for_a_short_one(tmp_path: Path) -> None:
    held = FolderLock(tmp_path)
    threading.Timer(0.3, held.release).start()
    FolderLock(tmp_path, wait=30).release()
    held = FolderLock(tmp_path)
    with pytest.raises(RunFolderError, match="Another process"):
        FolderLock(tmp_path, wait=0.2)
    held.release()
