"""Every network is built once: training uses the networks that the checks before the run built."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from pecobook import api
from pecobook.data.tokens import TokenBank
from pecobook.engine import launch
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.tokenizer import PerceptualTokenizer
from tests.runs import SMALL, train


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return a counter of the objects that are built from now on, by kind."""
    counter: Counter[str] = Counter()

    def count(owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            # Networks on the meta device have no weights: pecobook asks them what they can do, once a process.
            counter[kind] += torch.get_default_device().type != "meta"
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    count(timm, "create_model", "networks of timm")
    count(PerceptualDistance, "__init__", "perceptual distances")
    count(PerceptualTokenizer, "__init__", "tokenizers")
    count(TokenBank, "__init__", "token banks")
    count(launch, "resolve_precision", "precisions")
    return counter


_NETWORKS = {
    "contrast": {"networks of timm": 1},
    "codebook": {"networks of timm": 1, "perceptual distances": 1, "tokenizers": 1},
    "pretrain": {"networks of timm": 1, "tokenizers": 1},
    "finetune": {"networks of timm": 1},
    "segment": {"networks of timm": 1},
    "detect": {"networks of timm": 1},
}


@pytest.mark.parametrize("command", list(SMALL))
def test_train__builds_every_network_once(
    command: str, images: Path, needs: dict[str, str], tmp_path: Path, built: Counter[str]
) -> None:
    settings: dict[str, Any] = {"data": str(images), **needs}
    if command == "codebook":
        settings |= {
            "perceptual.network": "timm:resnet10t",
            "perceptual.weights": "random",
            "perceptual.layers": (1, 2),
        }
    built.clear()
    train(command, settings.pop("data"), tmp_path / "run", max_steps="2", **settings)
    assert built == {**_NETWORKS[command], "precisions": 1}


def test_train__from_a_token_bank_opens_it_once(
    images: Path, codebook_run: Path, tmp_path: Path, built: Counter[str]
) -> None:
    bank = str(tmp_path / "bank")
    shape = {"image_size": 16, "precision": "fp32", "workers": 0}
    api.tokenize("tiny", data=str(images), tokenizer=str(codebook_run), out=bank, **shape)
    assert built == {"tokenizers": 1, "precisions": 1}
    built.clear()
    train("pretrain", images, tmp_path / "run", tokenizer=str(codebook_run), tokens=bank, max_steps="2")
    assert built == {**_NETWORKS["pretrain"], "token banks": 1, "precisions": 1}
