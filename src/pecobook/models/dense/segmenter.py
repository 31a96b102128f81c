"""Semantic segmentation: UperNet (Xiao et al., arXiv 1807.10221) on a feature pyramid, and whole pictures through it.

The head is mmsegmentation's, which BEiT and PeCo use: pyramid pooling of the coarsest map at 1, 2, 3 and 6 cells, a
top-down pyramid, all four levels joined; in training a small convolutional head on the third level as well (weight
0.4). transformers' `BeitForSemanticSegmentation` has the same arithmetic.

B batch, C classes, H W height and width in pixels.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.dense.pyramid import FeaturePyramid, rebuild_pyramid
from pecobook.models.export import Card, Exported
from pecobook.settings.segment import SegmenterConfig, SegmentTestConfig
from pecobook.utils.images import fitted_size, resize, to_float

POOLS = (1, 2, 3, 6)
_MOST_SCORES = 50_000_000  # of a stretched picture held at once


def convolution(channels: int, width: int, size: int) -> nn.Sequential:
    """Convolution without bias, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, width, size, padding=size // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


def stretch(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Bilinear: (B, C, h, w) to (B, C, *size)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """Four maps to scores of classes.

    Args:
        channels: of the four maps, fine to coarse.
        width: channels of the head.
        num_classes: C.
    """

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), convolution(channels[-1], width, 1)) for cells in POOLS
        )
        self.pooled = convolution(channels[-1] + len(POOLS) * width, width, 3)
        self.lateral = nn.ModuleList(convolution(own, width, 1) for own in channels[:-1])
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in channels[:-1])
        self.joined = convolution(len(channels) * width, width, 3)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, C_l, h_l, w_l) to scores (B, C, h_0, w_0)."""
        coarse = maps[-1]
        pooled = [stretch(pool(coarse), coarse.shape[2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps[:-1], strict=True)]
        levels.append(self.pooled(torch.cat([coarse, *pooled], 1)))
        for number in range(len(levels) - 1, 0, -1):
            levels[number - 1] = levels[number - 1] + stretch(levels[number], levels[number - 1].shape[2:])
        out = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        out = [out[0], *(stretch(x, out[0].shape[2:]) for x in out[1:])]
        return self.classifier(self.joined(torch.cat(out, 1)))  # type: ignore[no-any-return]


class FCNHead(nn.Sequential):
    """One convolution and a classifier: (B, channels, h, w) to (B, C, h, w). Helps training alone."""

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__(convolution(channels, width, 3), nn.Conv2d(width, num_classes, 1))


class Segmenter(Exported):
    """A pyramid with UperNet on it.

    Args:
        pyramid: maps of images.
        described: what `describe_pyramid` says of it: the side of the squares it is trained on, and the mean and
            deviation that normalise images.
        classes: their names.
        config: heads.
    """

    kind = "segmenter"
    comes_from = "segment"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pyramid: FeaturePyramid,
        described: dict[str, Any],
        *,
        classes: tuple[str, ...],
        config: SegmenterConfig = SegmenterConfig(),
    ) -> None:
        super().__init__()
        self.pyramid, self.described, self.classes, self.config = pyramid, described, classes, config
        self.image_size = int(described["image_size"])
        self.head = UperNet(pyramid.channels, config.head_width or pyramid.channels[-1], len(classes))
        extra = config.auxiliary_width if config.auxiliary_weight else 0
        self.auxiliary = FCNHead(pyramid.channels[2], extra, len(classes)) if extra else None
        for module in (self.head, self.auxiliary):
            _initialise(module)
        self.register_buffer("mean", torch.tensor(described["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(described["std"])[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Float images (B, 3, H, W) in [0, 1] to scores (B, C, H / s, W / s), and in training the auxiliary ones."""
        maps = self.pyramid((images - self.mean) / self.std)
        auxiliary = self.auxiliary(maps[2]) if self.training and self.auxiliary is not None else None
        return self.head(maps), auxiliary

    def settings(self) -> dict[str, Any]:
        """All that `rebuild` makes the same segmenter of, but for the auxiliary head."""
        return {
            "classes": list(self.classes),
            "image_size": self.image_size,
            "width": self.config.head_width,
            "pyramid": self.described,
        }

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """The segmenter that `settings` describes, with random weights."""
        return cls(
            rebuild_pyramid(settings["pyramid"]),
            settings["pyramid"],
            classes=tuple(settings["classes"]),
            config=SegmenterConfig(head_width=settings["width"], auxiliary_width=0),
        )

    @classmethod
    def is_exported(cls, name: str) -> bool:
        """Whether more than training reads it."""
        return not name.startswith("auxiliary.")

    def lines(self, source: str) -> str:
        """Python that loads it from the folder `source`, or from the hub's repository of that name."""
        return (
            f'from pecobook import Segmenter\nmodel = Segmenter.from_pretrained("{source}")'
            "  # model.predict(image): uint8 (3, H, W) to classes (H, W)"
        )

    def card(self, origin: str) -> Card:  # noqa: ARG002
        """Its backbone, classes and size."""
        return Card(
            title=f"UperNet on {self.described['name']}",
            text=f"{len(self.classes)} classes, trained on squares of {self.image_size} pixels.",
            tags=("pecobook", "semantic-segmentation"),
            pipeline="image-segmentation",
        )

    @torch.no_grad()
    def predict(self, image: Tensor, test: SegmentTestConfig = SegmentTestConfig()) -> Tensor:
        """Class of every pixel of one picture: uint8 (3, H, W) to int64 (H, W), on the host."""
        size = int(image.shape[1]), int(image.shape[2])
        scaled = [x.to(self.mean.device) for x in scaled_pictures(image, self.image_size, test)]
        return best_classes(self.scores(scaled, test), size).cpu()

    def scores(self, pictures: list[Tensor], test: SegmentTestConfig) -> Tensor:
        """Scores of classes, float (C, h, w), of one picture.

        Args:
            pictures: of `scaled_pictures`, uint8 (3, h_i, w_i).
            test: what is averaged.

        Returns:
            at the size of the first one: scores, or, where several are averaged, their mean probabilities.
        """
        size = pictures[0].shape[1:]
        if len(pictures) == 1 and not test.flip:
            return stretch(self._scores(to_float(pictures[0])[None], test), size)[0]
        total = torch.zeros((), device=self.mean.device)
        for picture in pictures:
            scaled = to_float(picture)[None]
            for flip in (False, True) if test.flip else (False,):
                found = self._scores(scaled.flip(3) if flip else scaled, test)
                total = total + stretch(found.flip(3) if flip else found, size).softmax(1)[0]
        return total / (len(pictures) * (1 + test.flip))

    def _scores(self, image: Tensor, test: SegmentTestConfig) -> Tensor:
        """Scores (1, C, h', w') of a picture (1, 3, h, w), finer or coarser than it."""
        if test.mode == "whole":
            return self(image)[0].float()  # type: ignore[no-any-return]
        side, (h, w) = self.image_size, (int(length) for length in image.shape[2:])
        step = max(round(side * test.stride), 1)
        total = torch.zeros(1, len(self.classes), h, w, device=image.device)
        count = torch.zeros(1, 1, h, w, device=image.device)
        for top in starts(h, side, step):
            for left in starts(w, side, step):
                region = (..., slice(top, min(top + side, h)), slice(left, min(left + side, w)))
                window = image[region]
                total[region] += stretch(self(window)[0].float(), window.shape[2:])
                count[region] += 1
        return total / count


def scaled_pictures(image: Tensor, side: int, test: SegmentTestConfig) -> list[Tensor]:
    """A picture uint8 (3, H, W) at each of the test's sizes, every one made of the original: (3, h_i, w_i)."""
    height, width = int(image.shape[1]), int(image.shape[2])
    sizes = [fitted_size(height, width, side * factor, test.max_side * factor) for factor in test.scales]
    return [resize(image, *size) for size in sizes]


def best_classes(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class at every pixel of a picture: scores (C, h, w) to int64 (*size).

    A few classes are stretched at a time: all of 150 on a photograph of 12 megapixels would take 14 GB.
    """
    step = max(_MOST_SCORES // max(size[0] * size[1], 1), 1)
    best = scores.new_full(size, -torch.inf)
    classes = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for first in range(0, len(scores), step):
        value, place = stretch(scores[None, first : first + step], size)[0].max(0)
        classes = torch.where(value > best, place + first, classes)
        best = torch.maximum(best, value)
    return classes


class SegmenterAtOneSize(nn.Module):
    """A segmenter for squares of its training's size alone, for other runtimes; changes the model it is given."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model.eval()
        model.pyramid.set_image_size(model.image_size)
        with torch.no_grad():  # what is made once for a size is made now
            model(model.mean.new_zeros(1, 3, model.image_size, model.image_size))

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, 3, S, S) in [0, 1] to scores (B, C, S, S)."""
        return stretch(self.model(images)[0], images.shape[2:])


def starts(length: int, side: int, step: int) -> list[int]:
    """Where windows of `side` begin on a line of `length`, `step` apart; the last one ends where the line does."""
    last = max(length - side, 0)
    return [*range(0, last, step), last]


def _initialise(module: nn.Module | None) -> None:
    """Convolutions as mmsegmentation begins them; classifiers near zero."""
    for layer in module.modules() if module is not None else ():
        if isinstance(layer, nn.Conv2d):
            if layer.bias is None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
