"""Twenty losses of every stage are compared with recorded losses: a refactoring must not change them.

`PECOBOOK_UPDATE_GOLDEN=1 pytest tests/stages/test_golden.py` writes tests/golden/ again. A golden file changes only if
the computation changes, so its change needs a line in CHANGELOG.md that says why.

The runs use full precision, one thread, and small variants of `tiny` on the built-in photographs. Platforms round
differently, and twenty steps of Adam amplify the rounding: the tolerance is 1e-4 for that reason.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clips import write_moving
from tests.runs import losses, objects, shapes, train

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 20
# A large epsilon keeps Adam from amplifying the rounding of gradients near zero.
_COMMON: dict[str, Any] = {"max_steps": str(STEPS), "batch_size": 16, "seed": 1, "optim.eps": 0.1}

# Command and settings of each golden file.
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    # With 16 images, normalised over the batch, twenty steps amplify a rounding error ten thousand times.
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
    "codebook_features": (
        "codebook",
        {"target_features": "timm:resnet10t", "target.weights": "random", "target.layer": "2"},
    ),
    "pretrain": ("pretrain", {}),
    "finetune": ("finetune", {}),
    "finetune_clips": ("finetune", {"clip.frames": 4, "clip.sampling": "segments", "batch_size": 8}),
    "segment": ("segment", {}),
    "detect": ("detect", {"batch_size": 4}),
}


# Number of steps before a processor's rounding is amplified: contrast normalises few images at once, and a perceptual
# codebook may choose the other of two near codewords. Later steps differ by up to 1e-2 between processors, the first
# steps by 3e-5.
SHARP = {"contrast": 4, "codebook_perceptual": 5}
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):  # whose truncated normal draws other first weights
    SHARP |= dict.fromkeys(("pretrain", "finetune", "finetune_clips", "segment", "detect"), 0)


@pytest.mark.parametrize("name", list(STAGES))
def test_train__golden_losses(name: str, tmp_path: Path) -> None:
    command, more = STAGES[name]
    settings = {**_COMMON, **more}
    if command == "pretrain":
        settings["tokenizer"] = str(train("codebook", "photos", tmp_path / "codebook", **_COMMON))
    if command in (
        "finetune",
        "segment",
        "detect",
    ):  # random weights, so that a change of one stage moves no other stage's file
        side = 48 if command == "detect" else 32
        settings |= {"backbone": "timm:vit_tiny_patch16_224", "weights": "random", "image_size": side}
        settings["optim.layer_decay"] = 0.75  # which only pre-trained weights have unless it is given
    if name == "finetune_clips":
        settings["data"] = str(write_moving(tmp_path / "clips"))
    if command == "segment":
        settings["data"] = str(shapes())
    if command == "detect":
        settings["data"] = str(objects())
    run_losses = losses(train(command, "photos", tmp_path / "run", **settings))
    assert len(run_losses) == STEPS
    file = GOLDEN / f"{name}.json"
    if os.environ.get("PECOBOOK_UPDATE_GOLDEN"):
        file.write_text(json.dumps(run_losses, indent=1) + "\n")
    golden, sharp = json.loads(file.read_text()), SHARP.get(name, STEPS)
    advice = "the computation has changed; if intended: PECOBOOK_UPDATE_GOLDEN=1, and a line in CHANGELOG.md"
    assert run_losses[:sharp] == pytest.approx(golden[:sharp], rel=1e-4), advice
    assert run_losses == pytest.approx(golden, rel=2e-2), advice
    assert sum(run_losses[-5:]) < sum(run_losses[:5])  # the stage learns
