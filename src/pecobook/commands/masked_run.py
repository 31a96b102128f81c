"""A finished pre-training run as something that looks at images: its masked model, its tokenizer, its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import read_weights
from pecobook.models.export import export_folder
from pecobook.models.masked_vit import MaskedImageModel, VisibleOnlyModel
from pecobook.models.tokenizers import load_tokenizer
from pecobook.models.weights import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.values import load
from pecobook.stages.pretrain import encode_views, masked_model


class MaskedRun(nn.Module):
    """The model and the tokenizer of a run on codes, both on images float (B, 3, S, S) in [0, 1].

    It is a masked model, `run(images, mask)`, and a tokenizer, `run.encode(images)`: it normalises for the one and
    resizes for the other.
    """

    def __init__(self, model: MaskedImageModel | VisibleOnlyModel, tokenizer: Any, config: PretrainConfig) -> None:
        super().__init__()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    mean: Tensor
    std: Tensor

    @property
    def codebook(self) -> Tensor:
        """Float (K, D)."""
        return self.tokenizer.codebook  # type: ignore[no-any-return]

    @property
    def image_size(self) -> int:
        """Side of the images that the ViT was trained on, pixels."""
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.grid

    def encode(self, images: Tensor) -> Tensor:
        """The codes that the model was trained to predict, int64 (B, h, w)."""
        return encode_views(self.tokenizer, images, self.config.tokenizer_size)

    def decode(self, codes: Tensor) -> Tensor:
        """Images float (B, 3, H, W) in [0, 1] of codes (B, h, w), at the tokenizer's size."""
        return self.tokenizer.decode(codes)  # type: ignore[no-any-return]

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Logits (M, K) of the M masked patches, mask bool (B, h, w)."""
        return self.model((images - self.mean) / self.std, mask)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def score(self, images: Tensor, mask: Tensor, batch_size: int = 64) -> tuple[float, float]:
        """Percent of masked codes predicted rightly, and perplexity: the exponential of the mean cross-entropy."""
        total, right, count = torch.zeros((), dtype=torch.float64), 0, 0
        for part, hidden in zip(torch.split(images, batch_size), torch.split(mask, batch_size), strict=True):
            x, where = part.to(self.mean.device), hidden.to(self.mean.device)
            logits, targets = self(x, where).float(), self.encode(x)[where]
            total += F.cross_entropy(logits, targets, reduction="sum").cpu()
            right += int((logits.argmax(1) == targets).sum())
            count += len(targets)
        return 100 * right / count, float((total / count).exp())


def is_masked_run(source: str | Path) -> bool:
    """Whether this is a finished run of `pretrain`."""
    return (Path(source) / "export" / "mim.safetensors").is_file() or (Path(source) / "mim.safetensors").is_file()


def load_masked_run(run: str | Path) -> MaskedRun:
    """A finished run, in evaluation mode, on the CPU.

    Raises:
        WeightsError: it is no finished run of `pretrain`, or its targets are pixels.
    """
    folder = export_folder(run)
    if not (folder / "mim.safetensors").is_file():
        raise WeightsError(f"'{run}' is no run of pecobook pretrain: there is no mim.safetensors beside its weights.")
    config: PretrainConfig = load(PretrainConfig(), folder.parent / "config.json")
    if config.target != "tokens":
        raise WeightsError(f"'{run}' predicts pixels, not codes: give a run with --target tokens.")
    backbone = load_backbone(str(run)).network
    head = read_weights(str(folder / "mim.safetensors"))
    model = masked_model(config, backbone, len(head["head.weight"]))
    missing = [name for name in model.load_state_dict(head, strict=False).missing_keys if "backbone." not in name]
    if missing:
        raise WeightsError(f"'{folder / 'mim.safetensors'}' lacks {', '.join(missing[:5])}: it is of another model.")
    return MaskedRun(model, load_tokenizer(config.tokenizer), config).eval().requires_grad_(False)
