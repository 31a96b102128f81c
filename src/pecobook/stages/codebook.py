"""Train the tokenizer: a VQ-VAE whose codebook is learned under a perceptual loss (PeCo, equations 3 to 5).

    loss = pixel_weight x L_pixel + lambda x L_percep + beta x commitment

The codebook itself follows moving averages (`pecobook.models.quantizer`), which replaces equation 3's middle term.
What the paper compares this with is here too: the adversarial term of equation 8 (Table 7), and losses on the codewords
themselves (Table 6).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale

from pecobook.analysis.codewords import code_usage, distinct_codewords
from pecobook.analysis.reconstruction import psnr, ssim
from pecobook.data.batch import Batch
from pecobook.data.sampler import key
from pecobook.data.source import Splits
from pecobook.data.stream import ViewFunction
from pecobook.data.views import central_view, random_crop
from pecobook.engine.launch import check_min_batch
from pecobook.engine.stage import Stage, StageOutput
from pecobook.errors import ConfigError
from pecobook.models.discriminator import PatchDiscriminator, adversarial_losses
from pecobook.models.explicit import CodewordClassifier, CodewordContrast
from pecobook.models.perceptual import PerceptualDistance, perceptual_distance
from pecobook.models.quantizer import Quantized, VectorQuantizer
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.durations import steps
from pecobook.settings.tokenizer import TokenizerConfig
from pecobook.utils.distributed import mean_over_ranks
from pecobook.utils.images import to_float


class CodebookStage(Stage[CodebookConfig]):
    """Tokenizer, frozen perceptual network and loss.

    Args:
        config: all settings.
        num_classes: of the labels, for the classification of Table 6.
        perceptual: what `perceptual_distance` gives; None opens what the settings name.
    """

    command = "codebook"

    def __init__(
        self, config: CodebookConfig, num_classes: int = 0, perceptual: PerceptualDistance | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = build_tokenizer(config)
        self.perceptual = perceptual or perceptual_distance(config.perceptual, config.seed)
        self.discriminator = self.classifier = self.contrast = None
        if config.adversarial.weight > 0:
            self.discriminator = PatchDiscriminator(config.adversarial, config.model.in_channels)
        if config.explicit.kind == "classification":
            self.classifier = CodewordClassifier(config.model.latent_dim, num_classes)
        elif config.explicit.kind == "contrastive":
            self.min_batch_size, self.needs_full_batch_keys = 2, True  # an image is told from all images of a step
            self.contrast = CodewordContrast(self.tokenizer.encoder, config.model.latent_dim, config.explicit)

    def forward(self, batch: Batch) -> StageOutput:
        """Equation 5, and what is added to it, on a batch of uint8 images."""
        if "ahead" in batch:
            return StageOutput(None, {}, rows={"keys": self._keys(batch)})
        if self.contrast is not None and self.training and "keys" not in batch:
            batch = {**batch, "keys": self._keys(batch)}
        images = self._images(batch["image"])
        coded = self.tokenizer.quantizer(self.tokenizer.latent(images))
        restored = self.tokenizer.render(coded.quantized).float()
        loss, metrics = self.reconstruction(images, restored)
        beta = self.config.quantizer.commitment
        rest = beta * coded.commitment_loss
        if self.config.quantizer.learning == "gradient":
            rest = rest + coded.codebook_loss
        metrics["commitment"] = coded.commitment_loss
        fooled, own = self._adversarial(images, restored, metrics)
        loss, rest = loss + self._adversarial_weight() * fooled, rest + self._explicit(batch, coded, metrics)
        metrics["loss"] = loss + rest  # what is shown, since a balanced loss is always near 1
        if self.config.balance:
            # The mean over ranks, so that many devices learn what one would.
            loss = loss / mean_over_ranks(loss.detach()).clamp_min(1e-6)
        metrics |= self.health()
        pictures, rows = {}, {}
        if not self.training:
            shown = restored.clamp(0, 1)
            metrics |= {"psnr": psnr(shown, images).mean(), "ssim": ssim(shown, images).mean()}
            pictures, rows = {"images": images, "reconstructions": restored}, {"codes": coded.codes}
        return StageOutput(loss + rest + own, {name: value.detach() for name, value in metrics.items()}, pictures, rows)

    def summarise(self, rows: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, float]:
        """How many codewords all held-out images together use, and how evenly."""
        usage = code_usage(rows["codes"], self.config.quantizer.num_codewords)
        return {"codes_used": usage.codes_used, "codes_perplexity": usage.perplexity}

    def _images(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to what the tokenizer reads, (B, C, H, W) in [0, 1]."""
        images = to_float(pixels)
        return rgb_to_grayscale(images) if self.config.model.in_channels == 1 else images

    def reconstruction(self, images: Tensor, restored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixel and perceptual loss, weighted, and their metrics; both images float (B, C, H, W) in [0, 1]."""
        pixel = 4 * F.mse_loss(restored, images)  # 4: the error is meant on [-1, 1]
        # In training not torchmetrics', which waits for the device; evaluation measures with it.
        error = F.mse_loss(restored.detach().clamp(0, 1), images, reduction="none").flatten(1).mean(1)  # (B,)
        metrics = {"pixel": pixel, "psnr": -10 * error.log10().mean()}
        loss = self.config.pixel_weight * pixel
        if self.perceptual is not None:
            with torch.no_grad():
                target = self.perceptual.features(images)
            metrics["perceptual"] = self.perceptual.to_target(target, restored).mean()
            loss = loss + self._lambda() * metrics["perceptual"]
        return loss, metrics

    def _lambda(self) -> float | Tensor:
        """Weight of the perceptual loss at this step, equation 5's lambda after its warm-up."""
        own = self.config.perceptual
        if own.warmup == 0:
            return own.weight
        # From the buffer, not from a Python count: torch.compile would compile anew at each step.
        return own.weight * ((self.tokenizer.quantizer.num_updates + 1) / (own.warmup + 1)).clamp_max(1.0)

    def _adversarial_weight(self) -> float | Tensor:
        """Weight of equation 8's term at this step."""
        own = self.config.adversarial
        return own.weight if own.start == 0 else own.weight * (self.tokenizer.quantizer.num_updates >= own.start)

    def _adversarial(self, images: Tensor, restored: Tensor, metrics: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Equation 8, unweighted: what the autoencoder minimises, and what the discriminator does. () each."""
        if self.discriminator is None or not self.training:
            return images.new_zeros(()), images.new_zeros(())
        fooled, own = adversarial_losses(self.discriminator, images, restored)
        metrics |= {"adversarial": fooled, "discriminator": own}
        return fooled, own

    def _explicit(self, batch: Batch, coded: Quantized, metrics: dict[str, Tensor]) -> Tensor:
        """Table 6's loss on codewords, weighted: ()."""
        if not self.training or self.config.explicit.kind == "none":
            return coded.commitment_loss.new_zeros(())
        if self.classifier is not None:
            loss, accuracy = self.classifier.loss(coded.quantized, batch["label"])
        else:
            assert self.contrast is not None
            loss, accuracy = self.contrast.loss(coded.quantized, batch["keys"])
        metrics |= {"explicit": loss, "explicit_accuracy": 100 * accuracy}
        return self.config.explicit.weight * loss

    def _keys(self, batch: Batch) -> Tensor:
        """Keys (B, out) of the other view of each image."""
        assert self.contrast is not None
        return self.contrast.keys(self._images(batch["other"]) * 2 - 1, self.tokenizer.quantizer)

    def health(self) -> dict[str, Tensor]:
        """Codewords that vectors chose within the last `revive_after` steps (100 at least), and perplexity of the
        averaged usage; a codeword that was revived and not chosen since counts in neither.
        """
        quantizer = self.tokenizer.quantizer
        share = quantizer.usage / quantizer.usage.sum().clamp_min(1e-12)  # (K,)
        alive = (quantizer.unused < max(quantizer.config.revive_after, 100)).sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        return {
            "codes_alive": alive.float(),
            "codes_dead": quantizer.num_codewords - alive.float(),
            "perplexity": entropy.exp(),
            "revived": quantizer.num_revived.float(),
        }

    def after_step(self, step: int, total: int) -> None:
        """Move the codebook, and the contrastive loss's second encoder."""
        self.tokenizer.quantizer.update()
        if self.contrast is not None:
            self.contrast.after_step(self.tokenizer.encoder)

    def warning(self, metrics: dict[str, float], step: int) -> str | None:
        """Say when less than a quarter of the codebook is in use, next to all vectors choose a few codewords, or next
        to all codewords in use are copies of a few.
        """
        own, K = self.config.quantizer, self.config.quantizer.num_codewords
        # Before, every codeword counts as alive or is just being started.
        if step < own.start_after + 2 * max(own.revive_after, 100):
            return None
        # A revived codeword, being a vector of the batch, is chosen once or twice even when all else has collapsed.
        used = metrics["codes_alive"] >= K / 4 and metrics["perplexity"] >= K / 16
        # And where all vectors are next to a few points, those revived there share them out, by noise or by rounding.
        distinct = distinct_codewords(self.tokenizer.codebook, self.tokenizer.quantizer.usage) if used else 0.0
        if distinct >= K / 16:
            return None
        said = f"Of {K} codewords {metrics['codes_alive']:.0f} are in use (perplexity {metrics['perplexity']:.0f})"
        said += f", but only about {distinct:.0f} of them differ" if used else ""
        remedy = "a lower --optim.lr, or --model.latent-norm true"
        if own.revive_after == 0 or own.revive_after > 100:
            remedy = f"--quantizer.revive-after 100, {remedy}"
        return f"{said}.\nTry {remedy}; or fewer codewords: --quantizer.num-codewords {max(K // 4, 1)}."

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the tokenizer."""
        own = {name.removeprefix("tokenizer."): value for name, value in state.items() if name.startswith("tokenizer.")}
        self.tokenizer.save_pretrained(folder, state=own, origin=_origin(self.config))
        return self.tokenizer.lines(self.config.out)

    @classmethod
    def check(cls, config: CodebookConfig) -> PerceptualDistance | None:
        """The perceptual network. Raises PecobookError for settings, or weights, that cannot be used."""
        if not config.perceptual.network:
            raise ConfigError(
                "--perceptual.network is missing: give a run of 'pecobook contrast', timm:NAME, or none for pixels "
                "alone."
            )
        if config.explicit.kind == "contrastive":
            check_min_batch(config)
        distance = perceptual_distance(config.perceptual, config.seed)
        if distance is not None:
            distance.check(config.image_size, config.image_size)
        return distance

    @classmethod
    def needs_labels(cls, config: CodebookConfig) -> bool:
        """Whether images without labels are of no use."""
        return config.explicit.kind == "classification"

    @classmethod
    def build(cls, config: CodebookConfig, splits: Splits, made: PerceptualDistance | None = None) -> CodebookStage:
        """The stage, whose tokenizer has random weights."""
        total = steps(config.max_steps, num_images=len(splits.train), batch_size=config.batch_size)
        # A training that ends before its codebook starts would export a random one.
        own = dataclasses.replace(config.quantizer, start_after=min(config.quantizer.start_after, total // 2))
        return cls(dataclasses.replace(config, quantizer=own), len(splits.train.classes or ()), made)

    @classmethod
    def view(cls, config: CodebookConfig) -> ViewFunction:
        """What training reads of an image."""
        other = config.explicit.kind == "contrastive"
        return partial(_random_view, size=config.image_size, min_area=config.min_crop, other=other)

    @classmethod
    def evaluation_view(cls, config: CodebookConfig) -> ViewFunction:
        """What evaluation reads of a held-out image."""
        return partial(central_view, size=config.image_size)


def _origin(config: CodebookConfig) -> str:
    """How a tokenizer was trained, for its card."""
    own = config.perceptual
    features = "pixels alone"
    if own.network != "none" and own.weight > 0:
        layers = ", ".join(map(str, own.layers))
        weights = f" ({own.weights})" if own.weights else ""
        features = f"pixels and layers {layers} of {own.network}{weights}, lambda {own.weight:g}"
    length = f"{config.max_steps} steps" if config.max_steps.isdigit() else config.max_steps
    return f"`pecobook codebook`, on `{config.data}` for {length} at batch {config.batch_size}, under {features}."


def build_tokenizer(config: CodebookConfig) -> PerceptualTokenizer:
    """The tokenizer that these settings train, with random weights."""
    own = config.quantizer
    quantizer = VectorQuantizer(own, config.model.latent_dim, seed=config.seed)
    shape = TokenizerConfig(model=config.model, num_codewords=own.num_codewords, image_size=config.image_size)
    return PerceptualTokenizer(shape, quantizer)


def _random_view(image: Tensor, view_key: int, *, size: int, min_area: float, other: bool) -> dict[str, Tensor]:
    sample = {"image": random_crop(image, size, view_key, min_area=min_area)}
    if other:
        sample["other"] = random_crop(image, size, key(view_key, 1), min_area=min_area)
    return sample
