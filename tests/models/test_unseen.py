"""What no shape of a file's weights shows: heads, activations, biases that are left out, the pooling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import load_state
from pecobook.models.given_networks import as_backbone
from pecobook.models.initial import Start, start_backbone, start_tokenizer
from pecobook.models.makers import imagenet_maker, maker_args
from pecobook.models.network_traits import differing_layer
from pecobook.models.networks import create_network
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.models.weights import Backbone, load_backbone
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig

NAME = "test_vit"
SMALL: dict[str, Any] = {"num_classes": 0, "depth": 1, "embed_dim": 48, "img_size": 32}


def with_weights(name: str, **args: Any) -> Any:
    torch.manual_seed(0)
    network = timm.create_model(name, **args)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


# ------------------------------------------------------------------------------------------------------------- DINOv3


def dinov3(network: nn.Module) -> dict[str, Tensor]:
    """The weights of timm's network under DINOv3's names; the key's bias is masked."""
    state = {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(6)}
    for name, value in network.state_dict().items():
        block = name.removesuffix("q_bias")
        if name == "reg_token":
            state["storage_tokens"] = value
        elif name.endswith("q_bias"):
            state[f"{block}qkv.bias"] = torch.cat(
                [value, torch.ones_like(value), network.state_dict()[f"{block}v_bias"]]
            )
            state[f"{block}qkv.bias_mask"] = torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])
        elif not name.endswith("v_bias"):
            state[name.replace("gamma_", "ls").replace("ls1", "ls1.gamma").replace("ls2", "ls2.gamma")] = value
    return state


def test_dinov3__biases_are_read_or_refused() -> None:
    """The distilled DINOv3's are zero, so that timm has networks without; EUPE's, of the same names, are not."""
    small = SMALL | {"num_heads": 2}
    network = with_weights("vit_small_patch16_dinov3_qkvb", **small)
    images = torch.rand(1, 3, 32, 32)
    loaded = create_network("vit_small_patch16_dinov3_qkvb", **small)
    load_state(loaded, dinov3(network), source="eupe.pth")
    assert_close(loaded.eval()(images), network(images))
    plain = create_network("vit_small_patch16_dinov3", **small)
    with pytest.raises(WeightsError, match=r"no place for 1 biases that are not zero \(blocks.0.attn.qkv.bias\)"):
        load_state(plain, dinov3(network), source="eupe.pth")
    for part in (network.blocks[0].attn.q_bias, network.blocks[0].attn.v_bias):
        part.data.zero_()
    load_state(plain, dinov3(network), source="dinov3.pth")
    assert_close(plain.eval()(images), network(images))


def test_dinov3__is_normalised_as_timms_tag_says() -> None:
    """The weights for satellite images have a mean of their own."""
    state = dinov3(create_network("vit_small_patch16_dinov3", **SMALL, num_heads=2))
    assert imagenet_maker(state, (), "dinov3_vitl16_pretrain_sat493m.pth") == ""
    assert (
        imagenet_maker({name: value for name, value in state.items() if name != "storage_tokens"}, (), "x") == "DINOv2"
    )


# ------------------------------------------------------------------------------------------------- heads, of MoCo v3


def mocos_positions(rows: int, width: int, *, transposed: bool = False) -> Tensor:
    """MoCo v3's table, patch after patch: sines and cosines of the row, then of the column; MAE's is transposed."""
    table = torch.zeros(1, 1 + rows * rows, width)
    rates = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    for row in range(rows):
        for column in range(rows):
            first, second = (column, row) if transposed else (row, column)
            parts = [f(place * rates) for place in (first, second) for f in (torch.sin, torch.cos)]
            table[0, 1 + row * rows + column] = torch.cat(parts)
    return table


def test_moco_v3__linear_probes_file_has_twelve_heads_too() -> None:
    """Its network is not called `base_encoder`; its positions are those of MoCo v3 alone."""
    assert maker_args({"module.pos_embed": mocos_positions(14, 384), "module.head.weight": torch.zeros(9, 384)}) == {
        "num_heads": 12
    }
    assert maker_args({"module.pos_embed": mocos_positions(14, 768)}) == {}
    assert maker_args({"pos_embed": mocos_positions(14, 384, transposed=True)}) == {}
    assert maker_args({"pos_embed": torch.randn(1, 197, 384)}) == {}


# ------------------------------------------------------------------------------------------------------------ pooling


def test_file__with_a_norm_after_the_mean_pools_the_mean(tmp_path: Path) -> None:
    """MAE's fine-tuned networks and this package's masked models never train an output of the class token."""
    network = with_weights(NAME, num_classes=0, global_pool="avg")
    torch.save({"model": network.state_dict()}, tmp_path / "mae_finetuned_vit_base.pth")
    backbone = load_backbone(f"timm:{NAME}", weights=str(tmp_path / "mae_finetuned_vit_base.pth"))
    images = torch.rand(1, 3, 160, 160)
    assert_close(backbone.network.eval()(images), network(images))
    assert backbone.args == {"global_pool": "avg"}  # an export builds it again
    assert f"timm:{NAME} pools the mean of the patches, since the file has a norm after it (fc_norm)." in backbone.notes


# -------------------------------------------------------------------------------------- a configuration beside a file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"architecture": NAME, "model_args": {"act_layer": "relu"}}, r"blocks.0.mlp.act is ReLU\(\) there and GELU"),
        ({"name": NAME, "args": {"num_heads": 4}}, "of 4 heads there and .* of 2 heads here"),
        ({"model_type": "vit", "num_attention_heads": 4}, "of 4 heads there and .* of 2 heads here"),
        ({"architecture": NAME}, ""),
        ({"architecture": "test_vit2"}, ""),  # deeper; what both have is the same
        ({"architecture": "of a newer timm"}, ""),
        ({"name": NAME, "args": {"global_pool": "avg"}}, ""),
        ({"model_type": "vit", "num_attention_heads": 2}, ""),
        ({"num_attention_heads": 5}, ""),  # fits no width
    ],
)
def test_configuration__beside_a_file_that_describes_another_network(
    tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    """timm's on the hub, this package's own and transformers'."""
    file = tmp_path / "model.safetensors"
    save_file(create_network(NAME, num_classes=0).state_dict(), file)
    (tmp_path / "config.json").write_text(json.dumps(content))
    if said:
        with pytest.raises(WeightsError, match=rf"config.json beside it describes {NAME}, whose .*{said}"):
            load_backbone(f"timm:{NAME}", weights=str(file))
    else:
        load_backbone(f"timm:{NAME}", weights=str(file))


def test_differing_layer__ignores_what_only_training_sees() -> None:
    plain = create_network(NAME, num_classes=0)
    assert differing_layer(plain, create_network(NAME, num_classes=0, drop_path_rate=0.2, proj_drop_rate=0.1)) == ""
    other = create_network(NAME, num_classes=0, act_layer="gelu_tanh")
    assert differing_layer(plain, other).startswith("blocks.0.mlp.act is GELUTanh")


def test_init__of_a_backbone_with_other_heads_is_refused(tmp_path: Path) -> None:
    Backbone(create_network(NAME, num_classes=0), NAME, {}, (0.5,) * 3, (0.5,) * 3, 160).save_pretrained(tmp_path)
    args = {"num_heads": 4}
    network = create_network(NAME, num_classes=0, **args)
    with pytest.raises(
        WeightsError, match=r"--init: .* its blocks.0.attn is .* of 2 heads there and .* of 4 heads here"
    ):
        start_backbone(network, str(tmp_path), name=NAME, args=args, image_size=160)


def test_as_backbone__refuses_what_timm_would_build_otherwise() -> None:
    """An export names the network, and with timm's heads or activation its weights compute something else."""
    for args in ({"num_heads": 4}, {"act_layer": nn.ReLU}):
        with pytest.raises(WeightsError, match="an export must be able to build it again"):
            as_backbone(timm.create_model(NAME, num_classes=0, **args))
    assert as_backbone(timm.create_model(NAME, num_classes=0, drop_path_rate=0.1)).name == NAME


def test_init__of_a_codebook_from_a_file_names_the_settings_that_differ(tmp_path: Path) -> None:
    """A ViT's heads and a convolution's padding show in no shape."""
    model = AutoencoderConfig(kind="vit", channels=(16, 4), num_heads=2, num_blocks=1, latent_dim=8)
    there = TokenizerConfig(model=model, num_codewords=32, image_size=16)
    here = replace(there, model=replace(model, num_heads=4))
    PerceptualTokenizer(there).save_pretrained(tmp_path)
    start: Start = start_tokenizer(PerceptualTokenizer(here), str(tmp_path / "model.safetensors"), vectors=8)
    assert start.lines == ("--init: settings of the network differ from those there: model.num-heads: 2 -> 4",)
