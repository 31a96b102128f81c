"""Files of weights: what is read, what is refused, whose names are understood."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import load_state, read_checkpoint, read_weights, to_timm_names
from pecobook.models.makers import maker_args
from pecobook.models.weights import IMAGENET_MEAN, create_network, load_backbone, load_file

# --------------------------------------------------------------------------------------------------------- load_state


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))


def test_load_state__names_the_keys_that_differ() -> None:
    state = two_layers().state_dict()
    state["0.weight"] = torch.zeros(5, 5)
    state["2.bias"] = state.pop("1.bias")
    with pytest.raises(WeightsError) as caught:
        load_state(two_layers(), state, source="x.pth")
    assert str(caught.value) == (
        "The weights of 'x.pth' do not fit this network: "
        "1 missing (1.bias); 1 unknown (2.bias); 1 of another shape (0.weight)."
    )


def test_load_state__shortens_long_lists_and_changes_nothing() -> None:
    network = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=r"5 missing \(0\.bias, 1\.bias, 1\.weight, \.\.\.\)"):
        load_state(network, {"0.weight": torch.full((1, 1), 9.0)}, source="x")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_load_state__leaves_heads_out_and_the_caller_its_dictionary() -> None:
    state = two_layers().state_dict()
    extra = {f"{head}.weight": torch.ones(1) for head in ("head", "fc", "classifier")}
    input_state = {**state, **extra, "head.fc.bias": torch.ones(1)}
    copy_of_state = dict(input_state)
    network = two_layers()
    load_state(network, input_state, source="x")
    assert input_state.keys() == copy_of_state.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())


class Normed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.add_module(name, nn.LayerNorm(2))


@pytest.mark.parametrize(("old", "new"), [("norm", "fc_norm"), ("fc_norm", "norm"), ("norm", "norm")])
def test_load_state__takes_the_norm_before_or_after_the_mean(old: str, new: str) -> None:
    source, target = Normed(old), Normed(new)
    nn.init.normal_(source.get_parameter(f"{old}.weight"))
    load_state(target, source.state_dict(), source="x")
    assert torch.equal(target.get_parameter(f"{new}.weight"), source.get_parameter(f"{old}.weight"))


# ------------------------------------------------------------------------------------------------------- read_weights


def test_read_weights__reads_arrays_of_numpy(tmp_path: Path) -> None:
    weight, bias = np.ones((2, 3), np.float16), np.arange(2, dtype=np.float32)
    np.savez(tmp_path / "weights.npz", weight=weight, bias=bias)
    state = read_weights(str(tmp_path / "weights.npz"))
    assert {name: (value.dtype, value.tolist()) for name, value in state.items()} == {
        "weight": (torch.float16, [[1.0] * 3] * 2),
        "bias": (torch.float32, [0.0, 1.0]),
    }


def test_read_weights__runs_no_code_in_a_file_of_numpy(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", weight=np.array([{}], dtype=object))
    with pytest.raises(WeightsError, match="runs no code from a file"):
        read_weights(str(tmp_path / "weights.npz"))


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02", b"PK\x03\x04 half a zip", b"\x00" * 300])
@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_read_weights__refuses_what_is_no_file_of_weights(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"is not a plain file of weights|cannot be read as safetensors"):
        read_weights(str(file))


@pytest.mark.parametrize(
    ("start", "remedy"), [(b"version https://git-lfs.github.com/spec/v1", "lfs pull"), (b"<!DOCTYPE", "again")]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_read_weights__names_what_was_downloaded_in_vain(
    tmp_path: Path, start: bytes, remedy: str, suffix: str
) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(start + b" ...")
    with pytest.raises(WeightsError, match=f"not .*weights: .*{remedy}"):
        read_weights(str(file))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_read_weights__refuses_or_reads_a_damaged_file(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    file = tmp_path_factory.mktemp("damaged") / "weights.pth"
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    data = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
    file.write_bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data)
    try:
        state = read_weights(str(file))
    except WeightsError:
        return
    assert all(isinstance(value, Tensor) for value in state.values())


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 3}, {"state_dict": {"a": "text"}}, torch.ones(2)])
def test_read_weights__refuses_what_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="contains no state dict"):
        read_weights(str(tmp_path / "weights.pth"))


def test_read_weights__of_two_networks_that_no_name_tells_apart_names_the_keys(tmp_path: Path) -> None:
    torch.save({"G": {"a": torch.ones(1)}, "D": {"a": torch.zeros(1)}}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="contains no state dict: its keys are G, D"):
        read_weights(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_load_state__refuses_numbers_that_are_not_finite(value: float) -> None:
    state = two_layers().state_dict()
    state["1.bias"] = torch.full((3,), value)
    with pytest.raises(WeightsError, match=r"no finite numbers \(1\.bias\)"):
        load_state(two_layers(), state, source="x")


# ----------------------------------------------------------------------------------------------- layouts of others


def moco_v3(encoder: nn.Module, head: str) -> dict[str, Any]:
    """What MoCo v3's training script writes: two encoders, their projectors in the place of a head, a predictor."""
    encoder_state = {f"module.base_encoder.{name}": value for name, value in encoder.state_dict().items()}
    state: dict[str, Tensor] = {}
    for part in ("base_encoder", "momentum_encoder"):
        state |= {
            name.replace("base_encoder", part): value + (part != "base_encoder")
            for name, value in encoder_state.items()
        }
        state[f"module.{part}.{head}.0.weight"] = torch.zeros(8, 4)
        state[f"module.{part}.{head}.1.running_mean"] = torch.zeros(8)
    state["module.predictor.0.weight"] = torch.zeros(8, 8)
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"param_groups": [{"lr": 0.1}]}}


def test_moco_v3__vit(tmp_path: Path) -> None:
    torch.manual_seed(3)
    encoder = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(moco_v3(encoder, "head"), tmp_path / "vit-b-300ep.pth.tar")
    backbone = load_backbone("timm:test_vit", weights=str(tmp_path / "vit-b-300ep.pth.tar"))
    images = torch.rand(1, 3, 160, 160)
    assert_close(backbone.network.eval()(images), encoder(images))
    # timm's own weights of this network want 0.5; MoCo v3's want ImageNet's.
    assert backbone.mean == IMAGENET_MEAN
    plain = tmp_path / "plain.pth"
    torch.save(encoder.state_dict(), plain)
    assert load_backbone("timm:test_vit", weights=str(plain)).mean == (0.5, 0.5, 0.5)


def test_moco_v3__small_vit_has_twelve_heads(tmp_path: Path) -> None:
    """timm's ViT-S has six: its attention would read the same weights as another network, without an error."""
    torch.manual_seed(3)
    file = str(tmp_path / "vit-s-300ep.pth.tar")
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12, depth=2, img_size=32).eval()
    torch.save(moco_v3(encoder, "head"), file)
    torch.save(moco_v3(timm.create_model("test_vit", num_classes=0), "head"), tmp_path / "other.pth")
    state = read_checkpoint(file).state
    assert maker_args(state) == {"num_heads": 12}
    assert maker_args(read_checkpoint(str(tmp_path / "other.pth")).state) == {}
    small: dict[str, Any] = {"depth": 2, "img_size": 32}
    with pytest.raises(WeightsError, match=r"do not fit this network: MoCo v3's has the arguments {'num_heads': 12}"):
        load_file(
            create_network("vit_small_patch16_224", num_classes=0, **small),
            "vit_small_patch16_224",
            small,
            file,
            read_checkpoint(file),
        )


def test_load_backbone__builds_moco_v3s_small_vit(tmp_path: Path) -> None:
    torch.manual_seed(3)
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12).eval()
    torch.save(moco_v3(encoder, "head"), tmp_path / "vit-s-300ep.pth.tar")
    backbone = load_backbone("timm:vit_small_patch16_224", weights=str(tmp_path / "vit-s-300ep.pth.tar"))
    images = torch.rand(1, 3, 224, 224)
    assert_close(backbone.network.eval()(images), encoder(images))
    assert backbone.args == {"num_heads": 12}  # an export builds it again
    assert "timm:vit_small_patch16_224 is built with 12 heads, as in MoCo v3." in backbone.notes


def test_moco_v3__resnet_50_has_torchvisions_names(tmp_path: Path) -> None:
    torch.manual_seed(3)
    encoder = torchvision.models.resnet50(num_classes=1)
    del encoder.fc
    torch.save(moco_v3(encoder, "fc"), tmp_path / "r-50-1000ep.pth.tar")
    backbone = load_backbone("timm:resnet50", weights=str(tmp_path / "r-50-1000ep.pth.tar"))
    loaded = backbone.network.state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in loaded.items())


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "vgg16_bn"])
def test_torchvision__state_dicts_fit_timms_networks(name: str) -> None:
    with torch.device("meta"):  # VGG's weights are half a gigabyte
        torchvision_state = getattr(torchvision.models, name)().state_dict()
        timm_state = timm.create_model(name, num_classes=0).state_dict()
    renamed = to_timm_names(torchvision_state, timm_state)
    assert {key: value.shape for key, value in renamed.items()} == {
        key: value.shape for key, value in timm_state.items()
    }


def test_torchvision__vgg_convolves_what_was_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights give the same features after timm's 1 x 1 and 7 x 7 convolutions."""
    from timm.models.vgg import VGG

    plan: list[Any] = [4, "M", 6, "M"]
    torch.manual_seed(0)
    timm_network = VGG(cfg=plan, num_classes=0).eval()
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()]
    torchvision_network = torchvision.models.VGG(nn.Sequential(*layers, nn.MaxPool2d(2)), num_classes=10)
    torchvision_network.classifier = nn.Sequential(
        nn.Linear(6 * 49, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, 10),
    )
    timm_network.pre_logits = type(timm_network.pre_logits)(6, 4096)
    load_state(timm_network, torchvision_network.eval().state_dict(), source="vgg")
    images = torch.rand(1, 3, 28, 28)
    assert_close(
        timm_network.eval()(images),
        torchvision_network.classifier[:5](torchvision_network.features(images).flatten(1)),
        atol=1e-4,
        rtol=1e-3,
    )


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "model."])
def test_prefixes__of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    network = create_network("test_resnet", num_classes=0)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    loaded = create_network("test_resnet", num_classes=0)
    load_state(loaded, state, source="x")
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_load_backbone__a_files_positions_are_interpolated_to_the_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = load_backbone("timm:vit_tiny_patch16_224", weights=str(tmp_path / "weights.pth"), image_size=96)
    assert backbone.args["img_size"] == backbone.image_size == 96
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    expected.load_state_dict(network.state_dict())
    expected.set_input_size(img_size=96)
    images = torch.rand(1, 3, 96, 96)
    assert_close(backbone.network.eval()(images), expected.eval()(images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_load_state__refuses_patches_of_another_size(name: str) -> None:
    """timm would resample the kernels, and DINO's file for patches of 8 pixels would pass for the one of 16."""
    small: dict[str, Any] = {"num_classes": 0, "depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32}
    state = create_network(name, patch_size=8, **small).state_dict()
    with pytest.raises(WeightsError, match=r"of another shape \((.*, )?patch_embed.proj.weight"):
        load_state(create_network(name, patch_size=16, **small), state, source="dino_deitsmall8_pretrain.pth")


def test_load_state__resizes_the_shared_table_of_a_beit() -> None:
    """BEiT's authors save one table for all blocks, which a network for images of another size needs resized."""
    small: dict[str, Any] = {"num_classes": 0, "depth": 2, "embed_dim": 48, "num_heads": 3}
    tables = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    saved = create_network("beit_base_patch16_224", img_size=64, **tables, **small)
    torch.nn.init.normal_(cast("Any", saved).rel_pos_bias.relative_position_bias_table)
    state = saved.state_dict() | {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    network = cast("Any", create_network("beit_base_patch16_224", img_size=96, **small))
    load_state(network, state, source="beit.pth")
    table = resize_rel_pos_bias_table(state["rel_pos_bias.relative_position_bias_table"], (6, 6), (11 * 11 + 3, 3))
    assert table.shape[0] == 124
    for block in network.blocks:
        assert_close(block.attn.relative_position_bias_table, table)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("wrap", [lambda network: network, lambda network: {"model": network, "epoch": 3}])
def test_read_weights__of_a_network_that_was_saved_whole(name: str, wrap: Any, tmp_path: Path) -> None:
    network = create_network(name, num_classes=0)
    torch.save(wrap(network), tmp_path / "weights.pth")
    state = read_weights(str(tmp_path / "weights.pth"))
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())


def test_load_state__old_files_do_not_count_batches() -> None:
    state = create_network("test_resnet", num_classes=0).state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    network = create_network("test_resnet", num_classes=0)
    load_state(network, old, source="old.pth")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in old.items())


def test_load_state__of_a_foreign_layout_names_what_is_missing() -> None:
    encoder = timm.create_model("test_vit", num_classes=0)
    state = moco_v3(encoder, "head")["state_dict"]
    with pytest.raises(WeightsError, match=r"'moco.pth' do not fit this network: \d+ missing \(bn1.bias"):
        load_state(create_network("test_resnet", num_classes=0), state, source="moco.pth")
