"""Loading weights: what fits, what is refused, and what a person reads then."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import ConfigError, WeightsError
from pecobook.models.export import export_folder, read_export, write_tensors
from pecobook.models.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    Classifier,
    create_network,
    load_backbone,
)

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
NAME = "vit_tiny_patch16_224"
BEIT = "beit_base_patch16_224"
BEIT_ARGS = VIT | {"init_values": 0.1}


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def exported(folder: Path, name: str = NAME, args: dict[str, Any] = VIT, *, classes: tuple[str, ...] = ()) -> nn.Module:
    """Write a run of a network with its head or without; returns the network."""
    torch.manual_seed(1)
    network: nn.Module = timm.create_model(name, num_classes=len(classes), **args).eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.normal_(norm.weight)
    arguments = network, name, args, IMAGENET_MEAN, IMAGENET_STD, 32
    exported_model = Classifier(*arguments, classes=classes) if classes else Backbone(*arguments)
    exported_model.save_pretrained(folder / "export", origin="a test")
    return network


# ------------------------------------------------------------------------------------------------------------- create


def test_create__says_what_is_wrong() -> None:
    with pytest.raises(WeightsError, match=r"timm has no network 'nope'\. timm\.list_models\(\) in Python lists"):
        create_network("timm:nope")
    with pytest.raises(WeightsError, match=r"timm has no network 'vit_tiny_patch16_225'\. Did you mean 'vit_tiny"):
        create_network("timm:vit_tiny_patch16_225")
    with pytest.raises(WeightsError, match=r"does not accept these arguments.*colour"):
        create_network(NAME, colour="red")
    with pytest.raises(WeightsError, match="timm cannot build"):
        create_network("test_resnet", output_stride=3)
    with pytest.raises(WeightsError, match=r"timm cannot build .*divisible by num_heads"):
        create_network(NAME, embed_dim=25, num_heads=2)
    with pytest.raises(WeightsError, match=r"timm cannot build .*'huge'.* Change these\.$") as caught:
        create_network(NAME, init_values="huge")  # PyTorch's own message has eight lines
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="cannot be downloaded"):
        create_network("test_vit", True)


# ------------------------------------------------------------------------------------------------------ load_backbone


@pytest.mark.parametrize(("name", "args"), [(NAME, VIT), (BEIT, BEIT_ARGS)], ids=["vit", "beit"])
def test_load_backbone__gives_back_what_was_exported(tmp_path: Path, name: str, args: dict[str, Any]) -> None:
    network = exported(tmp_path, name, args)
    backbone = load_backbone(str(tmp_path))
    assert backbone.image_size == 32
    assert backbone.mean == (0.485, 0.456, 0.406)
    assert torch.equal(backbone.network.eval()(images()), network(images()))
    other = load_backbone(str(tmp_path), weights="random").network.eval()
    assert not torch.equal(other(images()), network(images()))


@pytest.mark.parametrize("normed_first", [True, False])
@pytest.mark.parametrize(("name", "args"), [(NAME, VIT), (BEIT, BEIT_ARGS)], ids=["vit", "beit"])
def test_load_backbone__pools_the_mean_with_the_same_norm(
    tmp_path: Path, name: str, args: dict[str, Any], normed_first: bool
) -> None:
    # Trained with the norm over all patches (as pre-training does), used with the norm after their mean, or after both.
    if name == BEIT:
        args = args | {"use_fc_norm": not normed_first}
    elif not normed_first:
        args = args | {"global_pool": "avg"}
    network = exported(tmp_path, name, args)
    pooled = load_backbone(str(tmp_path), pool_mean=True).network.eval()
    tokens: list[Tensor] = []
    network.get_submodule("blocks").get_submodule("1").register_forward_hook(lambda *call: tokens.append(call[2]))
    network(images())
    norm = network.get_submodule("norm" if normed_first else "fc_norm")
    assert isinstance(norm, nn.LayerNorm)
    assert_close(pooled(images()), norm(tokens[0][:, 1:].mean(1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "args"), [(NAME, VIT), (BEIT, BEIT_ARGS)], ids=["vit", "beit"])
def test_load_backbone__at_another_size_keeps_all_but_the_tables(
    tmp_path: Path, name: str, args: dict[str, Any]
) -> None:
    network = exported(tmp_path, name, args)
    backbone = load_backbone(str(tmp_path), image_size=64)
    assert backbone.image_size == 64
    assert backbone.args["img_size"] == 64
    out = backbone.network.eval().forward_features(images(64))  # type: ignore[operator]
    assert out.shape == (2, 65, 24)
    assert out.isfinite().all()
    old, new = network.state_dict(), backbone.network.state_dict()
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name].shape != new[name].shape}
    assert changed
    assert all(name.endswith(("pos_embed", "relative_position_bias_table")) for name in changed)
    assert all(torch.equal(old[name], new[name]) for name in old.keys() - changed if "relative_position" not in name)
    # The arguments that it reports make a network that takes these weights.
    again = create_network(backbone.name, num_classes=0, **backbone.args).eval()
    again.load_state_dict(new)
    assert torch.equal(again.forward_features(images(64)), out)  # type: ignore[operator]


def test_load_backbone__interpolates_position_tables(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(NAME, num_classes=0, **VIT)
    ramp = torch.linspace(0, 1, 4).repeat_interleave(4)[:, None].expand(16, 24)  # from the first row to the last
    network.pos_embed.data[0, 1:] = ramp
    Backbone(network, NAME, VIT, (0.5,) * 3, IMAGENET_STD, 32).save_pretrained(tmp_path / "export")
    backbone = load_backbone(str(tmp_path), image_size=64)
    table = backbone.network.get_parameter("pos_embed")[0, 1:, 0].view(8, 8)
    assert backbone.mean == (0.5, 0.5, 0.5)
    assert_close(table.std(1), torch.zeros(8), atol=1e-5, rtol=0)
    assert (table[1:, 0] > table[:-1, 0] - 0.02).all()
    assert table[-1, 0] - table[0, 0] > 0.9


def test_load_backbone__of_a_classifier_leaves_its_head(tmp_path: Path) -> None:
    network = exported(tmp_path, classes=("cat", "dog", "eel"))
    assert read_export(tmp_path)[0]["classes"] == ["cat", "dog", "eel"]
    backbone = load_backbone(str(tmp_path)).network.eval()
    features = network.forward_features(images())  # type: ignore[operator]
    assert torch.equal(backbone.forward_features(images()), features)  # type: ignore[operator]


def test_load_backbone__of_a_convolutional_network_takes_any_size(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=0).eval()
    Backbone(network, "test_resnet", {}, IMAGENET_MEAN, IMAGENET_STD, 64).save_pretrained(tmp_path / "export")
    backbone = load_backbone(str(tmp_path), image_size=96)
    assert "img_size" not in backbone.args
    assert torch.equal(backbone.network.eval()(images(96)), network(images(96)))


def test_load_backbone__stochastic_depth_reaches_the_network() -> None:
    deep = load_backbone("timm:test_vit", weights="random", drop_path=0.3).network
    assert max(getattr(module, "drop_prob", 0.0) or 0.0 for module in deep.modules()) == pytest.approx(0.3)
    flat = load_backbone("timm:test_vit", weights="random").network
    assert max(getattr(module, "drop_prob", 0.0) or 0.0 for module in flat.modules()) == 0


def test_load_backbone__from_timm_at_a_size() -> None:
    backbone = load_backbone("timm:vit_tiny_patch16_224", weights="random", image_size=64)
    assert backbone.image_size == 64
    assert backbone.network(torch.zeros(1, 3, 64, 64)).shape == (1, 192)
    assert load_backbone("timm:test_resnet", weights="random").mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("num_classes", [0, 1000], ids=["self-supervised", "classifier"])
@pytest.mark.parametrize("name", [NAME, "vit_base_patch16_siglip_224"], ids=["token", "attention"])
def test_load_backbone__from_timm_keeps_the_last_norm_where_it_pools_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_classes: int
) -> None:
    small = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    network = timm.create_model(name, num_classes=num_classes, **small)
    nn.init.normal_(network.norm.weight)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    make: Callable[..., nn.Module] = timm.create_model

    def from_file(name: str, *, pretrained: bool, **more: Any) -> nn.Module:
        overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": num_classes}
        return make(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **small, **more)

    monkeypatch.setattr(timm, "create_model", from_file)
    pooled = load_backbone(f"timm:{name}", pool_mean=True, image_size=64, drop_path=0.1)
    assert torch.equal(pooled.network.get_parameter("fc_norm.weight"), network.norm.weight)
    assert torch.equal(pooled.network.get_parameter("patch_embed.proj.weight"), network.patch_embed.proj.weight)
    assert pooled.args == {"global_pool": "avg", "img_size": 64}
    assert pooled.network(torch.zeros(1, 3, 64, 64)).shape == (1, 24)


def test_load_backbone__refuses_what_is_none(tmp_path: Path) -> None:
    exported(tmp_path)
    file = tmp_path / "export" / "config.json"
    file.with_name("config.json.sha256").unlink()
    original = json.loads(file.read_text())
    file.write_text(json.dumps({"kind": "tokenizer"}))  # of another kind only the kind is told, not what it lacks
    with pytest.raises(WeightsError, match="is a tokenizer, not a backbone: give a contrast or pretrain run"):
        load_backbone(str(tmp_path))
    for size in (True, 0):  # a table of positions for no patch at all
        file.write_text(json.dumps(original | {"args": original["args"] | {"img_size": size}}))
        with pytest.raises(WeightsError):
            load_backbone(str(tmp_path))
    file.write_text(json.dumps({name: value for name, value in original.items() if name != "image_size"}))
    assert load_backbone(str(tmp_path)).network is not None  # a ResNet's export may leave it out
    file.write_text("[]")
    with pytest.raises(WeightsError, match="does not hold a JSON object"):
        load_backbone(str(tmp_path))
    with pytest.raises(WeightsError, match="There is no run"):
        load_backbone(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"a file of weights; also name the network: --backbone timm:NAME --weights"):
        load_backbone(str(tmp_path / "export" / "model.safetensors"))
    with pytest.raises(WeightsError, match="neither a run folder nor a network"):
        load_backbone("resnet50")


# ------------------------------------------------------------------------------------------------------------- export


def test_export_folder__takes_a_run_or_its_export(tmp_path: Path) -> None:
    exported(tmp_path)
    assert export_folder(tmp_path) == tmp_path / "export" == export_folder(str(tmp_path / "export"))
    (tmp_path / "export" / "config.json").unlink()  # it is written last, so without it an export is half written
    with pytest.raises(WeightsError, match="it is not a finished run"):
        export_folder(tmp_path)


def test_write_tensors__is_read_back_whatever_the_layout(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(1, requires_grad=True).expand(3)}
    file = tmp_path / "new" / "folder" / "x.safetensors"
    write_tensors(file, tensors)
    loaded = load_file(file)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert sorted(path.name for path in file.parent.iterdir()) == ["x.safetensors", "x.safetensors.sha256"]


def test_forward__of_bytes_is_that_of_floats(tmp_path: Path) -> None:
    exported(tmp_path)
    backbone = load_backbone(str(tmp_path))
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    backbone.network.eval()
    assert torch.equal(backbone(pixels), backbone(pixels.float() / 255))
    assert_close(backbone((pixels / 255).half()), backbone(pixels), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"must have the shape \(B, 1 or 3, H, W\)"),
        (torch.zeros(1, 32, 32, 3), r"put the channels first"),
        (torch.full((1, 3, 32, 32), 255.0), r"divide them by 255"),
        (torch.full((1, 3, 32, 32), math.nan), "not finite"),
        (torch.zeros(1, 3, 32, 32).numpy(), "must be a tensor, not ndarray"),
    ],
)
def test_forward__says_what_is_wrong_with_images(images: Any, message: str, tmp_path: Path) -> None:
    exported(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_backbone(str(tmp_path))(images)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("checkpoint_path", "evil.pth"),
        ("pretrained", True),
        ("download", True),
        ("pretrained_cfg", {"url": "http://evil.example/w.pth"}),
        ("pretrained_cfg_overlay", {"file": "evil.pth"}),
        ("cache_dir", "/tmp"),
        ("pretrained_custom_load", True),
        ("no_such_argument", 1),
    ],
)
def test_create_network__refuses_arguments_that_do_not_shape_the_network(
    tmp_path: Path, argument: str, value: object
) -> None:
    """A config.json of somebody else's run could otherwise run a pickle, or request an address."""
    with pytest.raises(WeightsError, match=f"does not accept these arguments: {argument}"):
        create_network("vit_tiny_patch16_224", num_classes=0, **{argument: value})
    network = create_network("resnet10t", num_classes=0, channels=[8, 8, 8, 8], stem_width=8)
    args = {"channels": [8, 8, 8, 8], "stem_width": 8}
    Backbone(network, "resnet10t", args, IMAGENET_MEAN, IMAGENET_STD, 32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["args"][argument] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "config.json.sha256").unlink()
    with pytest.raises(WeightsError, match=argument):
        Backbone.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "swin_tiny_patch4_window7_224", "efficientnet_b0"])
def test_create_network__accepts_arguments_of_every_family(name: str) -> None:
    network: Any = create_network(name, num_classes=3, in_chans=1, drop_path_rate=0.1)
    assert network.get_classifier().out_features == 3
