"""Pre-train a ViT: hide patches, name the hidden codes (PeCo, equations 6 and 7)."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.config import BackboneConfig, OptimConfig, TrainConfig, between, positive
from pecobook.data.images import ImageSource
from pecobook.data.masking import blockwise_mask, random_mask
from pecobook.data.sampler import key
from pecobook.data.stream import Batch, ViewFunction
from pecobook.data.views import (
    PhotometricConfig,
    center_crop,
    colour_draws,
    photometric,
    random_crop,
    to_float,
)
from pecobook.engine.loop import StageOutput
from pecobook.errors import ConfigError
from pecobook.models.masked_vit import MaskedImageModel, initialise_beit
from pecobook.models.tokenizers import load_tokenizer
from pecobook.models.weights import IMAGENET_MEAN, IMAGENET_STD, create, export_backbone, write_tensors
from pecobook.stages.stage import Stage, StageKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches the ViT does not see."""

    kind: Literal["block", "random"] = "block"
    """Rectangles as in BEiT, or single patches."""
    num_masked: int = 75
    """Patches hidden in every image (the paper: 75 of 196)."""
    min_block: int = 16
    """Least area of a rectangle, in patches."""

    def __post_init__(self) -> None:
        positive(self, "num_masked", "min_block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Pre-train a ViT on the tokens of your images."""

    tokenizer: str = ""
    """Run folder of `pecobook codebook`, owner/name on the Hugging Face hub, dalle:FOLDER, or diffusers:FOLDER."""
    model: BackboneConfig = BackboneConfig(name="beit_base_patch16_224", args='{"init_values": 0.1}')
    drop_path: float = 0.1
    """Stochastic depth: probability of skipping the last block; the first ones less."""
    mask: MaskConfig = MaskConfig()
    colour: PhotometricConfig = PhotometricConfig(saturation=0.4, hue=0.0, jitter=1.0, grey=0.0)
    """Colour changes of the crop, before both the tokenizer and the ViT see it (BEiT)."""
    optim: OptimConfig = OptimConfig(lr=1.5e-3, final_lr=1e-5, warmup="10 epochs", clip_grad=3.0)
    max_steps: str = "300 epochs"
    """Length of the training: steps, "N epochs" or "N images"."""
    batch_size: int = 2048
    """Images in one optimizer step, over all devices and accumulation steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, 1.0, "drop_path")


class PretrainStage(Stage):
    """Frozen tokenizer, masked image model, cross-entropy.

    Args:
        config: all settings.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer)
        backbone = create(config.model.name, num_classes=0, drop_path_rate=config.drop_path, **backbone_args(config))
        initialise_beit(backbone)
        self.model = MaskedImageModel(backbone, self.tokenizer.num_codewords)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> PretrainStage:
        """The tokenizer stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def forward(self, batch: Batch) -> StageOutput:
        """Equation 7 on uint8 images (B, 3, H, W) with bool masks (B, h, w)."""
        images, mask = to_float(batch["image"]), batch["mask"]
        if self.training:
            images = photometric(images, batch["colour"], self.config.colour)
        codes = self.tokenizer.encode(images)  # (B, h, w)
        logits = self.model((images - self.mean) / self.std, mask).float()  # (M, K)
        targets = codes[mask]  # (M,), in the same order: images, then rows
        loss = F.cross_entropy(logits, targets)
        accuracy = 100 * (logits.argmax(1) == targets).float().mean()
        pictures = {} if self.training else self._pictures(images, mask, codes, logits)
        return StageOutput(loss, {"accuracy": accuracy.detach()}, pictures)

    def _pictures(
        self, images: Tensor, mask: Tensor, codes: Tensor, logits: Tensor, count: int = 8
    ) -> dict[str, Tensor]:
        """Images, what the ViT saw of them, and its prediction decoded (paper, figure 5), of the first few."""
        predicted = codes.clone()
        predicted[mask] = logits.argmax(1)
        scale = images.shape[-1] // mask.shape[-1]
        hidden = mask[:count, None].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        return {
            "images": images[:count],
            "masked": torch.where(hidden, 0.5, images[:count]),
            "predicted": self.tokenizer.decode(predicted[:count]),
        }

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the backbone as a plain timm network, and beside it the mask token and the head."""
        own = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        write_tensors(folder / "mim.safetensors", {n: v for n, v in own.items() if not n.startswith("backbone.")})
        backbone = {n.removeprefix("backbone."): v for n, v in own.items() if n.startswith("backbone.")}
        return export_backbone(
            folder,
            backbone,
            name=self.config.model.name,
            args=backbone_args(self.config),
            image_size=self.config.image_size,
            origin="PeCo masked image modelling",
        )


def backbone_args(config: PretrainConfig) -> dict[str, Any]:
    """Arguments of timm.create_model: the image's size, and what the settings add."""
    return {"img_size": config.image_size, **config.model.kwargs()}


def _check(config: PretrainConfig) -> None:
    if not config.tokenizer:
        raise ConfigError("--tokenizer is missing: give the folder of a codebook run.")
    tokenizer = load_tokenizer(config.tokenizer)
    model = MaskedImageModel(create(config.model.name, num_classes=0, **backbone_args(config)), 2)
    rows, columns = model.grid
    if config.image_size != rows * tokenizer.stride or config.image_size != columns * tokenizer.stride:
        raise ConfigError(
            f"The ViT makes {rows} x {columns} patches of {config.image_size} pixels, the tokenizer one code for "
            f"{tokenizer.stride} x {tokenizer.stride}: give a ViT with patches of {tokenizer.stride}, or --image-size "
            f"{rows * tokenizer.stride}."
        )
    if config.mask.num_masked >= rows * columns:
        raise ConfigError(f"--mask.num-masked {config.mask.num_masked} must be below {rows * columns}, all patches.")


def _build(config: PretrainConfig, source: ImageSource) -> PretrainStage:  # noqa: ARG001
    return PretrainStage(config)


def make_mask(view_key: int, grid: tuple[int, int], config: MaskConfig) -> Tensor:
    """The mask of a view: bool (h, w)."""
    generator = torch.Generator().manual_seed(key(view_key, 2) >> 1)
    if config.kind == "random":
        return random_mask(grid, num_masked=config.num_masked, generator=generator)
    return blockwise_mask(grid, num_masked=config.num_masked, min_block=config.min_block, generator=generator)


def _masked_view(
    image: Tensor,
    view_key: int,
    *,
    size: int,
    min_area: float | None,
    grid: tuple[int, int],
    mask: MaskConfig,
) -> dict[str, Tensor]:
    crop = center_crop(image, size) if min_area is None else random_crop(image, size, view_key, min_area=min_area)
    return {"image": crop, "colour": colour_draws(view_key), "mask": make_mask(view_key, grid, mask)}


@lru_cache(maxsize=1)  # a whole network is made to learn it, and both views ask
def _grid(config: PretrainConfig) -> tuple[int, int]:
    network = create(config.model.name, num_classes=0, **backbone_args(config))
    return cast("tuple[int, int]", tuple(network.patch_embed.grid_size))  # type: ignore[union-attr, arg-type]


def _view(config: PretrainConfig) -> ViewFunction:
    return partial(_masked_view, size=config.image_size, min_area=config.min_crop, grid=_grid(config), mask=config.mask)


def _evaluation_view(config: PretrainConfig) -> ViewFunction:
    return partial(_masked_view, size=config.image_size, min_area=None, grid=_grid(config), mask=config.mask)


KIND: StageKind[PretrainConfig] = StageKind("pretrain", _check, _build, _view, _evaluation_view)
