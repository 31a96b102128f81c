"""Children end with a parent that is killed, and only with their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pecobook.utils.parent import child_environment, end_with_parent

_CHILD = """
import os, signal, sys, time
from pecobook.utils.parent import end_with_parent
def stop(number, frame):
    open(sys.argv[1], "a").write(f"stopped {number}")
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
end_with_parent()
open(sys.argv[1], "w").write(f"{os.getpid()} ")
time.sleep(60)
"""
_PARENT = """
import os, subprocess, sys
from pecobook.utils.parent import child_environment
subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, **child_environment(), "X": "1"}).wait()
"""


def wait_for(path: Path, text: str, seconds: float = 60) -> str:
    stop = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < stop, path.read_text() if path.exists() else "nothing"
        time.sleep(0.05)
    return path.read_text()


def ended(process: int, seconds: float = 30) -> bool:
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("rank", ["0", "1"])
def test_child__ends_when_its_parent_is_killed(rank: str, tmp_path: Path) -> None:
    file = tmp_path / "child"
    environment = {**os.environ, "LOCAL_RANK": rank}
    environment.pop("LOCAL_WORLD_SIZE", None)
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, "-c", _CHILD, str(file)], env=environment)
    child = int(wait_for(file, " ").split()[0])
    parent.kill()
    parent.wait()
    if rank == "0":
        assert wait_for(file, "stopped").endswith(f"stopped {signal.SIGTERM.value}")
    assert ended(child)
    assert ("stopped" in file.read_text()) == (rank == "0")  # a rank is killed: it may wait for the first one


def test_child__of_another_process_or_of_none_goes_on(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(3)]
    for file, parent in zip(files, (child_environment(), {"PECOBOOK_PARENT": str(os.getppid())}, {}), strict=True):
        shell = f"{sys.executable} -c '{_CHILD}' {file} & echo"
        environment = {name: value for name, value in os.environ.items() if name != "PECOBOOK_PARENT"}
        subprocess.run(["sh", "-c", shell], env={**environment, **parent}, check=True, stdout=subprocess.DEVNULL)
    children = [int(wait_for(file, " ").split()[0]) for file in files]
    time.sleep(1.5)
    assert not any("stopped" in file.read_text() for file in files)
    for child in children:
        os.kill(child, signal.SIGKILL)
    end_with_parent()  # without the variable: nothing
