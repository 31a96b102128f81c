"""Position and content: the crossed probes, the position dependence of a tokenizer, and the baseline of positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pecobook.analysis.position import position_baseline
from pecobook.analysis.reconstruction import decode_all, encode_all, psnr
from pecobook.commands.analyze.measure import code_probes, evaluate_tokenizer
from tests.analysis.fakes import GreyTokenizer

CONTENTS = 6


def labelled_contents(seed: int, count: int = 300, grid: tuple[int, int] = (4, 4)) -> tuple[Tensor, Tensor]:
    """Return contents (N, h, w), of which each of the three classes has two of its own and shares none, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return 2 * labels[:, None, None] + torch.randint(2, (count, *grid), generator=generator), labels


def private(contents: Tensor) -> Tensor:
    """Give each position a vocabulary of its own: the code determines the content, at one position only."""
    return contents + CONTENTS * torch.arange(contents[0].numel()).view(contents.shape[1:])


def probes(codes: Tensor, labels: Tensor, train: tuple[Tensor, Tensor]) -> dict[str, Any]:
    num_codewords = CONTENTS * codes[0].numel()
    codebook = torch.randn(num_codewords, 16, generator=torch.Generator().manual_seed(9))
    tokenizer = SimpleNamespace(codebook=codebook, num_codewords=num_codewords)
    values, correct = code_probes(tokenizer, codes, labels, lambda: train, seed=0)
    for name, is_correct in correct.items():
        assert 100 * is_correct.mean() == pytest.approx(values[name], abs=1e-3)
    return values


def test_crossed_probes__drop_to_chance_for_a_private_vocabulary_at_each_position() -> None:
    (train, train_labels), (test, labels) = labelled_contents(0), labelled_contents(1)
    values = probes(private(test), labels, (private(train), train_labels))
    assert values["codeword_probe"] > 95
    assert values["bag_probe"] > 95
    for name in ("crossed_probe", "crossed_bag_probe"):
        assert values[name] == pytest.approx(100 / 3, abs=3 * values[f"{name}_error"])


def test_crossed_probes__keep_the_accuracy_of_codes_that_mean_the_same_at_every_position() -> None:
    values = probes(*labelled_contents(1), labelled_contents(0))
    for name in ("codeword_probe", "bag_probe", "crossed_probe", "crossed_bag_probe"):
        assert values[name] > 95


def test_crossed_probes__need_two_positions_in_each_half() -> None:
    values = probes(*labelled_contents(1, grid=(1, 3)), labelled_contents(0, grid=(1, 3)))
    assert values["bag_probe"] > 95
    assert values["crossed_probe"] is values["crossed_probe_error"] is values["crossed_bag_probe"] is None
    assert probes(*labelled_contents(1, grid=(1, 1)), labelled_contents(0, grid=(1, 1)))["bag_probe"] > 95


class PositionTokenizer(GreyTokenizer):
    """Encodes only the position of a patch."""

    def encode(self, images: Tensor) -> Tensor:
        return torch.arange(16).view(4, 4).expand(len(images), 4, 4)


def test_evaluate_tokenizer__measures_the_position() -> None:
    images = torch.rand(30, 3, 20, 20, generator=torch.Generator().manual_seed(0))

    def position_of(tokenizer: GreyTokenizer) -> dict[str, Any]:
        metrics, _ = evaluate_tokenizer(
            "x", tokenizer, images[..., :16, :16], None, lambda: None, None, larger=images, seed=0
        )
        return dict(metrics.values["position"])

    position = position_of(PositionTokenizer(levels=16))
    assert set(position) == {"share", "null_share", "bound", "null_bound", "moved"}
    assert (position["share"], position["bound"], position["null_bound"]) == (1, 100, 0)
    assert position["null_share"] < 0.2
    assert position["moved"] == {"roll": 0, "crop": 0}
    position = position_of(GreyTokenizer(levels=256))
    assert position["share"] == pytest.approx(position["null_share"], abs=0.05)
    assert position["moved"] == {"roll": 100, "crop": 100}


def test_evaluate_tokenizer__measures_bytes_like_floats_and_bounds_the_bags(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (130, 3, 20, 20), dtype=torch.uint8, generator=generator)
    labels = torch.arange(130) % 2
    tokenizer = GreyTokenizer(levels=16)

    def values_of(images: Tensor) -> dict[str, Any]:
        crops, larger = images[..., :16, :16], pixels.float() / 255
        train = encode_all(tokenizer, crops), labels
        return dict(
            evaluate_tokenizer("x", tokenizer, crops, labels, lambda: train, None, larger=larger, seed=0)[0].values
        )

    whole = values_of(pixels)
    assert whole == values_of(pixels.float() / 255)
    assert (whole["num_images"], whole["num_train"], whole["num_train_bag"]) == (130, 130, 130)
    restored = decode_all(tokenizer, encode_all(tokenizer, pixels[..., :16, :16]))
    expected = psnr(pixels[..., :16, :16].float() / 255, restored).mean()
    assert whole["psnr"] == pytest.approx(float(expected), abs=1e-3)
    monkeypatch.setattr("pecobook.commands.analyze.measure._BAG_VALUES", 16 * 40 + 1)
    few = values_of(pixels)
    assert (few["num_train"], few["num_train_bag"]) == (130, 40)
    assert few["codeword_probe"] == whole["codeword_probe"]


def test_position_baseline__predicts_each_image_from_other_images() -> None:
    codes = torch.tensor([[[1, 2]], [[1, 3]], [[1, 2]], [[4, 3]], [[0, 3]]])
    mask = torch.ones_like(codes, dtype=torch.bool)
    # Images 0, 2 and 4 are predicted as 1 (of 1 and 4) and 3; images 1 and 3 are predicted as 1 and 2.
    assert position_baseline(codes, mask) == pytest.approx(100 * (1 + 1 + 1 + 0 + 1) / 10)
    mask[:, :, 1] = False
    assert position_baseline(codes, mask) == pytest.approx(100 * (1 + 1 + 1 + 0 + 0) / 5)
    assert position_baseline(codes[:1], mask[:1]) is None
