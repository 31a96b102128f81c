"""MoCo v3's loss against loops over its formula, and two ranks against one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.models.contrastive import contrastive_loss, ema_update, gather_keys, initialise_moco, mlp
from tests.distributed import TwoProcesses


def features(seed: int, number: int = 8, width: int = 5) -> Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def slow_loss(queries: Tensor, keys: Tensor, temperature: float) -> tuple[float, float]:
    """2 tau mean_i -log(exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau)) of unit vectors, and how often i is the best."""
    q, k = queries.double().numpy(), keys.double().numpy()
    total, hits = 0.0, 0
    for i, query in enumerate(q):
        scores = [float(query @ key) / (np.linalg.norm(query) * np.linalg.norm(key)) / temperature for key in k]
        total -= math.log(math.exp(scores[i]) / sum(math.exp(score) for score in scores))
        hits += max(scores) == scores[i]
    return 2 * temperature * total / len(q), hits / len(q)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_contrastive_loss__is_info_nce(temperature: float) -> None:
    queries, keys = features(0), features(0) + 1.5 * features(2)
    loss, accuracy = contrastive_loss(queries, keys, temperature)
    expected, hits = slow_loss(queries, keys, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(accuracy) == pytest.approx(hits)
    assert 0 < hits < 1


def test_contrastive_loss__ignores_lengths() -> None:
    queries, keys = features(0), features(1)
    loss, _ = contrastive_loss(queries, keys, 0.2)
    scaled, _ = contrastive_loss(queries * torch.linspace(0.1, 9, 8)[:, None], 7 * keys, 0.2)
    assert_close(loss, scaled)


def test_contrastive_loss__of_equal_features_is_the_logarithm_of_the_batch() -> None:
    same = torch.ones(16, 4)
    loss, _ = contrastive_loss(same, same, 0.5)
    assert float(loss) == pytest.approx(math.log(16))


def test_contrastive_loss__is_single_precision_under_autocast() -> None:
    queries, keys = features(0), features(1)
    expected, _ = contrastive_loss(queries, keys, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = contrastive_loss(queries, keys, 0.05)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_contrastive_loss__sends_no_gradient_into_keys() -> None:
    queries, keys = features(0).requires_grad_(), features(1).requires_grad_()
    loss, _ = contrastive_loss(queries, keys, 0.2)
    torch.autograd.backward(loss)
    assert queries.grad is not None
    assert queries.grad.abs().max() > 0
    assert keys.grad is None


def loss_and_gradient(rank: int, world_size: int, x: Tensor, keys: Tensor) -> tuple[float, float, Tensor]:
    """Mean over ranks of loss, accuracy and gradient with respect to a weight, as DDP would have them."""
    weight = torch.eye(x.shape[1]).requires_grad_()
    own_rows = slice(rank * len(x) // world_size, (rank + 1) * len(x) // world_size)
    loss, accuracy = contrastive_loss(x[own_rows] @ weight, keys[own_rows], 0.2)
    torch.autograd.backward(loss)
    assert weight.grad is not None
    metrics = torch.stack([loss.detach(), accuracy])
    if world_size > 1:
        dist.all_reduce(weight.grad)
        dist.all_reduce(metrics)
    return float(metrics[0]) / world_size, float(metrics[1]) / world_size, weight.grad / world_size


def test_contrastive_loss__two_processes_are_one(two_processes: TwoProcesses) -> None:
    x, keys = features(0, 12), features(0, 12) + features(1, 12)
    loss, accuracy, gradient = loss_and_gradient(0, 1, x, keys)
    left, right = two_processes.run(loss_and_gradient, x, keys)
    assert left[0] == pytest.approx(loss, rel=1e-6)
    assert left[1] == pytest.approx(accuracy)
    assert_close(left[2], gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(left[2], right[2])


def gather_rank(rank: int, world_size: int) -> tuple[Tensor, int]:
    keys = torch.arange(6.0).view(2, 3).t() + 10 * rank  # (3, 2), not contiguous
    return gather_keys(keys.requires_grad_())


def test_gather_keys__keeps_the_order_of_ranks(two_processes: TwoProcesses) -> None:
    (left, left_first), (right, right_first) = two_processes.run(gather_rank)
    first_keys = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(left, torch.cat([first_keys, first_keys + 10]))
    assert torch.equal(left, right)
    assert (left_first, right_first) == (0, 3)
    assert not left.requires_grad


def test_gather_keys__of_one_process_is_the_input() -> None:
    keys, first = gather_keys(features(0))
    assert torch.equal(keys, features(0))
    assert first == 0


def test_mlp__shape_of_moco_v3() -> None:
    layers = mlp([4, 8, 8, 2], final_norm=True)
    kinds = [type(layer) for layer in layers]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear, nn.BatchNorm1d]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Linear))
    assert list(layers[-1].parameters()) == []
    assert [type(layer) for layer in mlp([4, 8, 2], final_norm=False)][-1] is nn.Linear


def test_ema_update__is_an_average_of_parameters() -> None:
    slow, fast = nn.Linear(3, 2), nn.Linear(3, 2)
    before = [parameter.detach().clone() for parameter in slow.parameters()]
    ema_update(slow, fast, 0.9)
    for updated, previous, target in zip(slow.parameters(), before, fast.parameters(), strict=True):
        assert_close(updated.detach(), 0.9 * previous + 0.1 * target.detach())
        assert torch.equal(updated.detach(), previous.lerp(target.detach(), 0.1))  # bit for bit one by one


def test_initialise_moco__of_a_vit() -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(32, 48), patch_size=8, depth=2)
    initialise_moco(network)
    width = 192
    block = network.blocks[1]
    for weight, fan in (
        (block.attn.qkv.weight, width + width),  # not 3 width: each of the three is a matrix of its own
        (block.attn.proj.weight, width + width),
        (block.mlp.fc1.weight, width + 4 * width),
        (network.patch_embed.proj.weight, 3 * 8 * 8 + width),
    ):
        bound = math.sqrt(6 / fan)
        assert 0.97 * bound < weight.abs().max() <= bound
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not any(layer.bias.any() for layer in (block.attn.qkv, block.mlp.fc2, network.patch_embed.proj))
    assert network.cls_token.abs().max() < 1e-4
    table = network.pos_embed[0]  # (1 + 4 x 6, 192)
    assert not network.pos_embed.requires_grad
    assert not table[0].any()
    row, column, quarter = 2, 5, width // 4
    place = table[1 + row * 6 + column].double()
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    expected = [f(frequencies * at) for at in (row, column) for f in (torch.sin, torch.cos)]
    assert_close(place.sort().values, torch.cat(expected).sort().values, atol=1e-5, rtol=0)


def test_initialise_moco__leaves_relative_positions_alone() -> None:
    import timm

    network = timm.create_model(
        "beit_base_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=2
    )
    initialise_moco(network)  # no table of absolute positions, no bias of keys
    assert not network.blocks[0].attn.relative_position_bias_table.any()
