"""Runs side by side: what each may use, and in which order they go."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pecobook.commands.jobs import GpuSlot, Job, gpu_slots, run_all
from pecobook.errors import PecobookError
from pecobook.recipes import codebook
from pecobook.utils import devices
from pecobook.utils.devices import gpus


def machine(monkeypatch: pytest.MonkeyPatch, num_cores: int, *gpu_names: str) -> None:
    monkeypatch.setattr(devices, "cores", lambda: tuple(range(num_cores)))
    monkeypatch.setattr(devices, "gpus", lambda: gpu_names)


@pytest.mark.parametrize(
    ("count", "shares"),
    [(1, [1]), (2, [1, 1]), (3, [1, 1]), (4, [2, 2]), (8, [4, 4]), (16, [4] * 4), (18, [4] * 4), (64, [4] * 16)],
)
def test_places__share_out_the_cores(monkeypatch: pytest.MonkeyPatch, count: int, shares: list[int]) -> None:
    machine(monkeypatch, count)
    found = gpu_slots(gpus_per_run=2)  # which only counts where there are some
    assert [len(slot.cores) for slot in found] == shares
    used = [core for slot in found for core in slot.cores]
    assert len(set(used)) == len(used)
    assert {slot.environment["OMP_NUM_THREADS"] for slot in found} == {str(shares[0])}
    assert not any("CUDA_VISIBLE_DEVICES" in slot.environment for slot in found)


def test_places__are_one_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 16, "0", "3")
    found = gpu_slots()
    assert found == [GpuSlot(tuple(range(8)), ("0",)), GpuSlot(tuple(range(8, 16)), ("3",))]
    assert [slot.environment for slot in found] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "3"}]
    machine(monkeypatch, 2, "0", "1", "2")
    assert gpu_slots()[2] == GpuSlot((0, 1), ("2",)), "with fewer cores than GPUs all may use all"


def test_places__hold_as_many_gpus_as_a_run_is_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 10, *"01234")
    pairs = gpu_slots(gpus_per_run=2)
    assert [slot.gpus for slot in pairs] == [("0", "1"), ("2", "3")], "the fifth is not enough for a run"
    assert pairs[0].environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert gpu_slots(gpus_per_run=sys.maxsize) == [GpuSlot(tuple(range(10)), tuple("01234"))]


@pytest.mark.parametrize(
    ("variable", "count", "names"),
    [("", 2, ("0", "1")), ("2, 5", 2, ("2", "5")), ("3,-1,0", 1, ("3",)), ("GPU-1,GPU-2", 2, ("GPU-1", "GPU-2"))],
)
def test_gpus__are_named_as_a_child_must_be_told(
    monkeypatch: pytest.MonkeyPatch, variable: str, count: int, names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert gpus() == names


def test_gpus__are_none_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpus() == ()


_RUN = """#!{python}
import json, os, pathlib, sys, time
out = pathlib.Path(json.loads(pathlib.Path(sys.argv[5]).read_text())["out"])
time.sleep(0.5)  # until the parent has given it its cores
(out / "export").mkdir(parents=True)
(out / "seen.json").write_text(json.dumps({{
    "process": os.getpid(), "began": time.time(),
    "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "cores": sorted(os.sched_getaffinity(0)),
}}))
for name in ("config.json", "environment.json"):
    (out / name).write_text("{{}}")
if "fails" in out.name:
    sys.exit("no luck")
time.sleep(60 if "long" in out.name else 0.5)
(out / "export" / "config.json").write_text("{{}}")
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder; runs are a script in place of pecobook."""
    script = tmp_path / "python"
    script.write_text(_RUN.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path


def job(folder: Path, name: str, *needs: str) -> Job:
    return Job("codebook", dataclasses.replace(codebook.tiny(), out=str(folder / name)), needs)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not keep processes to cores")
@pytest.mark.parametrize("gpu_names", [(), ("0", "3")])
def test_run_all__gives_each_run_a_place_of_its_own(
    runs: Path, monkeypatch: pytest.MonkeyPatch, gpu_names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: gpu_names)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # which hides a GPU from tests
    given = gpu_slots()
    jobs = {name: job(runs, name) for name in ("a", "b", "c")} | {"d": job(runs, "d", "a", "b", "c")}
    cost = run_all(jobs, runs)
    assert cost.keys() == jobs.keys()
    seen = {name: json.loads((runs / name / "seen.json").read_text()) for name in jobs}
    found = {(tuple(run["cores"]), run["gpu"]) for run in seen.values()}
    assert found <= {(slot.cores, slot.gpus[0] if slot.gpus else None) for slot in given}
    if len(given) > 1:
        assert seen["a"]["cores"] != seen["b"]["cores"]
    assert seen["d"]["began"] > max(seen[name]["began"] for name in "abc") + 0.5, "not before all that it needs"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_run_all__ends_its_runs_when_it_is_ended(runs: Path, number: signal.Signals) -> None:
    def end() -> None:
        while not (runs / "long" / "seen.json").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), number)

    before, began = signal.getsignal(number), time.monotonic()
    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run_all({"long": job(runs, "long")}, runs)
    assert ended.value.code == 128 + number
    assert time.monotonic() - began < 30, "the run was not waited for"
    assert signal.getsignal(number) == before
    process = json.loads((runs / "long" / "seen.json").read_text())["process"]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_run_all__says_which_run_failed_and_ends_the_others(runs: Path) -> None:
    with pytest.raises(PecobookError, match=r"(?s)The run 'fails' failed; .*fails\.log:\nno luck"):
        run_all({"fails": job(runs, "fails"), "late": job(runs, "late", "fails")}, runs)
    assert not (runs / "late").exists()
