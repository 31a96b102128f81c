"""One batch equals the same images in accumulated micro-batches, for stages whose loss is a mean over images.

Those of contrast, codebook and segment are in the tests of their stages. The losses of detection are means over the
regions that are drawn in a micro-batch, on purpose (docs/decisions.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import inputs, logged, train

STEADY: dict[str, dict[str, Any]] = {
    "finetune": {"mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0},  # whose draws are one for each micro-batch
    "pretrain": {},
    "pretrain pixels": {"target": "pixels"},
    "pretrain visible": {"visible_only": True, "model.name": "vit_tiny_patch16_224"},
}


@pytest.mark.parametrize("kind", STEADY)
def test_micro_batches__equal_the_whole_batch(
    kind: str, images: Path, codebook_run: Path, vit_run: Path, tmp_path: Path
) -> None:
    command = kind.split()[0]
    more: dict[str, Any] = {**inputs(command, codebook_run, vit_run), "drop_path": 0.0, "optim.eps": 1e-3}
    more |= {"max_steps": "3", **STEADY[kind]}
    if kind == "pretrain visible":
        more |= {"decoder": {"depth": 1, "width": 16, "num_heads": 2}}
    whole = logged(train(command, images, tmp_path / "whole", **more))
    parts = logged(train(command, images, tmp_path / "parts", **more, micro_batch_size=2))
    for a, b in zip(whole, parts, strict=True):
        for name in a.keys() & {"loss", "accuracy", "top1", "grad_norm"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
