"""Recipes of `pecobook detect`: object detection and instance masks."""

from __future__ import annotations

from pecobook.settings.dense import PyramidConfig
from pecobook.settings.detect import DetectConfig, DetectorConfig
from pecobook.settings.training import OptimConfig


def tiny() -> DetectConfig:
    """100 steps at 96 pixels with narrow heads, for a ViT with 4- or 8-pixel patches.

    Command: pecobook detect tiny --data NUCLEI --backbone runs/vit --out runs/detector
    """
    return DetectConfig(
        batch_size=4,
        max_steps="100",
        image_size=96,
        save_every=100,
        sample_every=100,
        evaluation_images=16,
        optim=OptimConfig(lr=1e-3, warmup="10%", clip_grad=1.0, layer_decay=0.75),
        drop_path=0.0,
        detector=DetectorConfig(width=64, head_width=128, proposals=200, samples=64),
        scales=(96,),
        max_size=96,
    )


def nuclei() -> DetectConfig:
    """Microscope images of nuclei (Data Science Bowl 2018) at 256 pixels, 800 steps, for a ViT with 8-pixel patches.

    Command: pecobook detect nuclei --data NUCLEI --backbone runs/vit --out runs/detector
    Cost: about half an hour on one CPU core with a ViT of depth 4 and width 96 (estimated from 300 steps).
    Result of 300 steps instead of 800 with this ViT from random weights, one seed: 26.1 box AP, 27.9 mask AP.
    """
    return DetectConfig(
        batch_size=4,
        max_steps="800",
        image_size=256,
        save_every=100,
        sample_every=400,
        evaluation_images=45,
        optim=OptimConfig(
            lr=1e-3, schedule="steps", milestones=("67%", "92%"), warmup="5%", clip_grad=1.0, layer_decay=0.75
        ),
        drop_path=0.0,
        detector=DetectorConfig(width=64, head_width=256, proposals=500, samples=128, detections=200),
        scales=(96,),
        max_size=96,
        jitter=(0.5, 2.0),
    )


def paper() -> DetectConfig:
    """Mask R-CNN on COCO 2017 with ViT-B/16, 12 epochs at batch 16, images of 800 to 1,333 pixels.

    Source: section 4 and supplement; lr 4e-4, divided by ten after epoch 8 and again after epoch 11, layer decay 0.75,
        stochastic depth 0.1. The paper names no warm-up: 500 steps are our choice, as in mmdetection's schedules.
    Command: pecobook detect paper-coco --data COCO --backbone runs/vit --out runs/detector
    Cost: 4312 GFLOP for an image of 800 x 1,067 pixels, so 6.1e18 FLOP; about 17 hours of one H200 at 100 TFLOP/s
        (estimated).
    Result of the paper: 47.8 box AP, 42.6 mask AP, from 800 epochs of pre-training.
    """
    return DetectConfig(
        batch_size=16,
        max_steps="12 epochs",
        image_size=1344,
        save_every=2000,
        sample_every=7330,
        optim=OptimConfig(
            name="adamw",
            lr=4e-4,
            lr_batch_size=0,
            schedule="steps",
            milestones=("8 epochs", "11 epochs"),
            warmup="500",
            weight_decay=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=0.0,
            layer_decay=0.75,
        ),
        masks=True,
        drop_path=0.1,
        pyramid=PyramidConfig(window=0, checkpointing=False, frozen=False),
        detector=DetectorConfig(
            width=256, head_width=1024, proposals=1000, samples=512, detections=100, score_threshold=0.05
        ),
        scales=(800,),
        max_size=1333,
        jitter=(),
    )


paper_coco = paper
