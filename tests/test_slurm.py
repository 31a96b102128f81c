"""The scripts of docs/clusters.md under a real Slurm, where one runs: sbatch on the PATH, and SLURM_CONF."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pecobook.commands.paper_tables import chosen_tables
from pecobook.commands.reproduce import slurm
from pecobook.commands.reproduce.plan import Plan
from pecobook.data.images import open_images
from pecobook.data.tokens import TokenBank
from pecobook.settings.reproduce import ReproduceConfig
from tests.runs import codebook_run, logged, small_flags
from tests.test_clusters import LIMIT, SCRIPTS, wait_until

__all__ = ["codebook_run"]  # the fixture

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not (shutil.which("sbatch") and os.environ.get("SLURM_CONF")), reason="there is no Slurm"),
]


class Cluster:
    """Scripts of the page under Slurm, with small settings and two tasks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        program = folder / "bin" / "pecobook"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pecobook "$@"\n')
        program.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def call(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, cwd=self.folder, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, script: str, **options: str) -> str:
        """Submit a script with other values of its options, without those of GPUs; return the number of the job."""
        options = {"time": "00:20:00", "cpus-per-task": "1", **options}
        for name, value in options.items():
            script = re.sub(rf"(?m)^#SBATCH --{name}=.*", f"#SBATCH --{name}={value}", script)
        script = re.sub(r"(?m)^#SBATCH --gpus.*\n", "", script)
        (self.folder / "job.sbatch").write_text(script)
        return self.call("sbatch", "--parsable", "job.sbatch").strip()

    def state(self, job: str) -> dict[str, str]:
        """Return the fields of a job, the last of an array."""
        shown = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()[-1]
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def ended(self, job: str) -> bool:
        shown = self.call("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job).split()
        return bool(shown) and all(state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") for state in shown)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize(("nodes", "tasks"), [("1", "2"), ("2", "1")])
def test_slurm__one_run_that_is_requeued_at_its_time_limit(
    cluster: Cluster, images: Path, nodes: str, tasks: str
) -> None:
    (script,) = [script for script in SCRIPTS if "scontrol requeue" in script]
    command = shlex.join(["contrast", "tiny", "--data", str(images), *small_flags("contrast", max_steps="40")])
    script = re.sub(r"pretrain paper.*\n", lambda _: f"{command} \\\n", script)
    out, log = cluster.folder / "runs" / "pretrain", cluster.folder / "pretrain.out"
    job = cluster.submit(script, **{"nodes": nodes, "ntasks-per-node": tasks})
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(logged(out)) > 2, log.read_text)
    cluster.call("scancel", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_until(lambda: int(cluster.state(job)["Restarts"]) == 1 or cluster.ended(job), log.read_text)
    # Slurm waits two minutes before a restart. A start within the second of the requeue finds its credential revoked.
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    wait_until(lambda: cluster.ended(job), log.read_text)
    assert cluster.state(job)["JobState"] == "COMPLETED", log.read_text()
    said = log.read_text()
    assert said.count("the checkpoint is written. Continue with --resume.") == 1
    assert said.count("Done: ") == 1  # one run, not one for each task
    assert "Traceback" not in said
    assert [line["step"] for line in logged(out)] == list(range(1, 41))


def test_slurm__job_array_writes_one_bank(cluster: Cluster, images: Path, codebook_run: Path) -> None:
    (script,) = [script for script in SCRIPTS if "--array" in script]
    command = f"tokenize tiny --data {images} --tokenizer {codebook_run} --image-size 16 --workers 0 --precision fp32"
    script = re.sub(r"tokenize paper.*--out", f"{command} --out", script)
    job = cluster.submit(script, array="1-2")
    logs = [cluster.folder / f"tokenize-{part}.out" for part in (1, 2)]

    def said() -> str:
        return "".join(log.read_text() for log in logs if log.exists())

    wait_until(lambda: cluster.ended(job), said)
    assert "Done: banks/imagenet" in said()
    assert TokenBank(cluster.folder / "banks" / "imagenet").num_views == 20


def test_slurm__a_refusal_ends_all_tasks_with_one_message(cluster: Cluster, images: Path) -> None:
    (cluster.folder / "full").mkdir()
    (cluster.folder / "full" / "thesis.tex").touch()
    words = ["contrast", "tiny", "--data", str(images), "--workers", "0"]
    for more, said in (
        (["--out", "full"], "--out 'full' is not empty"),
        (["--out", "new", "--devices", "4"], "--devices 4: srun has started 2 processes on each machine."),
    ):
        done = subprocess.run(
            ["srun", "--ntasks-per-node=2", "pecobook", *words, *more],
            capture_output=True,
            text=True,
            env=cluster.environment,
            cwd=cluster.folder,
            check=False,
            timeout=LIMIT,
        )
        assert done.returncode == 2
        assert done.stderr.count("pecobook: ") == 1
        assert said in done.stderr
    assert not (cluster.folder / "new").exists()


_PECOBOOK = """#!/bin/bash
while [ $# -gt 1 ] && [ "$1" != --out ]; do shift; done
case $2 in
*/codebook-pixel-1) exit 2 ;;
*/runs/*) mkdir -p "$2/export"; date +%s.%N | tee "$2/export/config.json" > "$2/report.html"; sleep 1 ;;
*) ls "$2/runs" > "$2/tables.md"; exit 2 ;;
esac
"""


def test_slurm__plan_of_reproduce_goes_on_after_a_failure(
    cluster: Cluster, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script in the place of pecobook writes the last files of each job; one codebook fails."""
    (cluster.folder / "bin" / "pecobook").write_text(_PECOBOOK)
    monkeypatch.chdir(cluster.folder)
    config = ReproduceConfig(tables=("table7",), data=str(images), out="my tables", seeds=(0, 1), transfer=False)
    plan = Plan(config, chosen_tables(config.tables), open_images(str(images)))
    (cluster.folder / "plan.sh").write_text(slurm.script(plan))
    monkeypatch.setitem(cluster.environment, "GPUS", "0")
    monkeypatch.setitem(cluster.environment, "CPUS", "1")
    said = cluster.call("bash", "plan.sh", "--time=00:10:00")
    (number,) = re.findall(r"Job (\d+) writes the tables", said)
    wait_until(lambda: cluster.ended(number), lambda: cluster.call("squeue"))
    failed = {"codebook-pixel-1", "analysis-pixel-1"}
    assert {name for name, job in plan.jobs.items() if not job.finished} == failed
    ended = {name: float((job.out / "report.html").read_text()) for name, job in plan.jobs.items() if job.finished}
    for name in ended:
        assert all(ended[need] < ended[name] for need in plan.jobs[name].needs), name
    assert set((Path("my tables") / "tables.md").read_text().split()) == plan.jobs.keys() - failed
