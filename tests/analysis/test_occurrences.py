"""Where codewords occur, against loops over all patches."""

import numpy as np
import pytest
from scipy.stats import binom

from pecobook.analysis.occurrences import class_counts, main_places, occurrences

K, C = 12, 3
image_codes = np.random.default_rng(0).integers(0, K - 1, (40, 3, 5)) // 2 * 2  # odd codewords and the last are unused
image_labels = np.random.default_rng(1).integers(0, C, 40)


def test_occurrences__are_the_patches_of_each_codeword() -> None:
    found = occurrences(image_codes, K)
    assert found.counts.tolist() == [(image_codes == code).sum() for code in range(K)]
    for code in range(K):
        assert found.of(code).tolist() == np.argwhere(image_codes == code).tolist()
    assert found.codewords().tolist() == np.sort(image_codes.reshape(-1)).tolist()


def test_exemplars__are_of_different_images_first() -> None:
    found = occurrences(image_codes, K)
    drawn = found.exemplars(2, 30)
    assert all(image_codes[image, row, column] == 2 for image, row, column in drawn)
    assert len({tuple(patch) for patch in drawn.tolist()}) == 30
    with_code = int((image_codes == 2).any((1, 2)).sum())
    assert len(np.unique(drawn[:with_code, 0])) == min(with_code, 30)
    assert np.array_equal(drawn, found.exemplars(2, 30))
    assert len(found.exemplars(1, 30)) == 0


def test_main_places__are_the_most_frequent() -> None:
    place, most = main_places(occurrences(image_codes, K))
    for code in range(K):
        counts = (image_codes == code).sum(0).reshape(-1)
        assert most[code] == counts.max()
        assert place[code] == counts.argmax()


def test_class_counts__equal_a_loop_over_images() -> None:
    found = occurrences(image_codes, K)
    table = class_counts(found, image_labels, C)
    expected = [
        (code, label, int(has[image_labels == label].sum()), int((image_codes[image_labels == label] == code).sum()))
        for code in range(K)
        for has in [(image_codes == code).any((1, 2))]
        for label in range(C)
        if has[image_labels == label].any()
    ]
    columns = (table.codeword, table.label, table.images, table.patches)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert table.rows(4) == slice(*np.searchsorted([row[0] for row in expected], [4, 5]).tolist())
    for row, (code, label, images, _) in enumerate(expected):
        with_code = (image_codes == code).any((1, 2)).sum()
        assert table.lift[row] == pytest.approx((images / with_code) / ((image_labels == label).sum() / 40))
    label_of, purity = table.purity(found.counts)
    of_four = {label: patches for code, label, _, patches in expected if code == 4}
    assert of_four[int(label_of[4])] == max(of_four.values())
    assert purity[4] == pytest.approx(100 * max(of_four.values()) / (image_codes == 4).sum())
    assert purity[1] == 0  # of an unused codeword


def test_class_counts__call_evidence_only_what_chance_does_not_make() -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1, 2, 3], 100)
    codes = rng.integers(0, 4, (400, 2, 2))
    codes[labels == 3, 0, 0] = 4  # in all images of the last class, and in 60 others
    codes[rng.permutation(300)[:60], 0, 0] = 4
    codes[:4, 1, 1] = 5  # in four images of the first class alone: too few
    table = class_counts(occurrences(codes, 6), labels, 4)
    evident = list(zip(table.codeword[table.is_evidence], table.label[table.is_evidence], strict=True))
    assert evident == [(4, 3)]
    label, lift = table.best_lift()
    assert (label[4], lift[4]) == (3, pytest.approx((100 / 160) / 0.25))
    assert not lift[[0, 1, 2, 3, 5]].any()


def test_class_counts__correct_the_level_for_codewords_and_classes() -> None:
    for images in (24, 25, 26, 27, 28, 29, 30):
        codes = np.zeros((400, 1, 1), dtype=np.int64)
        codes[:images] = codes[100 : 160 - images] = 1  # in 60 images, of which `images` have the first class
        table = class_counts(occurrences(codes, 9), np.repeat([0, 1, 2, 3], 100), 4)
        chance = binom.sf(images - 1, 60, 0.25)
        assert table.is_evidence[table.rows(1)][0] == (chance < 0.05 / (2 * 4))  # two codewords in use, four classes


def test_class_counts__of_random_labels_are_seldom_evidence() -> None:
    rng = np.random.default_rng(3)
    codes, labels = rng.integers(0, 200, (1000, 4, 4)), rng.integers(0, 20, 1000)
    assert class_counts(occurrences(codes, 200), labels, 20).is_evidence.sum() <= 1
