"""Checkpoints with 4M's names, against the forward pass of its authors written out plainly."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models.tokenizers import load_tokenizer

State = dict[str, Tensor]
W, P, D, K, SIDE = 128, 16, 8, 64, 64  # width (2 heads), patch, channels and number of codewords, training images
GRID = SIDE // P
ENCODER = ("encoder.", "quant_proj.", "quantize.")


def transformer(draw: torch.Generator, side: str, depth: int, *, mlp: bool) -> State:
    """Returns random weights of a transformer."""
    shapes: dict[str, tuple[int, ...]] = {f"{side}.pos_emb": (1, W, GRID, GRID)}
    for block in (f"{side}.blocks.{number}" for number in range(depth)):
        for name, out, inside in (
            ("attn.qkv", 3 * W, W),
            ("attn.proj", W, W),
            ("mlp.fc1", 4 * W, W),
            ("mlp.fc2", W, 4 * W),
        ):
            shapes |= {f"{block}.{name}.weight": (out, inside), f"{block}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"{block}.{name}.weight": (W,), f"{block}.{name}.bias": (W,)}
    if mlp:
        for name, shape in (("norm_mlp", (W,)), ("post_mlp.fc1", (4 * W, W)), ("post_mlp.fc2", (W, 4 * W))):
            shapes |= {f"{side}.{name}.weight": shape, f"{side}.{name}.bias": shape[:1]}
    return random(draw, shapes)


def random(draw: torch.Generator, shapes: dict[str, tuple[int, ...]]) -> State:
    """Returns weights whose products keep a scale of about 1."""
    return {
        name: torch.randn(shape, generator=draw) / math.sqrt(max(math.prod(shape[1:]), 4))
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, shape in shapes.items()
    }


def checkpoint(*, by_direction: bool = True, mlp: bool = True, decoder: bool = True) -> State:
    """Returns the weights of a tokenizer of 4M with random values."""
    draw = torch.Generator().manual_seed(0)
    state = transformer(draw, "encoder", 2, mlp=mlp)
    shapes: dict[str, tuple[int, ...]] = {"encoder.proj.weight": (W, 3, P, P), "encoder.proj.bias": (W,)}
    shapes |= {"quant_proj.weight": (D, W, 1, 1), "quant_proj.bias": (D,), "quantize._codebook.embed": (K, D)}
    if decoder:
        state |= transformer(draw, "decoder", 1, mlp=mlp)
        shapes |= {"post_quant_proj.weight": (W, D, 1, 1), "post_quant_proj.bias": (W,)}
        shapes |= {"decoder.out_proj.weight": (3 * P * P, W), "decoder.out_proj.bias": (3 * P * P,)}
        for block in ("decoder.out_conv.0", "decoder.out_conv.1"):
            shapes |= {f"{block}.gamma": (3,), f"{block}.dwconv.weight": (3, 1, 7, 7), f"{block}.dwconv.bias": (3,)}
            shapes |= {f"{block}.norm.weight": (3,), f"{block}.norm.bias": (3,)}
            shapes |= {f"{block}.pwconv1.weight": (12, 3), f"{block}.pwconv1.bias": (12,)}
            shapes |= {f"{block}.pwconv2.weight": (3, 12), f"{block}.pwconv2.bias": (3,)}
    state |= random(draw, shapes)
    state["quantize._codebook.cluster_size"] = torch.ones(K)
    if not by_direction:
        state["quantize._codebook.embed_avg"] = torch.zeros(K, D)
    return state


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """Returns x (..., in) through a linear layer."""
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """Returns the layer norm of x over its last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def transform(state: State, side: str, x: Tensor) -> Tensor:
    """Returns tokens (B, W, h, w) behind the transformer."""
    positions = F.interpolate(state[f"{side}.pos_emb"], size=x.shape[2:], mode="bicubic", align_corners=False)
    tokens = (x + positions).flatten(2).transpose(1, 2)
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith(f"{side}.blocks."))
    for block in (f"{side}.blocks.{number}" for number in range(depth)):
        q, k, v = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", tokens)).chunk(3, -1)
        heads = []
        for head in (slice(0, 64), slice(64, 128)):
            weights = (q[..., head] @ k[..., head].transpose(1, 2) / 8).softmax(-1)
            heads.append(weights @ v[..., head])
        tokens = tokens + linear(state, f"{block}.attn.proj", torch.cat(heads, -1))
        hidden = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", tokens)))
        tokens = tokens + linear(state, f"{block}.mlp.fc2", hidden)
    if f"{side}.norm_mlp.weight" in state:
        hidden = torch.tanh(linear(state, f"{side}.post_mlp.fc1", norm(state, f"{side}.norm_mlp", tokens)))
        tokens = tokens + linear(state, f"{side}.post_mlp.fc2", hidden)
    return tokens.transpose(1, 2).reshape(x.shape)


def expected_codes(state: State, images: Tensor, *, by_direction: bool) -> Tensor:
    """Returns the codes of images in [0, 1]."""
    patches = F.unfold(2 * images - 1, P, stride=P)  # (B, 3 P^2, h w)
    tokens = state["encoder.proj.weight"].flatten(1) @ patches + state["encoder.proj.bias"][:, None]
    features = transform(state, "encoder", tokens.reshape(len(images), W, *(side // P for side in images.shape[2:])))
    latents = linear(
        {"q.weight": state["quant_proj.weight"][:, :, 0, 0], "q.bias": state["quant_proj.bias"]},
        "q",
        features.movedim(1, -1),
    )
    codewords = state["quantize._codebook.embed"]
    if by_direction:
        return (F.normalize(latents, dim=-1) @ F.normalize(codewords, dim=-1).T).argmax(-1)
    return (latents[..., None, :] - codewords).square().sum(-1).argmin(-1)


def expected_images(state: State, codes: Tensor) -> Tensor:
    """Returns the images in [0, 1] of codes (B, h, w)."""
    codewords = state["quantize._codebook.embed"][codes]  # (B, h, w, D)
    start = codewords @ state["post_quant_proj.weight"][:, :, 0, 0].T + state["post_quant_proj.bias"]
    pixels = linear(state, "decoder.out_proj", transform(state, "decoder", start.movedim(-1, 1)).movedim(1, -1))
    B, h, w, _ = pixels.shape
    x = pixels.reshape(B, h, w, 3, P, P).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, h * P, w * P)
    for block in ("decoder.out_conv.0", "decoder.out_conv.1"):
        hidden = F.conv2d(x, state[f"{block}.dwconv.weight"], state[f"{block}.dwconv.bias"], padding=3, groups=3)
        hidden = norm(state, f"{block}.norm", hidden.movedim(1, -1))
        hidden = linear(state, f"{block}.pwconv2", F.gelu(linear(state, f"{block}.pwconv1", hidden)))
        x = x + (state[f"{block}.gamma"] * hidden).movedim(-1, 1)
    return ((x + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("by_direction", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
def test_tokenizer__computes_what_its_authors_do(tmp_path: Path, by_direction: bool, mlp: bool) -> None:
    state = checkpoint(by_direction=by_direction, mlp=mlp)
    torch.save({"model": state, "args": argparse.Namespace(domain="rgb")}, tmp_path / "tokenizer.pth")
    tokenizer = load_tokenizer(f"fourm:{tmp_path}")
    assert (tokenizer.num_codewords, tokenizer.stride, tokenizer.image_size) == (K, P, SIDE)
    assert torch.equal(tokenizer.codebook, state["quantize._codebook.embed"])
    for height, width in ((64, 64), (96, 32)):  # positions are interpolated
        images = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(1))
        codes = tokenizer.encode(images)
        assert torch.equal(codes, expected_codes(state, images, by_direction=by_direction))
        assert len(codes.unique()) > 2
        assert_close(tokenizer.decode(codes), expected_images(state, codes), rtol=1e-3, atol=2e-4)


def test_tokenizer__with_a_diffusion_model_as_decoder_gives_codes_alone(tmp_path: Path) -> None:
    state = checkpoint(decoder=False)
    state["decoder.unet.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors")
    tokenizer = load_tokenizer(f"fourm:{tmp_path / 'model.safetensors'}")
    images = torch.rand(2, 3, 64, 64)
    codes = tokenizer.encode(images)
    assert torch.equal(codes, expected_codes(state, images, by_direction=True))
    with pytest.raises(WeightsError, match="the condition of a diffusion model, not pixels"):
        tokenizer.decode(codes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder.proj.weight": torch.zeros(W, 3, 1, 1)}, "another kind of input .3 channels, patches of 1."),
        ({"encoder.proj.weight": torch.zeros(W, 1, P, P)}, "another kind of input .1 channels"),
        ({"cls_emb.weight": torch.zeros(5, 3)}, "another kind of input .classes."),
        ({"quantize.project_in.weight": torch.zeros(16, 8)}, "several codes a patch"),
        ({"encoder.proj.weight": None}, "no tokenizer of 4M"),
        ({"encoder.blocks.0.attn.proj.bias": None}, "encoder.blocks.0.attn.proj.bias"),
    ],
)
def test_tokenizer__of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Tensor | None], said: str) -> None:
    state = {name: value for name, value in (checkpoint() | changes).items() if value is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=said):
        load_tokenizer(f"fourm:{tmp_path / 'model.safetensors'}")
