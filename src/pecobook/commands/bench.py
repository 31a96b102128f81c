"""`pecobook bench pretrain`: images a second, memory and FLOP/s of pre-training here, and where time goes."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecobook.settings.bench import BenchConfig
from pecobook.settings.values import replace
from pecobook.utils.output_folder import check_new_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pecobook.data.batch import Batch
    from pecobook.models.tokenizer import PerceptualTokenizer
    from pecobook.settings.pretrain import PretrainConfig
    from pecobook.stages.pretrain import PretrainStage


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure and print; returns the figures: seconds a step by part, images a second, MiB, FLOP/s, share of peak.

    Raises:
        PecobookError: an unknown recipe, tokenizer or data, or a file that is there already.
    """
    import torch

    from pecobook.engine.attention import trainable_attention

    check_new_file(config.out)
    settings = _settings(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = _stage(config, settings).to(device).train()
    bench = _Bench(config, settings, stage, device)
    with trainable_attention(device):
        parts = bench.parts()
        whole, memory = bench.whole()
    flops = bench.flops()
    peak = matmul_peak(device, settings.precision)
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "recipe": config.recipe,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "seconds": parts,
        "seconds_online": whole["online"],
        "seconds_from_bank": whole["bank"],
        "images_per_second_online": settings.batch_size / whole["online"],
        "images_per_second_from_bank": settings.batch_size / whole["bank"],
        "images_per_second_data": settings.batch_size / parts["data"] if parts.get("data") else None,
        "peak_mib": memory / 2**20,
        "gflop_per_image": flops / settings.batch_size / 1e9,
        "tflops": flops / whole["bank"] / 1e12,
        "tflops_peak": peak / 1e12,
        "share_of_peak": flops / whole["bank"] / peak,
    }
    print(_table(figures), file=sys.stderr)
    if config.out:
        from pecobook.utils.files import write_atomically

        write_atomically(Path(config.out), (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def _settings(config: BenchConfig) -> PretrainConfig:
    import torch

    from pecobook.engine.launch import resolve_precision
    from pecobook.recipes import recipe

    size = config.batch_size or (128 if torch.cuda.is_available() else 8)
    chosen = {"data": config.data, "batch_size": size, "precision": config.precision, "tokenizer": config.tokenizer}
    settings: PretrainConfig = replace(recipe("pretrain", config.recipe), chosen)
    return dataclasses.replace(settings, precision=resolve_precision(settings))  # type: ignore[arg-type]


def _stage(config: BenchConfig, settings: PretrainConfig) -> PretrainStage:
    import torch

    from pecobook.stages.pretrain import PretrainStage, check_grids

    torch.manual_seed(0)
    stage = PretrainStage(settings, None if config.tokenizer else _stand_in(config.recipe))
    check_grids(settings, stage.model.backbone, stage.tokenizer)
    return stage


def _stand_in(recipe_name: str) -> PerceptualTokenizer:
    """A random tokenizer of the codebook recipe of this name, or of the paper's where there is none."""
    from pecobook.recipes import DEFAULT_RECIPE, RECIPES, recipe
    from pecobook.stages.codebook import build_tokenizer

    own = recipe("codebook", recipe_name if recipe_name in RECIPES["codebook"] else DEFAULT_RECIPE)
    return build_tokenizer(own).eval().requires_grad_(False)


class _Bench:
    def __init__(
        self, config: BenchConfig, settings: PretrainConfig, stage: PretrainStage, device: torch.device
    ) -> None:
        from pecobook.engine.optim import build_optimizer

        self.config, self.settings, self.stage, self.device = config, settings, stage, device
        if config.compile:
            stage.model.compile()
        groups = stage.parameter_groups(settings.optim)
        self.optimizer = build_optimizer(groups, settings.optim)
        self.batch = _random_batch(stage, settings, device)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        import torch

        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = kinds.get(self.settings.precision)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            yield

    def seconds(self, function: Callable[[], object]) -> float:
        """Of one call, on average."""
        for _ in range(self.config.steps if self.device.type == "cuda" else 1):
            function()
        self.wait()
        began = time.perf_counter()
        for _ in range(self.config.steps):
            function()
        self.wait()
        return (time.perf_counter() - began) / self.config.steps

    def wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def parts(self) -> dict[str, float]:
        """Seconds of data, tokenizer, forward, backward and optimizer, each measured by itself."""
        import torch

        from pecobook.stages.pretrain import encode_views

        own = self.settings
        found: dict[str, float] = {}
        if self.config.data_steps:
            found["data"] = self._data()
        if own.target == "tokens":

            def tokenize() -> None:
                with torch.no_grad(), self.autocast():
                    images = self.stage.views.pixels(self.batch, training=True)
                    encode_views(self.stage.tokenizer, images, own.tokenizer_size)

            found["tokenizer"] = self.seconds(tokenize)

        def forward() -> Tensor:
            with self.autocast():
                loss: Tensor = self.stage(self.batch).loss
            return loss

        found["forward"] = self.seconds(forward)
        found["backward"] = self.seconds(lambda: forward().backward()) - found["forward"]  # type: ignore[no-untyped-call]
        found["optimizer"] = self.seconds(self.optimizer.step)
        self.optimizer.zero_grad()
        return found

    def whole(self) -> tuple[dict[str, float], int]:
        """Seconds of a step with codes at hand and with the tokenizer in it; bytes at the peak of the first."""
        import resource

        import torch

        codes = self.batch.pop("codes", None)

        def step() -> None:
            with self.autocast():
                loss = self.stage(self.batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.stage.model.parameters(), self.settings.optim.clip_grad or 1e9)
            self.optimizer.step()
            self.optimizer.zero_grad()

        found = {}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if codes is not None:
            self.batch["codes"] = codes
        found["bank"] = self.seconds(step)
        memory = (
            torch.cuda.max_memory_allocated()
            if self.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        self.batch.pop("codes", None)
        found["online"] = self.seconds(step)
        return found, memory

    def flops(self) -> float:
        """Floating-point operations of the model in one step, forward and backward, counted."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, self.autocast():
            self.stage(self.batch if "codes" in self.batch else {**self.batch, "codes": self._codes()}).loss.backward()
        self.optimizer.zero_grad()
        return float(counter.get_total_flops())

    def _codes(self) -> Tensor:
        return _random_codes(self.stage, self.settings, self.device)

    def _data(self) -> float:
        """Seconds for one batch to be read, cropped and masked, with all workers."""
        from pecobook.data.images import open_images
        from pecobook.data.sampler import BatchPositions
        from pecobook.data.stream import Stream, default_workers, load
        from pecobook.stages.pretrain import PretrainStage

        own, companion = self.settings, self.stage.companions()[0]
        stream = Stream(open_images(own.data).train, PretrainStage.view(own), own.seed, companion=companion)
        count, size = self.config.data_steps + 1, own.batch_size
        positions = BatchPositions(
            start_step=0, stop_step=count, batch_size=size, micro_batch_size=size, rank=0, world_size=1
        )
        batches = load(stream, positions, workers=default_workers(1), pin=self.device.type == "cuda")
        next(batches)  # the workers have started
        began = time.perf_counter()
        for _ in batches:
            pass
        return (time.perf_counter() - began) / self.config.data_steps


def _random_batch(stage: PretrainStage, settings: PretrainConfig, device: torch.device) -> Batch:
    import torch

    from pecobook.data.batch import Batch
    from pecobook.data.stream import to_device
    from pecobook.data.views import colour_draws
    from pecobook.stages.pretrain import make_mask

    count, side = settings.batch_size, settings.image_size
    masks = [make_mask(index, stage.model.grid, settings.mask) for index in range(count)]
    batch = Batch(
        image=torch.randint(256, (count, 3, side, side), dtype=torch.uint8),
        colour=torch.stack([colour_draws(index) for index in range(count)]),
        mask=torch.stack(masks),
    )
    batch = to_device(batch, device)
    if settings.target == "tokens":
        batch["codes"] = _random_codes(stage, settings, device)
    return batch


def _random_codes(stage: PretrainStage, settings: PretrainConfig, device: torch.device) -> Tensor:
    import torch

    most = stage.tokenizer.num_codewords if stage.tokenizer is not None else 1
    return torch.randint(most, (settings.batch_size, *stage.model.grid), device=device)


def matmul_peak(device: torch.device, precision: str, *, size: int = 0, seconds: float = 1.0) -> float:
    """FLOP/s that a large matrix product reaches here, measured: what a model's share of peak is a share of."""
    import torch

    size = size or (8192 if device.type == "cuda" else 1536)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, stop = 0.0, time.perf_counter() + seconds
    a @ b
    wait()
    while time.perf_counter() < stop:
        began = time.perf_counter()
        a @ b
        wait()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def _table(figures: dict[str, Any]) -> str:
    parts = "\n".join(f"  {name:<10} {1000 * value:10.1f} ms" for name, value in figures["seconds"].items())
    data = figures["images_per_second_data"]
    lines = [
        f"{figures['recipe']} on {figures['device']}, {figures['precision']}, batch {figures['batch_size']}",
        f"each part by itself:\n{parts}",
        f"from a token bank  {figures['images_per_second_from_bank']:10.1f} images/s",
        f"tokenizer in each  {figures['images_per_second_online']:10.1f} images/s",
        *([f"data alone         {data:10.1f} images/s"] if data else []),
        f"peak memory        {figures['peak_mib']:10.0f} MiB",
        f"model              {figures['gflop_per_image']:10.1f} GFLOP an image, {figures['tflops']:.2f} TFLOP/s: "
        f"{figures['share_of_peak']:.0%} of the {figures['tflops_peak']:.2f} TFLOP/s of a large matrix product here",
    ]
    return "\n".join(lines)
