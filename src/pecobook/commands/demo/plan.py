"""The runs of the demo: a feature network, three codebooks with equal budgets, and two ViTs.

The three codebooks differ only in the loss. `pixel` is trained with the pixel loss. `perceptual` adds the distance in
the features of a network that MoCo v3 trained on the same images. `control` adds the distance in the features of the
same network with random weights: a gain of `control` does not come from what the network learned, so it does not
support a claim about semantics.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from pecobook.commands.jobs import Job
from pecobook.recipes import codebook, contrast, pretrain
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.demo import DemoConfig
from pecobook.settings.perceptual import PerceptualConfig
from pecobook.settings.pretrain import MaskConfig, PretrainConfig
from pecobook.settings.tokenizer import AutoencoderConfig, QuantizerConfig
from pecobook.settings.training import BackboneConfig, TrainConfig
from pecobook.settings.values import replace

ARMS = ("pixel", "control", "perceptual")
PRETRAINED = ("pixel", "perceptual")


def plan(config: DemoConfig) -> dict[str, Job]:
    """Return the runs by name, in an order in which each run needs only earlier runs."""
    out = Path(config.out)
    on_gpu = config.budget == "gpu" or (config.budget == "auto" and torch.cuda.is_available())
    feature_network, tokenizer_base, vit = _gpu() if on_gpu else _cpu()
    common = {"data": config.data, "value_range": config.value_range, "seed": config.seed}
    common |= {"loggers": (), "save_minutes": 1.0, "keep_checkpoints": 1}

    def adapt(base: TrainConfig, name: str) -> TrainConfig:
        steps = max(round(int(base.max_steps) * config.length), 1)
        settings = {**common, "out": str(out / name), "max_steps": str(steps), "sample_every": steps}
        settings["save_every"] = max(steps // 3, 1)
        return replace(base, settings)

    perceptual = tokenizer_base.perceptual
    networks = {
        "pixel": PerceptualConfig(network="none"),
        "control": dataclasses.replace(perceptual, network=str(out / "contrast"), weights="random"),
        "perceptual": dataclasses.replace(perceptual, network=str(out / "contrast")),
    }
    jobs = {"contrast": Job("contrast", adapt(feature_network, "contrast"))}
    for arm in ARMS:
        name = f"codebook-{arm}"
        base = dataclasses.replace(tokenizer_base, perceptual=networks[arm])
        jobs[name] = Job("codebook", adapt(base, name), () if arm == "pixel" else ("contrast",))
    for arm in PRETRAINED:
        name, tokenizer = f"vit-{arm}", f"codebook-{arm}"
        jobs[name] = Job("pretrain", adapt(replace(vit, {"tokenizer": str(out / tokenizer)}), name), (tokenizer,))
    # In this order, two processes are busy until the end: one trains the feature network while the other one trains the
    # pixel codebook and its ViT.
    order = ("contrast", "codebook-pixel", "vit-pixel", "codebook-perceptual", "codebook-control", "vit-perceptual")
    sizes = {name: int(job.config.max_steps) * int(job.config.batch_size) for name, job in jobs.items()}
    work = {name: _COST[job.command] * sizes[name] for name, job in jobs.items()}
    accept = config.accept_data_change
    return {name: dataclasses.replace(jobs[name], work=work[name], accept_data_change=accept) for name in order}


# Relative cost of one image, measured on one core with the sizes of the CPU budget.
_COST = {"contrast": 1.0, "codebook": 4.4, "pretrain": 1.6}


def _cpu() -> tuple[ContrastConfig, CodebookConfig, PretrainConfig]:
    """Use 32-pixel images with 4 x 4 tokens: with few tokens and deep layers, perceptual codes differ most."""
    return (
        dataclasses.replace(contrast.tiny(), batch_size=256, max_steps="160"),
        dataclasses.replace(codebook.tiny(), max_steps="700"),
        dataclasses.replace(pretrain.tiny(), max_steps="140"),
    )


def _gpu() -> tuple[ContrastConfig, CodebookConfig, PretrainConfig]:
    """Use 64-pixel images, 8 x 8 tokens, a ResNet-18, a ViT-Ti of full depth, and ten times as many images."""
    feature_network, tokenizer, vit = _cpu()
    feature_network = dataclasses.replace(
        feature_network,
        model=BackboneConfig(name="resnet18", args='{"output_stride": 8}'),
        image_size=64,
        batch_size=512,
        max_steps="1500",
    )
    tokenizer = dataclasses.replace(
        tokenizer,
        model=AutoencoderConfig(
            channels=(64, 128, 128, 256), latent_dim=128, num_blocks=2, latent_norm=True, padding="replicate"
        ),
        quantizer=QuantizerConfig(num_codewords=1024, revive_after=50),
        image_size=64,
        batch_size=128,
        max_steps="2000",
    )
    vit = dataclasses.replace(
        vit,
        model=BackboneConfig(name="vit_tiny_patch16_224", args='{"patch_size": 8, "init_values": 0.1}'),
        mask=MaskConfig(num_masked=26, min_block=6),
        image_size=64,
        batch_size=256,
        max_steps="2000",
    )
    return feature_network, tokenizer, vit
