"""Twenty losses of every stage, against those on record: a refactoring must not move them.

`PECOBOOK_UPDATE_GOLDEN=1 pytest tests/stages/test_golden.py` writes tests/golden/ anew. A change of a golden file is a
change of what is computed, so it needs a line in CHANGELOG.md that says why.

Full precision, one thread, small variants of `tiny` on the built-in photographs. Platforms round differently and twenty
steps of Adam enlarge that, hence the tolerance of 1e-4.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.runs import losses, objects, shapes, train

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 20
# A large epsilon keeps Adam from blowing up the sign of gradients near zero, which is rounding.
_COMMON: dict[str, Any] = {"max_steps": str(STEPS), "batch_size": 16, "seed": 1, "optim.eps": 0.1}

# Name of the file: command and settings.
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    # Of 16 images, normalised over the batch, it enlarges a rounding ten thousand times in twenty steps.
    "contrast": ("contrast", {"batch_size": 32}),
    "codebook": ("codebook", {}),
    "codebook_perceptual": (
        "codebook",
        {
            "perceptual.network": "timm:resnet10t",
            "perceptual.weights": "random",
            "perceptual.layers": (1, 2),
            "perceptual.weight": 0.5,
        },
    ),
    "pretrain": ("pretrain", {}),
    "finetune": ("finetune", {}),
    "segment": ("segment", {}),
    "detect": ("detect", {"batch_size": 4}),
}


# Steps before a processor's rounding is enlarged: contrast normalises few images at once, and a perceptual codebook may
# choose another of two near codewords. Later steps differ by up to 1e-2 between processors, the first ones by 3e-5.
SHARP = {"contrast": 4, "codebook_perceptual": 11}


@pytest.mark.parametrize("name", list(STAGES))
def test_train__golden_losses(name: str, tmp_path: Path) -> None:
    command, more = STAGES[name]
    settings = {**_COMMON, **more}
    if command == "pretrain":
        settings["tokenizer"] = str(train("codebook", "photos", tmp_path / "codebook", **_COMMON))
    if command in ("finetune", "segment", "detect"):  # random weights: one stage's change must not move another's file
        side = 48 if command == "detect" else 32
        settings |= {"backbone": "timm:vit_tiny_patch16_224", "weights": "random", "image_size": side}
    if command == "segment":
        settings["data"] = str(shapes())
    if command == "detect":
        settings["data"] = str(objects())
    found = losses(train(command, "photos", tmp_path / "run", **settings))
    assert len(found) == STEPS
    file = GOLDEN / f"{name}.json"
    if os.environ.get("PECOBOOK_UPDATE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1) + "\n")
    golden, sharp = json.loads(file.read_text()), SHARP.get(name, STEPS)
    said = "what is computed has changed; if that is meant: PECOBOOK_UPDATE_GOLDEN=1, and a line in CHANGELOG.md"
    assert found[:sharp] == pytest.approx(golden[:sharp], rel=1e-4), said
    assert found == pytest.approx(golden, rel=2e-2), said
    assert sum(found[-5:]) < sum(found[:5])  # it learns
