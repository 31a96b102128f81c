"""Semantic segmentation: UperNet (Xiao et al., arXiv 1807.10221) on a feature pyramid, and inference on whole images.

The head follows mmsegmentation, which BEiT and PeCo use: pyramid pooling of the coarsest map to 1, 2, 3 and 6 cells per
side, a top-down pyramid, and the concatenation of all four levels; in training also a small convolutional head on the
third level (weight 0.4). transformers' `BeitForSemanticSegmentation` computes the same function.

B batch, C classes, H W height and width in pixels.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.dense.pyramid import FeaturePyramid, rebuild_pyramid
from pecobook.models.export import Card, Exported
from pecobook.models.snippets import quoted, read_image_call
from pecobook.settings.segment import SegmenterConfig, SegmentTestConfig
from pecobook.utils.images import Normalised, check_pixels, fitted_size, resize, to_float

POOL_SIZES = (1, 2, 3, 6)  # sides of the pooled maps, cells
MAX_SCORES = 50_000_000  # number of interpolated scores that are stored at once


def conv_norm_relu(channels: int, width: int, size: int) -> nn.Sequential:
    """Build a bias-free convolution, batch normalisation and ReLU; `size` is the side of the kernel."""
    return nn.Sequential(
        nn.Conv2d(channels, width, size, padding=size // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


def resize_maps(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Interpolate bilinearly: (B, C, h, w) to (B, C, *size)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resize_to_pixels(scores: Tensor, size: torch.Size | tuple[int, ...], patch: int) -> Tensor:
    """Interpolate scores (B, C, h, w) of an image to its `size`: (B, C, *size).

    The scores also cover the padding to whole patches, which is cut off.
    """
    height, width = size
    return resize_maps(scores, (-(-height // patch) * patch, -(-width // patch) * patch))[..., :height, :width]


class UperNet(nn.Module):
    """Maps four feature maps to class scores.

    Args:
        channels: numbers of channels of the four feature maps, fine to coarse.
        width: number of channels of the head.
        num_classes: number of classes C.
        dropout: share of the channels dropped before the classifier in training.
    """

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), conv_norm_relu(channels[-1], width, 1)) for cells in POOL_SIZES
        )
        self.pooled = conv_norm_relu(channels[-1] + len(POOL_SIZES) * width, width, 3)
        self.lateral = nn.ModuleList(conv_norm_relu(level_channels, width, 1) for level_channels in channels[:-1])
        self.smooth = nn.ModuleList(conv_norm_relu(width, width, 3) for _ in channels[:-1])
        self.joined = conv_norm_relu(len(channels) * width, width, 3).append(nn.Dropout2d(dropout))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map feature maps (B, C_l, h_l, w_l) to scores (B, C, h_0, w_0)."""
        coarsest = maps[-1]
        pooled = [resize_maps(pool(coarsest), coarsest.shape[2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps[:-1], strict=True)]
        levels.append(self.pooled(torch.cat([coarsest, *pooled], 1)))
        for number in range(len(levels) - 1, 0, -1):
            levels[number - 1] = levels[number - 1] + resize_maps(levels[number], levels[number - 1].shape[2:])
        outputs = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        outputs = [outputs[0], *(resize_maps(x, outputs[0].shape[2:]) for x in outputs[1:])]
        return self.classifier(self.joined(torch.cat(outputs, 1)))  # type: ignore[no-any-return]


class FCNHead(nn.Sequential):
    """Auxiliary head for training, one convolution and a classifier: (B, channels, h, w) to (B, C, h, w)."""

    def __init__(self, channels: int, width: int, num_classes: int, dropout: float = 0.0) -> None:
        layers = conv_norm_relu(channels, width, 3).append(nn.Dropout2d(dropout))
        super().__init__(layers, nn.Conv2d(width, num_classes, 1))


class Segmenter(Normalised, Exported):
    """A semantic segmentation model: a feature pyramid with an UperNet head.

    Args:
        pyramid: the feature pyramid.
        pyramid_settings: result of `describe_pyramid` for the pyramid, including the side of the square training
            images, and the mean and standard deviation that normalise images.
        classes: names of the classes.
        config: settings of the heads.
    """

    kind = "segmenter"
    trained_by = "segment"

    def __init__(
        self,
        pyramid: FeaturePyramid,
        pyramid_settings: dict[str, Any],
        *,
        classes: tuple[str, ...],
        config: SegmenterConfig = SegmenterConfig(),
    ) -> None:
        super().__init__()
        self.pyramid, self.pyramid_settings, self.classes, self.config = pyramid, pyramid_settings, classes, config
        self.image_size = int(pyramid_settings["image_size"])
        shared = len(classes), config.dropout
        self.head = UperNet(pyramid.channels, config.head_width or pyramid.channels[-1], *shared)
        auxiliary_width = config.auxiliary_width if config.auxiliary_weight else 0
        self.auxiliary = FCNHead(pyramid.channels[2], auxiliary_width, *shared) if auxiliary_width else None
        for module in (self.head, self.auxiliary):
            _initialise(module)
        self.set_normalisation(pyramid_settings["mean"], pyramid_settings["std"])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map images to class scores.

        Args:
            images: float (B, 3, H, W) in [0, 1].

        Returns:
            scores (B, C, H / s, W / s) with the stride s of the finest map, and H and W padded to whole patches; scores
            of the auxiliary head, or None in evaluation mode.
        """
        maps = self.pyramid(self.normalise(images))
        auxiliary = self.auxiliary(maps[2]) if self.training and self.auxiliary is not None else None
        return self.head(maps), auxiliary

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `rebuild` builds an equal segmenter, without the auxiliary head."""
        return {
            "classes": list(self.classes),
            "image_size": self.image_size,
            "width": self.config.head_width,
            "pyramid": self.pyramid_settings,
        }

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """Build the segmenter that `settings` describes, with random weights and without the auxiliary head."""
        return cls(
            rebuild_pyramid(settings["pyramid"]),
            settings["pyramid"],
            classes=tuple(settings["classes"]),
            config=SegmenterConfig(head_width=settings["width"], auxiliary_width=0),
        )

    @classmethod
    def is_exported(cls, name: str) -> bool:
        """Return whether an export includes the weight of this name: all except those of the auxiliary head."""
        return not name.startswith("auxiliary.")

    def loading_code(self, source: str) -> str:
        """Return Python code that loads the segmenter; `source` is a folder or a repository on the Hugging Face hub."""
        return f"""\
from pecobook import Segmenter, read_image

model = Segmenter.from_pretrained({quoted(source)})
classes = model.predict({read_image_call(self.value_range)})  # int64 (H, W): a number in model.classes for every pixel
print({{model.classes[number]: int((classes == number).sum()) for number in classes.unique().tolist()}})"""

    def card(self, origin: str) -> Card:  # noqa: ARG002
        """Return the model card: backbone, number of classes and image size."""
        return Card(
            title=f"UperNet on {self.pyramid_settings['name']}",
            text=f"Number of classes: {len(self.classes)}. Trained on squares of {self.image_size} pixels.",
            tags=("pecobook", "semantic-segmentation"),
            pipeline="image-segmentation",
        )

    @torch.no_grad()
    def predict(self, image: Tensor, test_config: SegmentTestConfig = SegmentTestConfig()) -> Tensor:
        """Return the class of every pixel of an image: uint8 (3, H, W) to int64 (H, W), on the CPU."""
        check_pixels(image)
        size = int(image.shape[1]), int(image.shape[2])
        scaled = [x.to(self.mean.device) for x in rescaled_images(image, self.image_size, test_config)]
        return best_classes(self.scores(scaled, test_config), size).cpu()

    def scores(self, images: list[Tensor], test_config: SegmentTestConfig) -> Tensor:
        """Compute the class scores of one image.

        Args:
            images: the image at several sizes, uint8 (3, h_i, w_i), from `rescaled_images`.
            test_config: inference mode, and whether to average over mirrored images.

        Returns:
            float (C, h, w) at the size of the first image: scores, or mean probabilities if several results are
            averaged.
        """
        size = images[0].shape[1:]
        if len(images) == 1 and not test_config.flip:
            return self._scores(to_float(images[0])[None], test_config)[0]
        total = torch.zeros((), device=self.mean.device)
        for image in images:
            batch = to_float(image)[None]
            for flip in (False, True) if test_config.flip else (False,):
                scores = self._scores(batch.flip(3) if flip else batch, test_config)
                total = total + resize_maps(scores.flip(3) if flip else scores, size).softmax(1)[0]
        return total / (len(images) * (1 + test_config.flip))

    def _scores(self, image: Tensor, test_config: SegmentTestConfig) -> Tensor:
        """Compute scores (1, C, h, w) of an image (1, 3, h, w)."""
        if test_config.mode == "whole":
            return resize_to_pixels(self(image)[0].float(), image.shape[2:], self.pyramid.patch)
        side, (h, w) = self.image_size, (int(length) for length in image.shape[2:])
        step = max(round(side * test_config.stride), 1)
        total = torch.zeros(1, len(self.classes), h, w, device=image.device)
        count = torch.zeros(1, 1, h, w, device=image.device)
        for top in window_starts(h, side, step):
            for left in window_starts(w, side, step):
                region = (..., slice(top, min(top + side, h)), slice(left, min(left + side, w)))
                window = image[region]
                total[region] += resize_to_pixels(self(window)[0].float(), window.shape[2:], self.pyramid.patch)
                count[region] += 1
        return total / count


def rescaled_images(image: Tensor, side: int, test_config: SegmentTestConfig) -> list[Tensor]:
    """Resize an image uint8 (3, H, W) to every test scale: (3, h_i, w_i), each computed from the original."""
    height, width = int(image.shape[1]), int(image.shape[2])
    sizes = [fitted_size(height, width, side * factor, test_config.max_side * factor) for factor in test_config.scales]
    return [resize(image, *size) for size in sizes]


def best_classes(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class with the highest score at every pixel: scores (C, h, w) to int64 (*size).

    A few classes are interpolated at a time: all 150 classes of a 12-megapixel photograph would take 14 GB.
    """
    step = max(MAX_SCORES // max(size[0] * size[1], 1), 1)
    best = scores.new_full(size, -torch.inf)
    classes = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for start in range(0, len(scores), step):
        value, index = resize_maps(scores[None, start : start + step], size)[0].max(0)
        classes = torch.where(value > best, index + start, classes)
        best = torch.maximum(best, value)
    return classes


class FixedSizeSegmenter(nn.Module):
    """A segmenter for square images of the training size only, for other runtimes; modifies `model`."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model.eval()
        model.pyramid.set_image_size(model.image_size)
        with torch.no_grad():  # compute now what the pyramid caches for an image size
            model(model.mean.new_zeros(1, 3, model.image_size, model.image_size))

    def forward(self, images: Tensor) -> Tensor:
        """Map images, float (B, 3, S, S) in [0, 1], to scores (B, C, S, S)."""
        return resize_to_pixels(self.model(images)[0], images.shape[2:], self.model.pyramid.patch)


def window_starts(length: int, side: int, step: int) -> list[int]:
    """Return the starts of windows of `side` that cover `length`, `step` apart; the last window ends at `length`."""
    last = max(length - side, 0)
    return [*range(0, last, step), last]


def _initialise(module: nn.Module | None) -> None:
    """Initialise convolutions as mmsegmentation does, and classifiers near zero."""
    for layer in module.modules() if module is not None else ():
        if isinstance(layer, nn.Conv2d):
            if layer.bias is None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
