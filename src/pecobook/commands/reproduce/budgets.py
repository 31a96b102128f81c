"""Budgets: the size and length of every kind of run, from the paper's recipes down to minutes on 2 cores."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from pecobook.commands.paper_tables import EPOCHS
from pecobook.recipes import codebook, contrast, detect, finetune, pretrain, segment
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.detect import DetectConfig
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.pretrain import DecoderConfig, MaskConfig, PretrainConfig
from pecobook.settings.segment import SegmentConfig
from pecobook.settings.tokenizer import AutoencoderConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import LARGEST, replace


@dataclasses.dataclass(frozen=True)
class VitRuns:
    """The training runs of a ViT of one size. All pre-training lengths refer to `EPOCHS` epochs."""

    pretrain: PretrainConfig
    """Pre-training on tokens."""
    mae: PretrainConfig
    """Pre-training on pixels, with an encoder that reads only the visible patches."""
    moco: ContrastConfig
    finetune: FinetuneConfig
    """Fine-tuning for every arm that is not in `own`."""
    own: dict[str, FinetuneConfig]
    """Training runs of arms with their own recipes: `mae`, and the networks from scratch, `scratch` and `deit`."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """The settings of every kind of run."""

    gpus_per_run: int
    """Number of GPUs per run: small runs execute in parallel, large ones need the memory of many GPUs."""
    contrast: dict[str, ContrastConfig]
    """MoCo v3 training of the perceptual networks: resnet and vit."""
    layers: dict[str, tuple[int, ...]]
    """Layers of each perceptual network: resnet, vit and supervised."""
    default: str
    """The perceptual network of all rows that do not name one."""
    supervised: FinetuneConfig | None
    """Training of the supervised network; None uses `supervised_network` instead."""
    supervised_network: str
    """A supervised network with public weights, used if `supervised` is None."""
    codebook: CodebookConfig
    transformers: AutoencoderConfig
    """The tokenizer made of transformers in Table 12."""
    lite: AutoencoderConfig
    """The half-width tokenizer in Table 2."""
    discriminator_layers: int
    vits: dict[str, VitRuns]
    """The ViTs that are pre-trained and fine-tuned, by size: base, large, huge; and visible, of size base, whose
    pre-training on tokens reads only the visible patches."""
    transfers: dict[str, SegmentConfig | DetectConfig | FinetuneConfig]
    """Further training runs of each of these ViTs: segment and detect, and kinetics and ssv2 on clips. An arm's name
    after the kind, as in kinetics-deit, stands for a separate recipe."""
    max_images: int = 0
    """Maximum number of images per split in an analysis; 0 keeps the numbers of `analyze`."""
    classifier: str = ""
    """The classifier for ImageNet-1K reconstructions; if empty, the supervised network that is trained."""


def make_budget(name: str) -> Budget:
    """Return the budget `tiny`, `small` or `paper`."""
    return _with_visible(_paper() if name == "paper" else _tiny(5 if name == "small" else 1))


def _with_visible(budget: Budget) -> Budget:
    """Return the budget with the accelerated training of Table 8: MAE's settings for ViT-B, with tokens as targets."""
    base = budget.vits["base"]
    masked, classifier = dataclasses.replace(base.mae, target="tokens"), base.own.get("mae", base.finetune)
    visible = dataclasses.replace(base, pretrain=masked, finetune=classifier)
    return dataclasses.replace(budget, vits={**budget.vits, "visible": visible})


def _tiny(factor: int) -> Budget:
    """Return a budget for 32-pixel images with 4 x 4 tokens: a run takes minutes on 2 cores, times `factor`."""
    resnet = dataclasses.replace(contrast.tiny(), batch_size=256, max_steps=str(160 * factor))
    vit = _tiny_vit(patch_size=4)
    # Tables are of all test images, up to the default of both commands, not of the few of their small recipes.
    dense = {"max_steps": str(100 * factor), "evaluation_images": SegmentConfig().evaluation_images}
    tokenizer = codebook.tiny()
    tokenizer = dataclasses.replace(tokenizer, max_steps=str(int(tokenizer.max_steps) * factor))
    classifier = dataclasses.replace(finetune.tiny(), max_steps=str(200 * factor))
    supervised = replace(classifier, {"backbone": f"timm:{resnet.model.name}", "weights": "random"})
    autoencoder = tokenizer.model
    return Budget(
        gpus_per_run=1,
        contrast={"resnet": resnet, "vit": dataclasses.replace(resnet, model=vit)},
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
        vits={
            "base": _tiny_runs(factor, resnet, classifier),
            "large": _tiny_runs(factor, resnet, classifier, depth=8, embed_dim=160),
            "huge": _tiny_runs(factor, resnet, classifier, depth=10, embed_dim=192),
            "huge-448": _tiny_runs(factor, resnet, replace(classifier, {"image_size": 64}), depth=10, embed_dim=192),
        },
        transfers={
            "segment": replace(segment.tiny(), dense),
            "detect": replace(detect.tiny(), dense),
            **dict.fromkeys(("kinetics", "ssv2"), replace(finetune.tiny_video(), {"max_steps": str(100 * factor)})),
        },
    )


def _tiny_vit(**args: Any) -> BackboneConfig:
    return BackboneConfig(
        name="vit_tiny_patch16_224",
        args=json.dumps({"patch_size": 8, "depth": 6, "embed_dim": 128, "num_heads": 4, **args}),
    )


def _tiny_runs(factor: int, moco: ContrastConfig, classifier: FinetuneConfig, **args: int) -> VitRuns:
    """Return the training runs of a small ViT; `args` change its size."""
    model = _tiny_vit(init_values=0.1, **args)
    masked = dataclasses.replace(pretrain.tiny(), max_steps=str(200 * factor), model=model)
    mae = dataclasses.replace(
        masked,
        target="pixels",
        visible_only=True,
        decoder=DecoderConfig(depth=2, width=128, num_heads=4),
        mask=MaskConfig(kind="random", num_masked=12),
        colour=dataclasses.replace(masked.colour, jitter=0.0),
    )
    scratch = replace(classifier, {"weights": "random"})
    moco = dataclasses.replace(moco, model=model)
    return VitRuns(masked, mae, moco, classifier, {"scratch": scratch})


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
        vits=_paper_vits(),
        transfers={
            "segment": segment.paper_ade20k(),
            "detect": detect.paper_coco(),
            "kinetics": finetune.paper_video(),
            "kinetics-deit": finetune.paper_video_deit(),
            "ssv2": finetune.paper_video_ssv2(),
            "ssv2-deit": dataclasses.replace(finetune.paper_video_deit(), clip=finetune.paper_video_ssv2().clip),
        },
        max_images=LARGEST,
        classifier="timm:deit_tiny_patch16_224",
    )


def _paper_vits() -> dict[str, VitRuns]:
    """Return the runs of ViT-B, ViT-L and ViT-H; for the larger ones MAE uses a rate of 4e-3 at batch 1,024."""
    own = {"mae": finetune.paper_mae(), "scratch": finetune.paper_scratch(), "deit": finetune.paper_deit()}
    vits = {"base": _paper_runs(pretrain.paper(), finetune.paper(), own)}
    for size, name, masked, classifier in (
        ("large", "vit_large_patch16_224", pretrain.paper_vit_l(), finetune.paper_vit_l()),
        ("huge", "vit_huge_patch14_224", pretrain.paper_vit_h(), finetune.paper_vit_h()),
        ("huge-448", "vit_huge_patch14_224", pretrain.paper_vit_h(), finetune.paper_vit_h_448()),
    ):
        scratch = {"backbone": f"timm:{name}", "max_steps": "200 epochs", "drop_path": 0.2}
        own = {
            "mae": replace(classifier, {"optim.lr": 4e-3, "optim.final_lr": 1e-6}),
            "scratch": replace(finetune.paper_scratch(), scratch),
        }
        vits[size] = _paper_runs(masked, classifier, own)
    return vits


def _paper_runs(masked: PretrainConfig, classifier: FinetuneConfig, own: dict[str, FinetuneConfig]) -> VitRuns:
    """Return the training runs of a ViT; MAE and MoCo v3 train the plain ViT of the size of `masked`."""
    plain = BackboneConfig(name=masked.model.name.replace("beit_", "vit_"))
    num_masked = 192 if "patch14" in plain.name else 147  # three quarters of 256 or 196 patches
    mae = replace(pretrain.paper_mae(), {"mask.num_masked": num_masked})
    length = f"{EPOCHS} epochs"
    moco = replace(contrast.paper(), {"max_steps": length, "optim.warmup": "40 epochs"})
    return VitRuns(
        replace(masked, {"max_steps": length}),
        dataclasses.replace(mae, max_steps=length, model=plain),
        dataclasses.replace(moco, model=plain),
        classifier,
        own,
    )


def with_backbone(budget: Budget, model: BackboneConfig) -> Budget:
    """Return the budget with another ViT instead of ViT-B, for all ways to pre-train it."""
    base = budget.vits["base"]
    runs = dataclasses.replace(
        base,
        pretrain=dataclasses.replace(base.pretrain, model=model),
        mae=dataclasses.replace(base.mae, model=model if model.name.startswith("vit_") else base.mae.model),
        moco=dataclasses.replace(base.moco, model=model),
        # From scratch a run of this ViT names the architecture, since `finetune` accepts no timm arguments.
        own={
            arm: dataclasses.replace(settings, backbone="") if settings.weights else settings
            for arm, settings in base.own.items()
        },
    )
    return _with_visible(dataclasses.replace(budget, vits={**budget.vits, "base": runs}))
