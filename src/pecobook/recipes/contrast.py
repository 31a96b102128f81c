"""Feature networks by MoCo v3."""

from __future__ import annotations

import dataclasses

from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.training import BackboneConfig, OptimConfig

_SMALL_RESNET = BackboneConfig(
    name="resnet10t", args='{"channels": [32, 64, 128, 256], "stem_width": 16, "output_stride": 8}'
)


def tiny() -> ContrastConfig:
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


def cifar10() -> ContrastConfig:
    """The small ResNet on CIFAR-10's 50,000 images, 100 epochs at batch 512.

    Command: pecobook contrast cifar10 --data CIFAR10 --out runs/contrast
    Cost: 0.36 GFLOP an image, counted; 590 images/s on 2 CPU cores, measured, so 2.4 hours there.
    Result: not yet run.
    """
    return dataclasses.replace(
        tiny(),
        batch_size=512,
        max_steps="100 epochs",
        optim=OptimConfig(lr=4e-3, weight_decay=1e-4, warmup="10 epochs"),
        save_every=1000,
        sample_every=1000,
        hidden_dim=1024,
        output_dim=128,
    )


def tiny_imagenet() -> ContrastConfig:
    """A ResNet-18 on 64-pixel images, 200 epochs at batch 512.

    Command: pecobook contrast tiny-imagenet --data TINY_IMAGENET --out runs/contrast
    Cost: 4.0 GFLOP an image, counted; 73 images/s on 2 CPU cores, measured: for 38,000 images 29 hours there, so this
        one wants a GPU.
    Result: not yet run.
    """
    return dataclasses.replace(
        cifar10(),
        model=BackboneConfig(name="resnet18", args='{"output_stride": 16}'),
        image_size=64,
        max_steps="200 epochs",
        blur=(1.0, 0.1),
    )


def paper() -> ContrastConfig:
    """ViT-B/16 at 224 pixels on ImageNet-1K by MoCo v3, 100 epochs: PeCo's default perceptual network.

    Source: PeCo section 4 (100 epochs); MoCo v3, arXiv 2104.02057 (learning rate 1.5e-4 x batch / 256, weight
        decay 0.1, warm-up 40 of 300 epochs).
    Command: pecobook contrast paper --data IMAGENET --out runs/contrast
    Cost: 280 GFLOP an image (two views, two encoders), so 3.6e19: about 50 hours of one H100 at 200 TFLOP/s. Estimated.
    Result: not yet run. MoCo v3 reports 76.7% linear probe after 300 epochs.
    """
    return ContrastConfig(
        max_steps="100 epochs", optim=OptimConfig(lr=2.4e-3, lr_batch_size=4096, weight_decay=0.1, warmup="13 epochs")
    )


def paper_resnet50() -> ContrastConfig:
    """ResNet-50 at 224 pixels on ImageNet-1K by MoCo v3, 100 epochs.

    Source: MoCo v3's public configuration: LARS, lr 0.6 x batch / 256 at batch 4,096, weight decay 1e-6, temperature 1,
        smallest crop 0.2, warm-up 10 epochs, momentum 0.99 to 1.
    Command: pecobook contrast paper-resnet50 --data IMAGENET --out runs/contrast
    Cost: 66 GFLOP an image, so 8.4e18: about 24 hours of one H100 at 100 TFLOP/s. Estimated.
    Result: not yet run. MoCo v3 reports 68.9% linear probe.
    """
    return ContrastConfig(
        model=BackboneConfig(name="resnet50"),
        temperature=1.0,
        min_crop=0.2,
        max_steps="100 epochs",
        optim=OptimConfig(name="lars", lr=9.6, lr_batch_size=4096, weight_decay=1e-6, warmup="10 epochs"),
    )
