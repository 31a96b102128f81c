"""BEiT in timm and in transformers, the same weights, mask and labels: logits, loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import left_aside, load_state, read_checkpoint
from pecobook.models.huggingface import beit_config, beit_to_huggingface, from_huggingface
from pecobook.models.masked_vit import MaskedImageModel

SIZE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "depth": 3,
    "embed_dim": 24,
    "num_heads": 2,
    "init_values": 0.1,
}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}


def beit(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("beit_base_patch16_224", num_classes=0, **{**SIZE, **more})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def transformers_model(model: MaskedImageModel) -> Any:
    """transformers' masked image model with the same weights."""
    pytest.importorskip("transformers")  # its versions for the lowest huggingface-hub are too old
    from transformers import BeitConfig, BeitForMaskedImageModeling

    state = model.backbone.state_dict()
    config_values = beit_config(state, image_size=32, patch_size=8, num_heads=2)
    config_values.pop("model_type")
    peer = BeitForMaskedImageModeling(
        BeitConfig(**config_values, use_mask_token=True, vocab_size=11, drop_path_rate=0.0)
    )
    weights = {
        (name if name.startswith("layernorm.") else f"beit.{name}"): value
        for name, value in beit_to_huggingface(state).items()
    }
    weights |= {"beit.embeddings.mask_token": model.mask_token[None, None]}
    weights |= {"lm_head.weight": model.head.weight, "lm_head.bias": model.head.bias}
    peer.load_state_dict({name: value.detach().clone() for name, value in weights.items()})
    return peer


def masks() -> Tensor:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    for image, row, column in ((0, 0, 1), (0, 1, 3), (0, 2, 2), (1, 0, 0), (1, 3, 1), (1, 3, 3)):
        mask[image, row, column] = True
    return mask


@pytest.mark.parametrize("more", [SHARED, {}], ids=["one table", "a table a block"])
def test_masked_model__is_transformers_masked_model(more: dict[str, Any]) -> None:
    ours = MaskedImageModel(beit(**more), 11)
    peer = transformers_model(ours)
    images, mask, labels = torch.randn(2, 3, 32, 32), masks(), torch.tensor([3, 10, 0, 7, 7, 2])
    logits = ours(images, mask, 3)
    output = peer(images, bool_masked_pos=mask.flatten(1), labels=labels)
    assert_close(logits, output.logits[mask.flatten(1)], atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(logits, labels)
    assert_close(loss, output.loss, atol=1e-6, rtol=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    output.loss.backward()
    gradients = from_huggingface({n: p.grad for n, p in peer.named_parameters() if p.grad is not None})
    own_gradients = {name: p.grad for name, p in ours.backbone.named_parameters()}
    compared = 0
    for name, gradient in own_gradients.items():
        # timm's last norm of this BEiT is called fc_norm.
        assert_close(gradient, gradients[name.replace("fc_norm", "norm")], atol=1e-6, rtol=1e-4)
        compared += 1
    assert compared == len(list(ours.backbone.parameters())) > 40
    assert_close(ours.mask_token.grad, peer.beit.embeddings.mask_token.grad.flatten(), atol=1e-6, rtol=1e-4)
    assert_close(ours.head.weight.grad, peer.lm_head.weight.grad, atol=1e-6, rtol=1e-4)


def test_there_and_back__loads_into_timm() -> None:
    network = beit()
    state = beit_to_huggingface(network.state_dict())
    for prefix in ("", "beit."):
        again = beit()
        nn.init.zeros_(again.patch_embed.proj.weight)  # type: ignore[union-attr, arg-type]
        load_state(again, {prefix + name: value for name, value in state.items()}, source="hf")
        images = torch.randn(2, 3, 32, 32)
        assert_close(again.eval()(images), network.eval()(images))


def test_to_huggingface__refuses_what_has_no_place() -> None:
    with pytest.raises(WeightsError, match=r"no weight that corresponds to 'blocks.0.attn.q_norm.weight'"):
        beit_to_huggingface({"blocks.0.attn.q_norm.weight": torch.zeros(1)})


@pytest.mark.parametrize("tables", [SHARED, {"use_shared_rel_pos_bias": True}])  # one; one and those of blocks
def test_official_checkpoints__load_into_timms_beit(tables: dict[str, bool]) -> None:
    """What BEiT's own pre-training writes: one shared table, a table of places, a mask token and a head."""
    source = MaskedImageModel(beit(**tables), 11)
    for name, parameter in source.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
    state = {name.replace("fc_norm.", "norm."): v for name, v in source.backbone.state_dict().items()}
    state = {name: v for name, v in state.items() if "relative_position_index" not in name and "k_bias" not in name}
    state |= {"mask_token": source.mask_token[None, None], "lm_head.weight": source.head.weight}
    state |= {"lm_head.bias": source.head.bias, "rel_pos_bias.relative_position_index": torch.zeros(17, 17)}
    target = beit()
    load_state(target, state, source="beit_base_patch16_224_pt22k.pth")
    images = torch.randn(2, 3, 32, 32)
    assert_close(target.eval()(images), source.backbone.eval()(images))


VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
PEERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "ViTForImageClassification": ("vit_tiny_patch16_224", {}, {}, "head (2)"),
    "ViTModel": ("vit_tiny_patch16_224", {}, {}, "pooler (2)"),
    "DeiTForImageClassificationWithTeacher": (
        "deit_tiny_distilled_patch16_224",
        {},
        {},
        "head (2), head_dist (2)",
    ),
    "Dinov2Model": ("vit_small_patch14_dinov2", {}, {"mlp_ratio": 4}, "mask_token"),
    "Dinov2WithRegistersModel": ("vit_small_patch14_reg4_dinov2", {}, {"mlp_ratio": 4}, "mask_token"),
    "BeitForImageClassification": (
        "beit_base_patch16_224",
        {"init_values": 0.1},
        {"use_relative_position_bias": True},
        "head (2)",
    ),
}


@pytest.mark.parametrize("peer", PEERS)
def test_files_of_transformers__give_timm_the_same_features(peer: str, tmp_path: Path) -> None:
    """What `save_pretrained` writes, with the names of the files on the hub, in timm's network of the same kind."""
    pytest.importorskip("transformers")  # its versions for the lowest huggingface-hub are too old
    import transformers

    name, args, settings, left = PEERS[peer]
    kind = getattr(transformers, peer)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    theirs = kind(kind.config_class(image_size=32, patch_size=8, **sizes, **settings)).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(str(tmp_path / "model.safetensors"))
    ours = timm.create_model(name, num_classes=0, **VIT, **args).eval()
    assert left_aside("f", checkpoint, load_state(ours, checkpoint.state, source="f")).endswith(f"left aside: {left}.")
    body = next((getattr(theirs, part) for part in ("vit", "deit", "beit") if hasattr(theirs, part)), theirs)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected, features = body(images).last_hidden_state, ours.forward_features(images)
    if peer.startswith("Beit"):
        expected, features = body.pooler.layernorm(expected), ours.fc_norm(features)
    assert_close(features, expected, atol=1e-4, rtol=1e-4)
