"""The lines that end a run: pasted, they apply what was trained to an image file, as the library does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from pecobook import Backbone, Classifier, Detector, PerceptualTokenizer, Segmenter, api, read_image
from tests.runs import SMALL


def results(command: str, run: Path, photo: Path) -> dict[str, Any]:
    """Return what the library computes for an image file, under the names in the closing lines."""
    if command == "segment":
        return {"classes": Segmenter.from_pretrained(run).predict(read_image(photo))}
    if command == "detect":
        return {"boxes": Detector.from_pretrained(run).predict(read_image(photo)).boxes}
    if command == "codebook":
        tokenizer = PerceptualTokenizer.from_pretrained(run)
        return {"codes": tokenizer.encode(read_image(photo, tokenizer.image_size)[None] / 255)}
    network: Backbone = (Classifier if command == "finetune" else Backbone).from_pretrained(run)
    crop = getattr(network, "crop", 1.0)
    with torch.no_grad():
        output = network(read_image(photo, network.image_size, crop=crop)[None] / 255)[0]
    return {"probabilities": output.softmax(0)} if command == "finetune" else {"features": output}


@pytest.mark.parametrize("command", list(SMALL))
def test_closing_lines__apply_the_run_to_an_image(
    command: str, images: Path, needs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / 'a "run" of mine'
    settings = {"data": str(images), "out": str(run), **needs}
    getattr(api, command)("tiny", **{**SMALL[command], "max_steps": "2", **settings})
    lines = capsys.readouterr().err.split("\nDone: ")[1].split("\n\n", 1)[1]
    photo = tmp_path / "wide.png"
    pixels = torch.randint(256, (5, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).resize((90, 50), Image.Resampling.BICUBIC).save(photo)
    example = run / "samples" / "example.png"
    assert json.dumps(str(example)) in lines  # pasted as they are, they read a held-out image
    for file in (example, photo):
        scope: dict[str, Any] = {}
        exec(lines.replace(json.dumps(str(example)), json.dumps(str(file))), scope)
        assert capsys.readouterr().out
        if command == "detect":
            scope["boxes"] = scope["found"].boxes
        for name, expected in results(command, run, file).items():
            actual: Tensor = scope[name]
            if expected.dtype == torch.int64:
                assert torch.equal(actual, expected)
            else:
                assert_close(actual, expected, atol=0.02 * max(float(expected.abs().max()), 0.1), rtol=0.0)
