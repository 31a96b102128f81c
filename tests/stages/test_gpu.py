"""Every stage on a CUDA device: it trains, evaluates, resumes, and exports weights that load on a CPU."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pecobook.engine.feed import Feed
from pecobook.engine.skipped import Skipped
from pecobook.engine.speed import Speed
from pecobook.models.dense.segmenter import Segmenter
from pecobook.settings.segment import SegmentTestConfig
from tests.runs import SMALL, export_bytes, inputs, losses, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("command", list(SMALL))
def test_train__on_a_gpu(command: str, precision: str, images: Path, needs: dict[str, str], tmp_path: Path) -> None:
    more: dict[str, Any] = {**needs, "precision": precision, "devices": "1"}
    more |= {"max_steps": "6", "save_every": 3, "sample_every": 3}
    run = train(command, images, tmp_path / "run", **more)
    run_losses = losses(run)
    assert len(run_losses) == 6
    assert all(map(math.isfinite, run_losses))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    shutil.rmtree(run / "export")
    train(command, images, run, **more, resume=True)
    weights = load_file(run / "export" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())


# PyTorch has no deterministic kernels for some losses and poolings of segmentation and detection.
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("command", ["contrast", "codebook", "pretrain", "finetune"])
def test_resume__deterministic_gives_equal_bits_on_a_gpu(
    command: str, precision: str, images: Path, needs: dict[str, str], tmp_path: Path
) -> None:
    more: dict[str, Any] = {**needs, "precision": precision, "devices": "1"}
    more |= {"max_steps": "6", "save_every": 3, "deterministic": True}
    straight = train(command, images, tmp_path / "straight", **more)
    parts = train(command, images, tmp_path / "parts", **more)
    assert losses(parts) == losses(straight)
    shutil.rmtree(parts / "checkpoints" / "step-00000006")
    shutil.rmtree(parts / "export")
    train(command, images, parts, **more, resume=True)
    assert export_bytes(parts) == export_bytes(straight)
    assert not torch.are_deterministic_algorithms_enabled()


def test_feed__batches_arrive_whole_on_a_stream_of_their_own() -> None:
    device = torch.device("cuda")
    speed = Speed(0, 0.0, batch_size=1, flop=lambda: None, device=device, num_devices=1, precision="bf16")
    pixels = [torch.full((64, 3, 224, 224), number, dtype=torch.uint8).pin_memory() for number in range(8)]
    batches: Any = iter([{"image": image, "skipped": []} for image in pixels])
    sums = [batch["image"].float().mean() for batch in Feed(batches, device, speed, Skipped(None))]
    assert [float(value) for value in sums] == list(range(8))


@pytest.mark.parametrize(
    ("command", "settings"), [("codebook", {}), ("pretrain", {}), ("pretrain", {"residual": "bf16"})]
)
def test_train__compiled_on_a_gpu(
    command: str, settings: dict[str, Any], images: Path, needs: dict[str, str], tmp_path: Path
) -> None:
    more: dict[str, Any] = {**needs, "precision": "bf16", "devices": "1", **settings}
    plain = losses(train(command, images, tmp_path / "plain", **more))
    compiled = losses(train(command, images, tmp_path / "compiled", **more, compile=True))
    assert compiled == pytest.approx(plain, rel=0.05)


def test_segmenter__gpu_and_cpu_predict_the_same_classes(vit_run: Path, tmp_path: Path, images: Path) -> None:
    more: dict[str, Any] = {**inputs("segment", vit_run, vit_run), "max_steps": "2", "devices": "1"}
    model = Segmenter.from_pretrained(train("segment", images, tmp_path / "run", **more))
    picture = torch.randint(256, (3, 70, 90), dtype=torch.uint8)
    for test in (SegmentTestConfig(), SegmentTestConfig(mode="slide", scales=(1.0, 1.5), flip=True)):
        expected = model.cpu().predict(picture, test)
        assert float((model.cuda().predict(picture, test) == expected).float().mean()) > 0.99
        assert float((model.predict(picture.cuda(), test) == expected).float().mean()) > 0.98
