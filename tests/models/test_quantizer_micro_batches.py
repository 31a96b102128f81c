"""A step in many micro-batches: the codebook of one batch, in memory that their number does not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pecobook.models.accumulation import Sample
from pecobook.models.quantizer import VectorQuantizer
from tests.distributed import TwoProcesses
from tests.models.quantizing import State, assert_same, latents, rows, state_of

KINDS: list[dict[str, Any]] = [{}, {"normalise": True}, {"kind": "gradient"}]


def moved(seed: int, images: int = 100) -> Tensor:
    """1,600 vectors, 100 times as many as the codewords, most of which die in the fifth step."""
    return latents(images, 4, 4, seed) * (1 + (seed > 3) * torch.arange(4.0)[:, None, None]) + 9 * (seed > 3)


def trained(steps: int, parts: int, **settings: Any) -> VectorQuantizer:
    quantizer = VectorQuantizer(16, 4, **{"revive_after": 3, **settings})
    for seed in range(steps):
        for micro_batch in moved(seed).tensor_split(parts):
            quantizer(micro_batch)
        quantizer.update()
    return quantizer


@pytest.mark.parametrize("settings", KINDS)
def test_update__micro_batches_change_only_rounding(settings: dict[str, Any]) -> None:
    whole = trained(24, 1, **settings)
    assert whole.num_revived > 0
    for parts in (2, 7, 100):
        assert_close(state_of(trained(24, parts, **settings)), state_of(whole), atol=1e-5, rtol=1e-5)


def test_update__of_a_start_from_all_images_is_that_of_one_batch() -> None:
    """As in training, where the stage starts the codebook ahead of the first micro-batch."""
    whole, parts = VectorQuantizer(16, 4), VectorQuantizer(16, 4)
    whole(moved(0))
    parts.start(moved(0))
    for micro_batch in torch.split(moved(0), 10):
        parts(micro_batch)
    for quantizer in (whole, parts):
        quantizer.update()
    assert_close(state_of(parts), state_of(whole), atol=1e-5, rtol=1e-5)


def stored(value: Any) -> Iterator[tuple[int, int]]:
    """Yield addresses and sizes in bytes of what an object holds beside its state."""
    if isinstance(value, Tensor):
        yield value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
    elif isinstance(value, Sample):
        yield from stored(value.rows)
    elif isinstance(value, tuple):
        for part in value:
            yield from stored(part)


@pytest.mark.parametrize("settings", KINDS)
def test_forward__keeps_no_more_for_more_micro_batches(settings: dict[str, Any]) -> None:
    quantizer, most = VectorQuantizer(16, 4, revive_after=3, **settings), dict[tuple[int, bool], int]()
    for number in (200, 25):  # micro-batches of a step, 64 vectors each
        for seed in range(20):
            for micro_batch in torch.split(moved(seed, 4 * number), 4):
                quantizer(micro_batch)
                held = sum(dict(pair for value in vars(quantizer).values() for pair in stored(value)).values())
                key = (number, seed == 0 and not quantizer.num_updates)
                most[key] = max(most.get(key, 0), held)
            quantizer.update()
            assert not any(size for value in vars(quantizer).values() for _, size in stored(value))
    start, vector = 2 * 32 * 16, 4 * 4  # the largest sample of k-means; bytes
    # One micro-batch with its codes, K sums with codes and counts, and a sample of less than 2 K.
    most_held = 64 * (vector + 8) + 16 * (vector + 8 + 4) + 2 * 16 * vector
    assert 64 * vector < most[25, False] <= most_held
    assert 64 * vector < most[200, False] <= most_held
    assert most[200, True] < (2 * start + 5 * 64) * vector < 200 * 64 * vector


def test_update__is_that_of_a_slow_oracle_with_all_vectors() -> None:
    """Averages and revival of a step in 13 micro-batches, in NumPy with fp64, from all of its vectors at once."""
    quantizer = trained(9, 13)
    with torch.no_grad():
        quantizer.codebook[[3, 8, 11]] += 500  # nothing chooses these
        quantizer.idle[[3, 8]] = 50
        quantizer.idle[11] = 0
    before = {name: value.double().numpy() for name, value in state_of(quantizer).items()}
    z = moved(9)
    for micro_batch in z.tensor_split(13):
        quantizer(micro_batch)
    quantizer.update()
    vectors = rows(z).double().numpy()
    codes = np.array([((vector - before["codebook"]) ** 2).sum(1).argmin() for vector in vectors])
    counts = np.array([(codes == code).sum() for code in range(16)])
    sums = np.stack([vectors[codes == code].sum(0) for code in range(16)])
    ema_count = 0.99 * before["ema_count"] + 0.01 * counts
    ema_sum = 0.99 * before["ema_sum"] + 0.01 * sums
    smoothed = (ema_count + 1e-5) / (ema_count.sum() + 16 * 1e-5) * ema_count.sum()
    codebook = np.where(counts[:, None] > 0, ema_sum / smoothed[:, None], before["codebook"])
    idle = np.where(counts > 0, 0, before["idle"] + 1)
    dead = idle >= 3
    assert dead[3]
    assert dead[8]
    assert not dead[11]
    after = {name: value.double().numpy() for name, value in state_of(quantizer).items()}
    assert after["num_revived"] - before["num_revived"] == dead.sum()
    np.testing.assert_allclose(after["codebook"][~dead], codebook[~dead], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after["ema_count"][~dead], ema_count[~dead], rtol=1e-4)
    np.testing.assert_allclose(after["ema_sum"][~dead], ema_sum[~dead], rtol=1e-4, atol=1e-3)
    # 1,600 vectors are 100 for each codeword: of every 64th there are 25, between 16 and 32.
    pool = vectors[::64]
    chosen = [int(np.abs(pool - codeword).sum(1).argmin()) for codeword in after["codebook"][dead]]
    np.testing.assert_allclose(after["codebook"][dead], pool[chosen], atol=1e-6)
    assert len(set(chosen)) == dead.sum()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_sample__does_not_depend_on_the_parts(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for number in (1, 2, size, 2 * size - 1, 2 * size, 500):
        vectors, whole = torch.arange(number)[:, None], Sample(size)
        whole.add(vectors)
        assert min(number, size) <= len(whole.rows) < 2 * size or size == 1 == len(whole.rows)
        assert torch.equal(whole.rows, vectors[:: whole.stride])
        cuts = torch.randint(number + 1, (6,), generator=generator).sort().values
        parts = Sample(size)
        for part in vectors.tensor_split(cuts):
            parts.add(part)
        assert torch.equal(parts.rows, whole.rows)
        assert parts.seen == number


def rank_in_micro_batches(rank: int, world_size: int, parts: int) -> State:
    quantizer = VectorQuantizer(16, 4, revive_after=3)
    for seed in range(24):
        for micro_batch in moved(seed, 128).chunk(world_size)[rank].chunk(parts):
            quantizer(micro_batch)
        quantizer.update()
    return state_of(quantizer)


def test_two_processes__many_micro_batches_revive_as_one_batch(two_processes: TwoProcesses) -> None:
    left, right = two_processes.run(rank_in_micro_batches, 8)
    whole = rank_in_micro_batches(0, 1, 1)
    assert_same(left, right)
    assert whole["num_revived"] > 0
    assert_close(left, whole, atol=1e-5, rtol=1e-5)


def test_state_dict__a_quantizer_stopped_within_a_step_goes_on_from_the_last() -> None:
    whole, stopped = trained(20, 8), trained(15, 8)
    state = state_of(stopped)
    stopped(moved(15, 40))
    stopped(moved(16, 40))
    stopped.load_state_dict(state)
    for seed in range(15, 20):
        for micro_batch in moved(seed).tensor_split(8):
            stopped(micro_batch)
        stopped.update()
    assert whole.num_revived > 0
    assert_same(state_of(stopped), state_of(whole))
