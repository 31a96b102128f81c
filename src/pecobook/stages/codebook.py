"""Train the tokenizer: a VQ-VAE whose codebook is learned under a perceptual loss (PeCo, equations 3 to 5).

    loss = pixel_weight x L_pixel + lambda x L_percep + beta x commitment

The codebook itself follows moving averages (`pecobook.models.quantizer`), which replaces equation 3's middle term.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.config import OptimConfig, TrainConfig, between, positive
from pecobook.data.images import ImageSource
from pecobook.data.stream import Batch, ViewFunction
from pecobook.data.views import central_view, random_crop, to_float
from pecobook.engine.loop import StageOutput
from pecobook.errors import ConfigError
from pecobook.models.autoencoder import AutoencoderConfig
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.quantizer import VectorQuantizer
from pecobook.models.tokenizer import PerceptualTokenizer, TokenizerConfig
from pecobook.stages.stage import Stage, StageKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The frozen network whose features the reconstruction must match."""

    network: str = ""
    """timm:NAME, a contrast or pretrain run, or none for pixels alone."""
    weights: str = ""
    """A local file of weights, or random for the control; empty takes the network's own."""
    layers: tuple[int, ...] = (3, 6, 9, 12)
    """Layers compared, from 1: blocks of a transformer, stages of a convolutional network."""
    weight: float = 1.0
    """Lambda of equation 5."""
    normalisation: Literal["unit-rms", "layernorm", "none"] = "unit-rms"
    """How activations are normalised before they are compared."""
    input_size: int = 0
    """Side to which images are resized for the network, pixels; 0 keeps theirs (or takes a fixed-size network's)."""

    def __post_init__(self) -> None:
        between(self, 0.0, float("inf"), "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The codebook."""

    num_codewords: int = 8192
    """K."""
    decay: float = 0.99
    """Of the moving averages."""
    eps: float = 1e-5
    """Laplace smoothing of the counts."""
    revive_after: int = 100
    """Steps without use after which a codeword is dead and replaced; 0 never."""
    start_after: int = 0
    """Steps during which latent vectors pass unquantised; k-means then starts the codebook on features that mean
    something. A short training gains much by it."""
    commitment: float = 0.25
    """Beta of equation 3."""

    def __post_init__(self) -> None:
        positive(self, "num_codewords", "eps")
        between(self, 0.0, 1.0, "decay")
        between(self, 0.0, float("inf"), "commitment", "revive_after", "start_after")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookConfig(TrainConfig):
    """Train a perceptual codebook on your images."""

    model: AutoencoderConfig = AutoencoderConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    pixel_weight: float = 1.0
    """Weight of the pixel loss, the mean squared error on [-1, 1]."""
    balance: bool = False
    """Divide pixel and perceptual loss together by their present value, so that commitment weighs against 1 in every
    run. Without it a perceptual term, which is several times the pixel loss, drowns commitment, and runs with and
    without one differ in two things at once."""
    optim: OptimConfig = OptimConfig(name="adam", lr=5e-5, betas=(0.5, 0.95), weight_decay=0.0, warmup="5000")

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, float("inf"), "pixel_weight")
        if self.image_size % self.model.stride:
            raise ConfigError(
                f"--image-size {self.image_size} must be a multiple of {self.model.stride}, "
                "the stride that --model.channels gives."
            )
        if self.pixel_weight == 0 and (self.perceptual.network == "none" or self.perceptual.weight == 0):
            raise ConfigError("There is nothing to learn: --pixel-weight is 0 and there is no perceptual network.")


class CodebookStage(Stage):
    """Tokenizer, frozen perceptual network and loss.

    Args:
        config: all settings.
    """

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        quantizer = VectorQuantizer(
            config.quantizer.num_codewords,
            config.model.latent_dim,
            decay=config.quantizer.decay,
            eps=config.quantizer.eps,
            revive_after=config.quantizer.revive_after,
            start_after=config.quantizer.start_after,
            seed=config.seed,
        )
        shape = TokenizerConfig(
            model=config.model, num_codewords=config.quantizer.num_codewords, image_size=config.image_size
        )
        self.tokenizer = PerceptualTokenizer(shape, quantizer)
        self.perceptual = perceptual_distance(config.perceptual, config.seed)

    def forward(self, batch: Batch) -> StageOutput:
        """Equation 5 on a batch of uint8 images."""
        images = to_float(batch["image"])  # (B, 3, H, W) in [0, 1]
        quantized = self.tokenizer.quantizer(self.tokenizer.latent(images))
        restored = self.tokenizer.render(quantized.quantized).float()
        pixel = 4 * F.mse_loss(restored, images)  # 4: the error is meant on [-1, 1]
        metrics = {"pixel": pixel, "commitment": quantized.commitment_loss, "psnr": psnr(images, restored)}
        loss = self.config.pixel_weight * pixel
        if self.perceptual is not None:
            with torch.no_grad():
                target = self.perceptual.features(images)
            metrics["perceptual"] = self.perceptual.to_target(target, restored).mean()
            loss = loss + self.config.perceptual.weight * metrics["perceptual"]
        commitment = self.config.quantizer.commitment * quantized.commitment_loss
        metrics["loss"] = loss + commitment  # what is shown, since a balanced loss is always near 1
        loss = (loss / loss.detach().clamp_min(1e-6) if self.config.balance else loss) + commitment
        metrics |= self.health()
        pictures = {} if self.training else {"images": images, "reconstructions": restored}
        return StageOutput(loss, {name: value.detach() for name, value in metrics.items()}, pictures)

    def health(self) -> dict[str, Tensor]:
        """Codewords in use within the last `revive_after` steps, and perplexity of the averaged usage."""
        quantizer = self.tokenizer.quantizer
        share = quantizer.ema_count / quantizer.ema_count.sum().clamp_min(1e-12)  # (K,)
        alive = (quantizer.idle < max(quantizer.revive_after, 100)).sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        return {
            "codes_alive": alive.float(),
            "perplexity": entropy.exp(),
            "revived": quantizer.num_revived.float(),
        }

    def after_step(self, step: int, total: int) -> None:  # noqa: ARG002
        """Move the codebook."""
        self.tokenizer.quantizer.update()

    def warning(self, metrics: dict[str, float], step: int) -> str | None:
        """Say when the codebook is collapsing."""
        K = self.config.quantizer.num_codewords
        if metrics["perplexity"] >= 0.05 * K or step < 200:
            return None
        return (
            f"The codebook is collapsing: of {K} codewords it uses about {metrics['perplexity']:.0f} (perplexity).\n"
            "Try fewer --quantizer.num-codewords, a shorter --quantizer.revive-after, or a lower --optim.lr."
        )

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the tokenizer."""
        own = {name.removeprefix("tokenizer."): value for name, value in state.items() if name.startswith("tokenizer.")}
        whole = PerceptualTokenizer(self.tokenizer.config)  # ours may hold this process's shard alone
        whole.load_state_dict(own)
        whole.save_pretrained(folder)
        return 'from pecobook import PerceptualTokenizer\ntokenizer = PerceptualTokenizer.from_pretrained("{path}")'


def psnr(images: Tensor, restored: Tensor) -> Tensor:
    """Mean peak signal-to-noise ratio, dB: float (B, 3, H, W) in [0, 1], and about [0, 1], to ()."""
    error = (restored.clamp(0, 1) - images).square().mean((1, 2, 3)).clamp_min(1e-10)
    return -10 * error.log10().mean()


def perceptual_distance(config: PerceptualConfig, seed: int) -> PerceptualDistance | None:
    """The distance that the settings name, None for none."""
    if config.network == "none" or config.weight == 0:
        return None
    return PerceptualDistance(
        config.network,
        config.layers,
        config.weights or None,
        normalisation=config.normalisation,
        input_size=config.input_size or None,
        seed=seed,
    )


def _check(config: CodebookConfig) -> None:
    if not config.perceptual.network:
        raise ConfigError(
            "--perceptual.network is missing: give a run of 'pecobook contrast', timm:NAME, or none for pixels alone."
        )
    perceptual_distance(config.perceptual, config.seed)


def _build(config: CodebookConfig, source: ImageSource) -> CodebookStage:  # noqa: ARG001
    return CodebookStage(config)


def _random_view(image: Tensor, view_key: int, *, size: int, min_area: float) -> dict[str, Tensor]:
    return {"image": random_crop(image, size, view_key, min_area=min_area)}


def _view(config: CodebookConfig) -> ViewFunction:
    return partial(_random_view, size=config.image_size, min_area=config.min_crop)


def _evaluation_view(config: CodebookConfig) -> ViewFunction:
    return partial(central_view, size=config.image_size)


KIND: StageKind[CodebookConfig] = StageKind("codebook", _check, _build, _view, _evaluation_view)
