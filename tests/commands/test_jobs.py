"""Parallel runs: the cores and GPUs of each run, the order of the runs, failures and signals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pecobook import cli, recipes
from pecobook.commands.demo import demo
from pecobook.commands.jobs import GpuSlot, Job, Outcome, Progress, gpu_slots, run_all, seconds_of
from pecobook.commands.reproduce import reproduce
from pecobook.data.tokens import write_shard
from pecobook.errors import PecobookError, RunFolderError
from pecobook.recipes import codebook, finetune
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.images import PhotometricConfig
from pecobook.settings.tokenize import VIEW_SETTINGS
from pecobook.utils import devices
from pecobook.utils.devices import gpus
from pecobook.utils.folder_lock import FolderLock


def machine(monkeypatch: pytest.MonkeyPatch, num_cores: int, *gpu_names: str) -> None:
    monkeypatch.setattr(devices, "cores", lambda: tuple(range(num_cores)))
    monkeypatch.setattr(devices, "gpus", lambda: gpu_names)


@pytest.mark.parametrize(
    ("num_cores", "num_cores_each"),
    [(1, [1]), (2, [1, 1]), (3, [1, 1]), (4, [2, 2]), (8, [4, 4]), (16, [4] * 4), (18, [4] * 4), (64, [4] * 16)],
)
def test_gpu_slots__divide_the_cores(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, num_cores_each: list[int]
) -> None:
    machine(monkeypatch, num_cores)
    slots = gpu_slots(gpus_per_run=2)  # gpus_per_run has no effect without GPUs
    assert [len(slot.cores) for slot in slots] == num_cores_each
    used_cores = [core for slot in slots for core in slot.cores]
    assert len(set(used_cores)) == len(used_cores)
    assert {slot.environment["OMP_NUM_THREADS"] for slot in slots} == {str(num_cores_each[0])}
    assert not any("CUDA_VISIBLE_DEVICES" in slot.environment for slot in slots)


def test_gpu_slots__are_one_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 16, "0", "3")
    slots = gpu_slots()
    assert slots == [GpuSlot(tuple(range(8)), ("0",)), GpuSlot(tuple(range(8, 16)), ("3",))]
    assert [slot.environment for slot in slots] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "3"}]
    machine(monkeypatch, 2, "0", "1", "2")
    assert gpu_slots()[2] == GpuSlot((0, 1), ("2",)), "with fewer cores than GPUs, every slot may use all cores"


def test_gpu_slots__have_gpus_per_run_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 10, *"01234")
    pairs = gpu_slots(gpus_per_run=2)
    assert [slot.gpus for slot in pairs] == [("0", "1"), ("2", "3")], "the fifth GPU alone is too few for a run"
    assert pairs[0].environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert gpu_slots(gpus_per_run=sys.maxsize) == [GpuSlot(tuple(range(10)), tuple("01234"))]


@pytest.mark.parametrize(
    ("variable", "count", "names"),
    [("", 2, ("0", "1")), ("2, 5", 2, ("2", "5")), ("3,-1,0", 1, ("3",)), ("GPU-1,GPU-2", 2, ("GPU-1", "GPU-2"))],
)
def test_gpus__have_the_names_that_a_child_process_needs(
    monkeypatch: pytest.MonkeyPatch, variable: str, count: int, names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert gpus() == names


def test_gpus__are_empty_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpus() == ()


_RUN = """#!{python}
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
time.sleep(0.5)  # until the parent has set the cores
print("started", flush=True)
(out / "export").mkdir(parents=True, exist_ok=True)
(out / "process.json").write_text(json.dumps({{
    "process": os.getpid(), "began": time.time(),
    "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "cores": sorted(os.sched_getaffinity(0)),
}}))
for name in ("config.json", "environment.json"):
    (out / name).write_text("{{}}")
if "fails" in out.name:
    sys.exit("no luck")
if "killed" in out.name:
    os.kill(os.getpid(), 9)
time.sleep(60 if "long" in out.name else 0.3)
(out / "export" / "config.json").write_text("{{}}")
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs, in which a script replaces pecobook."""
    script = tmp_path / "python"
    script.write_text(_RUN.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("pecobook.commands.jobs._PERIOD", 0.05)
    return tmp_path


def job(folder: Path, name: str, *needs: str) -> Job:
    return Job("codebook", dataclasses.replace(codebook.tiny(), out=str(folder / name)), needs)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot confine processes to cores")
@pytest.mark.parametrize("gpu_names", [(), ("0", "3")])
def test_run_all__gives_each_run_its_own_slot(
    runs: Path, monkeypatch: pytest.MonkeyPatch, gpu_names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: gpu_names)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # the tests set it to hide GPUs
    slots = gpu_slots()
    jobs = {name: job(runs, name) for name in ("a", "b", "c")} | {"d": job(runs, "d", "a", "b", "c")}
    assert run_all(jobs, runs) == Outcome()
    assert seconds_of(jobs).keys() == jobs.keys()
    processes = {name: json.loads((runs / name / "process.json").read_text()) for name in jobs}
    used = {(tuple(process["cores"]), process["gpu"]) for process in processes.values()}
    assert used <= {(slot.cores, slot.gpus[0] if slot.gpus else None) for slot in slots}
    if len(slots) > 1:
        assert processes["a"]["cores"] != processes["b"]["cores"]
    last_began = max(processes[name]["began"] for name in "abc")
    assert processes["d"]["began"] > last_began + 0.3, "d must start after all jobs that it needs"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_run_all__ends_the_runs_on_a_signal(runs: Path, number: signal.Signals) -> None:
    def end() -> None:
        while not (runs / "long" / "process.json").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), number)

    handler, began = signal.getsignal(number), time.monotonic()
    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run_all({"long": job(runs, "long")}, runs)
    assert ended.value.code == 128 + number
    assert time.monotonic() - began < 30, "run_all must end the run, not wait for its end"
    assert signal.getsignal(number) == handler
    process = json.loads((runs / "long" / "process.json").read_text())["process"]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_run_all__goes_on_after_a_failed_run_and_repeats_only_what_is_missing(runs: Path) -> None:
    jobs = {"fails": job(runs, "fails"), "late": job(runs, "late", "fails"), "last": job(runs, "last", "late")}
    jobs |= {"good": job(runs, "good"), "better": job(runs, "better", "good")}
    outcome = run_all(jobs, runs)
    assert outcome.failed == {"fails": "started\nno luck"}
    assert outcome.not_run == {"late": "fails", "last": "fails"}
    assert {name for name, job in jobs.items() if job.finished} == {"good", "better"}
    assert not (runs / "late").exists()
    with pytest.raises(
        PecobookError, match=r"(?s)The run 'fails' failed; .*fails\.log:\nstarted\nno luck.*late, last"
    ) as error:
        outcome.check(runs)
    assert "The same command again runs only what is missing." in str(error.value)
    (runs / "fails" / "export" / "config.json").write_text("{}")
    before = (runs / "good" / "process.json").stat().st_mtime_ns
    assert run_all(jobs, runs) == Outcome()
    assert (runs / "good" / "process.json").stat().st_mtime_ns == before
    assert all(job.finished for job in jobs.values())


def test_run_all__blames_no_run_that_another_process_has_finished(runs: Path) -> None:
    """A job that failed on one machine is tried on the others, and may succeed there."""
    jobs = {"fails": job(runs, "fails"), "late": job(runs, "late", "fails"), "other": job(runs, "other")}
    (runs / "other").mkdir()
    lock = FolderLock(runs / "other")  # the other machine works on it

    def finish() -> None:
        while not (runs / "fails" / "process.json").exists():
            time.sleep(0.05)
        for name in jobs:
            (runs / name / "export").mkdir(parents=True, exist_ok=True)
            (runs / name / "export" / "config.json").write_text("{}")
        lock.release()

    threading.Thread(target=finish, daemon=True).start()
    assert run_all(jobs, runs) == Outcome()
    assert (runs / "logs" / "fails.log").read_text() == "started\nno luck\n"


def test_run_all__says_which_signal_ended_a_run(runs: Path) -> None:
    outcome = run_all({"killed": job(runs, "killed")}, runs)
    assert outcome.failed == {"killed": "started\nIt was ended by SIGKILL, as the system does where memory is short."}


def test_run_all__shares_the_jobs_of_a_folder_with_other_processes(runs: Path) -> None:
    """Two threads stand for two machines: filelock's locks are of open files, not of processes."""
    jobs = {name: job(runs, name) for name in "abcd"} | {"e": job(runs, "e", *"abcd")}
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(run_all(jobs, runs))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes == [Outcome(), Outcome()]
    starts = [(runs / "logs" / f"{name}.log").read_text().count("started") for name in jobs]
    assert starts == [1] * len(jobs), "a job was started twice"


def test_run_all__waits_for_a_run_that_another_process_has_begun(runs: Path) -> None:
    (runs / "a").mkdir()
    lock = FolderLock(runs / "a")  # as of a run that was started by hand, or of one whose starter was killed

    def end() -> None:
        time.sleep(0.5)
        (runs / "a" / "export").mkdir()
        (runs / "a" / "export" / "config.json").write_text("{}")
        lock.release()

    threading.Thread(target=end, daemon=True).start()
    assert run_all({"a": job(runs, "a")}, runs) == Outcome()
    assert not (runs / "logs" / "a.log").exists()


def test_job__words_give_the_same_settings(tmp_path: Path) -> None:
    config = dataclasses.replace(codebook.tiny(), out=str(tmp_path / "two words"), seed=3, loggers=())
    words = Job("codebook", config).words
    assert words == (
        "codebook",
        "tiny",
        "--data",
        "photos",
        "--out",
        config.out,
        "--seed",
        "3",
        "--loggers",
        "--resume",
        "auto",
    )
    captured: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pecobook.api.run", lambda _command, settings, _recipe: captured.append(settings))
        cli.main([*words])
    assert captured == [dataclasses.replace(config, resume="auto")]
    analysis = AnalyzeConfig(tokenizer="run", data="photos", out="analysis", seed=1)
    flags = ("--data", "photos", "--tokenizer", "run", "--out", "analysis", "--seed", "1", "--overwrite")
    assert Job("analyze", analysis).words == ("analyze", *flags)


def test_job__of_images_names_no_recipe_of_clips(tmp_path: Path) -> None:
    """Few settings of a plain fine-tuning differ from `tiny-video`, which would say that it learns from clips."""
    plain = dataclasses.replace(finetune.tiny_video(), clip=finetune.tiny().clip, out=str(tmp_path))
    assert Job("finetune", plain).words[1] == "tiny"
    assert Job("finetune", finetune.tiny_video()).words[1] == "tiny-video"


def test_job__of_a_token_bank_is_finished_when_all_shards_are_written(tmp_path: Path) -> None:
    config = dataclasses.replace(recipes.tokenize("tiny"), tokenizer="run", data="photos", views=2, out=str(tmp_path))
    bank = Job("tokenize", config)
    flags = ("--data", "photos", "--tokenizer", "run", "--out", str(tmp_path), "--views", "2", "--resume", "auto")
    assert bank.words == ("tokenize", "tiny", *flags)
    assert bank.fraction_done == 0
    settings: dict[str, Any] = {"kind": "token bank", "tokenizer": "1a", "grid": [1, 1]}
    settings |= {"data": "d", "evaluation_data": "e", "views": 2, "num_images": 3, "num_evaluation_images": 2}
    settings |= dict.fromkeys(VIEW_SETTINGS, 1)
    settings["colour"] = dataclasses.asdict(PhotometricConfig())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    write_shard(tmp_path / "train" / "codes-00000.npy", np.zeros((3, 2, 1, 1), np.uint16))
    assert (bank.fraction_done, bank.finished) == (0.5, False)
    write_shard(tmp_path / "evaluation" / "codes-00000.npy", np.zeros((2, 1, 1, 1), np.uint16))
    assert bank.finished


class BegunError(Exception):
    """Raised where the first run would start."""


@pytest.mark.parametrize("command", [demo, reproduce])
def test_begin_or_resume__refuses_changed_data_until_they_are_accepted(
    command: Callable[..., Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted: list[bool] = []

    def run(jobs: dict[str, Job], *_: object) -> None:
        (accepts,) = {job.accept_data_change for job in jobs.values()}
        accepted.append(accepts)
        raise BegunError

    for module in ("demo", "reproduce"):
        monkeypatch.setattr(f"pecobook.commands.{module}.run_all", run)
    monkeypatch.setattr("pecobook.commands.reproduce.rehearsal.rehearse", lambda *_: {})
    monkeypatch.setattr("pecobook.commands.reproduce.rehearsal.remaining_time", lambda *_: "")
    monkeypatch.setattr("pecobook.commands.reproduce.rehearsal.job_duration", lambda *_: 1.0)
    data, out = Path(shutil.copytree(images, tmp_path / "data")), tmp_path / "out"
    settings: dict[str, Any] = {"data": str(data), "out": str(out)}
    settings |= {"tables": ("v1-table7",)} if command is reproduce else {}
    for _ in range(2):
        with pytest.raises(BegunError):
            command(**settings)
    file = sorted(data.rglob("*.png"))[0]
    file.write_bytes(file.read_bytes() + b" ")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError) as caught:
        command(**settings)
    first, second = str(caught.value).splitlines()
    name, kind = file.relative_to(data), {"demo": "demo", "reproduce": "tables"}[command.__name__]
    assert first == f"--data '{data}' has changed since the {kind} in '{out}' began: 1 changed ({name})."
    assert second.endswith("continue with the data as they are with --accept-data-change.")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(BegunError):
        command(**settings, accept_data_change=True)
    with pytest.raises(BegunError):  # the change is recorded
        command(**settings)
    assert accepted == [False, False, True, False]
    times = file.stat()
    content = file.read_bytes()
    with pytest.raises(BegunError):
        command(**settings, verify_data=True)
    file.write_bytes(content[:-2] + b"x ")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(RunFolderError, match=r"1 changed"):
        command(**settings, verify_data=True)


def test_run_all__passes_on_that_the_change_is_accepted(runs: Path) -> None:
    script = runs / "python"
    script.write_text(
        script.read_text().replace("time.sleep(0.5)  #", "(out / 'words').write_text(str(sys.argv)) #", 1)
    )
    jobs = {name: dataclasses.replace(job(runs, name), accept_data_change=True) for name in ("a", "b")}
    (runs / "a").mkdir()
    (runs / "a" / "config.json").write_text("{}")
    (runs / "b").mkdir()
    run_all(jobs, runs)
    assert "'--resume', 'auto', '--accept-data-change']" in (runs / "a" / "words").read_text()
    assert "--accept-data-change" not in (runs / "b" / "words").read_text()


def test_progress__counts_finished_runs_where_no_duration_is_known(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a" / "export").mkdir(parents=True)
    (tmp_path / "a" / "export" / "config.json").write_text("{}")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 44}\n')
    jobs = {name: job(tmp_path, name) for name in ("a", "b")}
    jobs = {
        name: dataclasses.replace(j, config=dataclasses.replace(j.config, max_steps="88")) for name, j in jobs.items()
    }
    Progress(jobs).show()
    assert capfd.readouterr().err == " 75%, 1 of 2 runs finished: b 50%\n"
    jobs["b"] = job(tmp_path, "c")  # has logged no step yet
    Progress(jobs).show({"b"})
    assert capfd.readouterr().err == " 50%, 1 of 2 runs finished: b 0%\n"
