"""Codebook collapse: the usage that a run logs, and when it warns."""

from __future__ import annotations

import pytest
import torch

from pecobook.settings.tokenizer import QuantizerConfig
from tests.stages.test_codebook import make


def test_health__perplexity_of_a_given_usage() -> None:
    stage = make()
    quantizer = stage.tokenizer.quantizer
    quantizer.usage[:8] = 5.0
    quantizer.unused[:3] = 1000
    health = stage.health()
    assert float(health["perplexity"]) == pytest.approx(8.0, rel=1e-4)
    assert float(health["codes_alive"]) == 24 - 3
    assert float(health["codes_dead"]) == 3


@pytest.mark.parametrize("revive_after", [20, 100])
@pytest.mark.parametrize("num_points", [1, 3])
@pytest.mark.parametrize(("noise", "drift"), [(0.0, 0.0), (0.0, 1e-4), (1e-6, 1e-4), (1e-3, 0.0)])
def test_warning__revival_does_not_hide_a_collapse(
    revive_after: int, num_points: int, noise: float, drift: float
) -> None:
    """All vectors lie near a few points, so it is arbitrary which of the codewords revived there is nearest."""
    stage = make(quantizer=QuantizerConfig(num_codewords=128, revive_after=revive_after))
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, stage.config.model.latent_dim, generator=generator)
    for step in range(260):
        vectors = points[torch.arange(64).add(step) % num_points] + drift * step  # (64, D)
        vectors += noise * torch.randn(vectors.shape, generator=generator)
        stage.tokenizer.quantizer(vectors.T.reshape(1, -1, 8, 8))
        stage.tokenizer.quantizer.update()
    health = {name: float(value) for name, value in stage.health().items()}
    assert health["revived"] > 100
    assert "are in use" in (stage.warning(health, 260) or "")


def test_warning__copies_of_few_codewords() -> None:
    stage = make()
    stage.tokenizer.quantizer.usage.fill_(2.0)
    full_usage = {"codes_alive": 24.0, "perplexity": 24.0}
    assert stage.warning(full_usage, 200) is None
    stage.tokenizer.codebook[:] = 3 + 1e-4 * torch.randn(24, 8)
    warning = stage.warning(full_usage, 200)
    assert warning is not None
    assert "Of 24 codewords 24 are in use (perplexity 24), but only about 1 of them differ." in warning


def test_warning__when_the_codebook_collapses() -> None:
    stage = make()
    stage.tokenizer.quantizer.usage.fill_(1.0)
    warning = stage.warning({"codes_alive": 5.0, "perplexity": 1.0}, 200)
    assert warning is not None
    assert "Of 24 codewords 5 are in use (perplexity 1)" in warning
    assert "a lower --optim.lr" in warning
    assert "--quantizer.num-codewords 6" in warning
    assert "revive" not in warning  # revival is on already
    assert stage.warning({"codes_alive": 5.0, "perplexity": 1.0}, 199) is None
    assert stage.warning({"codes_alive": 6.0, "perplexity": 1.5}, 200) is None
    assert "24 codewords 5 are in use" in (stage.warning({"codes_alive": 5.0, "perplexity": 5.0}, 200) or "")
    assert "(perplexity 1)" in (stage.warning({"codes_alive": 24.0, "perplexity": 1.4}, 200) or "")
    without = make(quantizer=QuantizerConfig(num_codewords=24, revive_after=0))
    assert "--quantizer.revive-after 100" in (without.warning({"codes_alive": 5.0, "perplexity": 1.0}, 200) or "")
