"""The sums of one tokenizer and of the originals, batch by batch.

B images per batch, S side in pixels, K codewords.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pecobook.analysis.codewords import usage_from_counts
from pecobook.analysis.fid import FeatureSums, Gaussian, InceptionScore, frechet_distance
from pecobook.analysis.reconstruction import psnr, ssim
from pecobook.commands.evaluate.inputs import Inputs
from pecobook.utils.devices import device, synchronize


class Mean:
    """A mean with its standard error, over values that arrive in batches."""

    def __init__(self) -> None:
        self.count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """Add values (B,)."""
        values = values.cpu().double().flatten()
        self.count += len(values)
        self._sum += float(values.sum())
        self._squares += float(values.square().sum())

    def result(self, digits: int) -> tuple[float | None, float | None]:
        """Return the mean and its standard error; None if they are infinite or unknown."""
        mean = self._sum / self.count
        variance = max(self._squares / self.count - mean**2, 0.0) if math.isfinite(self._squares) else math.nan
        error = math.sqrt(variance / (self.count - 1)) if self.count > 1 else math.nan
        return tuple(round(value, digits) if math.isfinite(value) else None for value in (mean, error))  # type: ignore[return-value]


class Originals:
    """The originals at one image size, shared by all tokenizers with that size."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        # With statistics from a file the originals need not pass through Inception.
        self._inception = inputs.inception if inputs.statistics is None else None
        self.features, self._score = FeatureSums(), InceptionScore(inputs.num_images)
        self._count = 0

    def add(self, pixels: Tensor) -> Tensor:
        """Add uint8 (B, 3, S, S), and return these images' positions in reading order, int64 (B,)."""
        places = torch.arange(self._count, self._count + len(pixels))
        self._count += len(pixels)
        if self._inception is not None:
            features, logits = self._inception(pixels)
            if "rfid" in self._inputs.metrics:
                self.features.add(features)
            self._score.add(logits, places)
        return places

    def result(self) -> dict[str, Any]:
        """Return the Inception score of the originals, if it is measured."""
        if self._inception is None or "is" not in self._inputs.metrics:
            return {}
        return {"is_of_originals": round(self._score.result()[0], 3)}


class TokenizerSums:
    """Everything measured for one tokenizer, which stays on the device until `result`."""

    def __init__(self, inputs: Inputs, number: int, precision: str) -> None:
        self._inputs, self._size = inputs, inputs.sizes[number]
        self._about = {"name": inputs.names[number], "source": inputs.config.tokenizers[number]}
        self._tokenizer = inputs.tokenizers[number].eval()
        self._gflop = gflop(self._tokenizer, self._size) if "speed" in inputs.metrics else {}
        self._tokenizer.to(device())
        self._precision = precision
        self._counts = torch.zeros(self._tokenizer.num_codewords, dtype=torch.int64, device=device())
        self._means = {name: Mean() for name in ("psnr", "ssim", "lpips", "perceptual") if name in inputs.metrics}
        self._features, self._score = FeatureSums(), InceptionScore(inputs.num_images)
        self._speeds: list[tuple[int, float, float]] = []  # images, seconds of encoding, seconds of decoding

    @torch.inference_mode()
    def add(self, images: Tensor, places: Tensor) -> None:
        """Add images, float (B, 3, S, S) in [0, 1], with their positions in reading order."""
        restored = self._reconstruct(images)
        lpips: Any = self._inputs.lpips
        measures: dict[str, Any] = {"psnr": psnr, "ssim": ssim, "perceptual": self._inputs.distance}
        measures["lpips"] = lambda x, y: lpips(2 * x - 1, 2 * y - 1).flatten()
        for name, mean in self._means.items():
            mean.add(measures[name](images, restored))
        if self._inputs.inception is not None:
            features, logits = self._inputs.inception((255 * restored).round().to(torch.uint8))
            if "rfid" in self._inputs.metrics:
                self._features.add(features)
            self._score.add(logits, places)

    def _reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode a batch, and record the codes and the time."""
        where, batch = device(), len(images)
        with torch.autocast(where.type, torch.bfloat16, enabled=self._precision == "bf16"):
            synchronize(where)
            began = time.perf_counter()
            codes = self._tokenizer.encode(images, batch_size=batch, check=False)
            synchronize(where)
            encoded = time.perf_counter()
            restored = self._tokenizer.decode(codes, batch_size=batch)
            synchronize(where)
        self._speeds.append((batch, encoded - began, time.perf_counter() - encoded))
        self._counts += torch.bincount(codes.flatten(), minlength=len(self._counts))
        return restored.float().clamp(0, 1)  # type: ignore[no-any-return]

    def result(self, reference: Gaussian | None) -> dict[str, Any]:
        """Return all figures, and move the tokenizer back to the host."""
        tokenizer, metrics = self._tokenizer.cpu(), self._inputs.metrics
        K, tokens = tokenizer.num_codewords, (self._size // tokenizer.stride) ** 2
        values: dict[str, Any] = {
            **self._about,
            "image_size": self._size,
            "stride": tokenizer.stride,
            "tokens": tokens,
            "num_codewords": K,
            "bits_per_pixel": round(tokens * math.log2(K) / self._size**2, 5),
        }
        if "rfid" in metrics and reference is not None:
            values["rfid"] = round(frechet_distance(reference, self._features.gaussian()), 4)
        if "is" in metrics:
            values["is"], values["is_deviation"] = (round(value, 3) for value in self._score.result())
        for name, mean in self._means.items():
            key = "perceptual_distance" if name == "perceptual" else name
            values[key], values[f"{key}_error"] = mean.result(5)
        if "usage" in metrics:
            usage = usage_from_counts(self._counts.cpu().numpy())
            entropy = math.log2(usage.perplexity)
            values |= {
                "codes_used": usage.codes_used,
                "usage": round(100 * usage.codes_used / K, 2),
                "perplexity": round(usage.perplexity, 2),
                "entropy_bits": round(entropy, 4),
                "entropy_bits_per_pixel": round(tokens * entropy / self._size**2, 5),
            }
        return values | self._gflop | (self._images_per_second() if "speed" in metrics else {})

    def _images_per_second(self) -> dict[str, float]:
        """Return the speeds, excluding the slower first batch if there are more."""
        images, encode, decode = map(sum, zip(*(self._speeds[1:] or self._speeds), strict=True))
        seconds = {"": encode + decode, "encode_": encode, "decode_": decode}
        return {f"{name}images_per_second": round(images / max(value, 1e-9), 2) for name, value in seconds.items()}


def gflop(tokenizer: Any, size: int) -> dict[str, float]:
    """Count the floating-point operations, in 10^9, for one image of `size` pixels, on a copy without weights.

    A product and a sum count as two; the nearest-codeword search is included.
    """
    bare = copy.deepcopy(tokenizer).to("meta")
    images = torch.empty(1, 3, size, size, device="meta")
    counts = {}
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            codes = bare.encode(images, check=False)
        counts["encode_gflop"] = counter.get_total_flops() / 1e9
        with FlopCounterMode(display=False) as counter:
            bare.decode(codes)
        counts["decode_gflop"] = counter.get_total_flops() / 1e9
    return {name: round(value, 4) for name, value in {"gflop": sum(counts.values()), **counts}.items()}
