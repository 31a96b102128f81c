from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign

from pecobook.data.dense.views import mask_boxes
from pecobook.errors import ConfigError, WeightsError
from pecobook.models.dense.detector import (
    Detections,
    Detector,
    _Anchors,
    _roi_align,
    paste_masks,
    rescale_boxes,
    shift_half_pixel,
)
from pecobook.models.dense.pyramid import FeaturePyramid, describe_pyramid
from pecobook.models.weights import Backbone, create_network
from pecobook.settings.dense import PyramidConfig
from pecobook.settings.detect import DetectorConfig
from pecobook.utils.images import fitted_size, resize

SMALL = DetectorConfig(width=16, head_width=32, proposals=60, samples=32, detections=10)
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}
LOSSES = ["box", "class", "mask", "objectness", "proposal_box"]


def make(*, masks: bool = True, config: DetectorConfig = SMALL, pyramid: PyramidConfig = PyramidConfig()) -> Detector:
    torch.manual_seed(0)
    network = create_network("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, dynamic_img_pad=True, **VIT)
    backbone = Backbone(network, "vit_tiny_patch16_224", VIT, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 32)
    return Detector(
        FeaturePyramid(network, 32, pyramid),
        describe_pyramid(backbone, pyramid, 32),
        classes=("disc", "square"),
        category_ids=(3, 17),
        masks=masks,
        sides=(40, 64),
        config=config,
    )


def scene(size: tuple[int, int], boxes: list[list[int]], *, masks: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """An image with bright rectangles, red for label 1 and blue for label 2."""
    image = torch.full((3, *size), 30, dtype=torch.uint8)
    inside = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    labels = torch.tensor([1 + number % 2 for number in range(len(boxes))], dtype=torch.int64)
    for number, (left, top, right, bottom) in enumerate(boxes):
        image[2 * (number % 2), top:bottom, left:right] = 240
        inside[number, top:bottom, left:right] = 1
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": labels}
    return image, {**target, "masks": inside} if masks else target


def pair() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    scenes = [scene((40, 48), [[4, 4, 20, 24], [26, 10, 44, 30]]), scene((32, 56), [[10, 6, 30, 26]])]
    return [image for image, _ in scenes], [target for _, target in scenes]


def test_forward__five_losses_with_gradients_everywhere() -> None:
    detector = make().train()
    losses = detector(*pair())
    assert sorted(losses) == LOSSES
    assert all(loss.shape == () and float(loss.detach()) > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []
    assert sorted(make(masks=False).train()(*pair())) == [name for name in LOSSES if name != "mask"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("masks", [True, False])
def test_forward__images_without_any_object(precision: str, masks: bool) -> None:
    detector = make(masks=masks).train()
    scenes = [scene((32, 32), [], masks=masks)] * 2
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        losses = detector([image for image, _ in scenes], [target for _, target in scenes])
    total = sum(losses.values())
    total.backward()
    assert math.isfinite(float(total.detach()))
    assert float(losses["box"].detach()) == 0.0
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []  # so that DDP finds them all
    mixed = [scenes[0], scene((32, 32), [[4, 4, 20, 24]], masks=masks)]
    assert math.isfinite(float(sum(detector([i for i, _ in mixed], [t for _, t in mixed]).values()).detach()))


def test_forward__losses_and_boxes_are_float32_under_autocast() -> None:
    detector = make()
    images, targets = pair()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()(images, targets)
        with torch.no_grad():
            detections = detector.eval()(images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {detection.boxes.dtype for detection in detections} | {
        detection.masks.dtype for detection in detections
    } == {torch.float32}
    torch.manual_seed(1)
    exact = detector.train()(images, targets)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = detector(images, targets)
    for name in ("objectness", "class"):
        assert float(mixed[name].detach()) == pytest.approx(float(exact[name].detach()), rel=0.05)


def test_forward__finds_the_same_alone_and_in_a_batch_of_equal_sizes() -> None:
    detector = make(config=DetectorConfig(width=16, head_width=32, proposals=60, score_threshold=0.0)).eval()
    image, other = scene((48, 48), [[4, 4, 20, 24]])[0], scene((48, 48), [[8, 8, 30, 30]])[0]
    with torch.no_grad():
        alone, beside = detector([image])[0], detector([other, image])[1]
    torch.testing.assert_close(alone.boxes, beside.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(alone.masks, beside.masks, rtol=1e-4, atol=1e-4)
    assert len(alone.boxes) == len(alone.scores) == len(alone.labels) == len(alone.masks) > 0
    assert (alone.scores.diff() <= 0).all()
    assert set(alone.labels.tolist()) <= {1, 2}


def test_forward__sides_are_padded_to_the_coarsest_stride() -> None:
    detector = make()
    batch = detector.pad_to_batch(pair()[0])
    assert batch.tensors.shape == (2, 3, 48, 64)
    assert batch.image_sizes == [(40, 48), (32, 56)]
    pixel = (torch.tensor([240, 30, 30]) / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    torch.testing.assert_close(batch.tensors[0, :, 6, 6], pixel)
    assert not batch.tensors[0, :, 40:].any()
    assert not batch.tensors[0, :, :, 48:].any()


def test_train__learns_two_images_by_heart() -> None:
    detector = make().train()
    images, targets = pair()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    losses = []
    for step in range(60):
        torch.manual_seed(step)
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_anchors__are_torchvisions_where_its_guess_of_the_stride_is_right() -> None:
    strides = (4, 8, 16, 32, 64)
    levels = [torch.zeros(1, 1, 128 // stride, 192 // stride) for stride in strides]
    images = ImageList(torch.zeros(2, 3, 128, 192), [(128, 192)] * 2)
    anchors = _Anchors(strides)(images, levels)
    expected = AnchorGenerator(tuple((8 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * 5)(images, levels)
    assert len(anchors) == 2
    assert torch.equal(anchors[0], expected[0])
    odd = _Anchors((32, 64))(
        ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)]), [torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 2, 2)]
    )
    centres = (odd[0][27:, :2] + odd[0][27:, 2:]) / 2
    assert centres[::3].tolist() == [[0, 0], [64, 0], [0, 64], [64, 64]]  # torchvision would step by 48
    half = _Anchors(strides)(images, [level.bfloat16() for level in levels])
    assert torch.equal(half[0], anchors[0])


def test_pool__is_torchvisions_at_strides_4_to_32() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = {str(n): torch.randn(1, 2, 512 // s, 512 // s, generator=generator) for n, s in enumerate((4, 8, 16, 32))}
    corners = torch.rand(50, 2, generator=generator) * 200
    boxes = [torch.cat([corners, corners + 4 + 300 * torch.rand(50, 2, generator=generator)], 1)]
    expected = MultiScaleRoIAlign(list(levels), 7, sampling_ratio=2)(levels, boxes, [(512, 512)])
    torch.testing.assert_close(_roi_align((4, 8, 16, 32), 7)(levels, boxes, [(300, 512)]), expected)


def test_predict__gives_pixels_of_the_image() -> None:
    detector = make(config=DetectorConfig(width=16, head_width=32, proposals=60, score_threshold=0.0)).eval()
    image = scene((60, 100), [[4, 4, 50, 50]])[0]
    detections = detector.predict(image)
    resized = resize(image, *fitted_size(60, 100, 40, 64))
    assert resized.shape == (3, 38, 64)
    with torch.no_grad():
        expected = detector([resized])[0]
    torch.testing.assert_close(detections.boxes, expected.boxes * torch.tensor([100 / 64, 60 / 38, 100 / 64, 60 / 38]))
    assert float(detections.boxes[:, 2].max()) <= 100.01
    masks = detections.pasted_masks(60, 100)
    assert masks.shape == (len(detections.boxes), 60, 100)
    assert masks.dtype == torch.bool


def test_paste_masks__fills_its_box() -> None:
    boxes = torch.tensor([[10.0, 5.0, 30.0, 25.0], [0.0, 0.0, 8.0, 4.0]])
    masks = torch.ones(2, 28, 28)
    masks[1, :, 14:] = 0  # the left half
    whole, half = paste_masks(masks, boxes, 30, 40)
    exact = torch.zeros(2, 30, 40, dtype=torch.bool)
    exact[0, 5:25, 10:30] = exact[1, :4, :4] = True
    assert torch.equal(whole, exact[0])
    assert torch.equal(half, exact[1])
    beyond, nothing = paste_masks(torch.ones(2, 28, 28), torch.tensor([[-5.0, 20, 50, 40], [3, 3, 3, 9]]), 30, 40)
    assert int(beyond.sum()) == int(beyond[20:].sum()) == 400
    assert not nothing.any()
    assert Detections(boxes[:0], boxes[:0, 0], torch.zeros(0, dtype=torch.int64), masks[:0]).pasted_masks(
        3, 4
    ).shape == (
        0,
        3,
        4,
    )
    assert rescale_boxes(torch.tensor([[1.0, 2, 3, 4]]), (10, 20), (30, 10)).tolist() == [[0.5, 6, 1.5, 12]]


def test_paste_masks__of_what_is_learned_gives_the_mask_again() -> None:
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    discs = [(rows - y) ** 2 + (columns - x) ** 2 < r**2 for y, x, r in ((12, 15, 9.5), (20.5, 40.3, 15), (30, 8, 4))]
    masks = torch.stack(discs).to(torch.uint8)
    boxes = mask_boxes(masks)
    targets = project_masks_on_boxes(shift_half_pixel(masks), boxes, torch.arange(3), 28)
    for pasted, mask in zip(paste_masks(targets, boxes, 40, 60), masks > 0, strict=True):
        assert int((pasted & mask).sum()) >= 0.98 * int((pasted | mask).sum())


@pytest.mark.parametrize("masks", [True, False])
def test_from_pretrained__is_the_detector_that_was_exported(masks: bool, tmp_path: Path) -> None:
    config = DetectorConfig(width=16, head_width=32, proposals=60, score_threshold=0.01)
    detector = make(masks=masks, config=config, pyramid=PyramidConfig(window=4))
    detector.train()(*pair())  # moves the statistics of the pyramid's normalisation
    detector.save_pretrained(tmp_path / "export")
    again = Detector.from_pretrained(tmp_path)
    assert not again.training
    assert (again.classes, again.category_ids, again.config) == (("disc", "square"), (3, 17), config)
    image = scene((60, 100), [[4, 4, 50, 50]])[0]
    detections, expected = again.predict(image), detector.eval().predict(image)
    assert torch.equal(detections.boxes, expected.boxes)
    assert (detections.masks is None) == (not masks)
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"# {'Mask' if masks else 'Faster'} R-CNN on vit_tiny_patch16_224" in card
    assert '2 classes: "disc", "square".' in card


def test_from_pretrained__refuses_what_is_no_detector(tmp_path: Path) -> None:
    network = make().pyramid.network
    Backbone(network, "vit_tiny_patch16_224", VIT, (0.5,) * 3, (0.5,) * 3, 32).save_pretrained(tmp_path / "vit")
    with pytest.raises(WeightsError, match="is a backbone, not a detector: give a run of pecobook detect"):
        Detector.from_pretrained(tmp_path / "vit")
    with pytest.raises(WeightsError, match="There is no run"):
        Detector.from_pretrained(tmp_path / "nowhere")
    detector = make()
    state = {name: value for name, value in detector.state_dict().items() if "box_head" not in name}
    detector.save_pretrained(tmp_path / "export", state=state)
    with pytest.raises(WeightsError, match=r"The detector in .* is damaged: .*weights heads\.box_head"):
        Detector.from_pretrained(tmp_path)


def test_config__refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="--detections must be above 0"):
        DetectorConfig(detections=0)
    with pytest.raises(ConfigError, match="--score-threshold must lie in"):
        DetectorConfig(score_threshold=1.5)
