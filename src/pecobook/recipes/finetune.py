"""Recipes of `pecobook finetune`: classification by fine-tuning."""

from __future__ import annotations

import dataclasses
from typing import Any

from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.images import IMAGENET_MEAN, IMAGENET_STD, ClipConfig
from pecobook.settings.training import OptimConfig

PLAIN: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0, "rand_augment": "", "label_smoothing": 0.0}
"""Settings that leave only crops and flips as augmentation and do not change the labels."""
IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
"""The normalisation in MAE's and DeiT's code. Timm's for the name of their ViT is that of other weights: 0.5."""


def tiny() -> FinetuneConfig:
    """200 steps at 32 pixels.

    Command: pecobook finetune tiny --data photos --backbone runs/vit --out runs/classifier
    Result: on CIFAR-10, three seeds: 29.4% from random weights, 30.0 to 30.8% from ViTs that `pretrain tiny` trained
        for 300 steps on different targets (docs/results.md).
    """
    return dataclasses.replace(cifar10(), batch_size=128, max_steps="200", save_every=100, sample_every=200)


def tiny_video() -> FinetuneConfig:
    """200 steps on clips of 8 frames at 32 pixels.

    Command: pecobook finetune tiny-video --data CLIPS --backbone runs/vit --out runs/clips
    """
    return dataclasses.replace(
        tiny(),
        batch_size=32,
        optim=OptimConfig(lr=3e-3, warmup="10%", layer_decay=0.75),
        min_crop=0.6,
        **PLAIN,
        clip=ClipConfig(frames=8, sampling="segments", flip=False),
    )


def cifar10() -> FinetuneConfig:
    """CIFAR-10, 50 epochs at batch 512.

    Command: pecobook finetune cifar10 --data CIFAR10 --backbone runs/vit --out runs/classifier
    """
    return FinetuneConfig(
        batch_size=512,
        max_steps="50 epochs",
        image_size=32,
        optim=OptimConfig(lr=1e-3, warmup="10%", layer_decay=0.75),
        min_crop=0.3,
        drop_path=0.0,
        mixup=0.2,
        rand_augment="rand-m5-mstd0.5-inc1",
        eval_crop=1.0,
    )


def tiny_imagenet() -> FinetuneConfig:
    """Tiny-ImageNet at 64 pixels, 100 epochs at batch 512.

    Command: pecobook finetune tiny-imagenet --data TINY_IMAGENET --backbone runs/vit --out runs/classifier
    """
    return FinetuneConfig(
        batch_size=512,
        max_steps="100 epochs",
        image_size=64,
        optim=OptimConfig(lr=1e-3, warmup="10%", layer_decay=0.75),
        min_crop=0.3,
        rand_augment="rand-m5-mstd0.5-inc1",
        eval_crop=1.0,
    )


def imagenette() -> FinetuneConfig:
    """Photographs at 128 pixels, 100 epochs at batch 256.

    Command: pecobook finetune imagenette --data IMAGENETTE --backbone runs/vit --out runs/classifier
    """
    return FinetuneConfig(
        batch_size=256,
        max_steps="100 epochs",
        image_size=128,
        optim=OptimConfig(lr=1e-3, warmup="10%", layer_decay=0.75),
        min_crop=0.2,
        drop_path=0.1,
    )


def paper() -> FinetuneConfig:
    """ViT-B/16 on ImageNet-1K, 100 epochs, layer decay 0.65, lr 4e-3 at batch 1,024.

    Source: section 4; mixup, CutMix, RandAugment, smoothing, erasing and batch are BEiT's.
    Command: pecobook finetune paper --data IMAGENET --backbone runs/vit --out runs/classifier
    Cost: 106 GFLOP for an image, so 1.4e19 FLOP; about 13 hours of one H100 at 300 TFLOP/s (estimated).
    Result of the paper: 84.5% from 800 epochs of pre-training, 84.1% from 300.
    """
    return FinetuneConfig(
        batch_size=1024,
        max_steps="100 epochs",
        image_size=224,
        optim=OptimConfig(
            name="adamw",
            lr=4e-3,
            lr_batch_size=1024,
            final_lr=0.0,
            schedule="cosine",
            warmup="20 epochs",
            weight_decay=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=0.0,
            layer_decay=0.65,
        ),
        min_crop=0.08,
        drop_path=0.1,
        mixup=0.8,
        cutmix=1.0,
        repeats=1,
        label_smoothing=0.1,
        rand_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        average=0.0,
        eval_crop=0.875,
        head_rate=1.0,
        clip=ClipConfig(frames=0, sampling="stride", stride=32, flip=True, crops=1),
    )


def paper_vit_l() -> FinetuneConfig:
    """ViT-L/16 on ImageNet-1K, 50 epochs, layer decay 0.75, lr 1e-3 at batch 1,024.

    Source: Table 1 (86.5%); the paper gives no settings for ViT-L, so these are BEiT's.
    Command: pecobook finetune paper-vit-l --data IMAGENET --backbone runs/vit --out runs/classifier
    Cost: 370 GFLOP for an image, so 2.4e19 FLOP; about 22 hours of one H100 at 300 TFLOP/s (estimated).
    """
    return dataclasses.replace(
        paper(),
        max_steps="50 epochs",
        optim=dataclasses.replace(paper().optim, lr=1e-3, warmup="5 epochs", layer_decay=0.75),
        drop_path=0.2,
    )


def paper_vit_h() -> FinetuneConfig:
    """ViT-H/14 on ImageNet-1K at 224 pixels, 50 epochs, layer decay 0.75, lr 1e-3 at batch 1,024, drop path 0.3.

    Source: Table 1 (87.5%); the paper gives no settings for ViT-H, so these are BEiT's for ViT-L, with MAE's drop path.
    Command: pecobook finetune paper-vit-h --data IMAGENET --backbone runs/vit --out runs/classifier
    Cost: 1.0 TFLOP for an image, so 6.4e19 FLOP; about 60 hours of one H100 at 300 TFLOP/s (estimated).
    """
    return dataclasses.replace(paper_vit_l(), drop_path=0.3)


def paper_vit_h_448() -> FinetuneConfig:
    """ViT-H/14 on ImageNet-1K at 448 pixels, 32 x 32 patches; otherwise as at 224 pixels.

    Source: Table 1 (88.3%); the paper gives no settings. As in MAE, the pre-trained ViT is fine-tuned directly at this
        size, its positions are interpolated, and evaluation uses the whole central square.
    Command: pecobook finetune paper-vit-h-448 --data IMAGENET --backbone runs/vit --out runs/classifier
    Cost: 4.4 TFLOP for an image, so 2.8e20 FLOP; about 260 hours of one H100 at 300 TFLOP/s (estimated).
    """
    return dataclasses.replace(paper_vit_h(), image_size=448, eval_crop=1.0)


def paper_mae() -> FinetuneConfig:
    """MAE's ViT-B/16 on ImageNet-1K, 100 epochs, layer decay 0.65, lr 2e-3 at batch 1,024: MAE's own recipe.

    Source: MAE, arXiv 2111.06377, table 9 and public code.
    Command: pecobook finetune paper-mae --data IMAGENET --backbone runs/mae --out runs/classifier
    Cost: that of `paper`.
    Result of MAE: 83.6% from 1,600 epochs of pre-training, a row of the paper's Table 1.
    """
    return dataclasses.replace(
        paper(), optim=dataclasses.replace(paper().optim, lr=2e-3, final_lr=1e-6, warmup="5 epochs")
    )


def paper_scratch() -> FinetuneConfig:
    """ViT-B/16 from random weights on ImageNet-1K, 300 epochs at batch 4,096, weight decay 0.3, averaged weights.

    Source: MAE, arXiv 2111.06377, table 11, whose 82.3% is the row "ViT scratch" of the paper's Table 1. No random
        erasing; all layers share one learning rate.
    Command: pecobook finetune paper-scratch --data IMAGENET --out runs/classifier
    Cost: 106 GFLOP for an image, so 4.1e19 FLOP; about 40 hours of one H100 at 300 TFLOP/s (estimated).
    Result of MAE: 82.3%.
    """
    return dataclasses.replace(
        paper(),
        backbone="timm:vit_base_patch16_224",
        weights="random",
        **IMAGENET,
        batch_size=4096,
        max_steps="300 epochs",
        optim=dataclasses.replace(
            paper().optim, lr=1.6e-3, lr_batch_size=4096, weight_decay=0.3, betas=(0.9, 0.95), layer_decay=1.0
        ),
        random_erasing=0.0,
        average=0.9999,
    )


def paper_deit() -> FinetuneConfig:
    """ViT-B/16 from random weights on ImageNet-1K, 300 epochs at batch 1,024: DeiT's recipe.

    Source: DeiT, arXiv 2012.12877, table 9, whose 81.8% is a row of the paper's Table 1. As in DeiT, a batch holds
        three views of each image.
    Command: pecobook finetune paper-deit --data IMAGENET --out runs/classifier
    Cost: 106 GFLOP for an image, so 4.1e19 FLOP; about 40 hours of one H100 at 300 TFLOP/s (estimated).
    Result of DeiT: 81.8%.
    """
    return dataclasses.replace(
        paper(),
        backbone="timm:vit_base_patch16_224",
        weights="random",
        **IMAGENET,
        repeats=3,
        max_steps="300 epochs",
        optim=dataclasses.replace(paper().optim, lr=1e-3, final_lr=1e-5, warmup="5 epochs", layer_decay=1.0),
    )


def paper_video() -> FinetuneConfig:
    """ViT-B/16 with divided space-time attention on Kinetics-400, 15 epochs at batch 64, clips of 8 frames.

    Source: supplement, Table 9: clips, epochs, batch, lr 1.2e-3, layer decay 0.65, weight decay 1e-4. Every 32nd frame
        and three crops are TimeSformer's (arXiv 2102.05095); docs/decisions.md covers the rest.
    Command: pecobook finetune paper-video --data KINETICS --backbone runs/vit --out runs/kinetics
    Cost: 1.18 TFLOP for a clip, so 4.2e18 FLOP; about 4 hours of one H100 at 300 TFLOP/s (estimated).
    Result of the paper: 76.5% from 800 epochs of pre-training, BEiT 75.5%.
    """
    return dataclasses.replace(
        paper(),
        batch_size=64,
        max_steps="15 epochs",
        optim=dataclasses.replace(
            paper().optim, lr=1.2e-3, lr_batch_size=64, warmup="1 epochs", weight_decay=1e-4, layer_decay=0.65
        ),
        min_crop=0.4,
        **PLAIN,
        eval_crop=1.0,
        clip=ClipConfig(frames=8, sampling="stride", stride=32, flip=True, crops=3),
    )


def paper_video_ssv2() -> FinetuneConfig:
    """ViT-B/16 with divided space-time attention on Something-Something v2: `paper-video` with frames from all parts.

    Source: supplement, Table 9; one frame from each of eight equal parts of a video, without flips, as in TimeSformer.
    Command: pecobook finetune paper-video-ssv2 --data SSV2 --backbone runs/vit --out runs/ssv2
    Cost: 1.18 TFLOP for a clip, so 3.0e18 FLOP; about 3 hours of one H100 at 300 TFLOP/s (estimated).
    Result of the paper: 61.8% from 800 epochs of pre-training, BEiT 60.2%.
    """
    return dataclasses.replace(
        paper_video(), clip=ClipConfig(frames=8, sampling="segments", stride=32, flip=False, crops=3)
    )


def paper_video_deit() -> FinetuneConfig:
    """DeiT's ViT-B/16 with divided space-time attention on Kinetics-400: `paper-video` with the rates of Table 9.

    Source: supplement, Table 9: learning rate 1e-4, and 1e-3 for the head.
    Command: pecobook finetune paper-video-deit --data KINETICS --backbone runs/classifier --out runs/kinetics
    Cost: that of `paper-video`.
    Result of the paper: 75.4%, and 57.6% on Something-Something v2.
    """
    return dataclasses.replace(
        paper_video(), head_rate=10.0, optim=dataclasses.replace(paper_video().optim, lr=1e-4, layer_decay=1.0)
    )
