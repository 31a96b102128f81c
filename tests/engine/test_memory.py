"""The advice when a GPU runs out of memory names flags that exist and that help."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pecobook.engine.memory import gpu_memory, out_of_memory_advice
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.dense import PyramidConfig
from pecobook.settings.detect import DetectConfig
from pecobook.settings.segment import SegmentConfig, SegmentTestConfig
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import flags


def remedy(config: TrainConfig, *, min_batch_size: int = 1, evaluating: bool = False) -> str:
    advice = out_of_memory_advice(config, min_batch_size=min_batch_size, evaluating=evaluating)
    first, second = advice.splitlines()
    assert first.startswith("Out of GPU memory")
    words = [word.strip(".:") for word in second.split() if word.startswith("--")]
    assert {word.removeprefix("--") for word in words} <= {*flags(type(config))}
    return second


@pytest.mark.parametrize(
    ("batch", "micro", "minimum", "expected"),
    [(8, 0, 1, 4), (8, 4, 2, 2), (9, 0, 1, 3), (9, 3, 1, 1), (7, 0, 1, 1), (12, 5, 2, 2)],
)
def test_advice__halves_the_images_of_a_device(batch: int, micro: int, minimum: int, expected: int) -> None:
    config = CodebookConfig(batch_size=batch, micro_batch_size=micro)
    for evaluating in (False, True):
        assert f"--micro-batch-size {expected}:" in remedy(config, min_batch_size=minimum, evaluating=evaluating)


@pytest.mark.parametrize(("batch", "minimum"), [(1, 1), (2, 2), (3, 2)])
def test_advice__with_the_smallest_number_of_images(batch: int, minimum: int) -> None:
    more: dict[str, Any] = {"batch_size": batch, "precision": "bf16"}
    assert remedy(CodebookConfig(**more), min_batch_size=minimum) == "Give a smaller --image-size."
    segment = remedy(SegmentConfig(**more), min_batch_size=minimum)
    assert segment == "Give --pyramid.checkpointing true or a smaller --image-size."
    checkpointed = SegmentConfig(**{**more, "precision": "fp32"}, pyramid=PyramidConfig(checkpointing=True))
    assert remedy(checkpointed, min_batch_size=minimum) == "Give a smaller --image-size or --precision bf16."


def test_advice__in_the_evaluation_of_single_images() -> None:
    assert "--test.mode slide" in remedy(SegmentConfig(), evaluating=True)
    several = SegmentConfig(test=SegmentTestConfig(mode="slide", scales=(1.0, 2.0)))
    assert remedy(several, evaluating=True) == "Continue with --resume and smaller --test.scales."
    smallest = SegmentConfig(test=SegmentTestConfig(mode="slide"))
    assert "--test.max-side" in remedy(smallest, evaluating=True)
    sharded = SegmentConfig(strategy="fsdp", devices="2")
    assert "slide" not in remedy(sharded, evaluating=True)
    assert "--max-size" in remedy(DetectConfig(), evaluating=True)


def test_gpu_memory__is_in_gigabytes_and_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda _: 2_500_000_000)
    assert gpu_memory(torch.device("cpu")) == {}
    assert gpu_memory(torch.device("cuda", 0)) == {"gpu_memory": 2.5}
