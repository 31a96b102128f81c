"""Damages: flipped bits, zeroed blocks, cut and empty files in every file that pecobook reads again."""

from __future__ import annotations

import functools
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pecobook.utils.checksums import checksum_file
from tests.campaign.process import Process, run
from tests.campaign.subjects import TRAININGS, last_lines
from tests.campaign.verdict import Case, Field, Verdict, cleaned, judged, refusal_fault

_BLOCK = 512


def flip(file: Path, chance: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def zero(file: Path, chance: random.Random) -> None:
    """Write zeros over a block, as a disk that lost a sector."""
    content = bytearray(file.read_bytes())
    start = chance.randrange(len(content)) // _BLOCK * _BLOCK
    end = min(start + _BLOCK, len(content))
    content[start:end] = bytes(end - start)
    file.write_bytes(content)


def cut(file: Path, chance: random.Random) -> None:
    """Keep the first part."""
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(1, max(len(content), 2))])


def empty(file: Path, _chance: random.Random) -> None:
    """Keep nothing."""
    file.write_bytes(b"")


_STAGES = ("codebook", *(name for name in TRAININGS if name != "codebook"))
DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, zero, cut, empty)


def cases() -> list[Case]:
    """Return every damage of every file."""
    checkpoints = [functools.partial(_checkpoint, name, damage) for damage in DAMAGES for name in _STAGES]
    read = [functools.partial(_read, name, damage) for damage in DAMAGES for name in _READERS]
    configs = [functools.partial(_marker, name, damage) for damage in DAMAGES for name in _MARKERS]
    edits = [
        functools.partial(_edited, name) for name in ("codebook export", "vit export", "classifier export", "bank")
    ]
    return [*checkpoints, *read, *configs, *edits, _controls]


def _checkpoint(
    name: str, damage: Callable[[Path, random.Random], None], field: Field, chance: random.Random
) -> Iterator[Verdict]:
    """Damage the newest checkpoint: the run continues from the one before, says so, and ends as without the damage."""
    subject, began = field.subject(name), time.monotonic()
    out = field.materials.copy(field.materials.folder / "undisturbed" / name, field.place() / "run")
    shutil.rmtree(out / "export")
    file = out / "checkpoints" / "step-00000005" / "state.pt"
    damage(file, chance)
    process = subject.start(out)
    code = process.wait()
    text = process.text
    fault = ""
    if code != 0 or str(file) not in text:
        fault = f"exit code {code}, or the file is not named: {last_lines(text)}"
    else:
        shutil.rmtree(out / "checkpoints" / "step-00000005.damaged", ignore_errors=True)
        differing = subject.differences(out)
        fault = f"differs: {differing}" if differing else ""
    yield cleaned(judged("damaged checkpoint", f"{name}, {damage.__name__}", began, fault), out.parent)


# Files of a finished folder, and the command that reads them: (folder, file, words of the command).
_READERS: dict[str, tuple[str, str, str]] = {
    "codebook's weights, pretrain": ("codebook", "export/model.safetensors", "pretrain"),
    "codebook's weights, tokenize": ("codebook", "export/model.safetensors", "tokenize"),
    "codebook's config, pretrain": ("codebook", "export/config.json", "pretrain"),
    "codebook's config, analyze": ("codebook", "export/config.json", "analyze"),
    "ViT's weights, finetune": ("vit", "export/model.safetensors", "finetune"),
    "ViT's config, segment": ("vit", "export/config.json", "segment"),
    "classifier's weights, predict": ("classifier", "export/model.safetensors", "predict"),
    "classifier's config, predict": ("classifier", "export/config.json", "predict"),
    "bank's tokens, pretrain": ("bank", "train/*.npy", "bank"),
    "bank's config, pretrain": ("bank", "config.json", "bank"),
}


def _reading(field: Field, source: str, folder: Path, command: str, out: Path) -> Process:
    """Run the command that reads the copy `folder` of the materials `source`."""
    materials = field.materials
    original = str(getattr(materials, source))
    if command == "predict":
        words = ["predict", str(folder), str(materials.images), "--out", str(out)]
    elif command == "analyze":
        words = ["analyze", "--tokenizer", str(folder), "--data", str(materials.images), "--out", str(out)]
    elif command == "bank":
        words = [*materials.words("pretrain"), "--tokens", str(folder), "--out", str(out), *_BANK_VIEWS]
    else:
        words = [str(folder) if word == original else word for word in materials.words(command)] + ["--out", str(out)]
    return run(words, out.parent / "log")


_BANK_VIEWS = ("--min-crop", "0.2")


def _controls(field: Field, _chance: random.Random) -> Iterator[Verdict]:
    """Without damage each of these commands works, so that a refusal is one of the damage."""
    for name, (source, _, command) in _READERS.items():
        began, place = time.monotonic(), field.place()
        folder = field.materials.copy(getattr(field.materials, source), place / source)
        process = _reading(field, source, folder, command, place / "out")
        fault = "" if process.code == 0 else f"ended with {process.code}: {last_lines(process.text)}"
        yield cleaned(judged("no damage, for comparison", name, began, fault), place)


def _read(
    name: str, damage: Callable[[Path, random.Random], None], field: Field, chance: random.Random
) -> Iterator[Verdict]:
    """Damage a file of an export or a bank: the command that reads it refuses it by name."""
    source, pattern, command = _READERS[name]
    began, place = time.monotonic(), field.place()
    folder = field.materials.copy(getattr(field.materials, source), place / source)
    file = chance.choice(sorted(folder.glob(pattern)))
    damage(file, chance)
    process = _reading(field, source, folder, command, place / "out")
    assert process.code is not None
    fault = refusal_fault(process.code, process.text, [str(file), str(folder)], at_start=False)
    yield cleaned(judged("damaged export or bank", f"{name}, {damage.__name__}", began, fault), place)


_MARKERS = {
    "codebook": "config.json",
    "tokenize": "config.json",
    "demo": "demo.json",
    "reproduce": "reproduce.json",
}


def _marker(
    name: str, damage: Callable[[Path, random.Random], None], field: Field, chance: random.Random
) -> Iterator[Verdict]:
    """Damage the file that holds the settings of a folder: starting again refuses it, or ends as it must."""
    subject, began = field.subject(name), time.monotonic()
    out = field.materials.copy(field.materials.folder / "undisturbed" / name, field.place() / "run")
    file = out / _MARKERS[name]
    damage(file, chance)
    process = subject.start(out)
    code = process.wait()
    fault = "" if code == 0 and not subject.differences(out) else refusal_fault(code, process.text, [str(out)])
    yield cleaned(judged("damaged settings", f"{name}, {damage.__name__}", began, fault), out.parent)


_WRONG: tuple[Any, ...] = ("huge", -1, None, [], {}, 10**15, 0.5, True)


def _edited(name: str, field: Field, chance: random.Random) -> Iterator[Verdict]:
    """Edit a config.json without its checksum, key by key: the reader refuses it, or the edit has no effect."""
    source = name.partition(" ")[0]
    command = {"codebook": "tokenize", "vit": "finetune", "classifier": "predict", "bank": "bank"}[source]
    original = getattr(field.materials, source)
    relative = "config.json" if source == "bank" else "export/config.json"
    content = json.loads((original / relative).read_text())
    for key in chance.sample(sorted(content), min(4, len(content))):
        began, place = time.monotonic(), field.place()
        folder = field.materials.copy(original, place / source)
        checksum_file(folder / relative).unlink(missing_ok=True)
        wrong = chance.choice(("missing", *_WRONG))
        edited = {other: value for other, value in content.items() if other != key}
        (folder / relative).write_text(json.dumps(edited if wrong == "missing" else {**edited, key: wrong}))
        process = _reading(field, source, folder, command, place / "out")
        assert process.code is not None
        fault = refusal_fault(process.code, process.text, at_start=False) if process.code else ""
        yield cleaned(judged("edited config", f"{name}, {key}: {wrong!r}"[:120], began, fault), place)
