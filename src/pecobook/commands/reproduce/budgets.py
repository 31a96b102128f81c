"""Budgets: the size and the length of every kind of run, from the paper's recipes down to minutes on 2 cores."""

from __future__ import annotations

import dataclasses
import sys

from pecobook.recipes import codebook, contrast, finetune, pretrain
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.tokenizer import AutoencoderConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import replace


@dataclasses.dataclass(frozen=True)
class Budget:
    """The settings of every kind of run."""

    gpus_per_run: int
    """GPUs of one run: small trainings run in parallel, large trainings need the memory of many GPUs."""
    contrast: dict[str, ContrastConfig]
    """MoCo v3 by architecture: resnet, vit, and backbone where the masked ViT has another architecture than vit."""
    layers: dict[str, tuple[int, ...]]
    """Layers of each perceptual network: resnet, vit and supervised."""
    default: str
    """The perceptual network of all rows that name none."""
    supervised: FinetuneConfig | None
    """Training of the supervised network; None uses `supervised_network` instead."""
    supervised_network: str
    """A supervised network with public weights, for `supervised` None."""
    codebook: CodebookConfig
    transformers: AutoencoderConfig
    """The tokenizer of transformers in Table 12."""
    lite: AutoencoderConfig
    """The tokenizer of half the width in Table 2."""
    discriminator_layers: int
    pretrain: PretrainConfig
    finetune: FinetuneConfig


def make_budget(name: str) -> Budget:
    """Return the budget `tiny`, `small` or `paper`."""
    return _paper() if name == "paper" else _tiny(5 if name == "small" else 1)


def _tiny(factor: int) -> Budget:
    """Return a budget for images of 32 pixels with 4 x 4 tokens: a run takes minutes on 2 cores, times `factor`."""
    resnet = dataclasses.replace(contrast.tiny(), batch_size=256, max_steps=str(160 * factor))
    vit = BackboneConfig(
        name="vit_tiny_patch16_224", args='{"patch_size": 4, "depth": 6, "embed_dim": 128, "num_heads": 4}'
    )
    masked_vit = dataclasses.replace(pretrain.tiny(), max_steps=str(200 * factor))
    tokenizer = codebook.tiny()
    tokenizer = dataclasses.replace(tokenizer, max_steps=str(int(tokenizer.max_steps) * factor))
    classifier = dataclasses.replace(finetune.tiny(), max_steps=str(200 * factor))
    supervised = dataclasses.replace(
        classifier,
        backbone=f"timm:{resnet.model.name}",
        weights="random",
        optim=dataclasses.replace(classifier.optim, layer_decay=1.0),
    )
    autoencoder = tokenizer.model
    return Budget(
        gpus_per_run=1,
        contrast={
            "resnet": resnet,
            "vit": dataclasses.replace(resnet, model=vit),
            "backbone": dataclasses.replace(resnet, model=masked_vit.model),
        },
        layers={"resnet": (3, 4), "vit": (2, 4, 6), "supervised": (3, 4)},
        default="resnet",
        supervised=supervised,
        supervised_network="",
        codebook=tokenizer,
        transformers=dataclasses.replace(
            autoencoder, kind="vit", channels=(128, autoencoder.stride), num_blocks=4, num_heads=4
        ),
        lite=dataclasses.replace(autoencoder, channels=tuple(width // 2 for width in autoencoder.channels)),
        discriminator_layers=2,
        pretrain=masked_vit,
        finetune=classifier,
    )


def _paper() -> Budget:
    """Return the paper's recipes, with 300 epochs of pre-training as in the paper's ablations."""
    return Budget(
        gpus_per_run=sys.maxsize,
        contrast={"resnet": contrast.paper_resnet50(), "vit": contrast.paper()},
        layers={"resnet": (1, 2, 3, 4), "vit": (3, 6, 9, 12), "supervised": (1, 2, 3, 4, 5)},
        default="vit",
        supervised=None,
        supervised_network="torchvision:vgg16",
        codebook=codebook.paper(),
        transformers=AutoencoderConfig(kind="vit", channels=(768, 16), num_blocks=12),
        lite=codebook.paper_lite().model,
        discriminator_layers=3,
        pretrain=replace(pretrain.paper(), {"max_steps": "300 epochs"}),
        finetune=finetune.paper(),
    )


def with_backbone(budget: Budget, model: BackboneConfig) -> Budget:
    """Return the budget with another ViT, which is pre-trained on tokens and, for Table 1, by MoCo v3."""
    moco = dataclasses.replace(budget.contrast.get("backbone", budget.contrast["vit"]), model=model)
    pretraining = dataclasses.replace(budget.pretrain, model=model)
    return dataclasses.replace(budget, pretrain=pretraining, contrast={**budget.contrast, "backbone": moco})
