"""Encoder and decoder: the paper's sizes, shapes, fields of view."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pecobook.errors import ConfigError
from pecobook.models.autoencoder import (
    Convolution,
    Decoder,
    Encoder,
    LatentNorm,
    ResidualBlock,
    SelfAttention,
    Upsample,
)
from pecobook.models.tokenizer import build_autoencoder
from pecobook.settings.tokenizer import AutoencoderConfig

SMALL = AutoencoderConfig(channels=(8, 16, 12), latent_dim=6, num_blocks=1)


@pytest.mark.parametrize(
    ("channels", "parameters"),
    [((64, 128, 256, 512, 512), 37_521_600), ((32, 64, 128, 256, 512), 25_747_680)],
    ids=["base", "lite"],
)
def test_encoder__has_the_papers_size(channels: tuple[int, ...], parameters: int) -> None:
    config = AutoencoderConfig(channels=channels)
    with torch.device("meta"):
        encoder = Encoder(config)
    codebook = 8192 * config.latent_dim
    assert sum(p.numel() for p in encoder.parameters()) + codebook == parameters
    assert config.stride == 16


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 20), (4, 4)])
def test_encoder_and_decoder__shapes(height: int, width: int) -> None:
    z = Encoder(SMALL)(torch.zeros(2, 3, height, width))
    assert z.shape == (2, 6, height // 4, width // 4)
    assert Decoder(SMALL)(z).shape == (2, 3, height, width)


def test_encoder_and_decoder__of_one_resolution() -> None:
    config = AutoencoderConfig(channels=(8,), latent_dim=4)
    assert config.stride == 1
    assert Decoder(config)(Encoder(config)(torch.zeros(1, 3, 5, 7))).shape == (1, 3, 5, 7)


def test_encoder__treats_each_image_alone_and_reaches_every_weight() -> None:
    torch.manual_seed(0)
    encoder, images = Encoder(SMALL), torch.randn(3, 3, 16, 16)
    together = encoder(images)
    assert_close(together, torch.cat([encoder(image[None]) for image in images]), atol=1e-5, rtol=1e-5)
    together.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters() if p.ndim > 1)


def test_latent_norm__has_mean_zero_and_variance_one_at_each_place() -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=(8, 8), latent_dim=16, num_blocks=1, latent_norm=True)
    z = Encoder(config)(torch.randn(2, 3, 8, 8))
    assert_close(z.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    assert_close(z.var(1, unbiased=False), torch.ones(2, 4, 4), atol=1e-2, rtol=0)
    assert list(LatentNorm(16).parameters()) == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Encoder(config)(torch.randn(2, 3, 8, 8)).dtype == torch.float32


def test_self_attention__is_single_head_attention_over_positions() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(8, 4), torch.randn(2, 8, 3, 5)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)

    def apply(conv: nn.Module, t: torch.Tensor) -> torch.Tensor:
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        return t @ conv.weight[:, :, 0, 0].T + conv.bias

    scores = apply(layer.query, tokens) @ apply(layer.key, tokens).transpose(1, 2) / 8**0.5
    mixed = apply(layer.project, scores.softmax(-1) @ apply(layer.value, tokens))
    assert_close(layer(x), x + mixed.transpose(1, 2).view_as(x), atol=1e-5, rtol=1e-5)


def test_downsample_and_upsample__halve_and_double() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    down, up = Convolution(1, 1, "zeros", stride=2), Upsample(1, 1, "zeros")
    for layer in (down, up):
        nn.init.zeros_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        with torch.no_grad():
            layer.weight[0, 0, 1, 1] = 1
    # Padded at the right and bottom only: the kernel's centre falls on the odd pixels.
    assert down(x)[0, 0].tolist() == [[5.0, 7.0], [13.0, 15.0]]
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution__compiled_is_the_same(stride: int) -> None:
    torch.manual_seed(0)
    layer = Convolution(4, 6, "replicate", stride=stride)
    x = torch.randn(2, 4, 6, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for forward in (layer, torch.compile(layer)):
        y = forward(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong", [{"channels": ()}, {"channels": (8, 0)}, {"latent_dim": 0}, {"num_blocks": 0}])
def test_autoencoder_config__refuses_nothing(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"must be above 0|takes 1 to 12 numbers"):
        AutoencoderConfig(**wrong)  # type: ignore[arg-type]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_table_12__eight_fold_on_112_pixels_keeps_the_grid() -> None:
    config = AutoencoderConfig(channels=(64, 128, 256, 512))
    assert config.stride == 8
    assert 112 // config.stride == 14
    small = AutoencoderConfig(channels=(8, 8, 8, 8), latent_dim=4, num_blocks=1)
    z = Encoder(small)(torch.zeros(1, 3, 112, 112))
    assert z.shape == (1, 4, 14, 14)
    assert Decoder(small)(z).shape == (1, 3, 112, 112)


def test_table_12__half_the_decoder() -> None:
    with torch.device("meta"):
        whole = Decoder(AutoencoderConfig())
        narrow = Decoder(AutoencoderConfig(decoder_width=0.5))
        shallow = Decoder(AutoencoderConfig(decoder_blocks=1))
        encoders = [
            Encoder(AutoencoderConfig(**settings)) for settings in ({}, {"decoder_width": 0.5}, {"decoder_blocks": 1})
        ]
    convolutions = {name: p for name, p in narrow.named_parameters() if p.ndim == 4}
    for name, p in whole.named_parameters():
        if p.ndim == 4:
            out, into = p.shape[:2]  # latent and image keep their channels
            expected = (out if out == 3 else out // 2, into if name == "0.weight" else into // 2)
            assert convolutions[name].shape[:2] == expected, name
    blocks = [sum(isinstance(layer, ResidualBlock) for layer in decoder) for decoder in (whole, narrow, shallow)]
    # Five levels of two blocks each, and the two around the attention.
    assert blocks == [12, 12, 7]
    assert len({parameters(encoder) for encoder in encoders}) == 1


def test_decoder_side__is_the_config_itself_when_nothing_differs() -> None:
    assert SMALL.decoder_side() is SMALL
    half = dataclasses.replace(SMALL, decoder_width=0.5, decoder_blocks=3).decoder_side()
    assert (half.channels, half.num_blocks, half.decoder_width) == ((4, 8, 6), 3, 1.0)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_encoder_and_decoder__of_other_channels(channels: int) -> None:
    config = AutoencoderConfig(channels=(8, 16), latent_dim=4, num_blocks=1, in_channels=channels)
    encoder, decoder = build_autoencoder(config)
    assert decoder(encoder(torch.zeros(2, channels, 6, 10))).shape == (2, channels, 6, 10)


@pytest.mark.parametrize(
    "settings", [{"in_channels": 0}, {"decoder_width": 0.0}, {"decoder_blocks": -1}, {"num_heads": 0}]
)
def test_config__refuses_sizes_below_one(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        AutoencoderConfig(**settings)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- borders, translations


@pytest.mark.parametrize(
    ("height", "width", "stride"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (2, 2, 1), (2, 5, 1), (2, 2, 2), (4, 6, 2)]
)
def test_convolution__reflects_the_neighbours_or_repeats_a_single_row(height: int, width: int, stride: int) -> None:
    layer, x = (
        Convolution(1, 1, "reflect", stride=stride),
        torch.arange(float(height * width)).view(1, 1, height, width),
    )
    rows, columns = ([min(1, size - 1), *range(size), max(size - 2, 0)] for size in (height, width))
    if stride == 2:  # padded at the right and bottom only
        rows, columns = rows[1:], columns[1:]
    expected = nn.functional.conv2d(x[:, :, rows][..., columns], layer.weight, layer.bias, stride)
    assert_close(layer(x), expected)
    if stride == 1:  # as in an ONNX file
        with mock.patch("pecobook.models.autoencoder.exporting", return_value=True):
            assert_close(layer(x), expected)


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
def test_encoder_and_decoder__of_a_single_token(padding: Any) -> None:
    config = dataclasses.replace(SMALL, padding=padding)
    for height, width in ((4, 4), (4, 8), (12, 4)):
        z = Encoder(config)(torch.rand(2, 3, height, width))
        assert z.shape == (2, 6, height // 4, width // 4)
        assert Decoder(config)(z).shape == (2, 3, height, width)


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize(("down", "right"), [(4, 0), (0, 4), (8, -4)])
def test_encoder_and_decoder__follow_a_shift_by_tokens(padding: Any, down: int, right: int) -> None:
    """An object on a flat ground: without zeros at the border nothing tells where the object is."""
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=(8, 8, 8), latent_dim=6, num_blocks=1, padding=padding)
    encoder, decoder = Encoder(config).double(), Decoder(config).double()
    images = torch.full((1, 3, 112, 112), 0.3, dtype=torch.float64)
    images[:, :, 50:60, 52:62] = torch.rand(1, 3, 10, 10, dtype=torch.float64)
    latents = torch.full((1, 6, 28, 28), 0.3, dtype=torch.float64)
    latents[:, :, 13:15, 13:15] = torch.rand(1, 6, 2, 2, dtype=torch.float64)
    pixels, tokens = (down, right), (down // 4, right // 4)
    with torch.no_grad():
        for network, x, before, after in ((encoder, images, pixels, tokens), (decoder, latents, tokens, pixels)):
            equal = torch.allclose(network(x.roll(before, (2, 3))), network(x).roll(after, (2, 3)), atol=1e-9)
            assert equal == (padding != "zeros")
