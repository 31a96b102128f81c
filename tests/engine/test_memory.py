"""What is said when a GPU's memory is full: flags that exist, and that help."""

from __future__ import annotations

from typing import Any

import pytest

from pecobook.engine.memory import advice
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.dense import PyramidConfig
from pecobook.settings.detect import DetectConfig
from pecobook.settings.segment import SegmentConfig, SegmentTestConfig
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import flags


def told(config: TrainConfig, *, least: int = 1, evaluating: bool = False) -> str:
    first, second = advice(config, least=least, evaluating=evaluating).splitlines()
    assert first.startswith("Out of GPU memory")
    words = [word.strip(".:") for word in second.split() if word.startswith("--")]
    assert {word.removeprefix("--") for word in words} <= {*flags(type(config))}
    return second


@pytest.mark.parametrize(
    ("batch", "micro", "least", "expected"),
    [(8, 0, 1, 4), (8, 4, 2, 2), (9, 0, 1, 3), (9, 3, 1, 1), (7, 0, 1, 1), (12, 5, 2, 2)],
)
def test_advice__halves_the_images_of_a_device(batch: int, micro: int, least: int, expected: int) -> None:
    config = CodebookConfig(batch_size=batch, micro_batch_size=micro)
    for evaluating in (False, True):
        assert f"--micro-batch-size {expected}:" in told(config, least=least, evaluating=evaluating)


@pytest.mark.parametrize(("batch", "least"), [(1, 1), (2, 2), (3, 2)])
def test_advice__where_fewer_images_cannot_be(batch: int, least: int) -> None:
    more: dict[str, Any] = {"batch_size": batch, "precision": "bf16"}
    assert told(CodebookConfig(**more), least=least) == "Give a smaller --image-size."
    said = told(SegmentConfig(**more), least=least)
    assert said == "Give --pyramid.checkpointing true or a smaller --image-size."
    done = SegmentConfig(**{**more, "precision": "fp32"}, pyramid=PyramidConfig(checkpointing=True))
    assert told(done, least=least) == "Give a smaller --image-size or --precision bf16."


def test_advice__in_the_evaluation_of_pictures_one_by_one() -> None:
    assert "--test.mode slide" in told(SegmentConfig(), evaluating=True)
    several = SegmentConfig(test=SegmentTestConfig(mode="slide", scales=(1.0, 2.0)))
    assert told(several, evaluating=True) == "Go on with --resume and smaller --test.scales."
    least = SegmentConfig(test=SegmentTestConfig(mode="slide"))
    assert "--test.max-side" in told(least, evaluating=True)
    sharded = SegmentConfig(strategy="fsdp", devices="2")
    assert "slide" not in told(sharded, evaluating=True)
    assert "--max-size" in told(DetectConfig(), evaluating=True)
