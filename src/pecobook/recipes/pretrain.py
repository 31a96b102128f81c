"""Vision transformers pre-trained on tokens."""

from __future__ import annotations

import dataclasses

from pecobook.config import BackboneConfig, OptimConfig
from pecobook.stages.pretrain import MaskConfig, PretrainConfig

_SMALL_VIT = BackboneConfig(
    name="vit_tiny_patch16_224",
    args='{"patch_size": 8, "depth": 6, "embed_dim": 128, "num_heads": 4, "init_values": 0.1}',
)


def tiny() -> PretrainConfig:
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


def cifar10() -> PretrainConfig:
    """CIFAR-10, 100 epochs at batch 512.

    Command: pecobook pretrain cifar10 --data CIFAR10 --tokenizer runs/codebook --out runs/vit
    Result: not yet run.
    """
    return dataclasses.replace(
        tiny(),
        batch_size=512,
        max_steps="100 epochs",
        save_every=1000,
        sample_every=1000,
    )


def tiny_imagenet() -> PretrainConfig:
    """Tiny-ImageNet at 64 pixels, ViT-Ti with 8-pixel patches, 26 of 64 masked, 200 epochs.

    Command: pecobook pretrain tiny-imagenet --data TINY_IMAGENET --tokenizer runs/codebook --out runs/vit
    Result: not yet run.
    """
    return dataclasses.replace(
        cifar10(),
        image_size=64,
        mask=MaskConfig(num_masked=26, min_block=6),
        max_steps="200 epochs",
        model=BackboneConfig(name="vit_tiny_patch16_224", args='{"patch_size": 8, "init_values": 0.1}'),
        drop_path=0.05,
    )


def paper() -> PretrainConfig:
    """PeCo ViT-B/16, 800 epochs of ImageNet-1K at batch 2,048: 75 of 196 patches masked in blocks.

    Source: section 4 and Table 1 (84.5% after fine-tuning). Learning rate 1.5e-3, weight decay 0.05, drop path 0.1;
        warm-up, clipping and LayerScale are BEiT's.
    Command: pecobook pretrain paper --data IMAGENET --tokenizer runs/codebook --out runs/vit
    Result: not yet run.
    """
    return PretrainConfig(max_steps="800 epochs")
