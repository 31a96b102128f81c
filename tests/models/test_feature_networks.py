"""Networks that give features: whose layers are meant, and what is left of the network."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.vgg import VGG
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models import feature_networks
from pecobook.models.feature_networks import NodeFeatures, feature_indices, load_feature_network, stage_nodes
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.weights import IMAGENET_MEAN, IMAGENET_STD, Backbone, load_backbone

VIT, RESNET, SQUEEZENET = "timm:test_vit", "timm:test_resnet", "torchvision:squeezenet1_1"


def pictures(seed: int, side: int = 64) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def small_vgg() -> VGG:
    """VGG-11's plan, narrow: five stages, each ended by a pooling."""
    plan = [4, "M", 6, "M", 8, 8, "M", 10, 10, "M", 12, 12, "M"]
    return VGG(cfg=plan, num_classes=0, mlp_ratio=1 / 512)


def test_layers__of_a_vgg_are_its_stages_before_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: str, *, weights: str | None, **more: Any) -> Backbone:
        return Backbone(small_vgg(), "vgg", {}, IMAGENET_MEAN, IMAGENET_STD, 224)

    monkeypatch.setattr(feature_networks, "load_backbone", load)
    distance = PerceptualDistance("timm:vgg11", (1, 2, 3, 4, 5), "random")
    shapes = [tuple(feature.shape[1:]) for feature in distance.features(pictures(0, 64))]
    assert shapes == [(4, 64, 64), (6, 32, 32), (8, 16, 16), (10, 8, 8), (12, 4, 4)]


def test_load__a_vgg_of_timm() -> None:
    # timm's VGG takes no drop_path_rate. On the meta device, since its weights are half a gigabyte.
    with torch.device("meta"):
        backbone = load_backbone("timm:vgg11", weights="random")
    assert feature_indices(backbone.network, (1, 5), "vgg11") == [0, 4]


@pytest.mark.parametrize(
    ("name", "layers", "channels"),
    [("test_resnet", (1, 4), [32, 96]), ("test_convnext", (1, 4), [24, 64]), ("test_efficientnet", (1, 5), [16, 64])],
)
def test_layers__of_convolutional_networks_are_stages(name: str, layers: tuple[int, ...], channels: list[int]) -> None:
    distance = PerceptualDistance(f"timm:{name}", layers, "random")
    assert [feature.shape[1] for feature in distance.features(pictures(0, 64))] == channels


@pytest.mark.parametrize(
    ("network", "layers", "count"),
    [
        (VIT, (0,), 6),
        (VIT, (3, 7), 6),
        (VIT, (-1,), 6),
        (VIT, ("blocks.3",), 6),
        (RESNET, (5,), 4),
        (RESNET, (0, 1), 4),
    ],
)
def test_layers__that_a_network_lacks_are_refused(network: str, layers: tuple[int, ...], count: int) -> None:
    with pytest.raises(WeightsError, match=f"'{network}' has layers 1 to {count}"):
        PerceptualDistance(network, layers, "random")


def test_feature_indices__refuses_a_network_without_features() -> None:
    with pytest.raises(WeightsError, match="returns no intermediate features"):
        feature_indices(nn.Linear(1, 1), (1,), "linear")


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("vgg16", ["features.3", "features.8", "features.15", "features.22", "features.29"]),
        ("vgg16_bn", ["features.5", "features.12", "features.22", "features.32", "features.42"]),
        ("alexnet", ["features.1", "features.4", "features.11"]),
        ("squeezenet1_1", ["features.1", "features.4", "features.7", "features.12"]),
    ],
)
def test_stage_nodes__of_torchvision(name: str, stages: list[str]) -> None:
    with torch.device("meta"):
        network = getattr(torchvision.models, name)()
    assert stage_nodes(network, list(range(1, len(stages) + 1)), name) == stages
    assert stage_nodes(network, ["2", "avgpool"], name) == [stages[1], "avgpool"]
    with pytest.raises(WeightsError, match=f"torchvision's '{name}' has stages 1 to {len(stages)}"):
        stage_nodes(network, [len(stages) + 1], name)


def test_torchvision__vgg_stages_are_timms() -> None:
    with torch.device("meta"):
        torchvision_network, timm_network = torchvision.models.vgg16(), timm.create_model("vgg16")
    ends = [str(info["module"]) for info in timm_network.feature_info][:5]
    assert stage_nodes(torchvision_network, [1, 2, 3, 4, 5], "vgg16") == ends


def test_torchvision__resnet_features_are_timms() -> None:
    """The same weights through both libraries."""
    torch.manual_seed(0)
    torchvision_network = torchvision.models.resnet18()
    timm_network = timm.create_model("resnet18", num_classes=0)
    timm_network.load_state_dict(
        {name: value for name, value in torchvision_network.state_dict().items() if not name.startswith("fc.")}
    )
    by_node = NodeFeatures(torchvision_network, stage_nodes(torchvision_network, [1, 4], "resnet18"))
    by_index = feature_networks.TimmFeatures(timm_network.eval(), feature_indices(timm_network, [1, 4], "resnet18"))
    for a, b in zip(by_node(pictures(0)), by_index(pictures(0)), strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_nodes__see_what_an_in_place_activation_would_overwrite() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    before, after = NodeFeatures(network, ["0", "1"])(pictures(0))
    assert before.min() < 0
    assert torch.equal(before.relu(), after)


def test_features__come_in_the_order_of_the_layers() -> None:
    for network, layers in ((VIT, (5, 2)), (SQUEEZENET, ("features.10", "features.4"))):
        there = PerceptualDistance(network, layers, "random")
        back = PerceptualDistance(network, layers[::-1], "random")
        for a, b in zip(there.features(pictures(0)), back.features(pictures(0))[::-1], strict=True):
            assert_close(a, b)


@pytest.mark.parametrize(
    ("network", "layers", "gone"),
    [(VIT, (2,), "blocks.2"), (RESNET, (2,), "layer3.0"), (SQUEEZENET, ("features.4",), "features.6")],
)
def test_network__loses_what_comes_after_the_last_layer(network: str, layers: tuple[Any, ...], gone: str) -> None:
    names = [name for name, _ in PerceptualDistance(network, layers, "random").named_parameters()]
    assert names
    assert not any(gone in name for name in names)


def test_distance__takes_a_module_and_names_of_its_nodes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3))
    distance = PerceptualDistance(network, ("1", "2"), normalisation="none", mean=(0, 0, 0), std=(1, 1, 1))
    x, y = pictures(0), pictures(1)
    first = [network[:2](images) for images in (x, y)]
    expected = torch.stack([(a - b).square().mean((1, 2, 3)) for a, b in (first, [network[2](f) for f in first])])
    assert_close(distance.per_layer(x, y), expected)


@pytest.mark.parametrize(
    ("network", "layers", "message"),
    [
        (SQUEEZENET, ("features.99",), "SqueezeNet has no node 'features.99'"),
        (SQUEEZENET, ("feature.12",), "Did you mean 'features.2"),
        (SQUEEZENET, (5,), "has stages 1 to 4"),
        ("torchvision:convnext_tiny", (1,), "no numbered stages: give names of nodes"),
        ("torchvision:densenet121", (1,), "no numbered stages: give names of nodes"),
        ("torchvision:squeezenet", (1,), "torchvision has no network 'squeezenet'. Did you mean 'squeezenet1_"),
        ("torchvision:deeplabv3_resnet50", (1,), "torchvision has no network"),
        (VIT, (), "is empty"),
    ],
)
def test_open__refuses(network: str, layers: tuple[Any, ...], message: str) -> None:
    with pytest.raises(WeightsError, match=message.replace("(", r"\(")):
        load_feature_network(network, layers, "random")


def test_open__torchvision_without_the_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(WeightsError, match=r"cannot be downloaded \(no route to host\)") as caught:
        load_feature_network(SQUEEZENET, (1,), None)
    assert "--perceptual.weights" in str(caught.value)


@pytest.mark.parametrize("num_classes", [None, 10])
def test_open__torchvision_needs_no_head_in_the_file(tmp_path: Any, num_classes: int | None) -> None:
    torch.manual_seed(4)
    network = torchvision.models.resnet18(num_classes=num_classes or 5)
    state = {name: value for name, value in network.state_dict().items() if num_classes or "fc." not in name}
    torch.save({"state_dict": {f"module.encoder_q.{name}": value for name, value in state.items()}}, tmp_path / "m.pth")
    opened = load_feature_network("torchvision:resnet18", (1,), str(tmp_path / "m.pth"))
    expected = network.eval().maxpool(network.relu(network.bn1(network.conv1(pictures(0)))))
    assert_close(opened.network(pictures(0))[0], network.layer1(expected))
    with pytest.raises(WeightsError, match="fc"):
        load_feature_network("torchvision:resnet18", ("fc",), str(tmp_path / "m.pth"))


def test_open__torchvision_reads_its_own_file(tmp_path: Any) -> None:
    torch.manual_seed(4)
    network = torchvision.models.squeezenet1_1()
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "squeezenet.pth")
    feature_network = load_feature_network(SQUEEZENET, ("features.12",), str(tmp_path / "squeezenet.pth"))
    assert feature_network.notes[0].endswith("'state_dict' is read; left aside: epoch.")
    assert_close(feature_network.network(pictures(0))[0], network.eval().features(pictures(0)))
    assert (feature_network.mean, feature_network.std, feature_network.input_size) == (
        IMAGENET_MEAN,
        IMAGENET_STD,
        None,
    )
    other = torchvision.models.squeezenet1_0().state_dict()
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth' do not fit this network: .*of another shape"):
        load_feature_network(SQUEEZENET, ("features.12",), str(tmp_path / "other.pth"))


def test_open__torchvision_normalises_for_a_file_as_for_its_own_weights(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EfficientNetV2-L reads images around 0.5, and GoogLeNet, like Inception, rescales them inside."""
    small = torchvision.models.squeezenet1_1()  # in the place of 118 million weights
    torch.save(small.state_dict(), tmp_path / "efficientnet_v2_l.pth")
    monkeypatch.setattr("torchvision.models.get_model", lambda *_, **__: small)
    opened = load_feature_network("torchvision:efficientnet_v2_l", (1,), str(tmp_path / "efficientnet_v2_l.pth"))
    assert opened.mean == opened.std == (0.5, 0.5, 0.5)
    torch.manual_seed(4)
    network = torchvision.models.googlenet(num_classes=3, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "googlenet.pth")
    monkeypatch.setattr("torchvision.models.get_model", lambda *_, **__: network)
    opened = load_feature_network("torchvision:googlenet", ("maxpool1",), str(tmp_path / "googlenet.pth"))
    assert (opened.mean, opened.std) == (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = (torch.tensor(values)[:, None, None] for values in (opened.mean, opened.std))
    around_half = 2 * (pictures(0) * std + mean) - 1
    expected = network.eval().maxpool1(network.conv1(around_half))
    assert_close(opened.network(pictures(0))[0], expected, atol=1e-4, rtol=1e-4)


def test_bgr__turns_the_channels_after_the_normalisation() -> None:
    """Caffe's input, 255 x BGR minus (104, 117, 123), asked for in RGB terms."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    mean, std = (123 / 255, 117 / 255, 104 / 255), (1 / 255,) * 3
    distance = PerceptualDistance(network, ("0",), normalisation="none", mean=mean, std=std, bgr=True)
    images = pictures(0)
    caffe = 255 * images[:, [2, 1, 0]] - torch.tensor([104.0, 117.0, 123.0])[:, None, None]
    assert_close(distance.features(images)[0], network(caffe), atol=1e-3, rtol=1e-4)


def test_check__refuses_images_too_small_and_features_that_are_no_maps() -> None:
    distance = PerceptualDistance(SQUEEZENET, ("features.12",), "random")
    distance.check_image_size(32, 48)
    with pytest.raises(WeightsError, match="cannot read images of 8 x 8 pixels"):
        distance.check_image_size(8, 8)
    PerceptualDistance(SQUEEZENET, ("features.12",), "random", input_size=64).check_image_size(8, 8)
    with pytest.raises(WeightsError, match=r"returns \(2, 1000\), not a map"):
        PerceptualDistance(SQUEEZENET, ("flatten",), "random").check_image_size(64, 64)


def test_features__of_grey_images_are_those_of_three_equal_channels() -> None:
    distance = PerceptualDistance(RESNET, (1, 4), "random")
    grey = pictures(0)[:, :1]
    for a, b in zip(distance.features(grey), distance.features(grey.expand(2, 3, 64, 64)), strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)
