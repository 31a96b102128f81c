"""Recipes of `pecobook pretrain`: vision transformers pre-trained on tokens."""

from __future__ import annotations

import dataclasses

from pecobook.settings.images import PhotometricConfig
from pecobook.settings.pretrain import DecoderConfig, MaskConfig, PretrainConfig
from pecobook.settings.training import BackboneConfig, BaseOptimConfig


def tiny() -> PretrainConfig:
    """A ViT of width 128 and depth 6 on 4 x 4 patches of 32-pixel images, 200 steps.

    Command: pecobook pretrain tiny --data photos --tokenizer runs/codebook --out runs/vit
    """
    return dataclasses.replace(cifar10(), batch_size=128, max_steps="200", save_every=100, sample_every=200)


def cifar10() -> PretrainConfig:
    """CIFAR-10, 100 epochs at batch 512.

    Command: pecobook pretrain cifar10 --data CIFAR10 --tokenizer runs/codebook --out runs/vit
    Cost: 460 images/s on 2 CPU cores with the tokenizer in each step (measured), so 3 hours there.
    """
    return PretrainConfig(
        batch_size=512,
        max_steps="100 epochs",
        image_size=32,
        optim=BaseOptimConfig(lr=1.5e-3, final_lr=1e-5, warmup="10%", clip_grad=3.0),
        model=BackboneConfig(
            name="vit_tiny_patch16_224",
            args='{"patch_size": 8, "depth": 6, "embed_dim": 128, "num_heads": 4, "init_values": 0.1}',
        ),
        drop_path=0.0,
        mask=MaskConfig(num_masked=6, min_block=2),
    )


def tiny_imagenet() -> PretrainConfig:
    """Tiny-ImageNet at 64 pixels, ViT-Ti with 8-pixel patches, 26 of 64 masked, 200 epochs.

    Command: pecobook pretrain tiny-imagenet --data TINY_IMAGENET --tokenizer runs/codebook --out runs/vit
    """
    return PretrainConfig(
        batch_size=512,
        max_steps="200 epochs",
        image_size=64,
        optim=BaseOptimConfig(lr=1.5e-3, final_lr=1e-5, warmup="10%", clip_grad=3.0),
        model=BackboneConfig(name="vit_tiny_patch16_224", args='{"patch_size": 8, "init_values": 0.1}'),
        drop_path=0.05,
        mask=MaskConfig(num_masked=26, min_block=6),
    )


def imagenette() -> PretrainConfig:
    """Photographs at 128 pixels, ViT-S with 16-pixel patches, 26 of 64 masked, 300 epochs.

    Command: pecobook pretrain imagenette --data IMAGENETTE --tokenizer runs/codebook --out runs/vit
    """
    return dataclasses.replace(
        tiny_imagenet(),
        batch_size=256,
        max_steps="300 epochs",
        image_size=128,
        model=BackboneConfig(name="vit_small_patch16_224", args='{"init_values": 0.1}'),
    )


def paper() -> PretrainConfig:
    """PeCo ViT-B/16, 800 epochs of ImageNet-1K at batch 2,048: 75 of 196 patches masked in blocks.

    Source: section 4 and Table 1 (84.5% after fine-tuning). Learning rate 1.5e-3 at batch 2,048, weight decay 0.05,
        drop path 0.1; crops, warm-up, clipping, relative positions and LayerScale are BEiT's. The learning rate scales
        linearly with --batch-size.
    Command: pecobook pretrain paper --data IMAGENET --tokenizer runs/codebook --compile --out runs/vit
    Cost: 108 GFLOP for an image with a token bank (counted), so 1.1e20 FLOP; about 110 hours of one H200 (estimated) at
        the 280 TFLOP/s that steps reached there with --compile. 175 GFLOP with the tokenizer in each step.
    """
    return PretrainConfig(
        batch_size=2048,
        max_steps="800 epochs",
        image_size=224,
        optim=BaseOptimConfig(
            name="adamw",
            lr=1.5e-3,
            lr_batch_size=2048,
            final_lr=1e-5,
            schedule="cosine",
            warmup="10 epochs",
            weight_decay=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=3.0,
        ),
        min_crop=0.08,
        target="tokens",
        tokenizer_size=0,
        visible_only=False,
        model=BackboneConfig(
            name="beit_base_patch16_224",
            args='{"init_values": 0.1, "use_rel_pos_bias": false, "use_shared_rel_pos_bias": true}',
        ),
        drop_path=0.1,
        mask=MaskConfig(kind="block", num_masked=75, min_block=16),
        colour=PhotometricConfig(
            brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0, jitter=1.0, grey=0.0, blur=0.0, solarise=0.0
        ),
    )


def paper_vit_b_300() -> PretrainConfig:
    """PeCo ViT-B/16, 300 epochs: the setting of all the paper's comparisons between tokenizers.

    Source: Table 2 (84.1% after fine-tuning), Tables 5 to 7, 10 and 12.
    Command: pecobook pretrain paper-vit-b-300 --data IMAGENET --tokenizer runs/codebook --compile --out runs/vit
    Cost: 108 GFLOP for an image with a token bank (counted), so 4.2e19 FLOP; about 42 hours of one H200 (estimated) at
        the 280 TFLOP/s that steps reached there with --compile.
    """
    return dataclasses.replace(paper(), max_steps="300 epochs")


paper_vit_b_800 = paper


def paper_vit_l() -> PretrainConfig:
    """PeCo ViT-L/16, 800 epochs; the paper gives no separate settings for ViT-L.

    Source: Table 1 (86.5% after fine-tuning). LayerScale 1e-5 is BEiT's value for this size; all other settings are
        those of ViT-B, which is our choice.
    Command: pecobook pretrain paper-vit-l --data IMAGENET --tokenizer runs/codebook --compile --out runs/vit
    Cost: 375 GFLOP for an image with a token bank, so 3.8e20 FLOP; about 360 hours of one H100 at 300 TFLOP/s
        (estimated).
    """
    return dataclasses.replace(
        paper(),
        model=dataclasses.replace(
            paper().model,
            name="beit_large_patch16_224",
            args='{"init_values": 1e-05, "use_rel_pos_bias": false, "use_shared_rel_pos_bias": true}',
        ),
    )


def paper_vit_h() -> PretrainConfig:
    """PeCo ViT-H/14, 800 epochs; the paper gives neither settings nor a patch size for ViT-H.

    Source: Table 1 (87.5% after fine-tuning). Our choices: patches of 14 pixels, so 16 x 16 tokens, for which the
        tokenizer reads crops resized to 256 pixels; 98 of 256 patches masked, the same share as for ViT-B; absolute
        positions, LayerScale 1e-5, drop path 0.2.
    Command: pecobook pretrain paper-vit-h --data IMAGENET --tokenizer runs/codebook --compile --out runs/vit
    Cost: 1.0 TFLOP for an image with a token bank, so 1.0e21 FLOP; about 950 hours of one H100 at 300 TFLOP/s
        (estimated).
    """
    return dataclasses.replace(
        paper(),
        tokenizer_size=256,
        model=dataclasses.replace(paper().model, name="vit_huge_patch14_224", args='{"init_values": 1e-05}'),
        drop_path=0.2,
        mask=dataclasses.replace(paper().mask, num_masked=98),
    )


def paper_mae() -> PretrainConfig:
    """MAE ViT-B/16, 1,600 epochs at batch 4,096: predicts the hidden three quarters' pixels from the visible quarter.

    Source: MAE, arXiv 2111.06377, table 8 and public code: learning rate 1.5e-4 x batch / 256, warm-up 40 epochs, no
        colour augmentation, drop path or clipping, a decoder of 8 blocks of width 512. MAE's positions are fixed; those
        of timm's network are learned. For the "MAE" rows of the paper's Tables 1, 3 and 8.
    Command: pecobook pretrain paper-mae --data IMAGENET --compile --out runs/mae
    Cost: 58 GFLOP for an image (counted: 50 of 197 tokens in the encoder, all in the decoder), so 1.2e20 FLOP; about
        160 hours of one H100 at 200 TFLOP/s (estimated).
    Result of MAE: 83.6% after fine-tuning.
    """
    base = paper()
    return dataclasses.replace(
        base,
        batch_size=4096,
        max_steps="1600 epochs",
        optim=dataclasses.replace(
            base.optim,
            lr=2.4e-3,
            lr_batch_size=4096,
            final_lr=0.0,
            warmup="40 epochs",
            betas=(0.9, 0.95),
            clip_grad=0.0,
        ),
        min_crop=0.2,
        target="pixels",
        visible_only=True,
        decoder=DecoderConfig(depth=8, width=512, num_heads=16),
        model=BackboneConfig(name="vit_base_patch16_224", args="{}"),
        drop_path=0.0,
        mask=dataclasses.replace(base.mask, kind="random", num_masked=147),
        colour=dataclasses.replace(base.colour, jitter=0.0),
    )
