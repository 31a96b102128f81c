"""Recipes of `pecobook codebook`: the paper's tokenizers, and smaller ones."""

from __future__ import annotations

import dataclasses

from pecobook.settings.codebook import AdversarialConfig, CodebookConfig, ExplicitConfig
from pecobook.settings.perceptual import PerceptualConfig
from pecobook.settings.tokenizer import AutoencoderConfig, QuantizerConfig
from pecobook.settings.training import BaseOptimConfig


def tiny() -> CodebookConfig:
    """512 codewords, 16 tokens per 32-pixel image, 600 steps at batch 16: about a minute on 2 cores.

    There are many small steps, because what a short training learns depends on its number of steps. The moving averages
    and the revival of codewords are faster than the paper's, because there are still few steps. The batch size, the
    learning rate and the weight of the perceptual loss were chosen on held-out training images (docs/results.md).

    Command: pecobook codebook tiny --data photos --out runs/codebook
    Result: a run that is killed and resumed exports the same bytes as an uninterrupted run, with one process and with
        two (docs/results.md).
    """
    return CodebookConfig(
        batch_size=16,
        max_steps="600",
        image_size=32,
        save_every=200,
        sample_every=200,
        optim=BaseOptimConfig(name="adam", lr=5e-4, warmup="5%", weight_decay=0.0, betas=(0.9, 0.99)),
        model=AutoencoderConfig(
            channels=(16, 32, 64, 128), latent_dim=64, num_blocks=1, latent_norm=True, padding="replicate"
        ),
        quantizer=QuantizerConfig(num_codewords=512, decay=0.987, revive_after=80, start_after=120),
        perceptual=PerceptualConfig(network="none", layers=(3, 4), weight=0.1, warmup=0, normalisation="layernorm"),
        balance=True,
    )


def cifar10() -> CodebookConfig:
    """CIFAR-10, 16 tokens per image, 30 epochs, perceptual weight 0.1 as in the other small recipes.

    Command: pecobook codebook cifar10 --data CIFAR10 --perceptual.network runs/contrast --out runs/codebook
    Cost: 1.2 GFLOP for an image (counted, without the perceptual network); 140 images/s on 2 CPU cores (measured), so
        3 hours there.
    """
    return CodebookConfig(
        batch_size=128,
        max_steps="30 epochs",
        image_size=32,
        optim=BaseOptimConfig(name="adam", lr=5e-4, warmup="5%", weight_decay=0.0, betas=(0.9, 0.99)),
        model=AutoencoderConfig(
            channels=(32, 64, 64, 128), latent_dim=64, num_blocks=1, latent_norm=True, padding="replicate"
        ),
        quantizer=QuantizerConfig(num_codewords=512),
        perceptual=PerceptualConfig(layers=(3, 4), weight=0.1, warmup=0, normalisation="layernorm"),
        balance=True,
    )


def tiny_imagenet() -> CodebookConfig:
    """Tiny-ImageNet at 64 pixels, 64 tokens per image, 2,048 codewords, 50 epochs.

    Command: pecobook codebook tiny-imagenet --data TINY_IMAGENET --perceptual.network runs/contrast --out runs/codebook
    Cost: 13 GFLOP for an image (counted, without the perceptual network); 17 images/s on 2 CPU cores (measured), so 31
        hours there for 38,000 images: use a GPU.
    """
    return CodebookConfig(
        batch_size=128,
        max_steps="50 epochs",
        image_size=64,
        optim=BaseOptimConfig(name="adam", lr=5e-4, warmup="5%", weight_decay=0.0, betas=(0.9, 0.99)),
        model=AutoencoderConfig(channels=(32, 64, 128, 256), latent_dim=128, latent_norm=True, padding="replicate"),
        quantizer=QuantizerConfig(num_codewords=2048),
        perceptual=PerceptualConfig(layers=(3, 4), weight=0.1, warmup=0, normalisation="layernorm"),
        balance=True,
    )


def imagenette() -> CodebookConfig:
    """Photographs at 128 pixels, 64 tokens per image, 1,024 codewords, 20 epochs.

    Command: pecobook codebook imagenette --data IMAGENETTE --perceptual.network runs/contrast --out runs/codebook
    Result: 1.3 epochs with SqueezeNet as the network, three seeds: 18.1 dB (18.0 with the pixel loss alone), 1,023
        codewords used, position within 2.5 points of permuted codes, 55% of the codes move with a crop
        (docs/results.md).
    Cost: 11 GFLOP for an image (counted, without the perceptual network); 7 images/s on one CPU core with SqueezeNet
        (measured), so 23 minutes per epoch of 9,469 images there.
    """
    return CodebookConfig(
        batch_size=16,
        max_steps="20 epochs",
        image_size=128,
        optim=BaseOptimConfig(name="adam", lr=5e-4, warmup="5%", weight_decay=0.0, betas=(0.9, 0.99)),
        model=AutoencoderConfig(
            channels=(16, 32, 64, 128, 256), latent_dim=64, num_blocks=1, latent_norm=True, padding="replicate"
        ),
        quantizer=QuantizerConfig(num_codewords=1024, start_after=200),
        perceptual=PerceptualConfig(layers=(3, 4), weight=0.1, warmup=0, normalisation="layernorm"),
        balance=True,
    )


def imagenette_224() -> CodebookConfig:
    """Photographs at 224 pixels, 196 tokens per image, 8,192 codewords, 20 epochs: the paper's geometry.

    Command: pecobook codebook imagenette-224 --data IMAGENETTE --perceptual.network runs/contrast --out runs/codebook
    Cost: 100 GFLOP for an image (counted, without the perceptual network), so 1.9e16 FLOP for 9,469 images; minutes on
        an H200 (estimated), too slow for a CPU.
    """
    base = imagenette()
    return dataclasses.replace(
        base,
        image_size=224,
        model=dataclasses.replace(base.model, channels=(32, 64, 128, 256, 256), latent_dim=128),
        quantizer=dataclasses.replace(base.quantizer, num_codewords=8192),
    )


def paper() -> CodebookConfig:
    """PeCo's tokenizer: 8,192 codewords, 14 x 14 tokens at 224 pixels, MoCo v3 ViT-B blocks 3, 6, 9, 12.

    The encoder and the codebook have 37.5M parameters, as counted in Table 2.

    Source: section 4 and Table 2 (84.1% after 300 epochs of pre-training). Batch 128, Adam (0.5, 0.95), lr 5e-5, 100
        epochs, warm-up 5,000 steps, lambda 1, beta 0.25. docs/decisions.md lists our choices where the paper is silent.
    Command: pecobook codebook paper --data IMAGENET --perceptual.network runs/contrast --compile --out runs/codebook
    Cost: 690 GFLOP for an image (counted: tokenizer 588, perceptual network 101), so 8.8e19 FLOP for ImageNet-1K. About
        110 hours of one H200 (estimated) at the 227 TFLOP/s of a step with VGG-16 and --compile, 170 without --compile.
    """
    return CodebookConfig(
        batch_size=128,
        max_steps="100 epochs",
        image_size=224,
        optim=BaseOptimConfig(
            name="adam",
            lr=5e-5,
            lr_batch_size=0,
            final_lr=0.0,
            schedule="cosine",
            warmup="5000",
            weight_decay=0.0,
            betas=(0.5, 0.95),
            eps=1e-8,
            clip_grad=0.0,
        ),
        min_crop=0.2,
        model=AutoencoderConfig(
            channels=(64, 128, 256, 512, 512),
            latent_dim=256,
            num_blocks=2,
            in_channels=3,
            kind="cnn",
            decoder_width=1.0,
            decoder_blocks=0,
            group_size=4,
            padding="replicate",
            latent_norm=False,
        ),
        quantizer=QuantizerConfig(
            kind="ema",
            num_codewords=8192,
            decay=0.99,
            eps=1e-5,
            revive_after=100,
            start_after=0,
            commitment=0.25,
            normalise=False,
            precision="fp32",
        ),
        perceptual=PerceptualConfig(
            layers=(3, 6, 9, 12), weight=1.0, warmup=0, normalisation="unit-rms", input_size=0, also=()
        ),
        adversarial=AdversarialConfig(weight=0.0),
        explicit=ExplicitConfig(kind="none"),
        target_features="",
        pixel_weight=1.0,
        balance=False,
    )


def paper_lite() -> CodebookConfig:
    """PeCo_lite: half the width, 25.7M parameters.

    Source: Table 2 (84.0% after 300 epochs of pre-training).
    Command: pecobook codebook paper-lite --data IMAGENET --perceptual.network runs/contrast --out runs/codebook
    Cost: 296 GFLOP for an image (counted: tokenizer 195), so 3.8e19 FLOP; about 55 hours of one H100 at 200 TFLOP/s
        (estimated).
    """
    return dataclasses.replace(paper(), model=dataclasses.replace(paper().model, channels=(32, 64, 128, 256, 512)))


def paper_resnet50() -> CodebookConfig:
    """PeCo's tokenizer with the features of a self-supervised ResNet-50 after each of its four stages.

    MoCo v3's public checkpoint fits: --perceptual.network timm:resnet50 --perceptual.weights r-50-1000ep.pth.tar.

    Source: Table 5 (84.0% after 300 epochs of pre-training). The paper does not say how the network was trained.
    Command: pecobook codebook paper-resnet50 --data IMAGENET --perceptual.network runs/contrast --out runs/codebook
    Cost: 613 GFLOP for an image (counted), so 7.9e19 FLOP; about 110 hours of one H100 at 200 TFLOP/s (estimated).
    """
    return dataclasses.replace(paper(), perceptual=dataclasses.replace(paper().perceptual, layers=(1, 2, 3, 4)))


def paper_vgg16() -> CodebookConfig:
    """PeCo's tokenizer with the features of a supervised VGG-16 after each of its five stages.

    The weights come from torchvision's server, or from a local vgg16-397923af.pth with --perceptual.weights.

    Source: Table 5 (84.1% after 300 epochs of pre-training). The paper does not give the depth of the VGG; 16 is our
        choice.
    Command: pecobook codebook paper-vgg16 --data IMAGENET --out runs/codebook
    Cost: 680 GFLOP for an image (counted), so 8.7e19 FLOP; about 120 hours of one H100 at 200 TFLOP/s (estimated).
    """
    return dataclasses.replace(
        paper(), perceptual=dataclasses.replace(paper().perceptual, network="torchvision:vgg16", layers=(1, 2, 3, 4, 5))
    )


def modern_dinov3() -> CodebookConfig:
    """PeCo's tokenizer with a recent perceptual network: DINOv3's ViT-B, blocks 3, 6, 9, 12, images at 224 pixels.

    The blocks are the paper's; no run has tested this choice yet. This command compares other blocks on held-out
    training images: python -m benchmarks.quantizer_study --arms ema --validation --network timm:vit_base_patch16_dinov3
    --layers "3 6 9 12" "6 9 12" "9 12" "12" --data IMAGES --out runs/layers.jsonl. The weights have their own licence.

    Source: DINOv3, arXiv 2508.10104.
    Command: pecobook codebook modern-dinov3 --data IMAGENET --compile --out runs/codebook
    Cost: 695 GFLOP for an image (counted: tokenizer 588, perceptual network 107), so 8.9e19 FLOP for ImageNet-1K.
    """
    network = "timm:vit_base_patch16_dinov3.lvd1689m"
    return dataclasses.replace(
        paper(), perceptual=dataclasses.replace(paper().perceptual, network=network, input_size=224)
    )


def vqkd() -> CodebookConfig:
    """BEiT v2's tokenizer, for comparison: its decoder predicts the features of CLIP's ViT-B, not pixels.

    ViT-B encoder, three-block decoder, 8,192 codewords of dimension 32 and unit length, moving averages with decay
    0.99, commitment 1, AdamW (0.9, 0.99), weight decay 1e-4, batch 512, 100 epochs, and the learning rate, warm-up and
    crops of its code. Differences from BEiT v2: positions are fixed sines and cosines; there are no class tokens; one
    linear layer projects to the 32 dimensions and one to the features (two with a tanh between them there); the target
    is the last layer of CLIP after its norm, without CLIP's projection to 512 channels; a codeword averages vectors
    (there the means of steps); and dead codewords are revived. --target-features timm:vit_base_patch16_224.dino uses
    its other teacher.

    Source: BEiT v2, arXiv 2208.06366 (85.0% after 300 epochs of pre-training with the codes).
    Command: pecobook codebook vqkd --data IMAGENET --compile --out runs/vqkd
    Cost: 167 GFLOP for an image (counted: tokenizer 132, the target's network 35), so 2.1e19 FLOP for ImageNet-1K.
    """
    return CodebookConfig(
        batch_size=512,
        max_steps="100 epochs",
        image_size=224,
        min_crop=0.08,
        optim=BaseOptimConfig(
            name="adamw", lr=2e-4, final_lr=1e-5, warmup="10 epochs", betas=(0.9, 0.99), weight_decay=1e-4
        ),
        model=AutoencoderConfig(kind="vit", channels=(768, 16), num_blocks=12, decoder_blocks=3, latent_dim=32),
        quantizer=QuantizerConfig(num_codewords=8192, decay=0.99, normalise=True, commitment=1.0),
        perceptual=PerceptualConfig(network="none"),
        target_features="timm:vit_base_patch16_clip_quickgelu_224.openai",
    )
