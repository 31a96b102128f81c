"""The plan as a script that submits its jobs to Slurm: an array for each kind of job, with one task per seed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from pecobook.commands.reproduce.listing import HEADER, command_line, command_words, tables_line
from pecobook.commands.reproduce.plan import Plan
from pecobook.recipes import RECIPES

_ALL_GPUS = 8
"""Number of GPUs of a training that takes all of a machine, unless GPUS or --gpus-per-run sets another number."""
_MOST_TASKS = 1000
"""Number of tasks in an array; Slurm's MaxArraySize, unless an administrator changed it, is 1,001."""

_START = """\
#!/bin/bash
{header}{command}
# Submit all jobs:    bash THIS_FILE [options of sbatch for every job, such as --partition=gpu --time=48:00:00]
# GPUS=4 CPUS=12 before it gives a training 4 GPUs with 12 cores each; GPUS=0 takes no GPU.
set -eu
gpus=${{GPUS:-{gpus}}} cpus=${{CPUS:-12}}
options=("$@")
cd {folder}
mkdir -p {log_folder}

task_begins='#!/bin/bash
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
case $SLURM_ARRAY_TASK_ID in'
task_ends='esac
status=$?
if [ $status -eq 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status'

# submit NAME INDICES GPUS DEPENDENCY: reads the commands of an array from standard input, and prints its number.
submit() {{
    local resources=(--ntasks-per-node=1)
    if [ "$3" -gt 0 ]; then
        resources=(--ntasks-per-node="$3" --gpus-per-node="$3")
    fi
    {{ echo "$task_begins"; cat; echo "$task_ends"; }} | sbatch --parsable --job-name="$1" --array="$2" --nodes=1 \\
        "${{resources[@]}}" --cpus-per-task="$cpus" ${{4:+--dependency="$4"}} --kill-on-invalid-dep=yes --requeue \\
        --open-mode=append --signal=USR1@300 --output={logs}/"$1-%a.out" "${{options[@]}}"
}}
one=$((gpus > 0 ? 1 : 0))
"""


def script(plan: Plan) -> str:
    """Return a bash script that submits all unfinished jobs; jobs wait for what they need, seed by seed."""
    config = plan.config
    arrays: dict[str, dict[int, str]] = {}
    for name in plan.jobs:
        kind, index = _kind_and_index(name)
        arrays.setdefault(kind, {})[index] = name
    arrays = {kind: names for kind, names in arrays.items() if not all(plan.jobs[n].finished for n in names.values())}
    folder = Path.cwd()
    logs = str(folder / config.out / "logs")
    lines = [
        _START.format(
            header=HEADER,
            command=shlex.join(command_words(config, out=True)),
            folder=shlex.quote(str(folder)),
            log_folder=shlex.quote(logs),
            logs=shlex.quote(logs.replace("%", "%%")),  # sbatch replaces %a and the like in the names of outputs
            gpus=_ALL_GPUS if plan.gpus_per_run == sys.maxsize else plan.gpus_per_run,
        )
    ]
    variables = {kind: f"job{number}" for number, kind in enumerate(arrays)}
    for kind, names in arrays.items():
        jobs = {index: plan.jobs[name] for index, name in names.items()}
        gpus = "$one" if any(job.command not in (*RECIPES, "tokenize") for job in jobs.values()) else "$gpus"
        indices, waits = ",".join(map(str, jobs)), _dependency(plan, names, arrays, variables)
        lines.append(f"{variables[kind]}=$(submit {shlex.quote(kind)} {indices} {gpus} \"{waits}\" << 'TASKS'")
        for index, job in jobs.items():  # a finished job keeps its place, since arrays wait for each other by index
            line = ":" if job.finished else f"srun --kill-on-bad-exit=1 {command_line(job)}"
            lines.append(f"{index}) {line} ;;")
        lines.append("TASKS\n)")
    waits = "".join(f":${variable}" for variable in variables.values())
    lines += [
        f"tables=$(submit tables 0 0 \"{f'afterany{waits}' if waits else ''}\" << 'TASKS'",
        f"0) {tables_line(plan)} ;;\nTASKS\n)",
        f'echo "Submitted {len(arrays)} arrays. Job $tables writes the tables when all have ended."',
    ]
    return "\n".join(lines) + "\n"


def _kind_and_index(name: str) -> tuple[str, int]:
    """Return a job's array and its index there, which is its seed; further arrays hold the seeds that do not fit.

    The index names the task's log, so that a command with other seeds writes others.
    """
    kind, _, seed = name.rpartition("-")
    part, index = divmod(int(seed), _MOST_TASKS)
    return (f"{kind}+part{part}" if part else kind), index


def _dependency(plan: Plan, names: dict[int, str], arrays: dict[str, dict[int, str]], variables: dict[str, str]) -> str:
    """Return what an array waits for: the task with the same index if tasks need no others, otherwise whole arrays."""
    needed: dict[str, set[bool]] = {}
    for index, name in names.items():
        for need in plan.jobs[name].needs:
            kind, other = _kind_and_index(need)
            if kind in arrays:
                needed.setdefault(kind, set()).add(index == other and arrays[kind].keys() == names.keys())
    waits = {"aftercorr": [], "afterok": []}  # type: dict[str, list[str]]
    for kind, same in needed.items():
        waits["aftercorr" if same == {True} else "afterok"].append(variables[kind])
    return ",".join(f"{how}:{':'.join(f'${name}' for name in group)}" for how, group in waits.items() if group)
