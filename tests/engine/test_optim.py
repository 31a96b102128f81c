"""Weight decay and learning rate of each parameter, and the settings of the optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from pecobook.engine.optim import (
    build_optimizer,
    layer_decay_groups,
    parameter_groups,
    peak_learning_rate,
    set_learning_rate,
)
from pecobook.models.masked_vit import MaskedImageModel
from pecobook.settings.training import OptimConfig

SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2}


def beit() -> nn.Module:
    network: nn.Module = timm.create_model(
        "beit_base_patch16_224", num_classes=5, init_values=0.1, use_abs_pos_emb=True, **SIZE
    )
    return network


def by_parameter(module: nn.Module, groups: list[dict[str, Any]], what: str) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    values = [(names[id(p)], group.get(what, 1.0)) for group in groups for p in group["params"]]
    assert len(values) == len(dict(values))  # each parameter once
    return dict(values)


def test_parameter_groups__decay_matrices_only() -> None:
    model = MaskedImageModel(beit(), 7)
    decay = by_parameter(model, parameter_groups(model, OptimConfig(weight_decay=0.3)), "weight_decay")
    assert decay.keys() == dict(model.named_parameters()).keys()
    tables = ("cls_token", "pos_embed", "mask_token", "relative_position_bias_table")
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or name.endswith(tables)
        assert decay[name] == (0.0 if exempt else 0.3), name
    # The model has parameters of all kinds, so the loop above has checked each kind.
    assert {name.rpartition(".")[2] for name, value in decay.items() if value == 0} >= {*tables, "bias", "gamma_1"}
    assert decay["head.weight"] == 0.3
    assert decay["backbone.patch_embed.proj.weight"] == 0.3


def test_parameter_groups__leave_out_frozen_parameters() -> None:
    model = MaskedImageModel(beit(), 7)
    model.head.requires_grad_(False)
    decay = by_parameter(model, parameter_groups(model, OptimConfig()), "weight_decay")
    assert "head.weight" not in decay
    assert "mask_token" in decay


def test_layer_decay_groups__learn_slower_towards_the_input() -> None:
    network = beit()
    groups = layer_decay_groups(network, OptimConfig(layer_decay=0.5, weight_decay=0.1))
    scale = by_parameter(network, groups, "lr_scale")
    decay = by_parameter(network, groups, "weight_decay")
    assert scale.keys() == dict(network.named_parameters()).keys()
    # Layers: the embedding 0, the blocks 1 to 3, the head 4.
    assert scale["head.weight"] == 1
    for block in range(3):
        assert scale[f"blocks.{block}.attn.qkv.weight"] == pytest.approx(0.5 ** (3 - block))
        assert scale[f"blocks.{block}.norm1.bias"] == pytest.approx(0.5 ** (3 - block))
    assert scale["patch_embed.proj.weight"] == scale["cls_token"] == pytest.approx(0.5**4)
    assert decay["blocks.0.attn.qkv.weight"] == 0.1
    assert decay["blocks.0.attn.relative_position_bias_table"] == decay["cls_token"] == decay["pos_embed"] == 0.0


def test_layer_decay_groups__are_equal_for_a_decay_of_one() -> None:
    network = beit()
    scale = by_parameter(network, layer_decay_groups(network, OptimConfig(layer_decay=1.0)), "lr_scale")
    assert set(scale.values()) == {1.0}


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_build_optimizer__uses_every_setting(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    layer = nn.Linear(2, 2)
    config = OptimConfig(name=name, lr=0.1, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer(parameter_groups(layer, config), config)
    assert type(optimizer) is kind
    assert all(
        (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.7), 1e-3) for group in optimizer.param_groups
    )
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}


def test_build_optimizer__adamw_decays_apart_from_the_gradient() -> None:
    layer = nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups(layer, config), config)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.5))


def test_set_learning_rate__scales_each_group() -> None:
    network = beit()
    config = OptimConfig(layer_decay=0.5, lr=1.0)
    optimizer = build_optimizer(layer_decay_groups(network, config), config)
    for lr in (0.3, 0.2):  # not cumulative
        set_learning_rate(optimizer, lr)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(lr * group["lr_scale"])
    plain = build_optimizer(parameter_groups(network, config), config)
    set_learning_rate(plain, 0.7)
    assert {group["lr"] for group in plain.param_groups} == {0.7}


def test_peak_learning_rate__scales_with_the_batch_where_a_batch_is_given() -> None:
    assert peak_learning_rate(OptimConfig(lr=1e-3), 64) == 1e-3
    assert peak_learning_rate(OptimConfig(lr=1.5e-3, lr_batch_size=2048), 512) == pytest.approx(1.5e-3 / 4)


def test_build_optimizer__lars_is_layer_wise_adaptive_with_momentum() -> None:
    """MoCo v3's rule for ResNets: each matrix moves by its own norm, vectors by plain momentum without decay."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    config = OptimConfig(name="lars", lr=0.7, betas=(0.9, 0.0), weight_decay=0.01)
    optimizer = build_optimizer(parameter_groups(module, config), config)
    weight, bias = (p.detach().double().numpy().copy() for p in (module.weight, module.bias))
    momentum = [np.zeros_like(weight), np.zeros_like(bias)]
    for step in range(4):
        gradients = [
            np.random.default_rng([step, index]).normal(size=v.shape) for index, v in enumerate((weight, bias))
        ]
        for parameter, gradient in zip((module.weight, module.bias), gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient).float()
        optimizer.step()
        decayed = gradients[0] + 0.01 * weight
        decayed *= 0.001 * np.linalg.norm(weight) / np.linalg.norm(decayed)
        momentum = [0.9 * momentum[0] + decayed, 0.9 * momentum[1] + gradients[1]]
        weight, bias = weight - 0.7 * momentum[0], bias - 0.7 * momentum[1]
    torch.testing.assert_close(module.weight.detach().double(), torch.from_numpy(weight), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bias.detach().double(), torch.from_numpy(bias), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "args", "exempt"),
    [
        ("vit_tiny_patch16_224", {**SIZE, "reg_tokens": 2}, ("cls_token", "reg_token", "pos_embed")),
        ("deit_tiny_distilled_patch16_224", SIZE, ("cls_token", "dist_token", "pos_embed")),
        ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1)}, ("logit_scale", "cpb_mlp.0.weight", "cpb_mlp.2.weight")),
        ("levit_128s", {}, ("attention_biases",)),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_groups__exempt_what_the_network_names(
    name: str, args: dict[str, Any], exempt: tuple[str, ...], wrapped: bool
) -> None:
    network = timm.create_model(name, num_classes=3, **args)
    config = OptimConfig(weight_decay=0.3, layer_decay=0.9)
    module = nn.ModuleDict({"model": network}) if wrapped else network
    groups = parameter_groups(module, config) if wrapped else layer_decay_groups(network, config)
    decay = by_parameter(module, groups, "weight_decay")
    without = {key for key, value in decay.items() if value == 0 and module.get_parameter(key).ndim > 1}
    assert without
    assert {key for key in decay if key.endswith(exempt)} == without
