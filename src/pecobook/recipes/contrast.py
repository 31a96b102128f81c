"""Recipes of `pecobook contrast`: feature networks trained with MoCo v3."""

from __future__ import annotations

import dataclasses

from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.images import JitterConfig
from pecobook.settings.training import BackboneConfig, BaseOptimConfig


def tiny() -> ContrastConfig:
    """A small ResNet on 32-pixel images, 200 steps: a quick check that learns little.

    Command: pecobook contrast tiny --data photos --out runs/contrast
    """
    return dataclasses.replace(
        cifar10(),
        batch_size=128,
        max_steps="200",
        save_every=100,
        sample_every=200,
        optim=BaseOptimConfig(lr=2e-3, warmup="10%", weight_decay=1e-4),
        hidden_dim=512,
        output_dim=64,
    )


def cifar10() -> ContrastConfig:
    """The small ResNet on CIFAR-10's 50,000 images, 100 epochs at batch 512.

    Command: pecobook contrast cifar10 --data CIFAR10 --out runs/contrast
    Cost: 0.36 GFLOP for an image (counted); 590 images/s on 2 CPU cores (measured), so 2.4 hours there.
    """
    return ContrastConfig(
        batch_size=512,
        max_steps="100 epochs",
        image_size=32,
        optim=BaseOptimConfig(lr=4e-3, warmup="10 epochs", weight_decay=1e-4),
        min_crop=0.2,
        model=BackboneConfig(
            name="resnet10t", args='{"channels": [32, 64, 128, 256], "stem_width": 16, "output_stride": 8}'
        ),
        hidden_dim=1024,
        output_dim=128,
        blur=(0.0, 0.0),
    )


def tiny_imagenet() -> ContrastConfig:
    """A ResNet-18 on 64-pixel images, 200 epochs at batch 512.

    Command: pecobook contrast tiny-imagenet --data TINY_IMAGENET --out runs/contrast
    Cost: 4.0 GFLOP for an image (counted); 73 images/s on 2 CPU cores (measured), so 29 hours there for 38,000 images:
        use a GPU.
    """
    return ContrastConfig(
        batch_size=512,
        max_steps="200 epochs",
        image_size=64,
        optim=BaseOptimConfig(lr=4e-3, warmup="10 epochs", weight_decay=1e-4),
        min_crop=0.2,
        model=BackboneConfig(name="resnet18", args='{"output_stride": 16}'),
        hidden_dim=1024,
        output_dim=128,
    )


def imagenette() -> ContrastConfig:
    """A ResNet-18 on photographs at 128 pixels, 200 epochs at batch 256.

    Command: pecobook contrast imagenette --data IMAGENETTE --out runs/contrast
    Cost: 16 GFLOP for an image (counted), so 3e16 FLOP for 9,469 images; about 10 minutes of one H200 at 50 TFLOP/s
        (estimated).
    """
    base = tiny_imagenet()
    return dataclasses.replace(base, batch_size=256, image_size=128, optim=dataclasses.replace(base.optim, lr=2e-3))


def paper() -> ContrastConfig:
    """ViT-B/16 at 224 pixels on ImageNet-1K with MoCo v3, 100 epochs: PeCo's default perceptual network.

    Source: PeCo section 4 (100 epochs); MoCo v3, arXiv 2104.02057 (learning rate 1.5e-4 x batch / 256, weight
        decay 0.1, warm-up 40 of 300 epochs).
    Command: pecobook contrast paper --data IMAGENET --out runs/contrast
    Cost: 280 GFLOP for an image (two views, two encoders), so 3.6e19 FLOP; about 50 hours of one H100 at 200 TFLOP/s
        (estimated).
    Result of MoCo v3: 76.7% linear probe after 300 epochs.
    """
    return ContrastConfig(
        batch_size=4096,
        max_steps="100 epochs",
        image_size=224,
        optim=BaseOptimConfig(
            name="adamw",
            lr=2.4e-3,
            lr_batch_size=4096,
            final_lr=0.0,
            schedule="cosine",
            warmup="13 epochs",
            weight_decay=0.1,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=0.0,
        ),
        min_crop=0.08,
        model=BackboneConfig(name="vit_base_patch16_224", args="{}"),
        momentum=0.99,
        temperature=0.2,
        hidden_dim=4096,
        output_dim=256,
        freeze_patch_embed=True,
        fixed_positions=True,
        colour=JitterConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, grey=0.2),
        blur=(1.0, 0.1),
        solarise=(0.0, 0.2),
    )


def paper_resnet50() -> ContrastConfig:
    """ResNet-50 at 224 pixels on ImageNet-1K with MoCo v3, 100 epochs.

    Source: MoCo v3's public configuration: LARS, lr 0.6 x batch / 256 at batch 4,096, weight decay 1e-6, temperature 1,
        smallest crop 0.2, warm-up 10 epochs, momentum 0.99 to 1.
    Command: pecobook contrast paper-resnet50 --data IMAGENET --out runs/contrast
    Cost: 66 GFLOP for an image, so 8.4e18 FLOP; about 24 hours of one H100 at 100 TFLOP/s (estimated).
    Result of MoCo v3: 68.9% linear probe.
    """
    return dataclasses.replace(
        paper(),
        optim=dataclasses.replace(paper().optim, name="lars", lr=9.6, warmup="10 epochs", weight_decay=1e-6),
        min_crop=0.2,
        model=dataclasses.replace(paper().model, name="resnet50"),
        temperature=1.0,
    )
