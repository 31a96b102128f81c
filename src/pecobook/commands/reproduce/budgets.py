"""How long and how large everything is trained: the paper's recipes, or as much smaller as a budget allows."""

from __future__ import annotations

import dataclasses
import sys

from pecobook.recipes import codebook, contrast, finetune, pretrain
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.perceptual import PerceptualConfig
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.tokenizer import AutoencoderConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import replace


@dataclasses.dataclass(frozen=True)
class Budget:
    """Settings of every kind of run."""

    gpus_per_run: int
    """Small trainings go side by side, large ones need the memory of many GPUs."""
    contrast: dict[str, ContrastConfig]
    """By architecture: resnet and vit; backbone is a ViT like the masked ones, where vit is another."""
    layers: dict[str, tuple[int, ...]]
    """Of each perceptual network: resnet, vit and supervised."""
    default: str
    """The network of all rows that name none."""
    supervised: FinetuneConfig | None
    """How to train the supervised network; None takes `supervised_network`."""
    supervised_network: str
    codebook: CodebookConfig
    transformers: AutoencoderConfig
    """Table 12's tokenizer of transformers."""
    lite: AutoencoderConfig
    """Table 2's tokenizer of half the width."""
    discriminator_layers: int
    pretrain: PretrainConfig
    finetune: FinetuneConfig


def budget(name: str) -> Budget:
    """`tiny`, `small` or `paper`."""
    return _paper() if name == "paper" else _tiny(5 if name == "small" else 1)


def _tiny(factor: int) -> Budget:
    """32 pixels in 4 x 4 tokens: minutes a run on 2 cores, or `factor` times that."""

    def times(steps: int) -> str:
        return str(steps * factor)

    resnet = dataclasses.replace(contrast.tiny(), batch_size=256, max_steps=times(160))
    vit = BackboneConfig(
        name="vit_tiny_patch16_224", args='{"patch_size": 4, "depth": 6, "embed_dim": 128, "num_heads": 4}'
    )
    masked = dataclasses.replace(pretrain.tiny(), max_steps=times(200))
    tokenizer = dataclasses.replace(codebook.tiny(), max_steps=times(220))
    transfer = dataclasses.replace(finetune.tiny(), max_steps=times(200))
    supervised = dataclasses.replace(
        transfer,
        backbone=f"timm:{resnet.model.name}",
        weights="random",
        optim=dataclasses.replace(transfer.optim, layer_decay=1.0),
    )
    channels = tokenizer.model.channels
    return Budget(
        gpus_per_run=1,
        contrast={
            "resnet": resnet,
            "vit": dataclasses.replace(resnet, model=vit),
            "backbone": dataclasses.replace(resnet, model=masked.model),
        },
        layers={"resnet": (3, 4), "vit": (2, 4, 6), "supervised": (3, 4)},
        default="resnet",
        supervised=supervised,
        supervised_network="",
        codebook=tokenizer,
        transformers=dataclasses.replace(
            tokenizer.model, kind="vit", channels=(128, tokenizer.model.stride), num_blocks=4, num_heads=4
        ),
        lite=dataclasses.replace(tokenizer.model, channels=tuple(width // 2 for width in channels)),
        discriminator_layers=2,
        pretrain=masked,
        finetune=transfer,
    )


def _paper() -> Budget:
    """The paper's recipes; 300 epochs of pre-training, as its ablations have."""
    tokenizer = codebook.paper()
    return Budget(
        gpus_per_run=sys.maxsize,
        contrast={"resnet": contrast.paper_resnet50(), "vit": contrast.paper()},
        layers={"resnet": (1, 2, 3, 4), "vit": (3, 6, 9, 12), "supervised": (1, 2, 3, 4, 5)},
        default="vit",
        supervised=None,
        supervised_network="torchvision:vgg16",
        codebook=tokenizer,
        transformers=AutoencoderConfig(kind="vit", channels=(768, 16), num_blocks=12),
        lite=codebook.paper_lite().model,
        discriminator_layers=3,
        pretrain=replace(pretrain.paper(), {"max_steps": "300 epochs"}),
        finetune=finetune.paper(),
    )


def with_backbone(own: Budget, model: BackboneConfig) -> Budget:
    """The same with another ViT, pre-trained on tokens and, for Table 1, by MoCo v3."""
    contrasted = dataclasses.replace(own.contrast.get("backbone", own.contrast["vit"]), model=model)
    return dataclasses.replace(
        own, pretrain=dataclasses.replace(own.pretrain, model=model), contrast={**own.contrast, "backbone": contrasted}
    )


def perceptual(
    own: Budget, network: str, layers: tuple[int | str, ...], weights: str, *, shuffle: bool
) -> PerceptualConfig:
    """Settings of a perceptual network, normalised and weighted as the budget's codebook is."""
    base = own.codebook.perceptual
    return dataclasses.replace(base, network=network, layers=layers, weights=weights, shuffle=shuffle)
