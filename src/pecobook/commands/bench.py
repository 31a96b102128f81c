"""`pecobook bench pretrain`: images per second, memory, FLOP/s and the time of each part of pre-training."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pecobook.data.batch import Batch
from pecobook.data.masking import make_mask
from pecobook.data.sampler import BatchPositions
from pecobook.data.stream import Stream, default_workers, load, to_device
from pecobook.data.views import colour_draws
from pecobook.engine.attention import trainable_attention
from pecobook.engine.dry_run import autocast
from pecobook.engine.launch import resolve_precision
from pecobook.engine.optim import build_optimizer
from pecobook.engine.value_range import open_readable
from pecobook.models.masked_check import check_grids
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.recipes import DEFAULT_RECIPE, RECIPES, recipe
from pecobook.settings.bench import BenchConfig
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.values import replace
from pecobook.stages.codebook import build_tokenizer
from pecobook.stages.pretrain import PretrainStage, encode_views
from pecobook.utils import devices
from pecobook.utils.files import write_json
from pecobook.utils.output_folder import check_new_file
from pecobook.utils.printer import show


def bench(config: BenchConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Measure, print and return the figures: seconds per step by part, images per second, MiB, FLOP/s, share of peak.

    Raises:
        PecobookError: the recipe, the tokenizer or the data does not exist, or the file exists already.
    """
    config = replace(config or BenchConfig(), settings)
    check_new_file(config.out)
    pretraining = _settings(config)
    device = devices.device()
    torch.manual_seed(0)
    stage = PretrainStage(pretraining, None if config.tokenizer else _random_tokenizer(config.recipe))
    check_grids(pretraining, stage.model.backbone, stage.tokenizer)
    stage.to(device).train()
    benchmark = Benchmark(config, pretraining, stage, device)
    with trainable_attention(device, pretraining.attention):
        parts = benchmark.part_seconds()
        step_seconds, memory = benchmark.step_seconds()
    flops = benchmark.flops()
    peak = matmul_peak(device, pretraining.precision)
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "recipe": config.recipe,
        "precision": pretraining.precision,
        "batch_size": pretraining.batch_size,
        "seconds": parts,
        "seconds_online": step_seconds["online"],
        "seconds_from_bank": step_seconds["bank"],
        "images_per_second_online": pretraining.batch_size / step_seconds["online"],
        "images_per_second_from_bank": pretraining.batch_size / step_seconds["bank"],
        "images_per_second_data": pretraining.batch_size / parts["data"] if parts.get("data") else None,
        "peak_mib": memory / 2**20,
        "gflop_per_image": flops / pretraining.batch_size / 1e9,
        "tflops": flops / step_seconds["bank"] / 1e12,
        "tflops_peak": peak / 1e12,
        "share_of_peak": flops / step_seconds["bank"] / peak,
    }
    show(_table(figures))
    if config.out:
        write_json(Path(config.out), figures)
    return figures


def _settings(config: BenchConfig) -> PretrainConfig:
    batch_size = config.batch_size or (128 if torch.cuda.is_available() else 8)
    changes = {"data": config.data, "value_range": config.value_range, "batch_size": batch_size}
    changes |= {"precision": config.precision, "tokenizer": config.tokenizer}
    settings: PretrainConfig = replace(recipe("pretrain", config.recipe), changes)
    return dataclasses.replace(settings, precision=resolve_precision(settings))  # type: ignore[arg-type]


def _random_tokenizer(recipe_name: str) -> PerceptualTokenizer:
    """Build the tokenizer of the codebook recipe with this name (or else the paper's) with random weights."""
    config = recipe("codebook", recipe_name if recipe_name in RECIPES["codebook"] else DEFAULT_RECIPE)
    return build_tokenizer(config).eval().requires_grad_(False)


class Benchmark:
    """Times the parts and the whole of a pre-training step on one device."""

    def __init__(
        self, config: BenchConfig, settings: PretrainConfig, stage: PretrainStage, device: torch.device
    ) -> None:
        self.config, self.settings, self.stage, self.device = config, settings, stage, device
        if config.compile:
            stage.model.compile()
        groups = stage.parameter_groups(settings.optim)
        self.optimizer = build_optimizer(groups, settings.optim)
        self.batch = self._random_batch()

    def _random_batch(self) -> Batch:
        batch_size, size = self.settings.batch_size, self.settings.image_size
        masks = [make_mask(index, self.stage.model.grid, self.settings.mask) for index in range(batch_size)]
        batch = Batch(
            image=torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8),
            colour=torch.stack([colour_draws(index) for index in range(batch_size)]),
            mask=torch.stack(masks),
        )
        batch = to_device(batch, self.device)
        if self.settings.target == "tokens":
            batch["codes"] = self._random_codes()
        return batch

    def _random_codes(self) -> Tensor:
        num_codewords = self.stage.tokenizer.num_codewords if self.stage.tokenizer is not None else 1
        return torch.randint(num_codewords, (self.settings.batch_size, *self.stage.model.grid), device=self.device)

    def autocast(self) -> torch.autocast:
        """Compute in the precision that the settings name."""
        return autocast(self.settings.precision, self.device)

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the mean seconds of a call, after warm-up calls."""
        for _ in range(self.config.steps if self.device.type == "cuda" else 1):
            function()
        devices.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.config.steps):
            function()
        devices.synchronize(self.device)
        return (time.perf_counter() - start) / self.config.steps

    def part_seconds(self) -> dict[str, float]:
        """Return the seconds of data, tokenizer, forward, backward and optimizer, each measured alone."""
        settings = self.settings
        seconds = {"data": self._data_seconds()} if self.config.data_steps else {}
        if settings.target == "tokens":

            def tokenize() -> None:
                with torch.no_grad(), self.autocast():
                    images = self.stage.views.pixels(self.batch, training=True)
                    encode_views(self.stage.tokenizer, images, settings.tokenizer_size)

            seconds["tokenizer"] = self.seconds(tokenize)

        def forward() -> Tensor:
            with self.autocast():
                loss: Tensor = self.stage(self.batch).loss
            return loss

        seconds["forward"] = self.seconds(forward)
        seconds["backward"] = self.seconds(lambda: forward().backward()) - seconds["forward"]  # type: ignore[no-untyped-call]
        seconds["optimizer"] = self.seconds(self.optimizer.step)
        self.optimizer.zero_grad()
        return seconds

    def step_seconds(self) -> tuple[dict[str, float], int]:
        """Return the seconds of a whole step, and the peak memory of a step with codes from a bank, bytes.

        `bank` is a step that reads its codes from the batch; in `online` the tokenizer computes them.
        """

        def step() -> None:
            with self.autocast():
                loss = self.stage(self.batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.stage.model.parameters(), self.settings.optim.clip_grad or 1e9)
            self.optimizer.step()
            self.optimizer.zero_grad()

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = {"bank": self.seconds(step)}
        memory = devices.peak_memory(self.device)
        self.batch.pop("codes", None)
        seconds["online"] = self.seconds(step)
        return seconds, memory

    def flops(self) -> float:
        """Count the floating-point operations of the model in one step, forward and backward."""
        with FlopCounterMode(display=False) as counter, self.autocast():
            self.stage({**self.batch, "codes": self._random_codes()}).loss.backward()
        self.optimizer.zero_grad()
        return float(counter.get_total_flops())

    def _data_seconds(self) -> float:
        """Return the seconds that all workers together take to read, crop and mask one batch."""
        settings, companion = self.settings, self.stage.companions()[0]
        train = open_readable(settings.data, settings.value_range, [settings.tokenizer]).train
        stream = Stream(train, PretrainStage.view(settings), settings.seed, companion=companion)
        count, size = self.config.data_steps + 1, settings.batch_size
        positions = BatchPositions(
            start_step=0, stop_step=count, batch_size=size, micro_batch_size=size, rank=0, world_size=1
        )
        batches = load(stream, positions, workers=default_workers(1), device=self.device)
        next(batches)  # the first batch includes the start of the workers
        start = time.perf_counter()
        for _ in batches:
            pass
        return (time.perf_counter() - start) / self.config.data_steps


def matmul_peak(device: torch.device, precision: str, *, size: int = 0, seconds: float = 1.0) -> float:
    """Measure the FLOP/s of a large matrix product on this device, the peak that a model is compared with."""
    size = size or (8192 if device.type == "cuda" else 1536)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    devices.synchronize(device)
    best, end = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        devices.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _table(figures: dict[str, Any]) -> str:
    parts = "\n".join(f"  {name:<10} {1000 * value:10.1f} ms" for name, value in figures["seconds"].items())
    data = figures["images_per_second_data"]
    lines = [
        f"{figures['recipe']} on {figures['device']}, {figures['precision']}, batch {figures['batch_size']}",
        f"each part alone:\n{parts}",
        f"from a token bank  {figures['images_per_second_from_bank']:10.1f} images/s",
        f"with the tokenizer {figures['images_per_second_online']:10.1f} images/s",
        *([f"data alone         {data:10.1f} images/s"] if data else []),
        f"peak memory        {figures['peak_mib']:10.0f} MiB",
        f"model              {figures['gflop_per_image']:10.1f} GFLOP an image, {figures['tflops']:.2f} TFLOP/s: "
        f"{figures['share_of_peak']:.0%} of the {figures['tflops_peak']:.2f} TFLOP/s of a large matrix product here",
    ]
    return "\n".join(lines)
