"""Tokenizers of others behind our interface, and all of them for other runtimes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import PecobookError, WeightsError
from pecobook.models.dalle import DalleTokenizer
from pecobook.models.onnx import _batch_norm, export_onnx
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.models.tokenizers import DiffusersTokenizer, GreyTokenizer, load_tokenizer
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig

CNN = AutoencoderConfig(channels=(8, 16, 16), latent_dim=8, num_blocks=1)
VIT = AutoencoderConfig(kind="vit", channels=(16, 4), num_heads=2, num_blocks=1, latent_dim=8)


def pictures(height: int = 16, width: int = 24, channels: int = 3) -> Tensor:
    return torch.rand(3, channels, height, width, generator=torch.Generator().manual_seed(1))


def perceptual_tokenizer(model: AutoencoderConfig = CNN) -> PerceptualTokenizer:
    torch.manual_seed(0)
    return PerceptualTokenizer(TokenizerConfig(model=model, num_codewords=32, image_size=16)).eval()


def vq_model(**more: Any) -> Any:
    from diffusers import VQModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "latent_channels": 5,
        "num_vq_embeddings": 32,
        "vq_embed_dim": 6,
        "sample_size": 16,
    }
    model = VQModel(**settings, **more).eval()
    nn.init.normal_(model.quantize.embedding.weight)
    return model


def all_tokenizers() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "ours": perceptual_tokenizer(),
        "ours, ViT": perceptual_tokenizer(VIT),
        "ours, grey": GreyTokenizer(perceptual_tokenizer(replace(CNN, in_channels=1))).eval(),
        "dalle": DalleTokenizer(width=8, num_codewords=32, embedding_dim=6).eval(),
        "diffusers": DiffusersTokenizer(vq_model()).eval(),
    }


@pytest.mark.parametrize("name", list(all_tokenizers()))
def test_interface__is_one(name: str) -> None:
    tokenizer = all_tokenizers()[name]
    f = tokenizer.stride
    codes = tokenizer.encode(pictures())
    assert codes.shape == (3, 16 // f, 24 // f)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < tokenizer.num_codewords == len(tokenizer.codebook) == 32
    images = tokenizer.decode(codes)
    assert images.shape == (3, 3, 16, 24)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert tokenizer.image_size > 0
    assert torch.equal(tokenizer.encode(pictures()[1:]), codes[1:])
    assert torch.equal(tokenizer.encode(pictures(), batch_size=2), codes)
    assert_close(tokenizer.decode(codes, batch_size=2), images)
    with pytest.raises(ValueError, match=f"multiples of {f} pixels"):
        tokenizer.encode(torch.rand(1, 3, 16, 17))


# ------------------------------------------------------------------------------------------------------ diffusers


def test_diffusers__codes_and_images_are_the_models_own() -> None:
    model = vq_model()
    tokenizer, images = DiffusersTokenizer(model), pictures()
    with torch.no_grad():
        latents = model.encode(images * 2 - 1).latents
        quantized, _, (_, _, codes) = model.quantize(latents)
        restored = model.decode(latents).sample
    assert torch.equal(tokenizer.encode(images).flatten(), codes)
    assert_close(tokenizer.decode(codes.view(3, 4, 6)), ((restored + 1) / 2).clamp(0, 1), atol=1e-5, rtol=1e-4)
    assert_close(tokenizer.codebook[tokenizer.encode(images)].permute(0, 3, 1, 2), quantized)


def test_diffusers__amused_reads_and_draws_images_from_0_to_1() -> None:
    """diffusers' pipeline of aMUSEd normalises no image; its model looks codewords up."""
    model = vq_model(lookup_from_codebook=True, mid_block_add_attention=False)
    tokenizer, images = DiffusersTokenizer(model), pictures()
    with torch.no_grad():
        codes = model.quantize(model.encode(images).latents)[2][2].view(3, 4, 6)
        restored = model.decode(codes, force_not_quantize=True, shape=(3, 4, 6, 6)).sample
    assert torch.equal(tokenizer.encode(images), codes)
    assert_close(tokenizer.decode(codes), restored.clamp(0, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("subfolder", ["", "vqvae"])
def test_diffusers__is_loaded_from_its_folder(tmp_path: Path, subfolder: str) -> None:
    model = vq_model()
    model.save_pretrained(tmp_path / subfolder)
    tokenizer = load_tokenizer(f"diffusers:{tmp_path}")
    assert torch.equal(tokenizer.encode(pictures()), DiffusersTokenizer(model).encode(pictures()))
    assert not any(p.requires_grad for p in tokenizer.parameters())


def test_diffusers__that_is_missing_or_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="diffusers finds no VQModel at"):
        load_tokenizer(f"diffusers:{tmp_path}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(WeightsError, match=r"pip install 'pecobook\[diffusers\]'"):
        load_tokenizer(f"diffusers:{tmp_path}")


def test_load_tokenizer__refuses_channels_that_no_image_has(tmp_path: Path) -> None:
    perceptual_tokenizer(replace(CNN, in_channels=5)).save_pretrained(tmp_path / "five")
    with pytest.raises(WeightsError, match="has 5 channels"):
        load_tokenizer(tmp_path / "five")


def test_load_tokenizer__by_kind(tmp_path: Path) -> None:
    tokenizer = perceptual_tokenizer()
    tokenizer.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_tokenizer(tmp_path / "ours").encode(pictures()), tokenizer.encode(pictures()))
    grey = perceptual_tokenizer(replace(CNN, in_channels=1))
    grey.save_pretrained(tmp_path / "grey")
    red, green, blue = pictures().unbind(1)
    luma = (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]
    assert torch.equal(load_tokenizer(tmp_path / "grey").encode(pictures()), grey.encode(luma))
    dalle = DalleTokenizer(width=8, num_codewords=32, embedding_dim=6)
    (tmp_path / "dalle").mkdir()
    for part in ("encoder", "decoder"):
        torch.save(getattr(dalle, part).state_dict(), tmp_path / "dalle" / f"{part}.pt")
    assert torch.equal(load_tokenizer(f"dalle:{tmp_path / 'dalle'}").encode(pictures()), dalle.encode(pictures()))


# ------------------------------------------------------------------------------------------------------- batches


def test_encode__in_batches_is_encode_at_once() -> None:
    tokenizer, images = perceptual_tokenizer(), pictures()
    codes = tokenizer.encode(images, batch_size=2)
    assert torch.equal(codes, tokenizer.encode(images))
    assert_close(tokenizer.decode(codes, batch_size=1), tokenizer.decode(codes))
    assert tokenizer.encode(images[:0]).shape == (0, 4, 6)


def test_encode__refuses_other_channels() -> None:
    with pytest.raises(ValueError, match="must have 3 channels, not 1"):
        perceptual_tokenizer().encode(pictures(channels=1))


@pytest.mark.gpu
def test_encode__reads_images_from_the_host() -> None:
    tokenizer = perceptual_tokenizer()
    codes = tokenizer.encode(pictures())
    gpu_codes = tokenizer.cuda().encode(pictures())
    assert gpu_codes.device.type == "cpu"
    assert (gpu_codes == codes).float().mean() > 0.99


# ------------------------------------------------------------------------------------------------- other runtimes


# A grey tokenizer, and diffusers' model, run what the others run; an export takes ten seconds and more.
_LIKE_OTHERS = "ours, grey", "diffusers"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in _LIKE_OTHERS else ()) for name in all_tokenizers()]
)
def test_export_onnx__computes_the_same_at_any_size(name: str, tmp_path: Path) -> None:
    import onnxruntime

    tokenizer = all_tokenizers()[name]
    encoder, decoder = (onnxruntime.InferenceSession(str(path)) for path in export_onnx(tokenizer, tmp_path / "onnx"))
    assert sorted(path.name for path in (tmp_path / "onnx").glob("*.onnx")) == ["decoder.onnx", "encoder.onnx"]
    f = tokenizer.stride
    for count, rows, columns in ((1, 2, 3), (3, 4, 2)):
        images = torch.rand(count, 3, rows * f, columns * f)
        (codes,) = encoder.run(None, {"images": images.numpy()})
        assert codes.dtype == np.int64
        assert codes.tolist() == tokenizer.encode(images).tolist()
        (restored,) = decoder.run(None, {"codes": codes})
        assert_close(torch.from_numpy(restored), tokenizer.decode(torch.from_numpy(codes)), atol=1e-4, rtol=1e-3)


def test_export_onnx__says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(PecobookError, match=r"pip install 'pecobook\[onnx\]'"):
        perceptual_tokenizer().export_onnx(tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_encode__compiles_in_one_graph() -> None:
    tokenizer = perceptual_tokenizer()
    compiled = torch.compile(tokenizer.encode, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pictures()), tokenizer.encode(pictures()))
    again = torch.compile(tokenizer.decode, backend="eager", fullgraph=True)
    codes = tokenizer.encode(pictures())
    assert_close(again(codes), tokenizer.decode(codes))


def test_batch_norm__for_the_exporter_of_pytorch_2_6_equals_pytorchs() -> None:
    norm = torch.nn.BatchNorm2d(5).eval()
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 2.0)  # type: ignore[arg-type]
    x = torch.randn(2, 5, 3, 4)
    expected = norm(x)
    with mock.patch("torch.nn.functional.batch_norm", _batch_norm):
        assert_close(norm(x), expected)
