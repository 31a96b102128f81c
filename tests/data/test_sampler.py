"""The order of images: a bijection, the same for any ranks, workers and accumulation, and resumable anywhere."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pecobook.data.sampler import BatchPositions, key, permute, permute_windows, splitmix64, uniform, uniforms

KEYS = st.integers(0, 2**64 - 1)
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment


def test_splitmix64__gives_the_reference_values() -> None:
    # The first outputs of the generator's reference implementation from the states 0 and 1234567.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert [splitmix64((1234567 + i * GOLDEN) % 2**64) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_key__depends_on_every_part_and_its_place() -> None:
    keys = [key(*parts) for length in (1, 2, 3) for parts in itertools.product(range(10), repeat=length)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= value < 2**64 for value in keys)


@given(KEYS)
def test_uniforms__are_the_top_53_bits_of_splitmix64(seed_key: int) -> None:
    expected = [(splitmix64((seed_key + i * GOLDEN) % 2**64) >> 11) / 2**53 for i in range(7)]
    assert uniforms(seed_key, 7).tolist() == expected


@given(KEYS, st.integers(0, 50), st.integers(0, 50))
def test_uniforms__a_longer_draw_begins_with_the_shorter(seed_key: int, few: int, more: int) -> None:
    assert np.array_equal(uniforms(seed_key, few + more)[:few], uniforms(seed_key, few))


def test_uniforms__are_uniform() -> None:
    u = np.stack([uniforms(key(0, i), 41) for i in range(5000)])
    assert u.min() >= 0
    assert u.max() < 1
    sigma = (1 / 12) ** 0.5
    assert abs(u.mean() - 0.5) < 5 * sigma / u.size**0.5
    assert np.abs(u.mean(0) - 0.5).max() < 5 * sigma / 5000**0.5
    assert abs(u.std() - sigma) < 0.002
    correlation = np.corrcoef(u[:, :8].T) - np.eye(8)  # of the draws of one key
    assert np.abs(correlation).max() < 5 / 5000**0.5


@given(KEYS, st.integers(0, 50))
def test_uniform__is_one_of_uniforms(seed_key: int, number: int) -> None:
    assert uniform(seed_key, number) == uniforms(seed_key, number + 1)[number]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 4000), KEYS)
def test_permute_windows__is_a_bijection(size: int, window: int, permutation_key: int) -> None:
    assert sorted(permute_windows(i, size, window, permutation_key) for i in range(size)) == list(range(size))


def test_permute_windows__a_window_holds_few_runs_of_neighbours_and_shuffles_them() -> None:
    size, window = 10_000, 640
    order = [permute_windows(i, size, window, key(1, 2)) for i in range(size)]
    for first in range(0, size - window, window):
        chosen = sorted(order[first : first + window])
        runs = 1 + sum(b - a > 1 for a, b in itertools.pairwise(chosen))
        assert runs <= 33  # 32 runs of 20, one of which may lie across the end of the range
        assert np.ptp(chosen) > size / 2  # from all over the range
        assert abs(np.corrcoef(order[first : first + window], range(window))[0, 1]) < 0.2
    assert order[:window] != [permute_windows(i, size, window, key(1, 3)) for i in range(window)]
    assert [permute_windows(i, size, 0, 5) for i in range(50)] == [permute(i, size, 5) for i in range(50)]


def test_permute_windows__neighbours_part_in_another_epoch() -> None:
    """Runs begin elsewhere in each epoch, so no two images are always in the same window."""
    size, window = 1000, 320
    together = 0
    for epoch in range(40):
        place = {permute_windows(i, size, window, key(0, epoch)): i // window for i in range(size)}
        together += place[234] == place[235]
    assert 20 < together < 40


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), KEYS)
def test_permute__is_a_bijection(size: int, permutation_key: int) -> None:
    assert sorted(permute(i, size, permutation_key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", range(1, 70))
def test_permute__is_a_bijection_at_every_small_size(size: int) -> None:
    assert {permute(i, size, key(size)) for i in range(size)} == set(range(size))


@pytest.mark.parametrize("size", [10**9, 2**32, 2**32 + 1, 10**12])
def test_permute__of_a_billion_is_in_range_and_distinct(size: int) -> None:
    indices = [*range(1000), *range(size - 1000, size), *range(0, size, size // 1000)]
    images = {index: permute(index, size, 7) for index in indices}
    assert all(0 <= image < size for image in images.values())
    assert len(set(images.values())) == len(images)
    assert abs(np.mean(list(images.values())) / size - 0.5) < 0.05


def test_permute__differs_by_key() -> None:
    orders = {tuple(permute(i, 100, key(seed, epoch)) for i in range(100)) for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100


@pytest.mark.parametrize("size", [2, 3, 17, 24, 100])  # with 4 to 16 images, some positions are 15% likelier
def test_permute__sends_every_index_everywhere_equally_often(size: int) -> None:
    draws = 4000
    for index in (0, size // 2, size - 1):
        counts = Counter(permute(index, size, key(0, epoch)) for epoch in range(draws))
        chi_squared = sum((counts[i] - draws / size) ** 2 / (draws / size) for i in range(size))
        freedom = size - 1
        assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("index", [-1, 5, 6])
def test_permute__refuses_an_index_outside(index: int) -> None:
    with pytest.raises(IndexError, match=r"range\(5\)"):
        permute(index, 5, 0)


LAYOUTS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # ranks, accumulation, micro-batch


def positions(start: int, stop: int, micro: int, ranks: int, accumulation: int) -> list[BatchPositions]:
    """Return the positions of each rank."""
    return [
        BatchPositions(
            start_step=start,
            stop_step=stop,
            batch_size=micro * ranks * accumulation,
            micro_batch_size=micro,
            rank=rank,
            world_size=ranks,
        )
        for rank in range(ranks)
    ]


@given(LAYOUTS, st.integers(0, 1000), st.integers(0, 5))
def test_batch_positions__global_batches_are_the_same_for_any_layout(
    layout: tuple[int, int, int], start: int, num_steps: int
) -> None:
    ranks, accumulation, micro = layout
    readers = [list(reader) for reader in positions(start, start + num_steps, micro, ranks, accumulation)]
    batch_size = ranks * accumulation * micro
    assert all(len(reader) == num_steps * accumulation for reader in readers)
    for step in range(num_steps):
        # The batch is divided by micro-batch, and each micro-batch by rank.
        read = [
            position
            for number in range(step * accumulation, (step + 1) * accumulation)
            for reader in readers
            for position in reader[number]
        ]
        first = (start + step) * batch_size
        assert read == list(range(first, first + batch_size))


@given(LAYOUTS, st.integers(0, 6), st.integers(0, 6))
def test_batch_positions__resume_is_the_tail(layout: tuple[int, int, int], done: int, left: int) -> None:
    ranks, accumulation, micro = layout
    uninterrupted = positions(0, done + left, micro, ranks, accumulation)
    resumed = positions(done, done + left, micro, ranks, accumulation)
    for all_positions, tail in zip(uninterrupted, resumed, strict=True):
        assert list(all_positions)[done * accumulation :] == list(tail)
        assert [tail[i] for i in range(len(tail))] == list(tail)


def test_batch_positions__refuses_an_uneven_batch() -> None:
    with pytest.raises(ValueError, match="10 is not a multiple of 4 x 2"):
        BatchPositions(start_step=0, stop_step=1, batch_size=10, micro_batch_size=4, rank=0, world_size=2)


@pytest.mark.parametrize("number", [-1, 4])
def test_batch_positions__ends(number: int) -> None:
    (reader,) = positions(3, 5, 2, 1, 2)
    with pytest.raises(IndexError):
        reader[number]
