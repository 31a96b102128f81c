"""Reconstruction and masked prediction with models whose correct output is known."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from pecobook.analysis.reconstruction import decode_all, encode_all, hide, predict_masked, psnr, ssim

from .fakes import GreyTokenizer, Oracle


def test_psnr_against_scikit_image_and_closed_form() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    x, y = torch.rand(4, 3, 9, 9), torch.rand(4, 3, 9, 9)
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.0) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(psnr(x, y).numpy(), expected, rtol=1e-5)
    assert float(psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1))) == pytest.approx(20)
    assert math.isinf(float(psnr(x, x)[0]))
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(x, y[:1])


@pytest.mark.parametrize("shape", [(5, 3, 12, 30), (2, 1, 6, 11), (1, 3, 64, 64)])
def test_psnr_and_ssim__are_those_of_torchmetrics(shape: tuple[int, ...]) -> None:
    import torchmetrics.functional.image as library

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator)
    for noise in (0.0, 0.01, 1.0):
        y = (x + noise * torch.randn(shape, generator=generator)).clamp(0, 1)
        expected = library.peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))
        torch.testing.assert_close(psnr(x, y), expected)
        alike = library.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
        assert isinstance(alike, torch.Tensor)
        torch.testing.assert_close(ssim(x, y), alike.reshape(len(x)), rtol=1e-4, atol=1e-5)


def test_psnr_and_ssim__hold_64_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(2, 70, 3, 12, 12)
    sizes: list[int] = []
    original = torch.split

    def split(value: torch.Tensor, size: int) -> Any:
        sizes.append(size)
        return original(value, size)

    monkeypatch.setattr(torch, "split", split)
    for measure in (psnr, ssim):
        each = torch.cat([measure(a[None], b[None]) for a, b in zip(x, y, strict=True)])
        torch.testing.assert_close(measure(x, y), each)
    assert set(sizes) == {64}


def test_reconstruct_goes_through_codes_in_batches_in_evaluation_mode() -> None:
    tokenizer = GreyTokenizer().train()
    images = torch.rand(7, 3, 16, 16)
    codes = encode_all(tokenizer, images, batch_size=3)
    assert codes.shape == (7, 4, 4)
    again = decode_all(tokenizer, encode_all(tokenizer, images, batch_size=3), batch_size=3)
    torch.testing.assert_close(again, tokenizer.decode(codes))
    torch.testing.assert_close(encode_all(tokenizer, again), codes)
    again.add_(1)  # an ordinary tensor, not one of inference mode
    assert tokenizer.training
    assert not any(tokenizer.modes)


@pytest.mark.parametrize(("shift", "accuracy"), [(0, 100.0), (3, 0.0)])
def test_predict_masked_keeps_visible_codes(shift: int, accuracy: float) -> None:
    tokenizer = GreyTokenizer()
    images = torch.rand(3, 3, 16, 16)
    mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    codes, measured = predict_masked(Oracle(tokenizer, shift), tokenizer, images, mask)
    target = tokenizer.encode(images)
    torch.testing.assert_close(codes[~mask], target[~mask])
    torch.testing.assert_close(codes[mask], (target[mask] + shift) % 8)
    assert measured == accuracy


def test_masked_prediction_edges() -> None:
    tokenizer = GreyTokenizer()
    images = torch.rand(1, 3, 16, 16)
    _, accuracy = predict_masked(Oracle(tokenizer), tokenizer, images, torch.zeros(1, 4, 4, dtype=torch.bool))
    assert math.isnan(accuracy)
    with pytest.raises(ValueError, match="does not fit"):
        predict_masked(Oracle(tokenizer), tokenizer, images, torch.ones(1, 2, 2, dtype=torch.bool))


def test_hide_paints_masked_patches_only() -> None:
    images = torch.rand(1, 3, 8, 8)
    mask = torch.tensor([[[True, False], [False, False]]])
    shown = hide(images, mask)
    assert (shown[0, :, :4, :4] == 0.5).all()
    torch.testing.assert_close(shown[0, :, 4:], images[0, :, 4:])
    torch.testing.assert_close(shown[0, :, :, 4:], images[0, :, :, 4:])


def test_ssim_against_scikit_image() -> None:
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 40, 48, generator=generator)
    y = (x + 0.2 * torch.rand(2, 3, 40, 48, generator=generator)).clamp(0, 1)
    expected = [
        structural_similarity(
            a.numpy(),
            b.numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y).numpy(), expected, atol=0.01)  # their borders differ
    assert float(ssim(x, x)[0]) == pytest.approx(1)
    assert ssim(x[:1], y[:1]).shape == (1,)
