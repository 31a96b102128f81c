"""Recipes: named settings, each a documented claim. `pecobook recipes` lists them; a recipe is a function here.

The first line of a docstring is the claim; "Source", "Command", "Cost" and "Result" follow where there is something to
say. `tiny` is the same code with smaller numbers: about a minute on 2 cores, and what the tests train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pecobook.config import BackboneConfig, OptimConfig, TrainConfig
from pecobook.errors import ConfigError, did_you_mean
from pecobook.models.autoencoder import AutoencoderConfig
from pecobook.models.perceptual import PerceptualConfig
from pecobook.models.quantizer import QuantizerConfig
from pecobook.stages.classify import FinetuneConfig
from pecobook.stages.codebook import CodebookConfig
from pecobook.stages.contrast import ContrastConfig
from pecobook.stages.pretrain import MaskConfig, PretrainConfig

Recipe = Callable[[], TrainConfig]

# ------------------------------------------------------------------------------------------------------------ contrast

_SMALL_RESNET = BackboneConfig(
    name="resnet10t", args='{"channels": [32, 64, 128, 256], "stem_width": 16, "output_stride": 8}'
)


def contrast_tiny() -> ContrastConfig:
    """A small ResNet on 32-pixel images, 200 steps: shows that everything works, learns little.

    Command: pecobook contrast tiny --data photos --out runs/contrast
    """
    return ContrastConfig(
        model=_SMALL_RESNET,
        image_size=32,
        min_crop=0.2,
        batch_size=128,
        max_steps="200",
        temperature=0.2,
        hidden_dim=512,
        output_dim=64,
        blur=(0.0, 0.0),
        optim=OptimConfig(lr=2e-3, weight_decay=1e-4, warmup="10%"),
        save_every=100,
        sample_every=200,
    )


def contrast_cifar10() -> ContrastConfig:
    """The small ResNet on CIFAR-10's 50,000 images, 100 epochs at batch 512.

    Command: pecobook contrast cifar10 --data CIFAR10 --out runs/contrast
    Result: not yet run.
    """
    return dataclasses.replace(
        contrast_tiny(),
        batch_size=512,
        max_steps="100 epochs",
        optim=OptimConfig(lr=4e-3, weight_decay=1e-4, warmup="10 epochs"),
        save_every=1000,
        sample_every=1000,
        hidden_dim=1024,
        output_dim=128,
    )


def contrast_tiny_imagenet() -> ContrastConfig:
    """A ResNet-18 on 64-pixel images, 200 epochs at batch 512.

    Command: pecobook contrast tiny-imagenet --data TINY_IMAGENET --out runs/contrast
    Result: not yet run.
    """
    return dataclasses.replace(
        contrast_cifar10(),
        model=BackboneConfig(name="resnet18", args='{"output_stride": 16}'),
        image_size=64,
        max_steps="200 epochs",
        blur=(1.0, 0.1),
    )


def contrast_paper() -> ContrastConfig:
    """ViT-B/16 at 224 pixels on ImageNet-1K by MoCo v3, 100 epochs: PeCo's default perceptual network.

    Source: PeCo section 4 (100 epochs); MoCo v3, arXiv 2104.02057 (learning rate 1.5e-4 x batch / 256, weight
        decay 0.1, warm-up 40 of 300 epochs).
    Command: pecobook contrast paper --data IMAGENET --out runs/contrast
    Result: not yet run. MoCo v3 reports 76.7% linear probe after 300 epochs.
    """
    return ContrastConfig(max_steps="100 epochs", optim=OptimConfig(lr=2.4e-3, weight_decay=0.1, warmup="13 epochs"))


# ------------------------------------------------------------------------------------------------------------ codebook


def codebook_tiny() -> CodebookConfig:
    """512 codewords, 16 tokens for a 32-pixel image, 150 steps of 64: about a minute on 2 cores.

    Averages and revival are faster than the paper's, to fit so few steps.

    Command: pecobook codebook tiny --data photos --out runs/codebook
    """
    return CodebookConfig(
        model=AutoencoderConfig(channels=(16, 32, 64, 128), latent_dim=64, num_blocks=1, latent_norm=True),
        quantizer=QuantizerConfig(num_codewords=512, decay=0.95, revive_after=20, start_after=30),
        perceptual=PerceptualConfig(network="none", layers=(3, 4), normalisation="layernorm"),
        balance=True,
        image_size=32,
        batch_size=64,
        max_steps="150",
        optim=OptimConfig(name="adam", lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup="5%"),
        save_every=50,
        sample_every=50,
    )


def codebook_cifar10() -> CodebookConfig:
    """CIFAR-10, 16 tokens an image, 30 epochs, perceptual weight above the pixels'.

    Command: pecobook codebook cifar10 --data CIFAR10 --perceptual.network runs/contrast --out runs/codebook
    Result: not yet run.
    """
    return dataclasses.replace(
        codebook_tiny(),
        model=AutoencoderConfig(channels=(32, 64, 64, 128), latent_dim=64, num_blocks=1, latent_norm=True),
        quantizer=QuantizerConfig(num_codewords=512),
        batch_size=128,
        max_steps="30 epochs",
        save_every=1000,
        sample_every=1000,
        perceptual=PerceptualConfig(layers=(3, 4), normalisation="layernorm"),
    )


def codebook_tiny_imagenet() -> CodebookConfig:
    """Tiny-ImageNet at 64 pixels, 64 tokens an image, 2,048 codewords, 50 epochs.

    Command: pecobook codebook tiny-imagenet --data TINY_IMAGENET --perceptual.network runs/contrast --out runs/codebook
    Result: not yet run.
    """
    return dataclasses.replace(
        codebook_cifar10(),
        model=AutoencoderConfig(channels=(32, 64, 128, 256), latent_dim=128, latent_norm=True),
        quantizer=QuantizerConfig(num_codewords=2048),
        image_size=64,
        max_steps="50 epochs",
    )


def codebook_paper() -> CodebookConfig:
    """PeCo's tokenizer: 8,192 codewords, 14 x 14 tokens at 224 pixels, MoCo v3 ViT-B blocks 3, 6, 9, 12; 37.5M weights.

    Source: section 4 and Table 2 (84.1% after 300 epochs of pre-training). Batch 128, Adam (0.5, 0.95), lr 5e-5, 100
        epochs, warm-up 5,000 steps, lambda 1, beta 0.25. What the paper leaves open stands in docs/decisions.md.
    Command: pecobook codebook paper --data IMAGENET --perceptual.network runs/contrast --out runs/codebook
    Result: not yet run.
    """
    return CodebookConfig(batch_size=128, max_steps="100 epochs")


def codebook_paper_lite() -> CodebookConfig:
    """PeCo_lite: half the width, 25.7M parameters.

    Source: Table 2 (84.0% after 300 epochs of pre-training).
    Command: pecobook codebook paper-lite --data IMAGENET --perceptual.network runs/contrast --out runs/codebook
    Result: not yet run.
    """
    return dataclasses.replace(codebook_paper(), model=AutoencoderConfig(channels=(32, 64, 128, 256, 512)))


# ------------------------------------------------------------------------------------------------------------ pretrain


_SMALL_VIT = BackboneConfig(
    name="vit_tiny_patch16_224",
    args='{"patch_size": 8, "depth": 6, "embed_dim": 128, "num_heads": 4, "init_values": 0.1}',
)


def pretrain_tiny() -> PretrainConfig:
    """A ViT of width 128 and depth 6 on 4 x 4 patches of 32-pixel images, 200 steps.

    Command: pecobook pretrain tiny --data photos --tokenizer runs/codebook --out runs/vit
    """
    return PretrainConfig(
        model=_SMALL_VIT,
        mask=MaskConfig(num_masked=6, min_block=2),
        image_size=32,
        batch_size=128,
        max_steps="200",
        drop_path=0.0,
        optim=OptimConfig(lr=1.5e-3, final_lr=1e-5, warmup="10%", clip_grad=3.0),
        save_every=100,
        sample_every=200,
    )


def pretrain_cifar10() -> PretrainConfig:
    """CIFAR-10, 100 epochs at batch 512.

    Command: pecobook pretrain cifar10 --data CIFAR10 --tokenizer runs/codebook --out runs/vit
    Result: not yet run.
    """
    return dataclasses.replace(
        pretrain_tiny(),
        batch_size=512,
        max_steps="100 epochs",
        save_every=1000,
        sample_every=1000,
    )


def pretrain_tiny_imagenet() -> PretrainConfig:
    """Tiny-ImageNet at 64 pixels, ViT-Ti with 8-pixel patches, 26 of 64 masked, 200 epochs.

    Command: pecobook pretrain tiny-imagenet --data TINY_IMAGENET --tokenizer runs/codebook --out runs/vit
    Result: not yet run.
    """
    return dataclasses.replace(
        pretrain_cifar10(),
        image_size=64,
        mask=MaskConfig(num_masked=26, min_block=6),
        max_steps="200 epochs",
        model=BackboneConfig(name="vit_tiny_patch16_224", args='{"patch_size": 8, "init_values": 0.1}'),
        drop_path=0.05,
    )


def pretrain_paper() -> PretrainConfig:
    """PeCo ViT-B/16, 800 epochs of ImageNet-1K at batch 2,048: 75 of 196 patches masked in blocks.

    Source: section 4 and Table 1 (84.5% after fine-tuning). Learning rate 1.5e-3, weight decay 0.05, drop path 0.1;
        warm-up, clipping and LayerScale are BEiT's.
    Command: pecobook pretrain paper --data IMAGENET --tokenizer runs/codebook --out runs/vit
    Result: not yet run.
    """
    return PretrainConfig(max_steps="800 epochs")


# ------------------------------------------------------------------------------------------------------------ finetune


def finetune_tiny() -> FinetuneConfig:
    """200 steps at 32 pixels.

    Command: pecobook finetune tiny --data photos --backbone runs/vit --out runs/classifier
    """
    return FinetuneConfig(
        image_size=32,
        batch_size=128,
        max_steps="200",
        min_crop=0.3,
        drop_path=0.0,
        mixup=0.2,
        rand_augment=5,
        optim=OptimConfig(lr=1e-3, warmup="10%", layer_decay=0.75),
        save_every=100,
        sample_every=200,
    )


def finetune_cifar10() -> FinetuneConfig:
    """CIFAR-10, 50 epochs at batch 512.

    Command: pecobook finetune cifar10 --data CIFAR10 --backbone runs/vit --out runs/classifier
    Result: not yet run.
    """
    return dataclasses.replace(
        finetune_tiny(),
        batch_size=512,
        max_steps="50 epochs",
        save_every=1000,
        sample_every=1000,
    )


def finetune_tiny_imagenet() -> FinetuneConfig:
    """Tiny-ImageNet at 64 pixels, 100 epochs at batch 512.

    Command: pecobook finetune tiny-imagenet --data TINY_IMAGENET --backbone runs/vit --out runs/classifier
    Result: not yet run.
    """
    return dataclasses.replace(finetune_cifar10(), image_size=64, max_steps="100 epochs", mixup=0.8, drop_path=0.1)


def finetune_paper() -> FinetuneConfig:
    """ViT-B/16 on ImageNet-1K, 100 epochs, layer decay 0.65, lr 4e-3.

    Source: section 4; mixup, CutMix, RandAugment, smoothing, erasing and batch are BEiT's.
    Command: pecobook finetune paper --data IMAGENET --backbone runs/vit --out runs/classifier
    Result: not yet run. The paper: 84.5% from 800 epochs of pre-training, 84.1% from 300.
    """
    return FinetuneConfig()


# ------------------------------------------------------------------------------------------------------------- look-up

RECIPES: dict[str, dict[str, Recipe]] = {
    "contrast": {
        "tiny": contrast_tiny,
        "cifar10": contrast_cifar10,
        "tiny-imagenet": contrast_tiny_imagenet,
        "paper": contrast_paper,
    },
    "codebook": {
        "tiny": codebook_tiny,
        "cifar10": codebook_cifar10,
        "tiny-imagenet": codebook_tiny_imagenet,
        "paper": codebook_paper,
        "paper-lite": codebook_paper_lite,
    },
    "pretrain": {
        "tiny": pretrain_tiny,
        "cifar10": pretrain_cifar10,
        "tiny-imagenet": pretrain_tiny_imagenet,
        "paper": pretrain_paper,
    },
    "finetune": {
        "tiny": finetune_tiny,
        "cifar10": finetune_cifar10,
        "tiny-imagenet": finetune_tiny_imagenet,
        "paper": finetune_paper,
    },
}

DEFAULT_RECIPE = "paper"


def recipe(command: str, name: str = DEFAULT_RECIPE) -> Any:
    """Settings of a recipe. Raises ConfigError for an unknown one."""
    known = RECIPES[command]
    if name not in known:
        raise ConfigError(f"'{command}' has no recipe '{name}': it has {', '.join(known)}.{did_you_mean(name, known)}")
    return known[name]()


def claims() -> list[tuple[str, str, str]]:
    """Command, name and claim (the docstring's first line) of every recipe."""
    return [
        (command, name, (function.__doc__ or "").strip().splitlines()[0])
        for command, recipes in RECIPES.items()
        for name, function in recipes.items()
    ]
