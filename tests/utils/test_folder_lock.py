from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pecobook.errors import RunFolderError
from pecobook.utils.folder_lock import LOCK_FILES, FolderLock

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


def test_lock__raises_other_errors_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        FolderLock(tmp_path)
