"""A finished pre-training run, loaded: the masked image model, the tokenizer and the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import read_weights
from pecobook.models.export import export_folder
from pecobook.models.initial import tokenizer_of_run
from pecobook.models.masked_vit import MaskedImageModel, VisibleOnlyModel
from pecobook.models.tokenizers import load_tokenizer
from pecobook.models.weights import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.values import load
from pecobook.stages.pretrain import encode_views, masked_model
from pecobook.utils.images import Normalised


class MaskedRun(Normalised):
    """The masked image model and the tokenizer of a run with --target tokens.

    `run(images, mask)` predicts codes and `run.encode(images)` computes them. Both take images float (B, 3, S, S) in
    [0, 1], which are normalised for the model and resized for the tokenizer here.
    """

    def __init__(
        self,
        model: MaskedImageModel | VisibleOnlyModel,
        tokenizer: Any,
        config: PretrainConfig,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.image_size, self.grid = config.image_size, model.grid  # in pixels, and in patches
        self.set_normalisation(mean, std)

    @property
    def codebook(self) -> Tensor:
        """The codewords, float (K, D)."""
        return self.tokenizer.codebook  # type: ignore[no-any-return]

    def encode(self, images: Tensor) -> Tensor:
        """Return the codes that the model was trained to predict, int64 (B, h, w)."""
        return encode_views(self.tokenizer, images, self.config.tokenizer_size)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w) to images float (B, 3, H, W) in [0, 1] of the tokenizer's size."""
        return self.tokenizer.decode(codes)  # type: ignore[no-any-return]

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (M, K) of the M masked patches; the mask is bool (B, h, w)."""
        return self.model(self.normalise(images), mask)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def score(self, images: Tensor, codes: Tensor, mask: Tensor, batch_size: int = 64) -> tuple[float, float]:
        """Return the accuracy on masked codes, in percent, and the perplexity (exponential of the mean cross-entropy).

        `codes` are the codes of all `images`, as from `encode`, so that several masks need only one encoding.
        """
        loss_sum, num_correct, num_masked = torch.zeros((), dtype=torch.float64), 0, 0
        for batch in zip(*(torch.split(tensor, batch_size) for tensor in (images, codes, mask)), strict=True):
            x, batch_codes, masked = (part.to(self.mean.device) for part in batch)
            logits, targets = self(x, masked).float(), batch_codes[masked]
            loss_sum += F.cross_entropy(logits, targets, reduction="sum").cpu()
            num_correct += int((logits.argmax(1) == targets).sum())
            num_masked += len(targets)
        return 100 * num_correct / num_masked, float((loss_sum / num_masked).exp())


def is_masked_run(source: str | Path) -> bool:
    """Return whether `source` is a finished run of `pretrain`, or its export folder."""
    return any((folder / "mim.safetensors").is_file() for folder in (Path(source) / "export", Path(source)))


def load_masked_run(run: str | Path) -> MaskedRun:
    """Load a finished run in evaluation mode on the CPU.

    Raises:
        WeightsError: the folder is not a finished run of `pretrain`, or the targets of the run are pixels.
    """
    folder = export_folder(run)
    if not (folder / "mim.safetensors").is_file():
        raise WeightsError(f"'{run}' is not a run of pecobook pretrain: its export has no mim.safetensors.")
    config: PretrainConfig = load(PretrainConfig(), folder.parent / "config.json")
    if config.target != "tokens":
        raise WeightsError(f"'{run}' predicts pixels, not codes: give a run with --target tokens.")
    backbone = load_backbone(str(run))
    head = read_weights(str(folder / "mim.safetensors"))
    model = masked_model(config, backbone.network, len(head.get("head.weight", ())))
    misfit = f"'{folder / 'mim.safetensors'}' does not fit the run's model, as config.json describes it:"
    try:
        missing = [name for name in model.load_state_dict(head, strict=False).missing_keys if "backbone." not in name]
    except RuntimeError as error:  # its first line names only the class
        raise WeightsError(f"{misfit} {' '.join(str(error).split())[:200]}") from None
    if missing:
        raise WeightsError(f"{misfit} it lacks {', '.join(missing[:5])}.")
    tokenizer = load_tokenizer(tokenizer_of_run(config.tokenizer, config.out, Path(run)))
    return MaskedRun(model, tokenizer, config, backbone.mean, backbone.std).eval().requires_grad_(False)
