"""The masked image model: what it sees, where it answers, and that the transformer stays timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models.masked_vit import (
    MaskedImageModel,
    VisibleOnlyModel,
    at_positions,
    initialise_beit,
    masked_positions,
)
from pecobook.settings.pretrain import DecoderConfig

SIZE: dict[str, Any] = {"img_size": (24, 32), "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2}
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", SIZE),
    "vit without class token": ("vit_tiny_patch16_224", SIZE | {"class_token": False, "global_pool": "avg"}),
    "vit with registers": ("vit_tiny_patch16_224", SIZE | {"reg_tokens": 4}),
    "beit": ("beit_base_patch16_224", SIZE | {"init_values": 0.1}),
}


@pytest.fixture(params=list(BACKBONES))
def model(request: pytest.FixtureRequest) -> MaskedImageModel:
    name, args = BACKBONES[request.param]
    torch.manual_seed(0)
    return MaskedImageModel(timm.create_model(name, num_classes=0, **args), vocab_size=11).eval()


_BEIT_STD = 0.5396 * 0.02  # of a normal of 0.02 that is cut at one deviation


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(seed))


def some_mask() -> Tensor:
    """(2, 3, 4); five patches of the first image and three of the second are masked."""
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    for row, column in ((0, 1), (0, 3), (1, 0), (2, 2), (2, 3)):
        mask[0, row, column] = True
    for row, column in ((0, 0), (1, 3), (2, 1)):
        mask[1, row, column] = True
    return mask


def test_forward__answers_at_masked_positions_in_row_major_order(model: MaskedImageModel) -> None:
    mask = some_mask()
    logits = model(pictures(), mask)
    assert model.grid == (3, 4)
    assert logits.shape == (8, 11)
    hidden = model.hidden(pictures(), mask)
    positions = [(image, row * 4 + column) for image, row, column in mask.nonzero().tolist()]
    assert positions == sorted(positions)
    for number, (image, patch) in enumerate(positions):
        assert_close(logits[number], model.head(hidden[image, patch]))
    # And so does a target that is indexed by the same mask.
    codes = torch.arange(24).view(2, 3, 4)
    assert codes[mask].tolist() == [image * 12 + patch for image, patch in positions]


def test_forward__does_not_see_masked_pixels(model: MaskedImageModel) -> None:
    images, mask = pictures(), some_mask()
    under = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]  # (B, 1, H, W)
    logits = model(images, mask)
    assert torch.equal(model(torch.where(under, 100 * pictures(1), images), mask), logits)
    # But every pixel that is not masked counts: change one visible patch of the first image.
    for row, column in ((0, 0), (2, 1)):
        changed = images.clone()
        changed[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1
        other = model(changed, mask)
        assert ((other[:5] - logits[:5]).abs().amax(1) > 1e-6).all()
        assert torch.equal(other[5:], logits[5:])  # the second image is another image


def test_forward__the_mask_token_takes_the_place_of_patches(model: MaskedImageModel) -> None:
    images, mask = pictures(), some_mask()
    seen: list[Tensor] = []
    handle = model.backbone.blocks[0].register_forward_pre_hook(  # type: ignore[index, union-attr]
        lambda _module, inputs: seen.append(inputs[0].detach())
    )
    model(images, mask)
    nn.init.constant_(model.mask_token, 3.0)
    model(images, mask)
    model.hidden(images, None)
    handle.remove()
    patches = [tokens[:, -12:] for tokens in seen]
    changed = (patches[0] != patches[1]).any(2)
    assert torch.equal(changed, mask.flatten(1))
    # Position tables are added to the token too, so masked patches know where they are.
    assert torch.equal((patches[0] != patches[2]).any(2), mask.flatten(1))


def last_tokens(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """All tokens after the last norm, which timm holds back for after the pooling where it pools the mean."""
    tokens = backbone.forward_features(images)  # type: ignore[operator]
    has_norm = not isinstance(backbone.norm, nn.Identity)
    return tokens if has_norm else backbone.fc_norm(tokens)  # type: ignore[operator, no-any-return]


def test_hidden__reads_through_a_norm(model: MaskedImageModel) -> None:
    hidden = model.hidden(pictures(), None)
    assert torch.allclose(hidden.mean(-1), torch.zeros(()), atol=1e-4)
    assert torch.allclose(hidden.std(-1, unbiased=False), torch.ones(()), atol=1e-2)


def test_hidden__without_a_mask_is_timms(model: MaskedImageModel) -> None:
    images = pictures()
    model(images, some_mask())  # leaves nothing behind
    prefix = model.backbone.num_prefix_tokens if hasattr(model.backbone, "num_prefix_tokens") else 1
    plain = last_tokens(model.backbone, images)[:, prefix:]
    hidden = model.hidden(images, None)
    assert hidden.shape == (2, 12, 24)
    assert torch.equal(hidden, plain)


def test_hidden__forgets_the_mask_after_an_error(model: MaskedImageModel) -> None:
    with pytest.raises(RuntimeError):
        model(pictures(), torch.ones(2, 2, 2, dtype=torch.bool))
    expected = model.hidden(pictures(), None)
    assert torch.equal(last_tokens(model.backbone, pictures())[:, -12:], expected)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_state_dict__loads_into_a_plain_timm_network(name: str) -> None:
    architecture, args = BACKBONES[name]
    model = MaskedImageModel(timm.create_model(architecture, num_classes=0, **args), 11).eval()
    plain = timm.create_model(architecture, num_classes=0, **args).eval()
    state = model.state_dict()
    backbone_state = {
        key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")
    }
    plain.load_state_dict(backbone_state)
    assert state.keys() - {f"backbone.{key}" for key in backbone_state} == {"mask_token", "head.weight", "head.bias"}
    assert torch.equal(last_tokens(plain, pictures())[:, -12:], model.hidden(pictures(), None))


def test_backward__reaches_every_part(model: MaskedImageModel) -> None:
    torch.autograd.backward(nn.functional.cross_entropy(model(pictures(), some_mask()), torch.arange(8)))
    for name in ("mask_token", "head.weight", "head.bias", "backbone.patch_embed.proj.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().max() > 0, name


def test_forward__under_autocast(model: MaskedImageModel) -> None:
    exact = model(pictures(), some_mask())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(pictures(), some_mask())
    assert_close(logits.float(), exact, atol=0.05, rtol=0.1)


def test_init__of_mask_token_and_head() -> None:
    torch.manual_seed(0)
    model = MaskedImageModel(timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZE), 500)
    assert model.mask_token.shape == (24,)
    assert model.head.weight.std().item() == pytest.approx(_BEIT_STD, rel=0.05)
    assert model.mask_token.std().item() == pytest.approx(_BEIT_STD, rel=0.5)
    assert model.head.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_init__refuses_a_network_without_patches(name: str) -> None:
    with pytest.raises(WeightsError, match="has no patches to mask: choose a ViT or BEiT of timm"):
        MaskedImageModel(timm.create_model(name, num_classes=0), 8)


@pytest.mark.parametrize("make", [lambda b: MaskedImageModel(b, 8), lambda b: VisibleOnlyModel(b, 8)])
def test_init__refuses_a_pooling_that_would_not_learn(make: Callable[[nn.Module], nn.Module]) -> None:
    name = "vit_base_patch16_siglip_224"
    with pytest.raises(WeightsError, match=r'pools patches by attention.*--model\.args .*"global_pool": "avg"'):
        make(timm.create_model(name, num_classes=0, **SIZE))
    make(timm.create_model(name, num_classes=0, **SIZE, global_pool="avg"))


# Beside those above: other last blocks, norms after the pooling, positions.
ARRANGEMENTS = {
    **BACKBONES,
    "siglip": ("vit_base_patch16_siglip_224", SIZE | {"global_pool": "avg"}),
    "beit, shared positions": (
        "beit_base_patch16_224",
        SIZE | {"init_values": 0.1, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "eva02": ("eva02_tiny_patch14_224", SIZE),
    "dinov3": ("vit_small_patch16_dinov3", SIZE),
    "relative positions": ("vit_relpos_small_patch16_224", SIZE),
    "distilled": ("deit_tiny_distilled_patch16_224", SIZE),
}


@pytest.mark.parametrize("name", list(ARRANGEMENTS))
def test_backward__gives_every_weight_a_gradient(name: str) -> None:
    """Without, DDP waits for it, and a resumed optimizer lacks its state."""
    architecture, args = ARRANGEMENTS[name]
    model = MaskedImageModel(timm.create_model(architecture, num_classes=0, **args), 11)
    model(pictures(), even_mask(), 5).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_initialise_beit__is_beits(name: str) -> None:
    architecture, args = BACKBONES[name]
    torch.manual_seed(0)
    network = timm.create_model(architecture, num_classes=0, **args | {"depth": 4, "embed_dim": 96})
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.constant_(module.weight, 7.0)
            if module.bias is not None:
                nn.init.constant_(module.bias, 7.0)
    initialise_beit(network)
    for number, block in enumerate(network.blocks, start=1):
        for layer, expected in (
            (network.patch_embed.proj, _BEIT_STD),
            (block.attn.qkv, _BEIT_STD),
            (block.mlp.fc1, _BEIT_STD),
            (block.attn.proj, _BEIT_STD / (2 * number) ** 0.5),
            (block.mlp.fc2, _BEIT_STD / (2 * number) ** 0.5),
        ):
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert layer.weight.mean().abs() < expected / 10
            assert layer.bias is None or layer.bias.abs().max() == 0
            assert layer.weight.abs().max() <= 0.02
    for token in (network.cls_token, network.pos_embed):
        assert token is None or token.std().item() == pytest.approx(_BEIT_STD, rel=0.2)


def test_initialise_beit__leaves_fixed_positions() -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZE)
    network.pos_embed.requires_grad_(False)
    before = network.pos_embed.clone()
    initialise_beit(network)
    assert torch.equal(network.pos_embed, before)


# ------------------------------------------------------------------------------------------------- static shapes


def even_mask() -> Tensor:
    """(2, 3, 4) with five masked patches in each image."""
    mask = some_mask()
    mask[1, 0, 1] = mask[1, 2, 3] = True
    return mask


def test_positions__are_the_masked_ones_in_row_major_order() -> None:
    mask = even_mask()
    positions = masked_positions(mask, 5)
    assert positions.tolist() == [row.nonzero()[:, 0].tolist() for row in mask.flatten(1)]
    values = torch.randn(2, 12, 3)
    assert torch.equal(at_positions(values, positions), values[mask.flatten(1)])
    assert torch.equal(at_positions(values[..., 0], positions), values[..., 0][mask.flatten(1)])


def test_forward__with_a_known_count_is_forward_with_a_counted_one(model: MaskedImageModel) -> None:
    mask = even_mask()
    assert_close(model(pictures(), mask, 5), model(pictures(), mask))


@pytest.mark.parametrize("name", list(ARRANGEMENTS))
def test_forward__with_a_known_count_never_waits_for_the_device(name: str) -> None:
    """Also where the last block is none that it knows: no shape depends on the mask."""
    architecture, args = ARRANGEMENTS[name]
    model = MaskedImageModel(timm.create_model(architecture, num_classes=0, **args), 11).eval()
    assert_close(model(pictures(), even_mask(), 5), model(pictures(), even_mask()))
    model.to("meta")  # where tensors have no values that could be counted
    assert model(pictures().to("meta"), even_mask().to("meta"), 5).shape == (10, 11)


def test_forward__with_a_known_count_runs_the_last_perceptron_on_masked_positions_alone(
    model: MaskedImageModel,
) -> None:
    seen: list[tuple[int, ...]] = []
    for block in model.backbone.blocks:  # type: ignore[union-attr]
        block.mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(tuple(inputs[0].shape[:2])))
    total = model.backbone.num_prefix_tokens + 12  # type: ignore[operator]
    model(pictures(), even_mask(), 5)
    assert seen == [(2, total), (2, total), (2, 5)]
    seen.clear()
    model.hidden(pictures(), even_mask())
    assert seen == [(2, total)] * 3


def test_forward__with_a_known_count_has_the_same_gradients(model: MaskedImageModel) -> None:
    mask, gradients = even_mask(), []
    for more in ((), (5,)):
        model.zero_grad()
        model(pictures(), mask, *more).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------- the accelerated form


def accelerated(**more: Any) -> VisibleOnlyModel:
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**SIZE, **more})
    return VisibleOnlyModel(backbone, 11, DecoderConfig(depth=2, width=16, num_heads=2)).eval()


@pytest.mark.parametrize("more", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
def test_visible_only__reads_what_is_visible_and_nothing_else(more: dict[str, Any]) -> None:
    model, images, mask = accelerated(**more), pictures(), even_mask()
    seen: list[Tensor] = []
    model.backbone.blocks[0].register_forward_pre_hook(  # type: ignore[index, union-attr]
        lambda _module, inputs: seen.append(inputs[0].detach())
    )
    logits = model(images, mask, 5)
    assert logits.shape == (10, 11)
    prefix = {"{}": 1, "reg_tokens": 5, "class_token": 0}[next(iter(more), "{}")]
    assert seen[0].shape == (2, prefix + 7, 24)  # 12 patches, 5 hidden
    backbone = model.backbone
    patches = backbone._pos_embed(backbone.patch_embed(images))  # type: ignore[operator]
    visible = ~mask.flatten(1)
    for image in range(2):
        assert_close(seen[0][image, prefix:], patches[image, prefix:][visible[image]])
    under = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    assert torch.equal(model(torch.where(under, 100 * pictures(1), images), mask, 5), logits)
    assert not torch.allclose(model(torch.where(under, images, pictures(1)), mask, 5), logits)
    assert_close(model(images, mask), logits)


def test_visible_only__answers_in_row_major_order() -> None:
    """Two images alike but for the mask: what is asked of the same place among the same visible patches is the same."""
    model, images, mask = accelerated(), pictures(), even_mask()
    logits = model(images, mask, 5)
    swapped = model(images.flip(0), mask.flip(0), 5)
    assert_close(logits[:5], swapped[5:], atol=1e-5, rtol=1e-4)
    # The decoder's guesses differ by nothing but their place.
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_visible_only__leaves_the_backbone_a_plain_one() -> None:
    model = accelerated()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZE)
    plain.load_state_dict(model.backbone.state_dict())
    assert_close(model.backbone(pictures()), plain.eval()(pictures()))


@pytest.mark.parametrize("more", [{}, {"class_token": False, "global_pool": "avg"}])
def test_visible_only__every_weight_learns(more: dict[str, Any]) -> None:
    model = accelerated(**more).train()
    model(pictures(), even_mask(), 5).square().mean().backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert missing == set()


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_visible_only__refuses_relative_positions(name: str) -> None:
    backbone = timm.create_model(name, num_classes=0, **SIZE)
    with pytest.raises(WeightsError, match="positions are relative: choose a plain ViT"):
        VisibleOnlyModel(backbone, 4)


def test_tiled_cross_entropy__has_the_loss_the_gradients_and_the_predictions_of_one_tile() -> None:
    from pecobook.models.masked_vit import tiled_cross_entropy

    torch.manual_seed(0)
    head, targets = nn.Linear(6, 50), torch.randint(50, (17,))
    hidden = torch.randn(17, 6, requires_grad=True)
    whole = nn.functional.cross_entropy(head(hidden), targets)
    expected = torch.autograd.grad(whole, [hidden, *head.parameters()])
    for rows in (1, 5, 17, 100):
        loss, best = tiled_cross_entropy(head, hidden, targets, rows)
        assert_close(loss, whole)
        assert torch.equal(best, head(hidden).argmax(1))
        for gradient, value in zip(torch.autograd.grad(loss, [hidden, *head.parameters()]), expected, strict=True):
            assert_close(gradient, value)
