"""Object detection and instance masks."""

from __future__ import annotations

import dataclasses

from pecobook.settings.detect import DetectConfig, DetectorConfig
from pecobook.settings.training import OptimConfig


def tiny() -> DetectConfig:
    """100 steps at 96 pixels with narrow heads, for a ViT of patches of 4 or 8 pixels.

    Command: pecobook detect tiny --data NUCLEI --backbone runs/vit --out runs/detector
    """
    return DetectConfig(
        image_size=96,
        scales=(96,),
        max_size=96,
        batch_size=4,
        max_steps="100",
        drop_path=0.0,
        detector=DetectorConfig(width=64, head_width=128, proposals=200, samples=64),
        optim=OptimConfig(lr=1e-3, warmup="10%", layer_decay=0.75, clip_grad=1.0),
        evaluation_images=16,
        save_every=100,
        sample_every=100,
    )


def nuclei() -> DetectConfig:
    """Nuclei under the microscope (Data Science Bowl 2018) at 256 pixels, 800 steps, for a ViT of patches of 8.

    Command: pecobook detect nuclei --data NUCLEI --backbone runs/vit --out runs/detector
    Cost: about half an hour on one CPU core with a ViT of 4 blocks of width 96. Estimated from 300 steps.
    Result: not yet run. 300 steps of that ViT from random weights: 26.1 box AP, 27.9 mask AP (one seed).
    """
    return dataclasses.replace(
        tiny(),
        image_size=256,
        jitter=(0.5, 2.0),
        max_steps="800",
        detector=DetectorConfig(width=64, head_width=256, proposals=500, samples=128, detections=200),
        optim=OptimConfig(
            lr=1e-3, warmup="5%", layer_decay=0.75, clip_grad=1.0, schedule="steps", milestones=("67%", "92%")
        ),
        evaluation_images=45,
        sample_every=400,
    )


def paper_coco() -> DetectConfig:
    """Mask R-CNN on COCO 2017 with ViT-B/16, 12 epochs at batch 16, images of 800 to 1,333 pixels.

    Source: section 4 and supplement; lr 4e-4, a tenth of it after epochs 8 and 11, layer decay 0.75, stochastic depth
    0.1. The paper names no warm-up: 500 steps are our choice, as in mmdetection's schedules.
    Command: pecobook detect paper-coco --data COCO --backbone runs/vit --out runs/detector
    Cost: not yet measured.
    Result: not yet run. The paper: 47.8 box AP, 42.6 mask AP, from 800 epochs of pre-training.
    """
    return DetectConfig(sample_every=7330, save_every=2000)
