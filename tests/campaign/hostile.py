"""Hostile files: pickles that would run code, configs that would load files, names with escape codes."""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pecobook.utils.checksums import add_checksum
from tests.campaign.process import run
from tests.campaign.subjects import last_lines
from tests.campaign.verdict import Case, Field, Verdict, cleaned, judged, refusal_fault


class _Evil:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def cases() -> list[Case]:
    """Return every hostile file."""
    pickles = [functools.partial(_pickle, name) for name in ("state", "weights", "tensors", "array", "perceptual")]
    keys = ("checkpoint_path", "pretrained_cfg", "pretrained", "cache_dir", "pretrained_cfg_overlay")
    return [*pickles, *(functools.partial(_config, key) for key in keys), _names, _names_of_classes]


def _pickle(name: str, field: Field, _chance: random.Random) -> Iterator[Verdict]:
    """A pickle in the place of weights, a checkpoint or tokens: refused by name, and its code does not run."""
    began, place, materials = time.monotonic(), field.place(), field.materials
    proof, out = place / "proof", place / "out"
    content = pickle.dumps({"model": _Evil(proof), "state_dict": _Evil(proof)})
    file = place / "file.pth"
    words = [*materials.words("finetune"), "--out", str(out)]
    if name == "state":
        field.subject("codebook")
        run_folder = materials.copy(materials.folder / "undisturbed" / "codebook", out)
        for file in run_folder.glob("checkpoints/*/state.pt"):
            file.write_bytes(content)
            add_checksum(file)
        words = [*materials.words("codebook"), "--out", str(out), "--resume", "auto"]
    elif name == "weights":
        words += ["--weights", str(file)]
    elif name == "perceptual":
        words = [*materials.words("codebook"), "--out", str(out), "--perceptual.network", "timm:resnet18"]
        words += ["--perceptual.layers", "1", "--perceptual.weights", str(file)]
    elif name == "tensors":
        copy = materials.copy(materials.vit, place / "vit")
        file = copy / "export" / "model.safetensors"
        words = [str(copy) if word == str(materials.vit) else word for word in words]
    else:
        bank = materials.copy(materials.bank, place / "bank")
        file = sorted(bank.rglob("*.npy"))[0]
        words = [*materials.words("pretrain"), "--tokens", str(bank), "--out", str(out)]
    if name == "array":
        np.save(file, np.array([_Evil(proof)], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(content)
    if name in ("tensors", "array"):
        add_checksum(file)
    process = run(words, place / "log")
    assert process.code is not None
    fault = (
        "the code ran" if proof.exists() else refusal_fault(process.code, process.text, _named(file), at_start=False)
    )
    yield cleaned(judged("hostile file", f"pickle as {name}", began, fault), place)


def _named(file: Path) -> list[str]:
    """Return the texts by which a message may name a file: its own name, or its folder's."""
    return [file.name, str(file.parent)]


def _config(key: str, field: Field, _chance: random.Random) -> Iterator[Verdict]:
    """An argument in a run's config.json that would load a file or request an address."""
    began, place, materials = time.monotonic(), field.place(), field.materials
    proof = place / "proof"
    file = place / "evil.pth"
    file.write_bytes(pickle.dumps(_Evil(proof)))
    copy = materials.copy(materials.vit, place / "vit")
    config = copy / "export" / "config.json"
    content = json.loads(config.read_text())
    value = {"pretrained_cfg": {"url": "http://127.0.0.1:9/x"}, "pretrained": True}.get(key, str(file))
    if "args" in content:
        content["args"] = {**content["args"], key: value}
    else:
        content["model"] = {**content.get("model", {}), "args": json.dumps({key: value})}
    config.write_text(json.dumps(content))
    add_checksum(config)
    words = [str(copy) if word == str(materials.vit) else word for word in materials.words("finetune")]
    process = run([*words, "--out", str(place / "out")], place / "log")
    assert process.code is not None
    fault = "the code ran" if proof.exists() else refusal_fault(process.code, process.text, [key], at_start=False)
    yield cleaned(judged("hostile file", f"config with {key}", began, fault), place)


_BAD_NAMES = (
    "a\x1b[31mred.png",
    "b\n2026-01-01 00:00:00,000 forged line.png",
    "c[/b].png",
    "d\x9b31m.png",
    "e\u202egnp.png",
)


def _names(field: Field, _chance: random.Random) -> Iterator[Verdict]:
    """Unreadable images with escape codes, line breaks and markup in their names: listed, escaped, and no end."""
    yield from _hostile_names("images", field, [f"red/{name}" for name in _BAD_NAMES], b"no image")


def _names_of_classes(field: Field, _chance: random.Random) -> Iterator[Verdict]:
    """Class folders with such names."""
    image = (field.materials.images / "red" / "0.png").read_bytes()
    yield from _hostile_names("classes", field, [f"{name}/{i}.png" for name in _BAD_NAMES for i in range(8)], image)


def _hostile_names(kind: str, field: Field, names: list[str], content: bytes) -> Iterator[Verdict]:
    place, materials = field.place(), field.materials
    data = materials.copy(materials.images, place / "images")
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    faults: list[str] = []
    for command in ("finetune", "tokenize", "check"):
        began, out = time.monotonic(), place / command
        words = ["check"] if command == "check" else [*materials.words(command), "--out", str(out)]
        words = [str(data) if word == str(materials.images) else word for word in words]
        if command == "check":
            words += ["--data", str(data)]
        process = run(words, place / f"{command}.log")
        written = [place / f"{command}.log", out / "train.log", out / "skipped.txt"]
        texts = {file.name: file.read_bytes().decode(errors="replace") for file in written if file.exists()}
        control = [name for name, text in texts.items() if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)]
        forged = [name for name, text in texts.items() if re.search("^2026-01-01 00:00:00,000", text, re.MULTILINE)]
        fault = f"control characters in {control}" if control else f"a forged line in {forged}" if forged else ""
        if process.code not in ((0, 1) if command == "check" else (0,)):
            fault = f"ended with {process.code}: {last_lines(process.text)}"
        faults.append(fault)
        yield judged("hostile file", f"names of {kind}, {command}", began, fault)
    if not any(faults):
        shutil.rmtree(place)
