"""Train the tokenizer: a VQ-VAE whose codebook is learned with a perceptual loss (PeCo, equations 3 to 5).

    loss = pixel_weight x L_pixel + lambda x L_percep + beta x commitment

The codebook itself is learned by moving averages (`pecobook.models.quantizer`), which replace equation 3's middle term.
The paper's alternatives are here too: the adversarial term of equation 8 (Table 7), and losses on the codewords
themselves (Table 6).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale

from pecobook.analysis.codewords import code_usage, distinct_codewords
from pecobook.analysis.position import position_dependence
from pecobook.analysis.reconstruction import psnr, ssim
from pecobook.data.batch import Batch
from pecobook.data.sampler import key
from pecobook.data.source import Splits
from pecobook.data.stream import ViewFunction
from pecobook.data.views import central_view, random_crop
from pecobook.engine.launch import check_min_batch
from pecobook.engine.stage import Stage, StageOutput, submodule_state
from pecobook.errors import ConfigError
from pecobook.models.control_quantizers import build_quantizer
from pecobook.models.discriminator import PatchDiscriminator, adversarial_losses
from pecobook.models.explicit import CodewordClassifier, CodewordContrast
from pecobook.models.feature_target import FeatureTarget
from pecobook.models.group_norm import GroupNorm
from pecobook.models.initial import Start, start_tokenizer, take_parts, training_weights, write_training_weights
from pecobook.models.perceptual import PerceptualDistance, PerceptualSum, build_perceptual_distance
from pecobook.models.quantizer import Quantized
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.durations import steps
from pecobook.settings.tokenizer import TokenizerConfig
from pecobook.utils.distributed import mean_over_ranks
from pecobook.utils.files import without_folders
from pecobook.utils.images import to_float

_MIN_GROUP = 4  # channels, as VQGAN's smallest group
Frozen: TypeAlias = PerceptualDistance | PerceptualSum | FeatureTarget
"""The frozen network used by the loss."""


class CodebookStage(Stage[CodebookConfig]):
    """The tokenizer, the frozen perceptual network and the loss.

    Args:
        config: all settings.
        num_classes: number of classes of the labels, for the classification loss of Table 6.
        frozen: the perceptual distance, or the target, of the settings; None builds it.
    """

    command = "codebook"

    def __init__(self, config: CodebookConfig, num_classes: int = 0, frozen: Frozen | None = None) -> None:
        super().__init__()
        self.config = config
        # A frozen network leaves torch's generator as it is, so the tokenizer's random weights are the same without it.
        frozen = frozen or _frozen_network(config)
        self.target = frozen if isinstance(frozen, FeatureTarget) else None
        self.perceptual = None if isinstance(frozen, FeatureTarget) else frozen
        self.tokenizer = build_tokenizer(config, self.target)
        self.start = start_codebook(config, self.tokenizer)
        self.discriminator = self.classifier = self.contrast = None
        if config.adversarial.weight > 0:
            self.discriminator = PatchDiscriminator(config.adversarial, config.model.in_channels)
        if config.explicit.kind == "classification":
            self.classifier = CodewordClassifier(config.model.latent_dim, num_classes)
        elif config.explicit.kind == "contrastive":
            self.min_batch_size = 2  # images are contrasted with each other
            self.contrast = CodewordContrast(self.tokenizer.encoder, config.model.latent_dim, config.explicit)
        if config.init:
            skip = ("tokenizer", "perceptual", "target")
            state = training_weights(config.init)
            take_parts(self, {n: v for n, v in state.items() if not n.startswith("tokenizer.")}, self.start, skip=skip)
        frozen_notes = (*frozen.notes, *frozen.input_notes(config.image_size)) if frozen is not None else ()
        self.notes = (*frozen_notes, *small_groups(self.tokenizer), *self.start.notes)

    def forward(self, batch: Batch) -> StageOutput:
        """Compute equation 5, and the terms that the settings add, on a batch of uint8 images."""
        if "ahead" in batch:
            return StageOutput(None, {}, rows=self._rows_ahead(batch))
        if self.contrast is not None and self.training and "keys" not in batch:
            batch = {**batch, "keys": self._keys(batch)}
        images = self._tokenizer_input(batch["image"])
        coded = self.tokenizer.quantizer(self.tokenizer.encode_latents(images))
        restored = self.tokenizer.decode_latents(coded.quantized).float()
        loss, metrics = self._reconstruction_loss(images, restored)
        codebook_side = self.config.quantizer.commitment * coded.commitment_loss
        if self.config.quantizer.has_loss:
            codebook_side = codebook_side + coded.codebook_loss
        metrics["commitment"] = coded.commitment_loss
        autoencoder_loss, discriminator_loss = self._adversarial_losses(images, restored, metrics)
        loss = loss + self._adversarial_weight() * autoencoder_loss
        codebook_side = codebook_side + self._codeword_loss(batch, coded, metrics)
        metrics["loss"] = loss + codebook_side  # this sum is logged, since a balanced loss is always near 1
        if self.config.balance:
            # The mean over micro-batches and ranks makes them learn what one batch would.
            whole = batch["reconstruction"].mean() if "reconstruction" in batch else loss.detach()
            loss = loss / mean_over_ranks(whole).clamp_min(1e-6)
        metrics |= self.health()
        pictures, rows = {}, {} if self.training else {"codes": coded.codes}
        if not self.training and self.target is None:
            clamped = restored.clamp(0, 1)
            metrics |= {"psnr": psnr(clamped, images).mean(), "ssim": ssim(clamped, images).mean()}
            pictures = {"images": images, "reconstructions": restored}
        metrics = {name: value.detach() for name, value in metrics.items()}
        return StageOutput(loss + codebook_side + discriminator_loss, metrics, pictures, rows)

    def summarise(self, rows: dict[str, Tensor], reference_rows: dict[str, Tensor]) -> dict[str, float]:
        """Return how many codewords all held-out images use together, how evenly, and how far codes reveal positions.

        `position` is the information in codes about positions, in percent, and `position_null` that in codes permuted
        within each image (`pecobook.analysis.position`), both on at most 2,000 images.
        """
        usage = code_usage(rows["codes"], self.config.quantizer.num_codewords)
        position = position_dependence(rows["codes"][:2000])
        return {
            "codes_used": usage.codes_used,
            "codes_perplexity": usage.perplexity,
            "position": 100 * position.share,
            "position_null": 100 * position.null_share,
        }

    def _tokenizer_input(self, pixels: Tensor) -> Tensor:
        """Convert uint8 (B, 3, H, W) to the tokenizer's input, float (B, C, H, W) in [0, 1]."""
        images = to_float(pixels)
        return rgb_to_grayscale(images) if self.config.model.in_channels == 1 else images

    def _reconstruction_loss(self, images: Tensor, restored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted pixel and perceptual loss, (), and metrics; both images float (B, C, H, W) in [0, 1].

        With a target, `restored` contains the features that the decoder predicts.
        """
        if self.target is not None:
            loss = self.target.loss(restored, images)
            return loss, {"cosine": 1 - loss}
        pixel = 4 * F.mse_loss(restored, images)  # the factor 4 converts the error from [0, 1] to [-1, 1]
        # Training avoids torchmetrics' PSNR, which waits for the device; evaluation uses it.
        error = F.mse_loss(restored.detach().clamp(0, 1), images, reduction="none").flatten(1).mean(1)  # (B,)
        metrics = {"pixel": pixel, "psnr": -10 * error.log10().mean()}
        loss = self.config.pixel_weight * pixel
        if self.perceptual is not None:
            with torch.no_grad():
                target = self.perceptual.features(images)
            metrics["perceptual"] = self.perceptual.distance_to_features(target, restored).mean()
            loss = loss + self._perceptual_weight() * metrics["perceptual"]
        return loss, metrics

    def _perceptual_weight(self) -> float | Tensor:
        """Return the weight of the perceptual loss at this step: equation 5's lambda after its warm-up."""
        config = self.config.perceptual
        if config.warmup == 0:
            return config.weight
        # The step comes from a buffer: with a Python integer torch.compile would recompile at each step.
        return config.weight * ((self.tokenizer.quantizer.num_updates + 1) / (config.warmup + 1)).clamp_max(1.0)

    def _adversarial_weight(self) -> float | Tensor:
        """Return the weight of equation 8's term at this step."""
        config = self.config.adversarial
        if config.start == 0:
            return config.weight
        return config.weight * (self.tokenizer.quantizer.num_updates >= config.start)

    def _adversarial_losses(
        self, images: Tensor, restored: Tensor, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return equation 8's losses for the autoencoder and the discriminator, unweighted, () each."""
        if self.discriminator is None or not self.training:
            return images.new_zeros(()), images.new_zeros(())
        losses = adversarial_losses(self.discriminator, images, restored)
        metrics["adversarial"], metrics["discriminator"] = losses
        return losses

    def _codeword_loss(self, batch: Batch, coded: Quantized, metrics: dict[str, Tensor]) -> Tensor:
        """Return Table 6's loss on the codewords, weighted, ()."""
        if not self.training or self.config.explicit.kind == "none":
            return coded.commitment_loss.new_zeros(())
        if self.classifier is not None:
            loss, accuracy = self.classifier.loss(coded.quantized, batch["label"])
        else:
            assert self.contrast is not None
            loss, accuracy = self.contrast.loss(coded.quantized, batch["keys"])
        metrics |= {"explicit": loss, "explicit_accuracy": 100 * accuracy}
        return self.config.explicit.weight * loss

    @property
    def needs_full_batch_keys(self) -> bool:
        """Return whether a micro-batch needs all images of the step: to contrast them, for the size of the whole loss
        that --balance divides by, and once to initialise the codebook.
        """
        return self.contrast is not None or self.config.balance or self.tokenizer.quantizer.starts_now

    def _rows_ahead(self, batch: Batch) -> dict[str, Tensor]:
        """Return what other micro-batches need from these images, (B, ...) each."""
        rows = {} if self.contrast is None else {"keys": self._keys(batch)}
        if not (self.config.balance or self.tokenizer.quantizer.starts_now):
            return rows
        images = self._tokenizer_input(batch["image"])
        latents = self.tokenizer.encode_latents(images)
        if self.tokenizer.quantizer.starts_now:
            return {**rows, "latents": latents.float()}
        restored = self.tokenizer.decode_latents(self.tokenizer.quantizer.nearest(latents)).float()
        loss = self._reconstruction_loss(images, restored)[0]
        loss = loss + self._adversarial_weight() * self._adversarial_losses(images, restored, {})[0]
        return {**rows, "reconstruction": loss.expand(len(images))}

    def after_ahead(self, rows: dict[str, Tensor]) -> bool:
        """Initialise the codebook from all vectors of the step; --balance then needs the loss with this codebook."""
        if "latents" not in rows:
            return False
        self.tokenizer.quantizer.start(rows.pop("latents"))
        return self.config.balance

    def _keys(self, batch: Batch) -> Tensor:
        """Return the keys (B, out) of each image's second view."""
        assert self.contrast is not None
        return self.contrast.keys(self._tokenizer_input(batch["other"]) * 2 - 1, self.tokenizer.quantizer)

    def health(self) -> dict[str, Tensor]:
        """Return usage metrics of the codebook: `codes_alive`, `codes_dead`, `perplexity` and `revived`.

        A codeword is alive if a vector chose it within the last `revive_after` steps (at least 100). The perplexity is
        that of the averaged usage. A revived codeword that no vector has chosen yet counts in neither.
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
        """Update the codebook and the contrastive loss's momentum encoder."""
        self.tokenizer.quantizer.update()
        if self.contrast is not None:
            self.contrast.after_step(self.tokenizer.encoder)

    def warning(self, metrics: dict[str, float], step: int) -> str | None:
        """Return a warning if the codebook has collapsed.

        It has collapsed if less than a quarter of it is in use, if nearly all vectors choose a few codewords, or if
        nearly all codewords in use are copies of a few.
        """
        config, K = self.config.quantizer, self.config.quantizer.num_codewords
        # Until then every codeword counts as alive or has just been initialised.
        if step < config.start_after + 2 * max(config.revive_after, 100):
            return None
        # The perplexity is needed too: a revived codeword is a vector of the batch, so it is chosen once or twice even
        # when the rest of the codebook has collapsed.
        in_use = metrics["codes_alive"] >= K / 4 and metrics["perplexity"] >= K / 16
        # If all vectors lie near a few points, the codewords revived there divide the vectors by noise or rounding:
        # usage looks even, though the codewords are copies.
        distinct = distinct_codewords(self.tokenizer.codebook, self.tokenizer.quantizer.usage) if in_use else 0.0
        if distinct >= K / 16:
            return None
        finding = f"Of {K} codewords {metrics['codes_alive']:.0f} are in use (perplexity {metrics['perplexity']:.0f})"
        finding += f", but only about {distinct:.0f} of them differ" if in_use else ""
        remedy = "a lower --optim.lr, or --model.latent-norm true"
        if not config.revives:
            remedy += ", or --quantizer.kind ema"
        elif config.revive_after == 0 or config.revive_after > 100:
            remedy = f"--quantizer.revive-after 100, {remedy}"
        return f"{finding}.\nTry {remedy}; or fewer codewords: --quantizer.num-codewords {max(K // 4, 1)}."

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the tokenizer."""
        self.tokenizer.value_range, self.tokenizer.init = self.config.value_range, self.start.summary
        trained = (f"tokenizer.{name}" for name in ("encoder.", "decoder.", "quantizer.codebook"))
        write_training_weights(folder, state, leave_out=("perceptual.", "target.", *trained))
        self.tokenizer.save_pretrained(folder, state=submodule_state(state, "tokenizer"), origin=_origin(self.config))
        return self.tokenizer.loading_code(self.config.out)

    @classmethod
    def check(cls, config: CodebookConfig) -> Frozen | None:
        """Build the frozen network. Raises PecobookError for unusable settings or weights."""
        if not (config.perceptual.network or config.target_features):
            raise ConfigError(
                "--perceptual.network is missing: give a run of 'pecobook contrast', timm:NAME, or none for pixels "
                "alone."
            )
        if config.explicit.kind == "contrastive":
            check_min_batch(config)
        frozen = _frozen_network(config)
        if frozen is not None and not isinstance(frozen, FeatureTarget):
            frozen.check_image_size(config.image_size, config.image_size)
        if config.init:
            target = frozen if isinstance(frozen, FeatureTarget) else None
            start_codebook(config, build_tokenizer(config, target))
        return frozen

    @classmethod
    def needs_labels(cls, config: CodebookConfig) -> bool:
        """Return whether the settings use the classification loss, which needs labels."""
        return config.explicit.kind == "classification"

    @classmethod
    def build(cls, config: CodebookConfig, splits: Splits, prebuilt: Frozen | None = None) -> CodebookStage:
        """Build the stage, with random weights in the tokenizer."""
        total = steps(config.max_steps, num_images=len(splits.train), batch_size=config.batch_size)
        # A training that ended before k-means starts the codebook would export a random codebook.
        quantizer = dataclasses.replace(config.quantizer, start_after=min(config.quantizer.start_after, total // 2))
        return cls(dataclasses.replace(config, quantizer=quantizer), len(splits.train.classes or ()), prebuilt)

    @classmethod
    def view(cls, config: CodebookConfig) -> ViewFunction:
        """Return the function that takes a random crop of an image, or two for the contrastive loss."""
        second = config.explicit.kind == "contrastive"
        return partial(_random_view, size=config.image_size, min_area=config.min_crop, second=second)

    @classmethod
    def evaluation_view(cls, config: CodebookConfig) -> ViewFunction:
        """Return the function that takes the central crop of a held-out image."""
        return partial(central_view, size=config.image_size)


def _origin(config: CodebookConfig) -> str:
    """Describe in a sentence, for the model card, how the tokenizer was trained; no folders are named."""
    data, perceptual = without_folders(config.data), config.perceptual
    features = "pixels alone"
    if config.target_features:
        features = f"features of {without_folders(config.target_features)}, layer {config.target.layer}, by cosine"
    elif perceptual.network != "none" and perceptual.weight > 0:
        layers = ", ".join(map(str, perceptual.layers))
        weights = f" ({without_folders(perceptual.weights)})" if perceptual.weights else ""
        network = without_folders(perceptual.network)
        more = "".join(f", and {without_folders(text)}" for text in perceptual.also)
        features = f"pixels and layers {layers} of {network}{weights}{more}, lambda {perceptual.weight:g}"
    length = f"{config.max_steps} steps" if config.max_steps.isdigit() else config.max_steps
    return f"`pecobook codebook`, on `{data}` for {length} at batch {config.batch_size}, under {features}."


def start_codebook(config: CodebookConfig, tokenizer: PerceptualTokenizer) -> Start:
    """Load the weights of `--init` into the tokenizer; without `--init` nothing is loaded."""
    vectors = config.batch_size * (config.image_size / config.model.stride) ** 2
    return start_tokenizer(tokenizer, config.init, vectors=vectors) if config.init else Start("")


def small_groups(tokenizer: PerceptualTokenizer) -> tuple[str, ...]:
    """Return a line for the user if a GroupNorm group has too few channels for a bounded gradient."""
    norms = [module for module in tokenizer.modules() if isinstance(module, GroupNorm)]
    smallest = min((norm.num_channels // norm.num_groups for norm in norms), default=_MIN_GROUP)
    if smallest >= _MIN_GROUP:
        return ()
    return (
        f"GroupNorm has groups of {smallest} (channels): gradients of flat images may be infinite, and codes become "
        f"positions. Give --model.group-size {_MIN_GROUP} or more, and no layer fewer than {_MIN_GROUP} channels.",
    )


def _frozen_network(config: CodebookConfig) -> Frozen | None:
    """Build the network whose features the settings compare or predict; None without one."""
    if config.target_features:
        return FeatureTarget(config.target_features, config.target, config.image_size, seed=config.seed)
    return build_perceptual_distance(config.perceptual, config.seed)


def build_tokenizer(config: CodebookConfig, target: FeatureTarget | None = None) -> PerceptualTokenizer:
    """Build the tokenizer that the settings describe, with random weights; with a target it predicts its features."""
    quantizer = build_quantizer(config.quantizer, config.model.latent_dim, seed=config.seed)
    shape = TokenizerConfig(
        model=config.model,
        num_codewords=config.quantizer.num_codewords,
        quantizer=config.quantizer.kind,
        levels=config.quantizer.levels,
        image_size=config.image_size,
        features=target.channels if target is not None else 0,
        teacher=without_folders(target.name) if target is not None else "",
    )
    return PerceptualTokenizer(shape, quantizer)


def _random_view(image: Tensor, view_key: int, *, size: int, min_area: float, second: bool) -> dict[str, Tensor]:
    sample = {"image": random_crop(image, size, view_key, min_area=min_area)}
    if second:
        sample["other"] = random_crop(image, size, key(view_key, 1), min_area=min_area)
    return sample
