"""Semantic segmentation by UperNet."""

from __future__ import annotations

import dataclasses

from pecobook.settings.segment import SegmentConfig
from pecobook.settings.training import OptimConfig


def tiny() -> SegmentConfig:
    """100 steps on crops of 64 pixels, a head of width 32.

    Command: pecobook segment tiny --data SHAPES --backbone runs/vit --out runs/segmenter
    """
    return SegmentConfig(
        image_size=64,
        batch_size=8,
        max_steps="100",
        drop_path=0.0,
        head_width=32,
        auxiliary_width=32,
        evaluation_images=64,
        optim=OptimConfig(lr=1e-3, warmup="10%", layer_decay=0.75, schedule="poly"),
        save_every=100,
        sample_every=100,
    )


def camvid() -> SegmentConfig:
    """CamVid at 180 x 240 pixels, 11 classes, crops of 176 pixels, 4,000 steps at batch 16.

    Class 11 of the usual reduced set is "unlabelled".
    Command: pecobook segment camvid --data CAMVID --backbone runs/vit --out runs/segmenter
    Result: see docs/results.md for shorter runs on a CPU; this length is not yet run.
    """
    return dataclasses.replace(
        tiny(),
        ignore=("11", "255"),
        image_size=176,
        batch_size=16,
        max_steps="4000",
        drop_path=0.1,
        head_width=128,
        auxiliary_width=64,
        evaluation_images=5000,
        optim=OptimConfig(lr=1e-3, warmup="5%", layer_decay=0.75, schedule="poly"),
        save_every=1000,
        sample_every=1000,
    )


def paper_ade20k() -> SegmentConfig:
    """ADE20K at 512 pixels, ViT-B/16, 160,000 steps at batch 16, lr 3e-4, layer decay 0.65.

    Source: supplement; single scale, linear warm-up of 1,500 steps and linear decay, drop path 0.2. Widths of the
    heads, weight of the auxiliary one and the share of a crop that one class may fill are BEiT's.
    Command: pecobook segment paper-ade20k --data ADEChallengeData2016 --backbone runs/vit --out runs/segmenter
    Cost: about 1.8 TFLOP an image, so 4.6e18: about 7 hours of one H100 at 200 TFLOP/s. Estimated.
    Result: not yet run. The paper: 48.5 mIoU from 800 epochs of pre-training.
    """
    return SegmentConfig(mask_values=("1-150",), ignore=("0",), drop_path=0.2)
