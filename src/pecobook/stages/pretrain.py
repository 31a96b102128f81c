"""Pre-train a ViT: hide patches and predict their codes (PeCo, equations 6 and 7) or their pixels (MAE).

The codes come from a tokenizer that encodes every crop, or from a token bank that stores them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.analysis.features import layer_features
from pecobook.analysis.position import position_baseline
from pecobook.analysis.reconstruction import hide
from pecobook.data.batch import Batch
from pecobook.data.masking import make_mask
from pecobook.data.sampler import key
from pecobook.data.source import Splits
from pecobook.data.stream import Companion, ViewFunction
from pecobook.data.tokens import TokenBank, bank_differences, read_bank_config
from pecobook.data.views import NamedViews, central_view
from pecobook.engine.stage import Stage, StageOutput, submodule_state
from pecobook.engine.world import is_first_on_machine
from pecobook.errors import ConfigError, DataError, WeightsError
from pecobook.models.dry_run import refusing
from pecobook.models.export import write_tensors
from pecobook.models.initial import start_backbone, take_masked_model
from pecobook.models.masked_check import PURPOSE, check_grids, check_network
from pecobook.models.masked_vit import (
    MaskedImageModel,
    VisibleOnlyModel,
    at_positions,
    check_has_patches,
    initialise_beit,
    masked_positions,
    patch_grid,
    patch_pixels,
    tiled_cross_entropy,
    unshare_positions,
)
from pecobook.models.network_traits import without_memory
from pecobook.models.residual import keep_residuals_low
from pecobook.models.tokenizers import fingerprint, load_tokenizer
from pecobook.models.weights import Backbone, create_network
from pecobook.settings.pretrain import MaskConfig, PretrainConfig
from pecobook.utils.images import Normalised, to_float

_MANY_CODEWORDS = 2**16
"""Number of codewords above which logits are computed in tiles: with 262,144, 64 images have 5 GB of logits."""
_MANY_LOGITS = 2**28
"""Number of logits per tile, 1 GB in fp32."""


class PretrainStage(Normalised, Stage[PretrainConfig]):
    """A masked image model and its targets; without a tokenizer it loads the one that the settings name."""

    command = "pretrain"

    def __init__(self, config: PretrainConfig, tokenizer: Any = None) -> None:
        super().__init__()
        self.config, self.views = config, NamedViews.of(config)
        self.tokenizer: Any = None
        if config.target == "tokens":
            self.tokenizer = tokenizer or load_tokenizer(config.tokenizer)
        self.bank: TokenBank | None = None
        if config.tokens:
            self.bank = TokenBank(config.tokens, self.tokenizer.num_codewords, verify=is_first_on_machine())
        with refusing(config.model.name, PURPOSE):
            backbone = build_backbone(config)
            initialise_beit(backbone)
        args, image_size = backbone_args(config), config.image_size
        self.start = start_backbone(backbone, config.init, name=config.model.name, args=args, image_size=image_size)
        with refusing(config.model.name, PURPOSE):
            self.patch = int(config.image_size // patch_grid(backbone)[0])
            size = 3 * self.patch**2 if self.tokenizer is None else self.tokenizer.num_codewords
            self.model = masked_model(config, backbone, size)
        if config.residual == "bf16":
            keep_residuals_low([*backbone.blocks, *getattr(self.model, "decoder", ())], config.model.name)  # type: ignore[misc]
        take_masked_model(self.model, self.start, config.target, self.tokenizer)
        self.notes = self.start.notes
        self.set_normalisation(self.start.mean, self.start.std)

    def train(self, mode: bool = True) -> PretrainStage:
        """Set the model's mode; the tokenizer stays in evaluation mode."""
        super().train(mode)
        if self.tokenizer is not None:
            self.tokenizer.eval()
        return self

    def forward(self, batch: Batch) -> StageOutput:
        """Return equation 7 for uint8 images (B, 3, H, W), bool masks (B, h, w) and, from a bank, codes (B, h, w)."""
        if "probe" in batch:
            return StageOutput(None, {}, rows={"features": self._probed(batch["image"])})
        mask, M = batch["mask"], self.config.mask.num_masked
        images = self.views.pixels(batch, training=self.training)
        many = self.tokenizer is not None and self.tokenizer.num_codewords > _MANY_CODEWORDS
        outputs = self.model(self.normalise(images), mask, M, apply_head=not many)  # (B M, K or D)
        positions = masked_positions(mask, M)  # (B, M)
        if self.tokenizer is None:
            predicted = outputs.float()
            targets = at_positions(patch_pixels(images, self.patch), positions)  # (B M, 3 P^2)
            return StageOutput(F.mse_loss(predicted, targets), {})
        codes = batch.get("codes")
        if codes is None:
            codes = encode_views(self.tokenizer, images, self.config.tokenizer_size)  # (B, h, w)
        targets = at_positions(codes.flatten(1), positions)  # (B M,), in the order of `predicted`: images, then rows
        if many:
            rows = max(_MANY_LOGITS // self.tokenizer.num_codewords, 1)
            loss, best = tiled_cross_entropy(self.model.head, outputs, targets, rows)
        else:
            logits = outputs.float()  # (B M, K)
            loss, best = F.cross_entropy(logits, targets), logits.argmax(1)
        accuracy = 100 * (best == targets).float().mean()
        predicts = getattr(self.tokenizer, "predicts", "")  # features, so that there is nothing to draw
        pictures = {} if self.training or predicts else self._pictures(images, mask, codes, best)
        rows = {} if self.training else {"codes": codes, "mask": mask}
        return StageOutput(loss, {"accuracy": accuracy.detach()}, pictures, rows)

    def summarise(self, rows: dict[str, Tensor], reference_rows: dict[str, Tensor]) -> dict[str, float]:
        """Return the accuracy in percent of predicting each position's most frequent code, on at most 2,000 images.

        A model that is not more accurate has learned only where codes occur (`pecobook.analysis.position`).
        """
        if "codes" not in rows:
            return {}
        baseline = position_baseline(rows["codes"][:2000], rows["mask"][:2000])
        return {} if baseline is None else {"accuracy_of_position": baseline}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would compile the whole network once more
    def _probed(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of uint8 images (B, 3, S, S): the mean of the patches at 3/4 of the depth.

        A masked image model's best layer lies in the middle, since the last layers serve the prediction.
        """
        layers = list(layer_features(self.model.backbone, self.normalise(to_float(images)), False).values())
        return layers[max(len(layers) - 2, 0)].float()

    def _pictures(self, images: Tensor, mask: Tensor, codes: Tensor, best: Tensor, count: int = 8) -> dict[str, Tensor]:
        """Return the first `count` images, their visible parts, and their decoded predictions (paper, figure 5)."""
        predicted = codes.clone()
        predicted[mask] = best
        restored = self.tokenizer.decode(predicted[:count])
        return {
            "images": images[:count],
            "masked": hide(images[:count], mask[:count]),
            "predicted": resized(restored, images.shape[-1]),
        }

    def companions(self) -> tuple[Companion, Companion]:
        """Return functions that draw the mask of an image and, with a bank, read its codes."""
        mask, grid = self.config.mask, self.model.grid
        return (
            _MaskAndCodes(mask, grid, self.config.seed, "train", self.bank),
            _MaskAndCodes(mask, grid, 0, "evaluation", self.bank),
        )

    def num_views(self) -> int:
        """Return the number of views of each image in the token bank; 0 without a bank."""
        return 0 if self.bank is None else self.bank.num_views

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the backbone as a plain timm network, and mim.safetensors with the other weights: mask token, head."""
        model = submodule_state(state, "model")
        write_tensors(folder / "mim.safetensors", {n: v for n, v in model.items() if not n.startswith("backbone.")})
        weights, args = unshare_positions(submodule_state(model, "backbone"), backbone_args(self.config))
        pooling, renames_norm = self.exported_pooling
        if renames_norm:
            weights = {re.sub(r"^norm\.", "fc_norm.", weight): value for weight, value in weights.items()}
        name, size, target = self.config.model.name, self.config.image_size, self.config.target
        args = args | pooling
        mean, std = self.start.mean, self.start.std
        backbone = Backbone(self.model.backbone, name, args, mean, std, size, target=target)
        backbone.value_range, backbone.init = self.config.value_range, self.start.summary
        backbone.save_pretrained(folder, state=weights, origin="PeCo masked image modelling")
        return backbone.loading_code(str(folder))

    @functools.cached_property
    def exported_pooling(self) -> tuple[dict[str, Any], bool]:
        """The result of `exported_pooling` for this stage's network."""
        return exported_pooling(self.model.backbone, self.config)

    @classmethod
    def check(cls, config: PretrainConfig) -> PretrainStage:
        """Build the stage with random weights. Raises PecobookError for unusable settings or weights."""
        if config.target == "tokens" and not config.tokenizer:
            raise ConfigError("--tokenizer is missing: give the folder of a codebook run, or --target pixels.")
        stage = cls(config)
        rows, columns = stage.model.grid
        if config.mask.num_masked >= rows * columns:
            raise ConfigError(
                f"--mask.num-masked {config.mask.num_masked} must be below {rows * columns}, all patches."
            )
        if stage.tokenizer is not None:
            check_grids(config, stage.model.backbone, stage.tokenizer)
        check_network(config, stage.model)
        _ = stage.exported_pooling  # raises now, not at the export after many hours
        if stage.bank is not None:
            _check_bank(config, stage.bank, stage.tokenizer, (rows, columns))
        return stage

    @classmethod
    def check_data(cls, config: PretrainConfig, splits: Splits) -> None:
        """Raise DataError if the token bank was made from images other than those of `--data`."""
        if not config.tokens:
            return
        bank_config = read_bank_config(Path(config.tokens))
        expected: dict[str, Any] = {}
        if "value_range" in bank_config:  # the fingerprints differ too, but do not say why
            expected["value_range"] = splits.train.value_range and list(splits.train.value_range)
        expected |= {"data": splits.train.fingerprint, "evaluation_data": splits.evaluation.fingerprint}
        differences = bank_differences(bank_config, expected)
        if differences:
            raise DataError(
                f"The token bank '{config.tokens}' is of other images than --data '{config.data}': "
                f"{'; '.join(differences)}.\n"
                "Make a bank of these images with 'pecobook tokenize', or leave --tokens out."
            )

    @classmethod
    def view(cls, config: PretrainConfig) -> ViewFunction:
        """Return the function that takes a random crop of an image and draws its colour augmentation."""
        return NamedViews.of(config).train

    @classmethod
    def probe_view(cls, config: PretrainConfig) -> ViewFunction:
        """Return the function that takes the central crop of an image, without colour augmentation."""
        return partial(central_view, size=config.image_size)

    @classmethod
    def evaluation_view(cls, config: PretrainConfig) -> ViewFunction:
        """Return the function that takes the central crop of a held-out image."""
        return NamedViews.of(config).evaluation


# -------------------------------------------------------------------------------------------------------------- targets


def masked_model(config: PretrainConfig, backbone: nn.Module, size: int) -> MaskedImageModel | VisibleOnlyModel:
    """Build the masked image model that the settings name, with `size` outputs per masked patch."""
    if config.visible_only:
        return VisibleOnlyModel(backbone, size, config.decoder)
    return MaskedImageModel(backbone, size)


def encode_views(tokenizer: Any, images: Tensor, size: int) -> Tensor:
    """Encode float images (B, 3, S, S) in [0, 1] at `size` pixels (0: at S) to codes int64 (B, h, w)."""
    # Without checking the values, which would make a step wait for the device.
    return tokenizer.encode(resized(images, size or images.shape[-1]), check=False)  # type: ignore[no-any-return]


def resized(images: Tensor, size: int) -> Tensor:
    """Resize square images (bicubic, antialiased), and clamp them to [0, 1]."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------------- backbone


def build_backbone(config: PretrainConfig) -> nn.Module:
    """Build the network of the settings with random weights. Raises WeightsError, also if it has no patches."""
    name = config.model.name
    try:
        return create_network(name, num_classes=0, drop_path_rate=config.drop_path, **backbone_args(config))
    except WeightsError:
        check_has_patches(without_memory(name, config.model.kwargs()))  # one without patches takes no image size
        raise


def backbone_args(config: PretrainConfig) -> dict[str, Any]:
    """Return the arguments of timm.create_model: the image size, and `--model.args`."""
    return {"img_size": config.image_size, **config.model.kwargs()}


def exported_pooling(backbone: nn.Module, config: PretrainConfig) -> tuple[dict[str, Any], bool]:
    """Return how the exported network pools: the mean of the patches, since masked modelling trains no class token.

    Returns:
        arguments of timm.create_model, and whether the last norm is called `fc_norm` there and `norm` in `backbone`.

    Raises:
        WeightsError: the timm network cannot pool the mean of its patches.
    """
    pool = getattr(backbone, "global_pool", "")
    pooling = {"global_pool": "avg"} if pool in ("avg", "token") else {}
    if pool != "token":
        return pooling, False
    exported = without_memory(config.model.name, backbone_args(config) | pooling).state_dict()
    return pooling, "fc_norm.weight" in exported and "fc_norm.weight" not in backbone.state_dict()


# ---------------------------------------------------------------------------------------------------------------- check


def _check_bank(config: PretrainConfig, bank: TokenBank, tokenizer: Any, grid: tuple[int, int]) -> None:
    expected = {"tokenizer": fingerprint(tokenizer), "grid": list(grid), **NamedViews.of(config).settings()}
    differences = bank_differences(bank.config, expected)
    if differences:
        raise DataError(
            f"The token bank '{config.tokens}' is of other views or another tokenizer: {'; '.join(differences)}.\n"
            "Make a bank with 'pecobook tokenize' and these settings, or leave --tokens out."
        )


# ---------------------------------------------------------------------------------------------------- views and masks


@dataclasses.dataclass(frozen=True)
class _MaskAndCodes:
    """The mask of an image, new in every epoch, and the codes of its view in the bank."""

    config: MaskConfig
    grid: tuple[int, int]
    seed: int
    split: str
    bank: TokenBank | None

    def __call__(self, image: int, epoch: int) -> dict[str, Tensor]:
        sample = {"mask": make_mask(key(self.seed, image, epoch), self.grid, self.config)}
        if self.bank is not None:
            sample["codes"] = self.bank.read(self.split, image, epoch % self.bank.layouts[self.split].num_views)
        return sample
