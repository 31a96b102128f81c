"""The scripts of docs/clusters.md: their syntax and commands, and torchrun's; test_slurm.py runs those of Slurm."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pecobook import cli, recipes
from pecobook.engine import checkpoint
from pecobook.recipes import recipe
from tests.runs import export_bytes, logged, losses, small_flags

PAGE = (Path(__file__).parent.parent / "docs" / "clusters.md").read_text()
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
(JOB,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
LIMIT = 400
COMMANDS = "contrast|pretrain|tokenize|reproduce"
_STEPS = {"max_steps": "12", "save_every": 4}


def parse_command(words: list[str]) -> Any:
    """Return the settings of a pecobook command line. Raises ConfigError."""
    if words[0] == "reproduce":
        return cli._settings("reproduce", words[1:])
    command, name, *flags = words
    config = recipes.tokenize(name) if command == "tokenize" else recipe(command, name)
    return cli.parse(config, flags, f"{command} {name}")


def commands(script: str) -> list[list[str]]:
    """Return the words after `pecobook` of every command in a script, with a number for each variable of Slurm."""
    text = re.sub(r"\$SLURM_\w+", "3", script.replace("\\\n", " "))
    lines = [line for line in text.splitlines() if re.search(rf"\bpecobook (?:{COMMANDS})\b", line)]
    return [shlex.split(line.partition("pecobook ")[2]) for line in lines]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts__are_bash_with_commands_that_can_be_parsed(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (words,) = commands(script)
    config = parse_command(words)
    if words[0] == "reproduce":
        assert config.tables == ("table4", "table5")
        return
    assert config.resume == "auto" or config.shard == "3/3"
    assert (config.devices, config.num_nodes) == ("auto", 1)


def test_job__is_a_job_of_kubernetes_with_a_command_that_can_be_parsed() -> None:
    job = yaml.safe_load(JOB)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    program, *words = container["command"]
    assert program == "pecobook"
    assert parse_command(words).resume == "auto"
    volumes = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it


def wait_until(condition: Any, said: Any) -> None:
    stop = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < stop, said()
        time.sleep(0.05)


@pytest.mark.slow
def test_torchrun__restarts_a_killed_process_and_the_run_goes_on(images: Path, tmp_path: Path) -> None:
    """The command of the page, with two processes of which one is killed."""
    (script,) = [script for script in SCRIPTS if script.startswith("torchrun")]
    words = shlex.split(script.replace("\\\n", " "))
    words = [sys.executable, "-m", "torch.distributed.run", *words[1 : words.index("pecobook") + 1]]
    words[words.index("--nproc-per-node") + 1] = "2"
    more = ["contrast", "tiny", "--data", str(images), *small_flags("contrast", **_STEPS), "--resume", "auto"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    environment = {**os.environ, "MASTER_PORT": "0"}
    subprocess.run([*words, *more, "--out", str(straight)], check=True, capture_output=True, env=environment)
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen([*words, *more, "--out", str(out)], stderr=file, env=environment)
    try:
        wait_until(lambda: checkpoint.steps(out / "checkpoints") or process.poll() is not None, log.read_text)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        assert process.wait(LIMIT) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert [line["step"] for line in logged(out)] == list(range(1, 13))
    assert losses(out) == losses(straight)
    assert export_bytes(out) == export_bytes(straight)
