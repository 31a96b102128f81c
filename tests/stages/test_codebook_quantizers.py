"""Trainings with the control quantizers, and what other commands make of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pecobook import analyze, load_tokenizer, tokenize
from pecobook.data.images import open_images
from pecobook.data.stream import read_all
from pecobook.data.tokens import TokenBank
from tests.runs import losses, train

KINDS: dict[str, dict[str, Any]] = {
    "fsq": {"quantizer.levels": ("31", "32"), "quantizer.num_codewords": 992, "model.latent_dim": 2},
    "lfq": {"quantizer.num_codewords": 16, "model.latent_dim": 4},
    "simvq": {"quantizer.num_codewords": 20},
    "ibq": {"quantizer.num_codewords": 20, "quantizer.entropy_weight": 0.05},
    "features": {
        **{"quantizer.kind": "ema", "quantizer.num_codewords": 24, "target_features": "timm:resnet10t"},
        **{"target.weights": "random", "target.layer": "2"},
    },
}
"""Settings of the codebooks; `features` is the usual quantizer under a decoder that predicts features."""


def test_quantizers__train_export_fill_a_bank_and_are_analysed(images: Path, tmp_path: Path) -> None:
    for kind, settings in KINDS.items():
        run = train("codebook", images, tmp_path / kind, **{"quantizer.kind": kind, **settings})
        assert all(math.isfinite(loss) for loss in losses(run))
        tokenizer = load_tokenizer(run)
        assert tokenizer.num_codewords == settings["quantizer.num_codewords"]
        # fp32 as in `encode`: rounding to bf16, which auto takes on some processors, moves codes near a border
        where = {"data": str(images), "tokenizer": str(run), "out": str(tmp_path / f"{kind}-bank")}
        tokenize("tiny", image_size=16, precision="fp32", **where)
        bank = TokenBank(tmp_path / f"{kind}-bank", tokenizer.num_codewords)
        held_out = read_all(open_images(str(images)).evaluation, 16)[0]
        assert bank.shard("evaluation", 0)[:, 0].tolist() == tokenizer.encode(held_out).tolist()
    first, *others = (str(tmp_path / kind) for kind in KINDS)
    banks = tuple(str(tmp_path / f"{kind}-bank") for kind in KINDS)
    analyze(tokenizer=first, against=tuple(others), tokens=banks, data=str(images), out=str(tmp_path / "analysis"))
    analysed = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["tokenizers"]
    assert [values["num_codewords"] for values in analysed] == [s["quantizer.num_codewords"] for s in KINDS.values()]
    *pixels, features = analysed
    assert all(values["psnr"] > 0 for values in pixels)
    assert (features["psnr"], features["predicts"]) == (None, "features of timm:resnet10t")
    sentence = "features predicts features of timm:resnet10t, not pixels, and has no reconstructions."
    assert sentence in (tmp_path / "analysis" / "report.html").read_text()
