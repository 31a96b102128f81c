"""Networks are made once: what is looked at before a run is what is trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm

from pecobook import api
from pecobook.data.tokens import TokenBank
from pecobook.engine import launch
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.tokenizer import PerceptualTokenizer
from tests.runs import SMALL, inputs, train


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each thing is made from here on."""
    count: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: str) -> None:
        ordinary = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count[what] += 1
            return ordinary(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(timm, "create_model", "networks of timm")
    counted(PerceptualDistance, "__init__", "perceptual distances")
    counted(PerceptualTokenizer, "__init__", "tokenizers")
    counted(TokenBank, "__init__", "token banks")
    counted(launch, "resolve_precision", "precisions")
    return count


_NETWORKS = {
    "contrast": {"networks of timm": 1},
    "codebook": {"networks of timm": 1, "perceptual distances": 1, "tokenizers": 1},
    "pretrain": {"networks of timm": 1, "tokenizers": 1},
    "finetune": {"networks of timm": 1},
    "segment": {"networks of timm": 1},
    "detect": {"networks of timm": 1},
}


@pytest.mark.parametrize("command", list(SMALL))
def test_train__makes_every_network_once(
    command: str, images: Path, codebook_run: Path, vit_run: Path, tmp_path: Path, made: Counter[str]
) -> None:
    given: dict[str, Any] = {"data": str(images), **inputs(command, codebook_run, vit_run)}
    if command == "codebook":
        given |= {"perceptual.network": "timm:resnet10t", "perceptual.weights": "random", "perceptual.layers": (1, 2)}
    made.clear()
    train(command, given.pop("data"), tmp_path / "run", max_steps="2", **given)
    assert made == {**_NETWORKS[command], "precisions": 1}


def test_train__from_a_token_bank_opens_it_once(
    images: Path, codebook_run: Path, tmp_path: Path, made: Counter[str]
) -> None:
    bank = str(tmp_path / "bank")
    shape = {"image_size": 16, "precision": "fp32", "workers": 0}
    api.tokenize("tiny", data=str(images), tokenizer=str(codebook_run), out=bank, **shape)
    assert made == {"tokenizers": 1, "precisions": 1}
    made.clear()
    train("pretrain", images, tmp_path / "run", tokenizer=str(codebook_run), tokens=bank, max_steps="2")
    assert made == {**_NETWORKS["pretrain"], "token banks": 1, "precisions": 1}
