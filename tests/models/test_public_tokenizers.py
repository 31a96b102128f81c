"""Checkpoints with the public names and shapes, against the forward pass of the authors written out plainly."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models.tokenizers import load_tokenizer

State = dict[str, Tensor]
MULTIPLES = {"taming": (1, 1, 2, 2, 4), "llamagen": (1, 1, 2, 2, 4), "llamagen-8": (1, 2, 2, 4)}


class Checkpoint:
    """Weights under public names; `decoder_levels` are (name, level from the image) in the order of computation."""

    def __init__(self, layout: str, num_codewords: int, dim: int, width: int = 128) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(0)
        self.taming = layout == "taming"
        widths = [width * multiple for multiple in MULTIPLES[layout]]
        last = len(widths) - 1
        self.encoder_levels, self.decoder_levels = [], []
        self.conv("encoder.conv_in", 3, width, 3)
        here = width
        for level, out in enumerate(widths):
            name = f"encoder.down.{level}" if self.taming else f"encoder.conv_blocks.{level}"
            here = self.level(name, here, out, 2, attention=level == last)
            if level != last:
                self.conv(f"{name}.downsample.conv", here, here, 3)
            self.encoder_levels.append(name)
        self.middle("encoder", here)
        self.norm("encoder.norm_out", here)
        self.conv("encoder.conv_out", here, 256, 3)
        self.conv("quant_conv", 256, dim, 1)
        self.state["quantize.embedding.weight"] = torch.randn(num_codewords, dim, generator=self.generator)
        self.conv("post_quant_conv", dim, 256, 1)
        self.conv("decoder.conv_in", 256, here, 3)
        self.middle("decoder", here)
        for place, level in enumerate(reversed(range(last + 1))):
            name = f"decoder.up.{level}" if self.taming else f"decoder.conv_blocks.{place}"
            here = self.level(name, here, widths[level], 3, attention=level == last)
            if level:
                self.conv(f"{name}.upsample.conv", here, here, 3)
            self.decoder_levels.append(name)
        self.norm("decoder.norm_out", here)
        self.conv("decoder.conv_out", here, 3, 3)

    def conv(self, name: str, inside: int, out: int, side: int) -> None:
        scale = 1 / (inside * side * side) ** 0.5
        self.state[f"{name}.weight"] = scale * torch.randn(out, inside, side, side, generator=self.generator)
        self.state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=self.generator)

    def norm(self, name: str, width: int) -> None:
        self.state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=self.generator)
        self.state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=self.generator)

    def residual(self, name: str, inside: int, out: int) -> None:
        self.norm(f"{name}.norm1", inside)
        self.conv(f"{name}.conv1", inside, out, 3)
        self.norm(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out, 3)
        if inside != out:
            self.conv(f"{name}.nin_shortcut", inside, out, 1)

    def attention(self, name: str, width: int) -> None:
        self.norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", width, width, 1)

    def level(self, name: str, inside: int, out: int, blocks: int, *, attention: bool) -> int:
        for number in range(blocks):
            self.residual(f"{name}.{'block' if self.taming else 'res'}.{number}", inside, out)
            inside = out
            if attention:
                self.attention(f"{name}.attn.{number}", out)
        return out

    def middle(self, side: str, width: int) -> None:
        first, second, third = ("block_1", "attn_1", "block_2") if self.taming else ("0", "1", "2")
        self.residual(f"{side}.mid.{first}", width, width)
        self.attention(f"{side}.mid.{second}", width)
        self.residual(f"{side}.mid.{third}", width, width)

    # -------------------------------------------------------------------------------------------- the forward pass

    def apply_conv(self, x: Tensor, name: str, **kwargs: Any) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **kwargs)

    def apply_norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def apply_residual(self, x: Tensor, name: str) -> Tensor:
        hidden = self.apply_norm(x, f"{name}.norm1")
        hidden = self.apply_conv(hidden * hidden.sigmoid(), f"{name}.conv1", padding=1)
        hidden = self.apply_norm(hidden, f"{name}.norm2")
        hidden = self.apply_conv(hidden * hidden.sigmoid(), f"{name}.conv2", padding=1)
        short = self.apply_conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.state else x
        return short + hidden

    def apply_attention(self, x: Tensor, name: str) -> Tensor:
        normed = self.apply_norm(x, f"{name}.norm")
        q, k, v = (self.apply_conv(normed, f"{name}.{part}").flatten(2) for part in "qkv")  # (B, C, h w)
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, dim=2)
        return x + self.apply_conv(torch.einsum("bij,bcj->bci", weights, v).view_as(x), f"{name}.proj_out")

    def apply_level(self, x: Tensor, name: str, blocks: int) -> Tensor:
        for number in range(blocks):
            x = self.apply_residual(x, f"{name}.{'block' if self.taming else 'res'}.{number}")
            if f"{name}.attn.{number}.q.weight" in self.state:
                x = self.apply_attention(x, f"{name}.attn.{number}")
        return x

    def apply_middle(self, x: Tensor, side: str) -> Tensor:
        first, second, third = ("block_1", "attn_1", "block_2") if self.taming else ("0", "1", "2")
        x = self.apply_residual(x, f"{side}.mid.{first}")
        x = self.apply_attention(x, f"{side}.mid.{second}")
        return self.apply_residual(x, f"{side}.mid.{third}")

    def codebook(self) -> Tensor:
        weight = self.state["quantize.embedding.weight"]
        return weight if self.taming else weight / weight.norm(dim=1, keepdim=True)

    def encode(self, images: Tensor) -> Tensor:
        x = self.apply_conv(2 * images - 1, "encoder.conv_in", padding=1)
        for name in self.encoder_levels:
            x = self.apply_level(x, name, 2)
            if f"{name}.downsample.conv.weight" in self.state:
                x = self.apply_conv(F.pad(x, (0, 1, 0, 1)), f"{name}.downsample.conv", stride=2)
        x = self.apply_norm(self.apply_middle(x, "encoder"), "encoder.norm_out")
        x = self.apply_conv(self.apply_conv(x * x.sigmoid(), "encoder.conv_out", padding=1), "quant_conv")
        z = x.permute(0, 2, 3, 1)
        z = z if self.taming else z / z.norm(dim=-1, keepdim=True)
        return torch.cdist(z.reshape(-1, z.shape[-1]).double(), self.codebook().double()).argmin(1).view(z.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        x = self.apply_conv(self.codebook()[codes].permute(0, 3, 1, 2), "post_quant_conv")
        x = self.apply_middle(self.apply_conv(x, "decoder.conv_in", padding=1), "decoder")
        for name in self.decoder_levels:
            x = self.apply_level(x, name, 3)
            if f"{name}.upsample.conv.weight" in self.state:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.apply_conv(x, f"{name}.upsample.conv", padding=1)
        x = self.apply_norm(x, "decoder.norm_out")
        return ((self.apply_conv(x * x.sigmoid(), "decoder.conv_out", padding=1) + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize(
    ("layout", "num_codewords", "dim", "stride", "millions"),
    [
        ("taming", 1024, 256, 16, 72),
        ("taming", 16384, 256, 16, 76),
        ("llamagen", 16384, 8, 16, 72),  # LlamaGen's table names 72M and 70M parameters
        ("llamagen-8", 16384, 8, 8, 70),
    ],
)
def test_public_checkpoint__computes_what_its_authors_compute(
    layout: str, num_codewords: int, dim: int, stride: int, millions: int, tmp_path: Path
) -> None:
    public = Checkpoint(layout, num_codewords, dim)
    assert round(sum(value.numel() for value in public.state.values()) / 1e6) == millions
    others = {"loss.discriminator.main.0.weight": torch.zeros(2), "quantize.codebook_used": torch.zeros(65536)}
    wrapped = {"state_dict": public.state | others, "epoch": 3, "callbacks": {}}
    if layout != "taming":
        wrapped = {"model": public.state | others, "optimizer": {}, "steps": 3}
    torch.save(wrapped, tmp_path / "last.ckpt")
    kind = layout.partition("-")[0]
    tokenizer = load_tokenizer(f"{kind}:{tmp_path / 'last.ckpt'}")
    images = torch.rand(2, 3, 2 * stride, 3 * stride, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = public.encode(images)
        restored = public.decode(expected)
    codes = tokenizer.encode(images)
    assert torch.equal(codes, expected)
    assert_close(tokenizer.decode(codes), restored, atol=2e-4, rtol=1e-3)
    assert float(restored.std()) > 0.05
    assert (tokenizer.num_codewords, tokenizer.stride, tokenizer.image_size) == (num_codewords, stride, 256)
    assert_close(tokenizer.codebook, public.codebook())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_public_checkpoint__of_a_folder_and_mistakes(tmp_path: Path) -> None:
    public = Checkpoint("taming", 32, 16, width=32)
    file = tmp_path / "one" / "last.ckpt"
    file.parent.mkdir()
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": public.state}, file)
    assert load_tokenizer(f"taming:{file.parent}").num_codewords == 32
    with pytest.raises(WeightsError, match="has the layout of taming: give taming:"):
        load_tokenizer(f"llamagen:{file}")
    with pytest.raises(WeightsError, match="There is no file of weights"):
        load_tokenizer(f"taming:{tmp_path / 'none.ckpt'}")
    with pytest.raises(WeightsError, match="holds no file of weights: give taming:FILE"):
        load_tokenizer(f"taming:{tmp_path / 'empty'}")
    gumbel = {name.replace("quantize.embedding", "quantize.embed"): value for name, value in public.state.items()}
    torch.save({"state_dict": gumbel}, tmp_path / "gumbel.ckpt")
    with pytest.raises(WeightsError, match=r"its quantizer has no 'quantize.embedding.weight'"):
        load_tokenizer(f"taming:{tmp_path / 'gumbel.ckpt'}")
    average = {"model_ema.decay": torch.tensor(0.99), "model_ema.quantizeembeddingweight": torch.ones(32, 16)}
    torch.save({"state_dict": public.state | average}, tmp_path / "ema.ckpt")
    assert torch.equal(load_tokenizer(f"taming:{tmp_path / 'ema.ckpt'}").codebook, torch.ones(32, 16))
    # SimVQ's codewords are those of the file times a matrix.
    torch.save(
        {"state_dict": public.state | {"quantize.embedding_proj.weight": torch.eye(16)}}, tmp_path / "simvq.ckpt"
    )
    with pytest.raises(WeightsError, match=r"1 unknown \(quantize.embedding_proj.weight\)"):
        load_tokenizer(f"taming:{tmp_path / 'simvq.ckpt'}")
    torch.save({"state_dict": {"head.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(WeightsError, match=r"is no VQGAN in the layout of taming: 'encoder.down.0"):
        load_tokenizer(f"taming:{tmp_path / 'other.ckpt'}")
    missing = dict(public.state)
    del missing["decoder.up.1.block.2.conv1.weight"]
    torch.save({"state_dict": missing}, tmp_path / "cut.ckpt")
    with pytest.raises(WeightsError, match=r"1 missing \(decoder.up_blocks.3.resnets.2.conv1.weight\)"):
        load_tokenizer(f"taming:{tmp_path / 'cut.ckpt'}")


def test_public_checkpoint__of_lightning_with_callbacks_of_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """taming's files hold classes of pytorch_lightning as keys, and omegaconf's settings, which are not built."""
    public = Checkpoint("taming", 8, 4, width=32)
    kind = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning_of_then", "__qualname__": "ModelCheckpoint"})
    module: Any = types.ModuleType("pytorch_lightning_of_then")
    module.ModelCheckpoint = kind
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {"state_dict": public.state, "callbacks": {kind: {"best_model_score": torch.tensor(0.5)}}, "epoch": 1}
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert load_tokenizer(f"taming:{tmp_path / 'last.ckpt'}").num_codewords == 8
