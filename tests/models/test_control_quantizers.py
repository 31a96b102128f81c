"""The control quantizers against vector-quantize-pytorch, and against plain versions with N x K matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import ConfigError
from pecobook.models import control_quantizers
from pecobook.models.control_quantizers import (
    ControlQuantizer,
    SimVQ,
    build_quantizer,
    sign_entropies,
)
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.models.tokenizers import load_tokenizer
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig, VectorQuantizerConfig
from tests.distributed import TwoProcesses
from tests.models.quantizing import latents, rows

KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "fsq": ({"kind": "fsq", "levels": (8, 5, 5), "num_codewords": 200}, 3),
    "lfq": ({"kind": "lfq", "num_codewords": 64}, 6),
    "simvq": ({"kind": "simvq", "num_codewords": 50}, 6),
    "ibq": ({"kind": "ibq", "num_codewords": 50}, 6),
}


def make(kind: str, **more: Any) -> ControlQuantizer:
    settings, dim = KINDS[kind]
    torch.manual_seed(0)
    quantizer = build_quantizer(VectorQuantizerConfig(**{**settings, **more}), dim)
    assert isinstance(quantizer, ControlQuantizer)
    return quantizer


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of, retain_graph=True)


# ------------------------------------------------------------------------------------------------------------- oracles


def test_fsq__is_that_of_vector_quantize_pytorch() -> None:
    from vector_quantize_pytorch import FSQ

    ours, theirs = make("fsq"), FSQ([8, 5, 5])
    z = (3 * latents(2, 3, 4, 0)).requires_grad_()
    out = ours(z)
    quantized, codes = theirs(z)
    assert torch.equal(out.codes, codes.long())
    assert_close(out.quantized, quantized)
    assert_close(ours.codebook, theirs.implicit_codebook.float())
    weight = torch.randn(quantized.shape)
    assert_close(*gradients((out.quantized * weight).sum(), z), *gradients((quantized * weight).sum(), z))
    assert float(out.commitment_loss) == float(out.codebook_loss) == 0
    # Each code's codeword lies at the levels -4/4..3/4 and -2/2..2/2.
    assert sorted(set(ours.codebook[:, 0].tolist())) == [i / 4 for i in range(-4, 4)]
    assert sorted(set(ours.codebook[:, 1].tolist())) == [i / 2 for i in range(-2, 3)]


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_lfq__is_that_of_vector_quantize_pytorch(temperature: float) -> None:
    from vector_quantize_pytorch import LFQ

    ours = make("lfq", entropy_temperature=temperature, entropy_weight=0.1)
    theirs = LFQ(dim=6, codebook_size=64, entropy_loss_weight=0.1, commitment_loss_weight=0.25)
    z = (0.3 * latents(2, 6, 4, 1)).requires_grad_()
    out = ours(z)
    quantized, codes, loss = theirs(z, inv_temperature=1 / temperature)
    assert torch.equal(out.codes, codes.long())
    assert_close(out.quantized, quantized)
    assert torch.equal(ours.codebook, theirs.codebook)
    own = out.codebook_loss + 0.25 * out.commitment_loss
    assert_close(own, loss, atol=1e-5, rtol=1e-4)
    # They clamp probabilities at 1e-5 before the logarithm.
    assert_close(*gradients(own, z), *gradients(loss, z), atol=1e-4, rtol=1e-3)


def test_sign_entropies__are_those_of_the_softmax_over_all_codewords() -> None:
    z = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codewords = torch.tensor([[1.0 if code >> bit & 1 else -1.0 for bit in (4, 3, 2, 1, 0)] for code in range(32)])
    p = (2 * z @ codewords.double().T).softmax(1)
    expected = -(p * p.log()).sum(1).mean(), -(p.mean(0) * p.mean(0).log()).sum()
    assert_close(sign_entropies(z), expected)


def test_simvq__is_that_of_vector_quantize_pytorch() -> None:
    from vector_quantize_pytorch import SimVQ as Theirs

    ours = make("simvq")
    assert isinstance(ours, SimVQ)
    linear = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        linear.weight.copy_(ours.transform)
    theirs = Theirs(6, 50, codebook_transform=linear, channel_first=True, rotation_trick=False)
    theirs.frozen_codebook.copy_(ours.frozen)
    z = latents(2, 6, 4, 2).requires_grad_()
    out = ours(z)
    quantized, codes, loss = theirs(z)
    assert torch.equal(out.codes, codes)
    assert_close(out.quantized, quantized)
    own = out.codebook_loss + 0.25 * out.commitment_loss
    assert_close(own, loss)
    for mine, other in zip(gradients(own, z, ours.transform), gradients(loss, z, linear.weight), strict=True):
        assert_close(mine, other)
    assert_close(ours.lookup(out.codes), rows_to_map(ours.codebook[out.codes]))


def rows_to_map(codewords: Tensor) -> Tensor:
    return codewords.permute(0, 3, 1, 2)


def authors_ibq(z: Tensor, codebook: Tensor, temperature: float, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The published computation with N x K matrices: quantised map, codes, and the losses without commitment."""
    logits = torch.einsum("bdhw,nd->bnhw", z, codebook)
    soft = logits.softmax(1)
    codes = soft.argmax(1)
    hard = F.one_hot(codes, len(codebook)).permute(0, 3, 1, 2).to(soft)
    quantized = torch.einsum("bnhw,nd->bdhw", hard - soft.detach() + soft, codebook)
    chosen = torch.einsum("bnhw,nd->bdhw", hard, codebook)
    flat = logits.permute(0, 2, 3, 1).flatten(0, 2) / temperature
    probabilities, logs = flat.softmax(1), flat.log_softmax(1)
    mean = probabilities.mean(0)
    entropy = -(probabilities * logs).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    loss = (quantized - z).square().mean() + 0.25 * (chosen - z.detach()).square().mean()
    return quantized, codes, loss + weight * entropy


@pytest.mark.parametrize("tile", [50, 7 * 50, 10**9])
@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_ibq__is_the_published_computation_in_tiles(weight: float, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_quantizers, "_TILE_ELEMENTS", tile)
    ours = make("ibq", entropy_weight=weight, entropy_temperature=0.3)
    z = latents(2, 6, 4, 3).requires_grad_()
    out = ours(z)
    quantized, codes, loss = authors_ibq(z, ours.codebook, 0.3, weight)
    assert torch.equal(out.codes, codes)
    assert torch.equal(ours.encode(z), codes)
    assert_close(out.quantized, quantized)
    assert_close(out.codebook_loss, loss)
    assert_close(out.commitment_loss, (z - ours.codebook[codes].permute(0, 3, 1, 2)).square().mean())
    image = torch.randn(quantized.shape)
    mine = gradients((out.quantized * image).sum() + out.codebook_loss, z, ours.codebook)
    theirs = gradients((quantized * image).sum() + loss, z, ours.codebook)
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert int((mine[1].abs().sum(1) > 0).sum()) == 50  # the gradient reaches all codewords


# ----------------------------------------------------------------------------------------------------------- interface


@pytest.mark.parametrize("kind", KINDS)
def test_control__codes_choose_the_codewords(kind: str) -> None:
    quantizer = make(kind).eval()
    z = latents(2, KINDS[kind][1], 4, 4)
    out = quantizer(z)
    assert torch.equal(quantizer.encode(z), out.codes)
    assert_close(quantizer.lookup(out.codes), out.quantized)
    assert torch.equal(quantizer.nearest(z), quantizer.lookup(out.codes))
    assert_close(quantizer.codebook[out.codes.flatten()], rows(out.quantized))
    assert len(quantizer.codebook) == quantizer.num_codewords


@pytest.mark.parametrize("kind", KINDS)
def test_control__counts_use_and_starts_after_the_unquantised_steps(kind: str) -> None:
    quantizer, dim = make(kind, start_after=2, decay=0.5), KINDS[kind][1]
    for seed in range(2):
        z = latents(1, dim, 2, seed).requires_grad_()
        out = quantizer(z)
        assert torch.equal(out.quantized, z)
        for parameter in quantizer.parameters():
            assert torch.equal(torch.autograd.grad(out.codebook_loss, parameter, retain_graph=True)[0], 0 * parameter)
        quantizer.update()
    codes = [quantizer(latents(1, dim, 2, seed)).codes.flatten() for seed in (5, 6)]  # two micro-batches
    quantizer.update()
    counts = torch.bincount(torch.cat(codes), minlength=quantizer.num_codewords)
    assert torch.equal(quantizer.usage, 0.5 * counts)
    assert torch.equal(quantizer.unused, (counts == 0).long())
    assert int(quantizer.num_updates) == 3
    again = make(kind, start_after=2)
    again.load_state_dict(quantizer.state_dict())
    z = latents(1, dim, 2, 9)
    assert torch.equal(again(z).codes, quantizer(z).codes)


def run_rank(rank: int, world_size: int) -> dict[str, Tensor]:
    quantizer = make("simvq")
    z = latents(4, 6, 4, 7)
    share = len(z) // world_size
    quantizer(z[rank * share : (rank + 1) * share])
    quantizer.update()
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def test_two_processes__count_as_one(two_processes: TwoProcesses) -> None:
    whole = run_rank(0, 1)
    for state in two_processes.run(run_rank):
        assert all(torch.equal(value, whole[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "fsq"}, "levels needs numbers of 3 or more whose product"),
        ({"kind": "fsq", "levels": (8, 5), "num_codewords": 41}, "product is --quantizer.num-codewords 41, not 8 5"),
        ({"kind": "fsq", "levels": (2, 5), "num_codewords": 10}, "numbers of 3 or more"),
        ({"levels": (8, 5)}, "levels is for --quantizer.kind fsq alone"),
        ({"kind": "lfq", "num_codewords": 100}, "must be a power of 2 for lfq, not 100"),
        ({"kind": "ibq", "normalise": True}, "ibq has no --quantizer.normalise"),
        ({"kind": "lfq", "entropy_temperature": 0.0}, "entropy-temperature"),
    ],
)
def test_settings__that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VectorQuantizerConfig(**settings)


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer__of_each_kind_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    settings, dim = KINDS[kind]
    model = AutoencoderConfig(channels=(8, 16), latent_dim=dim, num_blocks=1)
    config = TokenizerConfig(
        model=model,
        num_codewords=settings["num_codewords"],
        quantizer=settings["kind"],
        levels=settings.get("levels", ()),
        image_size=16,
    )
    tokenizer = PerceptualTokenizer(config, make(kind, decay=0.9, entropy_weight=0.3)).eval()
    tokenizer.save_pretrained(tmp_path / "export")
    again = load_tokenizer(tmp_path / "export")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.encode(images)
    assert torch.equal(again.encode(images), codes)
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))
    assert_close(again.codebook, tokenizer.codebook)
    assert again.num_codewords == settings["num_codewords"]
    with torch.no_grad():
        assert_close(again.quantizer(again.encode_latents(images)).codes, codes)
