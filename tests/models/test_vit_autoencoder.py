"""The tokenizer's transformer: shapes, positions, and what of Table 12 it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from pecobook.errors import ConfigError
from pecobook.models.tokenizer import build_autoencoder
from pecobook.models.vit_autoencoder import ViTDecoder, ViTEncoder, sincos_positions
from pecobook.settings.tokenizer import AutoencoderConfig

SMALL = AutoencoderConfig(kind="vit", channels=(16, 4), num_heads=2, num_blocks=2, latent_dim=6)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 20), (4, 4)])
def test_shapes(height: int, width: int) -> None:
    encoder, decoder = build_autoencoder(SMALL)
    z = encoder(torch.zeros(2, 3, height, width))
    assert z.shape == (2, 6, height // 4, width // 4)
    assert decoder(z).shape == (2, 3, height, width)
    assert SMALL.stride == 4


def test_vit_base__is_one_at_both_ends() -> None:
    """Table 12's ViT-B / ViT-B: 12 blocks of width 768, as timm counts them."""
    import timm

    config = AutoencoderConfig(kind="vit", channels=(768, 16), num_blocks=12)
    with torch.device("meta"):
        encoder, decoder = build_autoencoder(config)
        blocks = timm.create_model("vit_base_patch16_224", num_classes=0).blocks
    count = sum(p.numel() for p in blocks.parameters())
    for side in (encoder, decoder):
        assert sum(p.numel() for name, p in side.named_parameters() if ".attn." in name or ".mlp." in name) == sum(
            p.numel() for name, p in blocks.named_parameters() if ".attn." in name or ".mlp." in name
        )
        assert count < sum(p.numel() for p in side.parameters()) < 1.1 * count


def test_encoder__sees_every_patch_and_knows_where_it_is() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(SMALL).eval()
    image = torch.randn(1, 3, 16, 16, requires_grad=True)
    encoder(image)[0, :, 0, 0].sum().backward()
    assert image.grad is not None
    assert (image.grad.abs().sum(1) > 0).all()
    flat = encoder(torch.ones(1, 3, 16, 16))  # equal patches: positions alone tell them apart
    assert (flat[0, :, 0, 0] - flat[0, :, 3, 2]).abs().max() > 1e-3
    patches = torch.randn(2, 3, 16, 16)
    assert_close(encoder(patches)[1:], encoder(patches[1:]), atol=1e-5, rtol=1e-4)


def test_decoder__writes_each_patch_where_it_belongs() -> None:
    torch.manual_seed(0)
    decoder = ViTDecoder(SMALL)
    with torch.no_grad():
        decoder[2].weight.zero_()  # type: ignore[operator]
        decoder[2].bias.copy_(torch.arange(48.0))  # type: ignore[operator]
    image = decoder(torch.zeros(1, 6, 2, 3))
    assert image.shape == (1, 3, 8, 12)
    expected = torch.arange(48.0).view(3, 4, 4)  # channel, row, column within a patch
    for row in range(2):
        for column in range(3):
            assert torch.equal(image[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4], expected)


def test_decoder__may_be_narrower_and_shallower() -> None:
    config = AutoencoderConfig(
        kind="vit", channels=(16, 4), num_heads=2, num_blocks=2, latent_dim=6, decoder_width=0.5, decoder_blocks=1
    )
    encoder, decoder = build_autoencoder(config)
    assert decoder(encoder(torch.zeros(1, 3, 8, 8))).shape == (1, 3, 8, 8)
    assert len(decoder[1]) == 2  # type: ignore[index]  # one block and the norm


def test_sincos_positions__are_sines_and_cosines_of_row_and_column() -> None:
    table = sincos_positions(3, 5, 8, device=torch.device("cpu"))
    for row in range(3):
        for column in range(5):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (i / 2) for i in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            position = table[row * 5 + column].double()
            assert_close(
                position.sort().values, torch.tensor(expected, dtype=torch.float64).sort().values, atol=1e-5, rtol=0
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": (16, 32, 4)}, "WIDTH PATCH"),
        ({"channels": (18, 4), "num_heads": 2}, "width, 18, must be a multiple of 8"),
        ({"channels": (16, 4), "num_heads": 2, "decoder_width": 0.7}, "width, 11, must be a multiple of 8"),
    ],
)
def test_config__refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoencoderConfig(kind="vit", **settings)  # type: ignore[arg-type]
