"""DALL-E's tokenizer against the published sizes and names, and against its description in slow NumPy."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import read_weights
from pecobook.models.dalle import DalleTokenizer


def small() -> DalleTokenizer:
    torch.manual_seed(0)
    tokenizer = DalleTokenizer(width=8, num_codewords=32, embedding_dim=6).eval()
    for parameter in tokenizer.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return tokenizer.requires_grad_(False)


def pictures(height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_parameters__are_those_of_the_paper() -> None:
    """Table 2 of PeCo counts 53.8M, the encoder's."""
    with torch.device("meta"):
        tokenizer = DalleTokenizer()
    assert sum(p.numel() for p in tokenizer.encoder.parameters()) == 53_786_240
    shapes = {name: tuple(p.shape) for name, p in tokenizer.encoder.named_parameters()}
    assert shapes["blocks.input.w"] == (256, 3, 7, 7)
    assert shapes["blocks.group_4.block_1.id_path.w"] == (2048, 1024, 1, 1)
    assert shapes["blocks.group_4.block_2.res_path.conv_1.w"] == (512, 2048, 3, 3)
    assert shapes["blocks.group_4.block_2.res_path.conv_4.w"] == (2048, 512, 1, 1)
    assert shapes["blocks.output.conv.b"] == (8192,)
    assert "blocks.group_1.block_1.id_path.w" not in shapes  # equal widths: the identity
    shapes = {name: tuple(p.shape) for name, p in tokenizer.decoder.named_parameters()}
    assert shapes["blocks.input.w"] == (128, 8192, 1, 1)
    assert shapes["blocks.group_1.block_1.res_path.conv_1.w"] == (512, 128, 1, 1)
    assert shapes["blocks.group_4.block_2.res_path.conv_4.w"] == (256, 64, 3, 3)
    assert shapes["blocks.output.conv.w"] == (6, 256, 1, 1)
    assert tokenizer.codebook.shape == (8192, 128)


def test_encode__of_112_pixels_gives_14_by_14() -> None:
    tokenizer = small()
    codes = tokenizer.encode(torch.rand(1, 3, 112, 112))
    assert codes.shape == (1, 14, 14)
    assert codes.dtype == torch.int64
    assert tokenizer.decode(codes).shape == (1, 3, 112, 112)
    with pytest.raises(ValueError, match="multiples of 8 pixels, not 12 x 16"):
        tokenizer.encode(torch.rand(1, 3, 12, 16))


# ------------------------------------------------------------------------------------------------- in slow NumPy


def convolve(x: Any, state: dict[str, Tensor], name: str) -> Any:
    w, b = (state[f"{name}.{part}"].double().numpy() for part in ("w", "b"))
    side = w.shape[-1]
    padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2))
    out = np.zeros((w.shape[0], *x.shape[1:]))
    for i in range(side):
        for j in range(side):
            out += np.tensordot(w[:, :, i, j], padded[:, i : i + x.shape[1], j : j + x.shape[2]], 1)
    return out + b[:, None, None]


def block(x: Any, state: dict[str, Tensor], name: str) -> Any:
    hidden = x
    for number in range(1, 5):
        hidden = convolve(np.maximum(hidden, 0), state, f"{name}.res_path.conv_{number}")
    skip = convolve(x, state, f"{name}.id_path") if f"{name}.id_path.w" in state else x
    return skip + hidden / 64


def groups(x: Any, state: dict[str, Tensor], *, down: bool) -> Any:
    for group in range(1, 5):
        for number in (1, 2):
            x = block(x, state, f"blocks.group_{group}.block_{number}")
        if group < 4 and down:
            C, H, W = x.shape
            x = x.reshape(C, H // 2, 2, W // 2, 2).max((2, 4))
        elif group < 4:
            x = x.repeat(2, 1).repeat(2, 2)
    return convolve(np.maximum(x, 0), state, "blocks.output.conv")


def test_logits__are_the_description() -> None:
    tokenizer, images = small(), pictures()
    state = tokenizer.encoder.state_dict()
    slow = np.stack(
        [
            groups(convolve(0.8 * image + 0.1, state, "blocks.input"), state, down=True)
            for image in images.double().numpy()
        ]
    )
    assert_close(tokenizer.logits(images).double(), torch.from_numpy(slow), atol=1e-4, rtol=1e-4)
    assert tokenizer.encode(images).tolist() == slow.argmax(1).tolist()


def test_decode__is_the_description() -> None:
    tokenizer = small()
    codes = torch.randint(32, (2, 2, 3), generator=torch.Generator().manual_seed(2))
    state = tokenizer.decoder.state_dict()
    for image, grid in zip(tokenizer.decode(codes), codes.numpy(), strict=True):
        one_hot = np.eye(32)[grid].transpose(2, 0, 1)
        six = groups(convolve(one_hot, state, "blocks.input"), state, down=False)
        mean = 1 / (1 + np.exp(-six[:3]))
        assert_close(image.double(), torch.from_numpy(((mean - 0.1) / 0.8).clip(0, 1)), atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_from_pretrained__reads_plain_state_dicts(tmp_path: Path, suffix: str) -> None:
    tokenizer = small()
    for part in ("encoder", "decoder"):
        state = getattr(tokenizer, part).state_dict()
        if suffix == "pt":
            torch.save(state, tmp_path / f"{part}.pt")
        else:
            from safetensors.torch import save_file

            save_file(state, tmp_path / f"{part}.safetensors")
    again = DalleTokenizer.from_pretrained(tmp_path)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    codes = tokenizer.encode(pictures())
    assert torch.equal(again.encode(pictures()), codes)
    assert_close(again.decode(codes), tokenizer.decode(codes))


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.proof,)


def test_from_pretrained__never_unpickles_the_public_files(tmp_path: Path) -> None:
    proof = tmp_path / "code ran"
    for part in ("encoder", "decoder"):
        (tmp_path / f"{part}.pkl").write_bytes(pickle.dumps(Evil(proof)))
    for suffix in ("pkl", "pt"):
        for file in list(tmp_path.iterdir()):
            file.rename(file.with_suffix(f".{suffix}"))
        with pytest.raises(WeightsError, match="pecobook runs no code from a file"):
            DalleTokenizer.from_pretrained(tmp_path)
    assert not proof.exists()
    with pytest.raises(WeightsError, match=r"contains no encoder\.pkl .*\n.*cdn.openai.com/dall-e/encoder.pkl"):
        DalleTokenizer.from_pretrained(tmp_path / "nothing")


def test_from_pretrained__takes_the_weights_of_pickled_modules(tmp_path: Path) -> None:
    tokenizer = DalleTokenizer(width=8, num_codewords=32, embedding_dim=8).eval()
    tokenizer.encoder.__dict__["device"] = torch.device("cpu")  # the public modules hold such values too
    for part in ("encoder", "decoder"):
        torch.save(getattr(tokenizer, part), tmp_path / f"{part}.pkl")
    read = DalleTokenizer.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read.encode(images), tokenizer.encode(images))
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)
    torch.save({"model": tokenizer.encoder, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert read_weights(str(tmp_path / "checkpoint.pth")).keys() == tokenizer.encoder.state_dict().keys()


def test_from_pretrained__refuses_other_weights(tmp_path: Path) -> None:
    for part in ("encoder", "decoder"):
        torch.save({"conv.weight": torch.zeros(1)}, tmp_path / f"{part}.pt")
    with pytest.raises(WeightsError, match=r"no weights of DALL-E's tokenizer: 'blocks.output.conv.w' is missing"):
        DalleTokenizer.from_pretrained(tmp_path)
    tokenizer = small()
    state = tokenizer.encoder.state_dict()
    del state["blocks.group_2.block_1.id_path.b"]
    torch.save(state, tmp_path / "encoder.pt")
    torch.save(tokenizer.decoder.state_dict(), tmp_path / "decoder.pt")
    with pytest.raises(WeightsError, match=r"1 missing \(blocks.group_2.block_1.id_path.b\)"):
        DalleTokenizer.from_pretrained(tmp_path)
