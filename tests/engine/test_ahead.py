from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pecobook.data.batch import Batch
from pecobook.engine.ahead import look_ahead, micro_batches
from pecobook.engine.stage import StageOutput


@given(st.integers(2, 7), st.integers(1, 6))
def test_look_ahead__adds_all_rows_to_every_micro_batch_its_own_rows_first(count: int, size: int) -> None:
    numbers = torch.arange(count * size).view(count, size).unbind()
    passes: list[list[int]] = []
    seeds: list[int] = []

    def model(batch: Batch) -> StageOutput:
        assert batch["ahead"]
        assert not torch.is_grad_enabled()
        passes.append(batch["image"].tolist())
        return StageOutput(None, {}, rows={"keys": 10 * batch["image"][:, None]})

    batches: list[Batch] = [{"image": part, "label": part % 3} for part in numbers]
    with_keys = list(look_ahead(model, batches, seeds.append))
    assert seeds == list(range(count))
    for number, (batch, part) in enumerate(zip(with_keys, numbers, strict=True)):
        assert torch.equal(batch["image"], part)
        assert torch.equal(batch["label"], part % 3)
        keys = batch["keys"].flatten().tolist()
        assert keys[:size] == (10 * part).tolist(), number
        assert sorted(keys) == [10 * image for image in range(count * size)]
    # Each forward pass contains as few images of one micro-batch as possible.
    max_from_one = -(-size // count)
    for images in passes:
        assert len(images) == size
        assert max(sum(image // size == number for image in images) for number in range(count)) <= max_from_one


@pytest.mark.parametrize(("needs", "count", "passes"), [(False, 3, 0), (True, 1, 0), (True, 3, 3)])
def test_micro_batches__are_read_one_by_one_unless_the_stage_needs_all(needs: bool, count: int, passes: int) -> None:
    read: list[int] = []
    seen: list[Batch] = []

    def parts() -> Any:
        for number in range(count):
            read.append(number)
            yield {"image": torch.full((2,), number)}

    def model(batch: Batch) -> StageOutput:
        seen.append(batch)
        return StageOutput(None, {}, rows={"keys": batch["image"][:, None]})

    stage = SimpleNamespace(needs_full_batch_keys=needs, after_ahead=lambda _: False)
    for number, batch in enumerate(micro_batches(stage, model, parts(), lambda _: None)):
        assert batch["image"].tolist() == [number, number]
        assert ("keys" in batch) == (passes > 0)
        assert len(read) == (count if needs else number + 1)
    assert len(seen) == passes
