"""Whether a codebook is in use: what is logged of it, and when a run warns."""

from __future__ import annotations

import pytest
import torch

from pecobook.settings.tokenizer import QuantizerConfig
from tests.stages.test_codebook import make


def test_health__perplexity_of_known_usage() -> None:
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
    """All vectors are next to a few points, so which of the codewords revived there is nearest says nothing."""
    stage = make(quantizer=QuantizerConfig(num_codewords=128, revive_after=revive_after))
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, stage.config.model.latent_dim, generator=generator)
    for step in range(260):
        chosen = points[torch.arange(64).add(step) % num_points] + drift * step  # (64, D)
        chosen += noise * torch.randn(chosen.shape, generator=generator)
        stage.tokenizer.quantizer(chosen.T.reshape(1, -1, 8, 8))
        stage.tokenizer.quantizer.update()
    health = {name: float(value) for name, value in stage.health().items()}
    assert health["revived"] > 100
    assert "are in use" in (stage.warning(health, 260) or "")


def test_warning__copies_of_few_codewords() -> None:
    stage = make()
    stage.tokenizer.quantizer.usage.fill_(2.0)
    everything = {"codes_alive": 24.0, "perplexity": 24.0}
    assert stage.warning(everything, 200) is None
    stage.tokenizer.codebook[:] = 3 + 1e-4 * torch.randn(24, 8)
    said = stage.warning(everything, 200)
    assert said is not None
    assert "Of 24 codewords 24 are in use (perplexity 24), but only about 1 of them differ." in said


def test_warning__when_the_codebook_collapses() -> None:
    stage = make()
    stage.tokenizer.quantizer.usage.fill_(1.0)
    said = stage.warning({"codes_alive": 5.0, "perplexity": 1.0}, 200)
    assert said is not None
    assert "Of 24 codewords 5 are in use (perplexity 1)" in said
    assert "a lower --optim.lr" in said
    assert "--quantizer.num-codewords 6" in said
    assert "revive" not in said  # they are revived already
    assert stage.warning({"codes_alive": 5.0, "perplexity": 1.0}, 199) is None
    assert stage.warning({"codes_alive": 6.0, "perplexity": 1.5}, 200) is None
    assert "24 codewords 5 are in use" in (stage.warning({"codes_alive": 5.0, "perplexity": 5.0}, 200) or "")
    assert "(perplexity 1)" in (stage.warning({"codes_alive": 24.0, "perplexity": 1.4}, 200) or "")
    without = make(quantizer=QuantizerConfig(num_codewords=24, revive_after=0))
    assert "--quantizer.revive-after 100" in (without.warning({"codes_alive": 5.0, "perplexity": 1.0}, 200) or "")
