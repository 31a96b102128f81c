"""`pecobook bench pretrain`: every part is measured, and the counted operations agree with a formula."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import pecobook
from pecobook import cli
from pecobook.commands.bench import bench, matmul_peak
from pecobook.errors import ConfigError
from pecobook.recipes import RECIPES, pretrain
from pecobook.settings.bench import BenchConfig


def test_bench__measures_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str], codebook_run: Path) -> None:
    words = ["bench", "pretrain", "tiny", "--batch-size", "4", "--steps", "1", "--precision", "fp32"]
    # The tiny recipe's ViT has patches of 8 pixels, the small run's tokenizer codes of 4.
    small = dataclasses.replace(pretrain.tiny(), tokenizer_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES["pretrain"], "tiny", lambda: small)
        cli.main([*words, "--data-steps", "1", "--tokenizer", str(codebook_run), "--out", str(tmp_path / "b.json")])
    figures = json.loads((tmp_path / "b.json").read_text())
    assert set(figures["seconds"]) == {"data", "tokenizer", "forward", "backward", "optimizer"}
    seconds = figures["seconds"]
    # The backward pass is a difference of two measurements, which a busy machine can turn around.
    assert all(math.isfinite(value) if name == "backward" else value > 0 for name, value in seconds.items())
    assert figures["images_per_second_from_bank"] > 0
    assert figures["share_of_peak"] == pytest.approx(figures["tflops"] / figures["tflops_peak"])
    # A ViT of width 128 and depth 6 on 17 tokens: 24 N D^2 a block, and attention; three times that with backward. The
    # MLP of the last block, 16 D^2 a token, computes only the M masked patches. The patch embedding needs no gradient
    # of the pixels.
    N, M, D, depth, K = 17, 6, 128, 6, 24
    blocks = depth * (24 * N * D**2 + 4 * N**2 * D) - 16 * (N - M) * D**2
    patches, head = 2 * 16 * (3 * 64) * D, 2 * M * D * K
    assert figures["gflop_per_image"] == pytest.approx((3 * blocks + 2 * patches + 3 * head) / 1e9, rel=0.03)
    assert "from a token bank" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "cifar10", "tiny-imagenet"])
def test_bench__without_a_tokenizer_builds_one_that_fits_the_recipe(name: str) -> None:
    figures = bench(BenchConfig(recipe=name, batch_size=1, steps=1, data_steps=0, precision="fp32"))
    assert figures["images_per_second_online"] > 0


def test_bench__refuses_a_tokenizer_of_another_grid_before_it_measures(
    codebook_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pecobook.commands.bench.Benchmark.seconds", lambda *_: pytest.fail("a part was measured"))
    with pytest.raises(ConfigError, match="one code for 4 x 4"):
        bench(BenchConfig(recipe="tiny", batch_size=1, data_steps=0, tokenizer=str(codebook_run)))


def test_bench__refuses_other_commands_and_unknown_recipes() -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "codebook"])
    with pytest.raises(ConfigError, match="no recipe 'papr'"):
        pecobook.bench(recipe="papr")


@pytest.mark.parametrize("seconds", [0.05, 0.0], ids=["idle", "too-busy-for-a-second-product"])
def test_matmul_peak__is_a_rate(seconds: float) -> None:
    assert matmul_peak(torch.device("cpu"), "fp32", size=64, seconds=seconds) > 1e6
