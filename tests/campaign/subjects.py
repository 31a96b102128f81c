"""What is disturbed, how it is started again, and how its end is compared with an undisturbed one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pecobook.utils.checksums import damage
from tests.campaign.faults import Counter, at_event
from tests.campaign.materials import Materials
from tests.campaign.process import Process

TRAININGS = ("contrast", "codebook", "pretrain", "finetune", "segment", "detect")
_TIMES = ("images_per_second", "data_wait", "tflops", "mfu", "seconds")


@dataclasses.dataclass
class Subject:
    """A command whose end is known, in a folder of its own."""

    name: str
    words: list[str]
    """The command line without --out."""
    again: list[str]
    """Further words when the command is started again."""
    outcome: Callable[[Path], dict[str, Any]]
    """Returns all that must not depend on disturbances, by name."""
    expected: dict[str, Any]
    events: int = 0
    """Number of file events of an undisturbed run."""
    seconds: float = 0.0
    """Duration of an undisturbed run."""

    def start(self, out: Path, *more: str, **options: Any) -> Process:
        """Start the command, or start it again."""
        again = self.again if out.exists() else []
        log = out.parent / f"{out.name}.log"
        return Process([*self.words, *again, "--out", str(out), *more], log, **options)

    def differences(self, out: Path) -> str:
        """Return the names of what differs from the undisturbed end; empty when nothing does."""
        found = self.outcome(out)
        names = sorted(found.keys() | self.expected.keys())
        return ", ".join(name for name in names if found.get(name) != self.expected.get(name))

    def finish(self, out: Path, *more: str) -> str:
        """Run the command to its end; return what is wrong with the end, or an empty text."""
        process = self.start(out, *more)
        code = process.wait()
        process.end()
        if code != 0:
            return f"the restart ended with {code}: {last_lines(process.text)}"
        differing = self.differences(out)
        return f"differs from the undisturbed end: {differing}" if differing else ""


def last_lines(text: str, number: int = 3) -> str:
    """Return the last lines of a text in one line."""
    return " | ".join(line for line in text.splitlines()[-number:] if line.strip())[:400]


def changed(words: list[str], flags: dict[str, str]) -> list[str]:
    """Return a command line with other values of some of its flags."""
    return [flags.get(before.replace("_", "-"), word) for before, word in zip(["", *words], words, strict=False)]


def subjects(materials: Materials, names: tuple[str, ...]) -> dict[str, Subject]:
    """Return the subjects of these names, each after an undisturbed run."""
    return {name: _measured(materials, name) for name in names}


def _measured(materials: Materials, name: str) -> Subject:
    subject = _described(materials, name)
    out = materials.folder / "undisturbed" / name
    out.parent.mkdir(exist_ok=True)
    counter, began = Counter(), time.monotonic()
    process = subject.start(out, prepare=at_event(out, 0, "kill", counter))
    if process.wait() != 0:
        raise RuntimeError(process.text)
    subject.expected, subject.events = subject.outcome(out), counter.value
    subject.seconds = time.monotonic() - began
    return subject


def _described(materials: Materials, name: str) -> Subject:
    if name in TRAININGS:
        words = [*materials.words(name), "--resume", "auto"]
        return Subject(name, words, [], run_outcome, {})
    if name == "tokenize":
        return Subject(name, [*materials.words(name), "--resume", "auto"], [], bank_outcome, {})
    data = ["--data", str(materials.images)]
    if name == "analyze":
        words = ["analyze", "--tokenizer", str(materials.codebook), *data]
        return Subject(name, words, ["--overwrite"], analysis_outcome, {})
    if name == "demo":
        words = ["demo", *data, "--length", "0.005", "--max-train", "16", "--max-test", "8", "--budget", "cpu"]
        return Subject(name, words, [], demo_outcome, {})
    words = ["reproduce", "table4", *data, "--length", "0.01", "--seeds", "0", "--no-transfer"]
    return Subject(name, words, [], reproduction_outcome, {})


# ------------------------------------------------------------------------------------------------------------ outcomes


def run_outcome(out: Path) -> dict[str, Any]:
    """Return the export, the final state, the metrics, TensorBoard's values and the pictures of a run."""
    found: dict[str, Any] = _hashes(out, "export/*", "samples/*")
    for file in sorted(out.glob("checkpoints/*/*")):
        found[str(file.relative_to(out))] = damage([file]) or (_values(file) if file.suffix == ".pt" else "")
    for number, line in enumerate((out / "metrics.jsonl").read_text().splitlines()):
        values = json.loads(line)
        found[f"metrics {number}"] = {name: value for name, value in values.items() if name not in _TIMES}
    settings = json.loads((out / "config.json").read_text())
    found["config.json"] = {name: value for name, value in settings.items() if name != "out"}
    if "tensorboard" in settings["loggers"]:
        found |= {f"TensorBoard {name}": value for name, value in _tensorboard(out).items()}
    found["unfinished files"] = _unfinished(out)
    return found


def _values(file: Path) -> str:
    """Return SHA-256 of the values of a checkpoint; its pickle differs with the identity of equal objects."""
    digest = hashlib.sha256()

    def add(value: Any, name: str) -> None:
        if isinstance(value, dict | list | tuple):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                add(part, f"{name}/{key}")
        else:
            content = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if torch.is_tensor(value) else b""
            digest.update(f"{name} {(content and value.dtype) or value!r} ".encode() + content)

    add(torch.load(file, weights_only=True), "")
    return digest.hexdigest()


def bank_outcome(out: Path) -> dict[str, Any]:
    """Return the files of a token bank."""
    return {**_hashes(out, "*", "*/*"), "unfinished files": _unfinished(out)}


def analysis_outcome(out: Path) -> dict[str, Any]:
    """Return the values and the pictures of an analysis."""
    values = _timeless(json.loads((out / "analysis.json").read_text()))
    report = {"report": (out / "report.html").read_text().rstrip().endswith("</html>")}
    return {**values, **report, **_hashes(out, "pictures/*"), "unfinished files": _unfinished(out)}


def demo_outcome(out: Path) -> dict[str, Any]:
    """Return the values and the pictures of a demo, and the exports of its runs."""
    values = _timeless(json.loads((out / "results.json").read_text()))
    values.pop("fingerprints", None)
    return {**values, **_hashes(out, "pictures/*", "*/export/model.safetensors"), "unfinished files": _unfinished(out)}


def reproduction_outcome(out: Path) -> dict[str, Any]:
    """Return the exports of the runs of a reproduction and its table."""
    found = _hashes(out, "runs/*/export/model.safetensors", "pictures/*.png")
    table = [line.rpartition(",")[0] for line in (out / "tables.csv").read_text().splitlines()]
    return {**found, "table": table, "unfinished files": _unfinished(out)}


def _hashes(out: Path, *patterns: str) -> dict[str, Any]:
    """Return SHA-256 of files by name; a path of the folder in a file's text does not count."""
    files = {path for pattern in patterns for path in out.glob(pattern) if path.is_file()}
    names = (str(out).encode(), str(out.parent).encode())
    contents = {str(path.relative_to(out)): path.read_bytes() for path in files if ".lock" not in path.name}
    for name in names:
        contents = {file: content.replace(name, b"OUT") for file, content in contents.items()}
    return {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}


def _unfinished(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if ".tmp" in path.name)


def _timeless(value: Any) -> Any:
    """Return values without those that are times."""
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if name not in _TIMES}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def _tensorboard(out: Path) -> dict[str, Any]:
    """Return (step, value) of every scalar as TensorBoard shows them, and the steps of the pictures."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found: dict[str, Any] = {}
    for tag in events.Tags()["scalars"]:
        if tag not in _TIMES:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
        else:
            found[tag] = [event.step for event in events.Scalars(tag)]
    for tag in events.Tags()["images"]:
        found[tag] = [event.step for event in events.Images(tag)]
    return {tag: steps for tag, steps in found.items() if steps}


def draw(items: dict[str, Subject], chance: random.Random) -> Subject:
    """Return a subject at random; long ones are drawn less often."""
    weights = [1 / (1 + subject.seconds) for subject in items.values()]
    return chance.choices(list(items.values()), weights)[0]
