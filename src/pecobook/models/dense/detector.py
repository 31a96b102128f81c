"""Object detection: Mask R-CNN (arXiv 1703.06870) on a feature pyramid, or Faster R-CNN without masks.

The components are torchvision's, with three differences from its models. Anchors and the choice of level follow the
pyramid's strides, which torchvision would estimate from shapes and round to powers of two. Boxes and losses are float32
under any autocast, since bfloat16 cannot distinguish pixels 1,001 and 1,004. Masks stay 28 x 28 until a caller requests
a larger size; they are then pasted with sub-pixel accuracy where they were learned.

B images, C classes, n objects, D detections per image; boxes are left, top, right, bottom in pixels.
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
from pecobook.models.snippets import quoted, read_image_call
from pecobook.settings.detect import DetectorConfig
from pecobook.utils.images import Normalised, check_pixels, fitted_size, resize

MASK_SIDE = 28
_ANCHOR = 8  # side of an anchor, in strides of the level
_ASPECTS = (0.5, 1.0, 2.0)
_CANONICAL = 14  # boxes with a side of this many strides of level 3 are pooled from level 3: 224 pixels at stride 16
_LOSSES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposal_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}


@dataclasses.dataclass(frozen=True)
class Detections:
    """Detections on one image, sorted by score from high to low."""

    boxes: Tensor
    """Float (D, 4)."""
    scores: Tensor
    """Float (D,) in [0, 1]."""
    labels: Tensor
    """int64 (D,), 1 to C."""
    masks: Tensor | None
    """Float (D, 28, 28) in [0, 1], each relative to its box; None without masks."""

    def above(self, score: float) -> Detections:
        """Return the detections with at least this score."""
        selected = self.scores >= score
        masks = None if self.masks is None else self.masks[selected]
        return Detections(self.boxes[selected], self.scores[selected], self.labels[selected], masks)

    def pasted_masks(self, height: int, width: int) -> Tensor:
        """Return the masks on an image of this size, bool (D, height, width)."""
        masks = self.masks if self.masks is not None else self.boxes.new_zeros(0, MASK_SIDE, MASK_SIDE)
        pasted = list(paste_masks(masks, self.boxes, height, width))
        return torch.stack(pasted) if pasted else torch.zeros(0, height, width, dtype=torch.bool)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """Resize masks (n, 28, 28) to their boxes and paste them into an image; yields one bool (height, width) each.

    A pixel is inside if the mask, interpolated at the pixel's centre, is above 0.5. (torchvision's pasting shifts and
    enlarges masks by up to a pixel, which reduces the overlap of small objects by a tenth.)
    """
    for mask, box in zip(masks.float().cpu(), boxes.tolist(), strict=True):
        left, top, right, bottom = box
        pasted = torch.zeros(height, width, dtype=torch.bool)
        columns = torch.arange(max(int(left), 0), min(int(right) + 1, width))
        rows = torch.arange(max(int(top), 0), min(int(bottom) + 1, height))
        if right > left and bottom > top and len(columns) and len(rows):
            x = (columns + 0.5 - left) / (right - left) * 2 - 1
            y = (rows + 0.5 - top) / (bottom - top) * 2 - 1
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (rows, columns, 2)
            values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
            pasted[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] = values > 0.5
        yield pasted


def shift_half_pixel(masks: Tensor) -> Tensor:
    """Shift masks uint8 (n, h, w) by half a pixel to the right and down; returns float16, which holds quarters exactly.

    torchvision computes the mask targets with a RoIAlign that treats the corner of a pixel as the centre; for shifted
    masks, these targets are exact.
    """
    padded = F.pad(masks, (1, 0, 1, 0)).half()
    return (padded[:, 1:, 1:] + padded[:, :-1, 1:] + padded[:, 1:, :-1] + padded[:, :-1, :-1]) / 4


class Detector(Normalised, Exported):
    """An object detector for uint8 images of any size.

    Args:
        pyramid: the feature pyramid.
        pyramid_settings: result of `describe_pyramid` for the pyramid; its mean and deviation normalise images.
        classes: names of the classes.
        category_ids: ids of the classes in the annotations.
        masks: whether the detector also predicts masks.
        sides: short side that `predict` resizes images to, and maximum of the long side, in pixels.
        config: settings of the heads.
    """

    kind = "detector"
    trained_by = "detect"

    def __init__(
        self,
        pyramid: FeaturePyramid,
        pyramid_settings: dict[str, Any],
        *,
        classes: Sequence[str],
        category_ids: Sequence[int],
        masks: bool,
        sides: tuple[int, int],
        config: DetectorConfig = DetectorConfig(),
    ) -> None:
        super().__init__()
        self.pyramid_settings, self.config, self.sides = pyramid_settings, config, sides
        self.classes, self.category_ids, self.has_masks = tuple(classes), tuple(category_ids), masks
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(list(pyramid.channels), config.width, extra_blocks=LastLevelMaxPool())
        self.proposals = _build_proposal_network((*pyramid.strides, 2 * pyramid.strides[-1]), config)
        self.heads = _build_heads(pyramid.strides, len(self.classes) + 1, masks, config)
        self.set_normalisation(pyramid_settings["mean"], pyramid_settings["std"])

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return losses in training mode, detections in evaluation mode.

        Args:
            images: uint8 (3, h, w) each.
            targets: boxes float (n, 4), labels int64 (n,) and masks uint8 (n, h, w) for each image; only in training.

        Returns:
            losses by name, () each; or the `Detections` of each image, in pixels of the image.
        """
        batch = self.pad_to_batch(images)
        if targets is not None and self.has_masks:
            targets = [{**target, "masks": shift_half_pixel(target["masks"])} for target in targets]
        levels = self.fpn(OrderedDict((str(level), x) for level, x in enumerate(self.pyramid(batch.tensors))))
        levels = OrderedDict((name, x.float()) for name, x in levels.items())
        boxes, losses = self.proposals(batch, levels, targets)
        detections, head_losses = self.heads(levels, boxes, batch.image_sizes, targets)
        if self.training:
            return {_LOSSES[name]: loss for name, loss in {**losses, **head_losses}.items()}
        return [
            Detections(
                found["boxes"], found["scores"], found["labels"], found["masks"][:, 0] if self.has_masks else None
            )
            for found in detections
        ]

    def pad_to_batch(self, images: list[Tensor]) -> Any:
        """Normalise images and zero-pad them at the right and bottom to a multiple of the largest stride."""
        stride = int(self.pyramid.strides[-1])
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        height, width = (-(-max(side) // stride) * stride for side in zip(*sizes, strict=True))
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for target, image in zip(batch, images, strict=True):
            target[:, : image.shape[1], : image.shape[2]] = self.normalise(image.float() / 255)
        return ImageList(batch, sizes)

    @torch.no_grad()
    def predict(self, image: Tensor) -> Detections:
        """Detect objects in an image uint8 (3, H, W).

        The detector must be in evaluation mode.

        Returns:
            detections in pixels of the image, on the CPU.
        """
        check_pixels(image)
        height, width = image.shape[1:]
        resized = resize(image, *fitted_size(height, width, *self.sides))
        detections: Detections = self([resized.to(self.mean.device)])[0]
        boxes = rescale_boxes(detections.boxes, (resized.shape[1], resized.shape[2]), (height, width)).cpu()
        masks = None if detections.masks is None else detections.masks.cpu()
        return Detections(boxes, detections.scores.cpu(), detections.labels.cpu(), masks)

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `rebuild` builds an equal detector, as JSON values."""
        return {
            "pyramid": self.pyramid_settings,
            "classes": list(self.classes),
            "category_ids": list(self.category_ids),
            "masks": self.has_masks,
            "sides": list(self.sides),
            "heads": dataclasses.asdict(self.config),
        }

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """Build the detector that `settings` describes, with random weights."""
        return cls(
            rebuild_pyramid(settings["pyramid"]),
            settings["pyramid"],
            classes=settings["classes"],
            category_ids=settings["category_ids"],
            masks=settings["masks"],
            sides=(settings["sides"][0], settings["sides"][1]),
            config=DetectorConfig(**settings["heads"]),
        )

    def loading_code(self, source: str) -> str:
        """Return Python code that loads the detector; `source` is a folder or a repository on the Hugging Face hub."""
        return f"""\
from pecobook import Detector, read_image

model = Detector.from_pretrained({quoted(source)})
found = model.predict({read_image_call(self.value_range)})  # boxes are left, top, right, bottom in pixels
names = [model.classes[label - 1] for label in found.labels.tolist()]
print(list(zip(names, found.scores.tolist(), found.boxes.tolist()))[:5])"""

    def card(self, origin: str) -> Card:  # noqa: ARG002
        """Return the model card: backbone, classes, and what `predict` returns."""
        names = ", ".join(json.dumps(name, ensure_ascii=False) for name in self.classes)
        classes = f"{len(self.classes)} class{'es' if len(self.classes) > 1 else ''}: {names}"
        short, long = self.sides
        mask_text = "; `.pasted_masks(H, W)` of the result returns masks" if self.has_masks else ""
        return Card(
            title=f"{'Mask' if self.has_masks else 'Faster'} R-CNN on {self.pyramid_settings['name']}",
            text=f"{classes}. Images of any size, RGB in 0..255; "
            f"the short side is resized to {short} pixels, the long one to at most {long}.",
            more="`model.predict(image)` takes a uint8 tensor (3, H, W) and returns boxes (left, top, right, bottom), "
            f"scores and labels (1 for the first class){mask_text}.",
            tags=("pecobook",),
            pipeline="object-detection",
        )


def rescale_boxes(boxes: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Rescale boxes (n, 4) from an image of (height, width) `size` to the same image of (height, width) `target`."""
    return boxes * boxes.new_tensor([target[1] / size[1], target[0] / size[0]]).repeat(2)


# --------------------------------------------------------------------------------------------- torchvision's components


def _build_proposal_network(strides: tuple[float, ...], config: DetectorConfig) -> nn.Module:
    """Build the region proposal network."""
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


def _build_heads(strides: tuple[float, ...], num_classes: int, masks: bool, config: DetectorConfig) -> nn.Module:
    """Build the heads for the class, box and mask of every region; `num_classes` includes the background."""
    width, mask_layers = config.width, {}
    if masks:
        mask_layers = {
            "mask_roi_pool": _roi_align(strides, MASK_SIDE // 2),
            "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
            "mask_predictor": _MaskPredictor(width, width, num_classes),
        }
    heads: nn.Module = RoIHeads(
        _roi_align(strides, 7),
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
        **mask_layers,
    )
    return heads


def _roi_align(strides: tuple[float, ...], side: int) -> Any:
    """Build a RoIAlign that chooses the level by box size (arXiv 1612.03144, eq. 1), with fixed scales."""
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], side, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(0, len(strides) - 1, canonical_scale=_CANONICAL * strides[2], canonical_level=2)
    return pool


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """Generates float32 anchors with a side of 8 strides, at fixed strides."""

    def __init__(self, strides: tuple[float, ...]) -> None:
        super().__init__(tuple((_ANCHOR * stride,) for stride in strides), (_ASPECTS,) * len(strides))
        self.strides = strides

    def forward(self, images: Any, levels: list[Tensor]) -> list[Tensor]:
        """Return the anchors (A, 4) of each image."""
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
