"""Mask R-CNN (arXiv 1703.06870) on a feature pyramid; Faster R-CNN where there are no masks.

The parts are torchvision's. What differs from its own assembly: anchors and the choice of a level follow the pyramid's
strides, which torchvision would guess from shapes and round to powers of two; boxes and losses are float32 under any
autocast, since bfloat16 cannot tell pixel 1,001 from 1,004; masks stay 28 x 28 until someone wants them larger, and
then lie where they were learned, to a fraction of a pixel.

B images, n objects, D detections of an image; boxes are left, top, right, bottom in pixels.
"""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from pecobook.models.dense.pyramid import FeaturePyramid, rebuild_pyramid
from pecobook.models.export import Card, Exported
from pecobook.settings.detect import DetectorConfig
from pecobook.utils.images import fitted_size, resize

MASK_SIDE = 28
_ANCHOR = 8  # side of an anchor in strides of its level
_ASPECTS = (0.5, 1.0, 2.0)
_CANONICAL = 14  # a box of this many strides of the third level is pooled from there: 224 pixels at stride 16
_LOSSES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposal_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found on one image, the best first."""

    boxes: Tensor
    """Float (D, 4)."""
    scores: Tensor
    """Float (D,) in [0, 1]."""
    labels: Tensor
    """int64 (D,), 1 to C."""
    masks: Tensor | None
    """Float (D, 28, 28) in [0, 1], stretched over their boxes; None without masks."""

    def above(self, score: float) -> Detections:
        """Those of at least this score."""
        kept = self.scores >= score
        masks = None if self.masks is None else self.masks[kept]
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept], masks)

    def pasted(self, height: int, width: int) -> Tensor:
        """Masks on an image of this size, bool (D, height, width)."""
        masks = self.masks if self.masks is not None else self.boxes.new_zeros(0, MASK_SIDE, MASK_SIDE)
        found = list(paste_masks(masks, self.boxes, height, width))
        return torch.stack(found) if found else torch.zeros(0, height, width, dtype=torch.bool)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """Masks (n, 28, 28) stretched over their boxes on an image, one by one: bool (height, width).

    A pixel is inside where the mask, interpolated at the pixel's centre, is above 0.5. (torchvision's own pasting moves
    and enlarges masks by up to a pixel, which costs small objects a tenth of their overlap.)
    """
    for mask, box in zip(masks.float().cpu(), boxes.tolist(), strict=True):
        left, top, right, bottom = box
        found = torch.zeros(height, width, dtype=torch.bool)
        columns = torch.arange(max(int(left), 0), min(int(right) + 1, width))
        rows = torch.arange(max(int(top), 0), min(int(bottom) + 1, height))
        if right > left and bottom > top and len(columns) and len(rows):
            x = (columns + 0.5 - left) / (right - left) * 2 - 1
            y = (rows + 0.5 - top) / (bottom - top) * 2 - 1
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (rows, columns, 2)
            values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
            found[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] = values > 0.5
        yield found


def half_pixel(masks: Tensor) -> Tensor:
    """Masks uint8 (n, h, w) moved by half a pixel to the right and down, as float16, which holds their quarters.

    torchvision makes the targets of masks with a RoIAlign that takes a pixel's corner for its centre; from masks moved
    beforehand it makes exact ones.
    """
    padded = F.pad(masks, (1, 0, 1, 0)).half()
    return (padded[:, 1:, 1:] + padded[:, :-1, 1:] + padded[:, 1:, :-1] + padded[:, :-1, :-1]) / 4


class Detector(Exported):
    """A detector of objects of `classes`, on uint8 images of any size.

    Args:
        pyramid: the backbone.
        described: what `describe_pyramid` says of it; its mean and deviation normalise images.
        classes: names.
        category_ids: their numbers in the annotations.
        masks: whether it finds masks, too.
        sides: short and longest side that `predict` resizes images to, pixels.
        config: heads.
    """

    kind = "detector"
    comes_from = "detect"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pyramid: FeaturePyramid,
        described: dict[str, Any],
        *,
        classes: Sequence[str],
        category_ids: Sequence[int],
        masks: bool,
        sides: tuple[int, int],
        config: DetectorConfig = DetectorConfig(),
    ) -> None:
        super().__init__()
        self.described, self.config, self.sides = described, config, sides
        self.classes, self.category_ids, self.has_masks = tuple(classes), tuple(category_ids), masks
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(list(pyramid.channels), config.width, extra_blocks=LastLevelMaxPool())
        self.proposals = _proposals((*pyramid.strides, 2 * pyramid.strides[-1]), config)
        self.heads = _heads(pyramid.strides, len(self.classes) + 1, masks, config)
        self.register_buffer("mean", torch.tensor(described["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(described["std"])[:, None, None], persistent=False)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training, detections in evaluation mode.

        Args:
            images: uint8 (3, h, w) each.
            targets: of each image boxes float (n, 4), labels int64 (n,) and masks uint8 (n, h, w); in training only.

        Returns:
            losses () by name, or of each image its `Detections` in its pixels.
        """
        batch = self._batch(images)
        if targets is not None and self.has_masks:
            targets = [{**target, "masks": half_pixel(target["masks"])} for target in targets]
        levels = self.fpn(OrderedDict((str(level), x) for level, x in enumerate(self.pyramid(batch.tensors))))
        levels = OrderedDict((name, x.float()) for name, x in levels.items())
        boxes, losses = self.proposals(batch, levels, targets)
        found, further = self.heads(levels, boxes, batch.image_sizes, targets)
        if self.training:
            return {_LOSSES[name]: loss for name, loss in {**losses, **further}.items()}
        return [_detections(one) for one in found]

    def _batch(self, images: list[Tensor]) -> Any:
        """Normalised images in one tensor, zeros at the right and the bottom, sides multiples of the largest stride."""
        stride = self.pyramid.strides[-1]
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        height, width = (-(-max(side) // stride) * stride for side in zip(*sizes, strict=True))
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = (image.float() / 255 - self.mean) / self.std
        return ImageList(batch, sizes)

    @torch.no_grad()
    def predict(self, image: Tensor) -> Detections:
        """What is on an image uint8 (3, H, W), in its pixels, on the host. The detector must be in evaluation mode."""
        height, width = image.shape[1:]
        view = resize(image, *fitted_size(height, width, *self.sides))
        found: Detections = self([view.to(self.mean.device)])[0]
        boxes = rescale(found.boxes, (view.shape[1], view.shape[2]), (height, width)).cpu()
        masks = None if found.masks is None else found.masks.cpu()
        return Detections(boxes, found.scores.cpu(), found.labels.cpu(), masks)

    def settings(self) -> dict[str, Any]:
        """All that `rebuild` makes the same detector of."""
        return {
            "pyramid": self.described,
            "classes": list(self.classes),
            "category_ids": list(self.category_ids),
            "masks": self.has_masks,
            "sides": list(self.sides),
            "heads": dataclasses.asdict(self.config),
        }

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """The detector that `settings` describes, with random weights."""
        return cls(
            rebuild_pyramid(settings["pyramid"]),
            settings["pyramid"],
            classes=settings["classes"],
            category_ids=settings["category_ids"],
            masks=settings["masks"],
            sides=(settings["sides"][0], settings["sides"][1]),
            config=DetectorConfig(**settings["heads"]),
        )

    def lines(self, source: str) -> str:
        """Python that loads it from the folder `source`, or from the hub's repository of that name."""
        return f'from pecobook import Detector\nmodel = Detector.from_pretrained("{source}")'

    def card(self, origin: str) -> Card:  # noqa: ARG002
        """Its backbone, classes and what it returns."""
        classes = ", ".join(json.dumps(name, ensure_ascii=False) for name in self.classes)
        short, long = self.sides
        return Card(
            title=f"{'Mask' if self.has_masks else 'Faster'} R-CNN on {self.described['name']}",
            text=f"{len(self.classes)} classes: {classes}. Images of any size, RGB in 0..255; "
            f"the short side is resized to {short} pixels, the long one to at most {long}.",
            more="`model.predict(image)` of a uint8 tensor (3, H, W) gives boxes (left, top, right, bottom), "
            f"scores and labels (1 for the first class){'; `.pasted(H, W)` gives masks' if self.has_masks else ''}.",
            tags=("pecobook",),
            pipeline="object-detection",
        )


def rescale(boxes: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) of an image of `size` on the same image of height and width `target`."""
    return boxes * boxes.new_tensor([target[1] / size[1], target[0] / size[0]]).repeat(2)


def _detections(found: dict[str, Tensor]) -> Detections:
    masks = found["masks"][:, 0] if "masks" in found else None
    return Detections(found["boxes"], found["scores"], found["labels"], masks)


# -------------------------------------------------------------------------------------------------- torchvision's parts


def _proposals(strides: tuple[int, ...], config: DetectorConfig) -> nn.Module:
    """The region proposal network."""
    network: nn.Module = RegionProposalNetwork(
        _Anchors(strides),
        _ProposalHead(config.width, len(_ASPECTS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * config.proposals, "testing": config.proposals},
        post_nms_top_n={"training": config.proposals, "testing": config.proposals},
        nms_thresh=0.7,
    )
    return network


def _heads(strides: tuple[int, ...], num_classes: int, masks: bool, config: DetectorConfig) -> nn.Module:
    """Class, box and mask of every region; `num_classes` counts the background."""
    width, further = config.width, {}
    if masks:
        further = {
            "mask_roi_pool": _pool(strides, MASK_SIDE // 2),
            "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
            "mask_predictor": _MaskPredictor(width, width, num_classes),
        }
    heads: nn.Module = RoIHeads(
        _pool(strides, 7),
        TwoMLPHead(width * 49, config.head_width),
        _BoxPredictor(config.head_width, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.samples,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.score_threshold,
        nms_thresh=0.5,
        detections_per_img=config.detections,
        **further,
    )
    return heads


def _pool(strides: tuple[int, ...], side: int) -> Any:
    """RoIAlign from the level that suits a box's size (arXiv 1612.03144, eq. 1), with scales known beforehand."""
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], side, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(0, len(strides) - 1, canonical_scale=_CANONICAL * strides[2], canonical_level=2)
    return pool


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors of 8 strides, float32, at strides known beforehand."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__(tuple((_ANCHOR * stride,) for stride in strides), (_ASPECTS,) * len(strides))
        self.strides = strides

    def forward(self, images: Any, levels: list[Tensor]) -> list[Tensor]:
        """Anchors (A, 4) of each image."""
        device = levels[0].device
        self.set_cell_anchors(torch.float32, device)
        steps = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(level.shape[-2:]) for level in levels], steps))
        return [anchors] * len(images.image_sizes)


class _ProposalHead(RPNHead):  # type: ignore[misc]
    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = super().forward(levels)
        return [x.float() for x in logits], [x.float() for x in offsets]


class _BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, offsets = super().forward(x)
        return logits.float(), offsets.float()


class _MaskPredictor(MaskRCNNPredictor):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()  # type: ignore[no-any-return]
