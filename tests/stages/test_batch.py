"""`Batch` lists exactly the keys that stages receive, with their types."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from pecobook.commands.tokenize import tokenize
from pecobook.data.batch import Batch
from pecobook.data.stream import Stream
from pecobook.engine.stage import Stage
from pecobook.recipes import tokenize as tokenize_recipe
from pecobook.settings.values import replace
from pecobook.stages.classify import ClassifyStage
from pecobook.stages.codebook import CodebookStage
from pecobook.stages.detect import DetectStage
from pecobook.stages.moco import MocoStage
from pecobook.stages.pretrain import PretrainStage
from pecobook.stages.segment import SegmentStage
from tests.runs import inputs, train

STAGES: list[type[Stage[Any]]] = [
    MocoStage,
    CodebookStage,
    PretrainStage,
    ClassifyStage,
    SegmentStage,
    DetectStage,
]
HINTS = get_type_hints(Batch)
# The dtypes as in the docstrings of the keys.
KEYS: dict[torch.dtype, set[str]] = {
    torch.uint8: {"image", "images", "view0", "view1", "other", "masks"},
    torch.int16: {"mask", "masks"},
    torch.int64: {"label", "codes", "labels", "size", "index"},
    torch.float32: {"colour", "colour0", "colour1", "boxes", "keys", "keys0", "keys1", "reconstruction"},
    torch.bool: {"mask", "replaced", "repeated"},
}


def check(batch: dict[str, Any]) -> None:
    for name, value in batch.items():
        assert name in HINTS, f"'{name}' is not listed in Batch"
        kind = HINTS[name]
        if get_origin(kind) is list:
            assert isinstance(value, list), name
            assert all(isinstance(item, get_args(kind)[0]) for item in value), name
        else:
            assert isinstance(value, kind), name
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor):
                assert name in KEYS[item.dtype], (name, item.dtype)


def test_batch__lists_exactly_the_keys_that_stages_receive(
    images: Path, codebook_run: Path, vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, set[str]] = {}
    loaded: set[str] = set()

    def watch(stage: type[Stage[Any]]) -> None:
        original = stage.forward

        def forward(self: Any, batch: Any) -> Any:
            check(batch)
            received.setdefault(stage.command, set()).update(batch)
            return original(self, batch)

        monkeypatch.setattr(stage, "forward", forward)

    for stage in STAGES:
        watch(stage)
    original_getitem = Stream.__getitem__

    def sample(self: Stream, position: int) -> dict[str, Any]:
        loaded_sample = original_getitem(self, position)
        loaded.update(loaded_sample)
        return loaded_sample

    monkeypatch.setattr(Stream, "__getitem__", sample)
    config = replace(tokenize_recipe("tiny"), {"data": str(images), "tokenizer": str(codebook_run), "image_size": 16})
    bank = tokenize(replace(config, {"out": str(tmp_path / "bank"), "workers": 0}))
    view = {name: getattr(config, name) for name in ("seed", "image_size", "min_crop")}
    parts = {"micro_batch_size": 4, "batch_size": 8}
    more: dict[str, dict[str, Any]] = {
        "contrast": {**parts, "probe_data": str(images)},
        "codebook": {**parts, "explicit.kind": "contrastive", "quantizer.start_after": 0},
        "pretrain": {**view, "tokens": str(bank), "probe_data": str(images)},
    }
    for stage in STAGES:
        command = stage.command
        settings = {"max_steps": "2", "workers": 0, **inputs(command, codebook_run, vit_run), **more.get(command, {})}
        train(command, settings.pop("data", images), tmp_path / command, **settings)
    assert loaded <= HINTS.keys()
    everywhere = {"index", "label", "replaced", "repeated"}
    assert {command: names - everywhere for command, names in received.items()} == {
        "contrast": {"view0", "view1", "colour0", "colour1", "image", "ahead", "keys0", "keys1", "probe"},
        "codebook": {"image", "other", "ahead", "keys", "reconstruction"},
        "pretrain": {"image", "colour", "mask", "codes", "probe"},
        "finetune": {"image"},
        "segment": {"image", "colour", "mask", "images", "masks"},
        "detect": {"images", "boxes", "labels", "masks", "size"},
    }
    assert set().union(*received.values()) | {"skipped"} == HINTS.keys()
