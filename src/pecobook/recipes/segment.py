"""Recipes of `pecobook segment`: semantic segmentation with UperNet."""

from __future__ import annotations

from pecobook.settings.dense import PyramidConfig
from pecobook.settings.images import PhotometricConfig
from pecobook.settings.segment import SegmentConfig, SegmentTestConfig
from pecobook.settings.training import OptimConfig


def tiny() -> SegmentConfig:
    """100 steps on 64-pixel crops, with a head of width 32.

    Command: pecobook segment tiny --data SHAPES --backbone runs/vit --out runs/segmenter
    """
    return SegmentConfig(
        batch_size=8,
        max_steps="100",
        image_size=64,
        save_every=100,
        sample_every=100,
        evaluation_images=64,
        optim=OptimConfig(lr=1e-3, schedule="poly", warmup="10%", layer_decay=0.75),
        drop_path=0.0,
        head_width=32,
        auxiliary_width=32,
    )


def camvid() -> SegmentConfig:
    """CamVid at 180 x 240 pixels, 11 classes, 176-pixel crops, 4,000 steps at batch 16.

    Class 11 of the usual reduced data set means "unlabelled" and is ignored.

    Command: pecobook segment camvid --data CAMVID --backbone runs/vit --out runs/segmenter
    Result of shorter runs, on a CPU: docs/results.md.
    """
    return SegmentConfig(
        batch_size=16,
        max_steps="4000",
        image_size=176,
        optim=OptimConfig(lr=1e-3, schedule="poly", warmup="5%", layer_decay=0.75),
        ignore=("11", "255"),
        head_width=128,
        auxiliary_width=64,
    )


def paper() -> SegmentConfig:
    """ADE20K at 512 pixels, ViT-B/16, 160,000 steps at batch 16, lr 3e-4, layer decay 0.65.

    Source: supplement; single scale, linear warm-up of 1,500 steps and linear decay, drop path 0.2. Widths and
        dropout of the heads, the auxiliary weight and the share of a crop that one class may fill are BEiT's.
    Command: pecobook segment paper-ade20k --data ADEChallengeData2016 --backbone runs/vit --out runs/segmenter
    Cost: 3637 GFLOP for an image, so 9.3e18 FLOP; about 13 hours of one H200 at 200 TFLOP/s (estimated).
    Result of the paper: 48.5 mIoU from 800 epochs of pre-training.
    """
    return SegmentConfig(
        batch_size=16,
        max_steps="160000",
        image_size=512,
        optim=OptimConfig(
            name="adamw",
            lr=3e-4,
            lr_batch_size=0,
            final_lr=0.0,
            schedule="poly",
            power=1.0,
            warmup="1500",
            weight_decay=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=0.0,
            layer_decay=0.65,
        ),
        mask_values=("1-150",),
        ignore=("0",),
        pyramid=PyramidConfig(window=0, checkpointing=False, frozen=False),
        drop_path=0.2,
        head_width=0,
        auxiliary_width=256,
        auxiliary_weight=0.4,
        dropout=0.1,
        scales=(0.5, 2.0),
        max_share=0.75,
        colours=PhotometricConfig(
            brightness=0.125, contrast=0.5, saturation=0.5, hue=0.1, jitter=0.75, grey=0.0, blur=0.0, solarise=0.0
        ),
        test=SegmentTestConfig(mode="whole", stride=0.6666666666666666, max_side=2048, scales=(1.0,), flip=False),
    )


paper_ade20k = paper
