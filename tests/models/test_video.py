"""Divided space-time attention against PyTorch's own attention, a copy of the rule in loops, and the image network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pecobook.engine.optim import layer_decay_groups, parameter_groups
from pecobook.models.residual import keep_residuals_low
from pecobook.models.video import ClipClassifier, ClipNetwork, TemporalAttention, image_network
from pecobook.settings.images import ClipConfig
from pecobook.settings.training import OptimConfig

T = 3
SIZE: dict[str, Any] = {"img_size": 16, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "init_values": 0.1, "global_pool": "avg", "fc_norm": True}),
    "class token": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "beit": ("beit_base_patch16_224", {"patch_size": 8, "init_values": 0.1}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8, "global_pool": "avg"}),
    "no class token": ("vit_tiny_patch16_224", {"patch_size": 8, "class_token": False, "global_pool": "avg"}),
}


def make(kind: str, **more: Any) -> tuple[Any, ClipNetwork]:
    """Return a network with random weights everywhere, and a copy that reads clips."""
    torch.manual_seed(0)
    name, args = KINDS[kind]
    network = timm.create_model(name, **{**SIZE, **args, **more})
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return network.eval(), ClipNetwork(copy.deepcopy(network), T).eval()


def awake(clips: ClipNetwork) -> ClipNetwork:
    """Give what begins at zero random weights."""
    for name, parameter in clips.named_parameters():
        if ".temporal." in name or "norm.1.pos_embed" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return clips


@pytest.mark.parametrize("kind", KINDS)
def test_clip_network__equal_frames_give_the_logits_of_the_image_network(kind: str) -> None:
    network, clips = make(kind)
    images = torch.randn(2, 3, 16, 16)
    equal = images[:, None].expand(-1, T, -1, -1, -1)
    torch.testing.assert_close(clips(equal), network(images), rtol=1e-5, atol=1e-5)


def test_clip_network__without_class_token_the_features_are_the_mean_over_frames() -> None:
    """With one the frames share it after the first block, so there the identity holds for equal frames alone."""
    network, clips = make("no class token", fc_norm=False)
    frames = torch.randn(2, T, 3, 16, 16)
    each = network(frames.flatten(0, 1)).unflatten(0, (2, T))
    torch.testing.assert_close(clips(frames), each.mean(1), rtol=1e-5, atol=1e-5)
    network, clips = make("class token")
    each = network(frames.flatten(0, 1)).unflatten(0, (2, T))
    assert not torch.allclose(clips(frames), each.mean(1), atol=1e-3)


def expected(network: Any, clips: ClipNetwork, frames: Tensor) -> Tensor:
    """Compute one clip (T, 3, H, W) as TimeSformer's paper says, place by place, with one class token for the clip."""
    inner: Any = clips.image_network
    times = inner.patch_embed.norm[1].pos_embed
    tokens = torch.stack(
        [
            network._pos_embed(network.patch_embed(frame[None]) + time)[0]
            for frame, time in zip(frames, times, strict=True)
        ]
    )  # (T, 1 + N, D), with the patches' positions
    token, patches = tokens[0, :1], tokens[:, 1:]
    for plain, divided in zip(network.blocks, inner.blocks, strict=True):
        temporal: TemporalAttention = divided.temporal
        attention: Any = nn.MultiheadAttention(SIZE["embed_dim"], SIZE["num_heads"], batch_first=True)
        attention.in_proj_weight, attention.in_proj_bias = temporal.qkv.weight, temporal.qkv.bias
        attention.out_proj = temporal.proj
        patches = patches.clone()
        for place in range(patches.shape[1]):
            column = temporal.norm(patches[:, place])[None]  # (1, T, D)
            patches[:, place] += temporal.out(attention(column, column, column)[0][0])
        residuals = [plain.ls1(plain.attn(plain.norm1(torch.cat((token, frame))[None])))[0] for frame in patches]
        token = token + torch.stack([residual[:1] for residual in residuals]).mean(0)
        patches = patches + torch.stack([residual[1:] for residual in residuals])
        token = token + plain.ls2(plain.mlp(plain.norm2(token)))
        patches = patches + plain.ls2(plain.mlp(plain.norm2(patches)))
    pooled = network.norm(torch.cat((token, patches.flatten(0, 1)))[None])
    return network.forward_head(pooled)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["vit", "class token"])
def test_clip_network__is_timesformers_rule_in_loops(kind: str) -> None:
    network, clips = make(kind)
    frames = torch.randn(2, T, 3, 16, 16)
    with torch.no_grad():
        awake(clips)
        wanted = torch.cat([expected(network, clips, clip) for clip in frames])
        torch.testing.assert_close(clips(frames), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(clips(frames), clips(frames.flip(1)), atol=1e-3)  # the order of the frames counts


@pytest.mark.parametrize("kind", KINDS)
def test_clip_network__a_permutation_of_frames_matters_through_the_time_embedding_alone(kind: str) -> None:
    _, clips = make(kind)
    frames = torch.randn(2, T, 3, 16, 16)
    with torch.no_grad():
        embedding = awake(clips).image_network.patch_embed.norm[1].pos_embed
        ordered, permuted = clips(frames), clips(frames[:, [2, 0, 1]])
        assert not torch.allclose(ordered, permuted, atol=1e-3)
        embedding.zero_()
        torch.testing.assert_close(clips(frames), clips(frames[:, [2, 0, 1]]), rtol=1e-4, atol=1e-5)


def test_temporal_attention__begins_with_the_weights_of_beits_attention_without_its_positions() -> None:
    network, clips = make("beit")
    inner: Any = clips.image_network
    for plain, divided in zip(network.blocks, inner.blocks, strict=True):
        temporal = divided.temporal
        assert torch.equal(temporal.qkv.weight, plain.attn.qkv.weight)
        query, key, value = temporal.qkv.bias.chunk(3)
        assert torch.equal(query, plain.attn.q_bias)
        assert torch.equal(value, plain.attn.v_bias)
        assert not key.any()
        assert torch.equal(temporal.norm.weight, plain.norm1.weight)
        assert torch.equal(temporal.proj.weight, plain.attn.proj.weight)
        assert not temporal.out.weight.any()


def test_clip_network__every_weight_learns() -> None:
    _, clips = make("beit")
    frames = torch.randn(2, T, 3, 16, 16)
    clips(frames).square().sum().backward()
    silent = {name for name, weight in clips.named_parameters() if weight.grad is None or not weight.grad.any()}
    zero = {name for name in silent if ".temporal." not in name or ".temporal.out" in name}
    assert zero == set()  # the projections at zero hide the rest of the branch in the first step alone
    awake(clips).zero_grad()
    clips(frames).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in clips.parameters())


def test_clip_network__stochastic_depth_keeps_one_class_token_and_leaves_out_whole_clips() -> None:
    _, clips = make("beit", drop_path_rate=0.5)
    seen: list[Tensor] = []
    for block in clips.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: seen.append(output.detach()))
    torch.manual_seed(1)
    frames = torch.randn(6, 1, 3, 16, 16).expand(-1, T, -1, -1, -1)
    awake(clips).train()(frames)
    for output in seen:
        token = output[:, 0].view(6, T, -1)
        assert torch.equal(token, token[:, :1].expand_as(token))
    with torch.no_grad():
        times = clips.image_network.patch_embed.norm[1].pos_embed
        times.zero_()
        seen.clear()
        clips(frames)
    for output in seen:  # of equal frames each gets the same, or nothing
        alike = output.view(6, T, *output.shape[1:])
        torch.testing.assert_close(alike, alike[:, :1].expand_as(alike), rtol=1e-4, atol=1e-4)


def test_layer_decay__puts_attention_over_time_into_its_blocks_layer() -> None:
    _, clips = make("beit")
    names = {id(parameter): name for name, parameter in image_network(clips).named_parameters()}
    config = OptimConfig(layer_decay=0.5, weight_decay=0.1)
    rates = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in layer_decay_groups(image_network(clips), config)
        for parameter in group["params"]
    }
    assert len(rates) == len(names)
    for block in range(3):
        for name in ("temporal.qkv.weight", "temporal.out.weight", "spatial.mlp.fc1.weight"):
            assert rates[f"blocks.{block}.{name}"] == (0.5 ** (3 - block), 0.1)
        assert rates[f"blocks.{block}.temporal.qkv.bias"] == (0.5 ** (3 - block), 0)
    assert rates["patch_embed.norm.1.pos_embed"] == (0.5**4, 0)  # the stem, without decay
    decayed = {
        names[id(p)] for group in parameter_groups(clips, config) if group["weight_decay"] for p in group["params"]
    }
    assert "patch_embed.norm.1.pos_embed" not in decayed


def test_clip_network__residuals_in_bf16() -> None:
    _, clips = make("beit")
    keep_residuals_low(clips.blocks, "beit")
    kinds: list[torch.dtype] = []
    clips.blocks[-1].register_forward_hook(lambda _block, _inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        clips(torch.randn(1, T, 3, 16, 16))
    assert kinds == [torch.bfloat16]


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_clip_network__other_networks_are_refused(name: str) -> None:
    args = {"qk_norm": True} if name.startswith("vit") else {}
    with pytest.raises((AttributeError, Exception), match=r"no transformer of patches|normalises queries"):
        ClipNetwork(timm.create_model(name, **args), T)


def test_clip_network__crops_give_the_mean_probability() -> None:
    _, clips = make("vit")
    crops = torch.randn(2, 3, T, 3, 16, 16)
    wanted = torch.stack([clips(crops[:, number]).softmax(1) for number in range(3)]).mean(0)
    torch.testing.assert_close(clips(crops).exp(), wanted)


def test_clip_classifier__saves_and_loads(tmp_path: Any) -> None:
    _, clips = make("vit")
    args = {"img_size": 16, **{k: SIZE[k] for k in ("depth", "embed_dim", "num_heads")}, **KINDS["vit"][1]}
    clip = ClipConfig(frames=T, sampling="segments", crops=3, flip=False)
    names = ("a", "b", "c", "d", "e")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    classifier = ClipClassifier(awake(clips), KINDS["vit"][0], args, mean, std, 16, classes=names, clip=clip)
    classifier.save_pretrained(tmp_path)
    loaded = ClipClassifier.from_pretrained(tmp_path)
    frames = torch.randint(256, (2, T, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(loaded(frames), classifier(frames))
    assert (loaded.clip, loaded.classes, loaded.image_size) == (clip, names, 16)
    normalised = (frames / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(loaded(frames), clips(normalised))
    with pytest.raises(ValueError, match=r"Clips must have the shape \(B, 3, 3, H, W\), not \(2, 3, 16, 16\)"):
        loaded(frames[:, 0])
