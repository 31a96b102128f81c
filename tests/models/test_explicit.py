"""Table 6's losses on codewords, against losses computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.models.contrastive import contrastive_loss
from pecobook.models.explicit import CodewordClassifier, CodewordContrast
from pecobook.models.quantizer import VectorQuantizer
from pecobook.settings.codebook import ExplicitConfig


def latents(seed: int, count: int = 6, dim: int = 4) -> Tensor:
    return torch.randn(count, dim, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_classifier__is_cross_entropy_of_averaged_codewords() -> None:
    torch.manual_seed(0)
    classifier, quantized, labels = CodewordClassifier(4, 3), latents(0), torch.tensor([0, 1, 2, 2, 1, 0])
    loss, accuracy = classifier.loss(quantized.requires_grad_(), labels)
    weight, bias = classifier.weight.detach().double().numpy(), classifier.bias.detach().double().numpy()
    total, right = 0.0, 0
    for image, label in zip(quantized.detach().double().numpy(), labels.tolist(), strict=True):
        logits = weight @ image.mean((1, 2)) + bias
        total -= logits[label] - np.log(np.exp(logits).sum())
        right += int(logits.argmax() == label)
    assert float(loss) == pytest.approx(total / 6, rel=1e-5)
    assert float(accuracy) == pytest.approx(right / 6)
    (gradient,) = torch.autograd.grad(loss, quantized)
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


def contrast() -> tuple[nn.Module, VectorQuantizer, CodewordContrast]:
    torch.manual_seed(0)
    encoder, quantizer = nn.Conv2d(3, 4, 4, stride=4), VectorQuantizer(8, 4)
    return (
        encoder,
        quantizer.eval(),
        CodewordContrast(encoder, 4, ExplicitConfig(hidden_dim=16, output_dim=5, momentum=0.8)),
    )


def test_contrast__compares_codewords_with_those_of_the_other_view() -> None:
    encoder, quantizer, head = contrast()
    images, other = (torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    coded = quantizer(encoder(images))
    loss, accuracy = head.loss(coded.quantized, head.keys(other, quantizer))
    queries = head.predictor(head.projector(coded.quantized.mean((2, 3))))
    keys = head.projector(quantizer(encoder(other)).quantized.mean((2, 3)))  # the copies are still equal
    expected, hits = contrastive_loss(queries, keys, 0.2)
    assert_close(loss, expected)
    assert_close(accuracy, hits)


def test_contrast__teaches_the_encoder_and_not_its_copy() -> None:
    encoder, quantizer, head = contrast()
    keys = head.keys(torch.rand(6, 3, 8, 8), quantizer)
    loss, _ = head.loss(quantizer(encoder(torch.rand(6, 3, 8, 8))).quantized, keys)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in encoder.parameters())
    copies = [*head.momentum_encoder.parameters(), *head.momentum_projector.parameters()]
    assert copies
    assert all(p.grad is None and not p.requires_grad for p in copies)


def test_contrast__after_step_moves_the_copies() -> None:
    encoder, _, head = contrast()
    before = [p.detach().clone() for p in encoder.parameters()]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    head.after_step(encoder)
    for copy, old in zip(head.momentum_encoder.parameters(), before, strict=True):
        assert_close(copy, old + 0.2)
