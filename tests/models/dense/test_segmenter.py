from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError
from pecobook.models.dense.pyramid import FeaturePyramid, describe_pyramid
from pecobook.models.dense.segmenter import (
    POOL_SIZES,
    FCNHead,
    Segmenter,
    UperNet,
    best_classes,
    rescaled_images,
    window_starts,
)
from pecobook.models.export import write_export
from pecobook.models.huggingface import beit_to_huggingface
from pecobook.models.weights import Backbone
from pecobook.settings.dense import PyramidConfig
from pecobook.settings.segment import SegmenterConfig, SegmentTestConfig
from pecobook.utils.images import resize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def segmenter(size: int = 32, classes: int = 5, **args: Any) -> Segmenter:
    torch.manual_seed(0)
    network = timm.create_model("beit_base_patch16_224", num_classes=0, **{**ARGS, **args})
    pyramid = FeaturePyramid(network, size, PyramidConfig())
    names = tuple(f"class {number}" for number in range(classes))
    pyramid_settings = describe_pyramid(
        Backbone(network, "beit_base_patch16_224", {**ARGS, **args}, MEAN, STD, 32), PyramidConfig(), size
    )
    model = Segmenter(pyramid, pyramid_settings, classes=names, config=SegmenterConfig(auxiliary_width=16))
    for key, value in model.named_parameters():
        if "relative_position" in key or key.endswith("classifier.weight"):
            nn.init.normal_(value, std=0.5)
    return model.eval()


def images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def test_forward__is_that_of_transformers_given_the_same_weights() -> None:
    pytest.importorskip("transformers")  # its versions for the lowest huggingface-hub are too old
    from transformers import BeitConfig, BeitForSemanticSegmentation

    model = segmenter().train()
    peer_config: Any = BeitConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=5,  # numbers of maps count from the embedding, so the last block can't be one: it idles
        num_attention_heads=2,
        intermediate_size=96,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
        layer_norm_eps=1e-6,
        num_labels=5,
        out_indices=[2, 3, 4, 5],
        pool_scales=list(POOL_SIZES),
        auxiliary_channels=16,
        use_auxiliary_head=True,
    )
    peer = BeitForSemanticSegmentation(peer_config).train()
    state = {f"beit.{name}": value for name, value in beit_to_huggingface(model.pyramid.network.state_dict()).items()}
    state |= _neck(model) | _head(model) | _auxiliary(model)
    missing = {name for name in set(peer.state_dict()) - set(state) if "layers.4." not in name}
    assert {name for name in missing if "relative_position_index" not in name} == set()
    assert peer.load_state_dict(state, strict=False).unexpected_keys == []
    x = images()
    normalised = (x - model.mean) / model.std
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(x)[0], peer.eval()(pixel_values=normalised).logits, rtol=1e-4, atol=1e-5
        )
    # In training too, less exactly: a pooled cell of two images is normalised by the difference of the two.
    main, auxiliary = model.train()(x)
    peer.train()
    expected = peer(pixel_values=normalised, labels=torch.zeros(2, 32, 32, dtype=torch.int64))
    torch.testing.assert_close(main, expected.logits, rtol=1e-2, atol=2e-3)
    # Their output has no auxiliary scores; their loss does.
    stretched = [nn.functional.interpolate(s, (32, 32), mode="bilinear") for s in (main, auxiliary)]
    losses = [nn.functional.cross_entropy(s, torch.zeros(2, 32, 32, dtype=torch.int64)) for s in stretched]
    torch.testing.assert_close(losses[0] + 0.4 * losses[1], expected.loss, rtol=1e-3, atol=1e-3)


def _layer(prefix: str, layer: Any) -> dict[str, Tensor]:
    """One of our convolutions under transformers' names."""
    state = {f"{prefix}.convolution.weight": layer[0].weight.detach()}
    return state | {f"{prefix}.normalization.{key}": value for key, value in layer[1].state_dict().items()}


def _neck(model: Segmenter) -> dict[str, Tensor]:
    up: Any = model.pyramid.scale[0]
    parts = {"fpn1.conv_transpose1": up[0], "fpn1.normalization": up[1], "fpn1.conv_transpose2": up[3]}
    parts["fpn2"] = model.pyramid.scale[1]
    return {f"fpn.{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def _head(model: Segmenter) -> dict[str, Tensor]:
    head: Any = model.head
    state = {f"decode_head.classifier.{key}": value for key, value in head.classifier.state_dict().items()}
    state |= _layer("decode_head.psp_bottleneck", head.pooled) | _layer("decode_head.fpn_bottleneck", head.joined)
    for number, pool in enumerate(head.pools):
        state |= _layer(f"decode_head.psp_modules.blocks.{number}.conv", pool[1])
    for number in range(3):
        state |= _layer(f"decode_head.lateral_convs.{number}", head.lateral[number])
        state |= _layer(f"decode_head.fpn_convs.{number}", head.smooth[number])
    return state


def _auxiliary(model: Segmenter) -> dict[str, Tensor]:
    auxiliary: Any = model.auxiliary
    state = {f"auxiliary_head.classifier.{key}": value for key, value in auxiliary[1].state_dict().items()}
    return state | _layer("auxiliary_head.convs.0", auxiliary[0])


def test_upernet__maps_of_odd_sizes_and_many_channels() -> None:
    head = UperNet((8, 16, 24, 32), 12, 3)
    maps = [torch.randn(2, c, h, w) for c, h, w in ((8, 21, 30), (16, 11, 15), (24, 6, 8), (32, 3, 4))]
    assert head(maps).shape == (2, 3, 21, 30)


@pytest.mark.parametrize("build", [lambda: UperNet((4, 4, 4, 4), 64, 3, 0.25), lambda: FCNHead(4, 64, 3, 0.25)])
def test_heads__drop_whole_channels_before_the_classifier_in_training_alone(build: Any) -> None:
    torch.manual_seed(0)
    head, maps = build(), [torch.randn(2, 4, 8, 8)] * 4
    classifier = head.classifier if isinstance(head, UperNet) else head[-1]
    seen: list[Tensor] = []
    classifier.register_forward_pre_hook(lambda _layer, arguments: seen.append(arguments[0]))
    inputs = maps if isinstance(head, UperNet) else maps[0]
    head(inputs)
    head.eval()(inputs)
    absent = [(features == 0).all((2, 3)).float().mean() for features in seen]  # ReLU alone leaves no channel empty
    assert 0.1 < absent[0] < 0.4
    assert absent[1] == 0


@pytest.mark.parametrize(
    ("length", "side", "step", "expected"),
    [(10, 4, 3, [0, 3, 6]), (10, 4, 4, [0, 4, 6]), (4, 4, 2, [0]), (3, 4, 2, [0]), (9, 4, 9, [0, 5])],
)
def test_window_starts__cover_the_line(length: int, side: int, step: int, expected: list[int]) -> None:
    assert window_starts(length, side, step) == expected


def test_scores__slide_is_the_mean_over_windows() -> None:
    model, x = segmenter(16), torch.randint(256, (3, 20, 28), dtype=torch.uint8)
    with torch.no_grad():
        sliding_scores = model.scores([x], SegmentTestConfig(mode="slide", stride=0.5))
    total, count = torch.zeros(5, 20, 28), torch.zeros(20, 28)
    with torch.no_grad():
        for top in (0, 4):
            for left in (0, 8, 12):
                window = x[None, :, top : top + 16, left : left + 16].float() / 255
                scores = nn.functional.interpolate(model(window)[0], (16, 16), mode="bilinear")[0]
                total[:, top : top + 16, left : left + 16] += scores
                count[top : top + 16, left : left + 16] += 1
    torch.testing.assert_close(sliding_scores, total / count, rtol=1e-4, atol=1e-5)


def test_scores__of_several_sizes_are_mean_probabilities_and_flip_with_the_picture() -> None:
    model, x = segmenter(), torch.randint(256, (3, 40, 52), dtype=torch.uint8)
    test = SegmentTestConfig(scales=(1.0, 0.5, 1.5), flip=True)
    with torch.no_grad():
        scores = model.scores(rescaled_images(x, 32, test), test)
        mirrored = model.scores(rescaled_images(x.flip(2), 32, test), test)
        plain = model.scores(rescaled_images(x, 32, SegmentTestConfig()), SegmentTestConfig())
    assert scores.shape == plain.shape == (5, 32, 42)
    torch.testing.assert_close(scores.sum(0), torch.ones(32, 42))
    torch.testing.assert_close(mirrored.flip(2), scores, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain.softmax(0), scores, atol=1e-3)


def test_rescaled_images__are_all_made_of_the_original() -> None:
    x = torch.randint(256, (3, 120, 90), dtype=torch.uint8)
    small, large, narrow = rescaled_images(x, 30, SegmentTestConfig(scales=(1.0, 3.0, 0.5)))
    assert torch.equal(large, x)  # nothing was lost on the way
    assert torch.equal(small, resize(x, 40, 30))
    assert narrow.shape == (3, 20, 15)
    assert rescaled_images(x, 30, SegmentTestConfig(max_side=20))[0].shape == (3, 20, 15)


@pytest.mark.parametrize("most", [1, 200, 10**9])
def test_best_classes__a_few_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.interpolate(scores[None], (11, 9), mode="bilinear")[0].argmax(0)
    monkeypatch.setattr("pecobook.models.dense.segmenter.MAX_SCORES", most)
    assert torch.equal(best_classes(scores, (11, 9)), expected)


def test_predict__a_class_for_every_pixel_of_the_picture() -> None:
    model = segmenter()
    for height, width in ((1, 1), (7, 90), (64, 48), (3, 1500)):
        classes = model.predict(torch.randint(256, (3, height, width), dtype=torch.uint8))
        assert classes.shape == (height, width)
        assert 0 <= int(classes.min()) <= int(classes.max()) < 5


@pytest.mark.parametrize("settings", [{"mode": "window"}, {"stride": 0.0}, {"scales": ()}, {"scales": (0.0,)}])
def test_test_config__refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SegmentTestConfig(**settings)


def test_export__and_back(tmp_path: Path) -> None:
    model = segmenter(48)
    model.save_pretrained(tmp_path / "export")
    again = Segmenter.from_pretrained(tmp_path)
    x = torch.randint(256, (3, 50, 60), dtype=torch.uint8)
    assert torch.equal(again.predict(x), model.predict(x))
    assert again.classes == model.classes
    assert not any(name.startswith("auxiliary") for name in again.state_dict())


def test_from_pretrained__refuses_other_exports(tmp_path: Path) -> None:
    backbone = {"kind": "backbone", "name": "resnet10t", "args": {}, "mean": [0.5] * 3, "std": [0.5] * 3}
    write_export(tmp_path, backbone, {"x": torch.zeros(1)}, "")
    with pytest.raises(WeightsError, match="is a backbone, not a segmenter"):
        Segmenter.from_pretrained(tmp_path)
