from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from pecobook.data.decode import BadImage
from pecobook.data.sampler import key
from pecobook.data.stream import Stream, collate
from pecobook.data.views import NamedViews, center_crop, colour_draws, photometric, random_crop
from pecobook.settings.images import PhotometricConfig
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.tokenize import TokenizeConfig
from tests.runs import Squares, squares

VIEWS = NamedViews(seed=5, image_size=16, tokenizer_size=8, min_crop=0.3, colour=PhotometricConfig(jitter=1.0))


def picture() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, 20, 24), dtype=torch.uint8, generator=generator)


def test_views__of_pretrain_of_tokenize_and_of_a_bank_are_the_same() -> None:
    settings: dict[str, Any] = {
        "seed": 5,
        "image_size": 16,
        "tokenizer_size": 8,
        "min_crop": 0.3,
        "colour": VIEWS.colour,
    }
    for config in (PretrainConfig(**settings), TokenizeConfig(**settings)):
        assert NamedViews.of(config) == VIEWS
    written = json.loads(json.dumps({"kind": "token bank", **VIEWS.settings(), "views": 3}))
    assert NamedViews.of_bank(written) == VIEWS
    assert NamedViews.of(TokenizeConfig(image_size=32)).tokenizer_size == 32


def test_views__follow_from_their_key() -> None:
    image = picture()
    seen = VIEWS.train(image, 7)
    assert torch.equal(seen["image"], random_crop(image, 16, 7, min_area=0.3))
    assert torch.equal(seen["colour"], colour_draws(7))
    held_out = VIEWS.evaluation(image, 7)
    assert torch.equal(held_out["image"], center_crop(image, 16))
    assert torch.equal(held_out["image"], VIEWS.evaluation(image, 8)["image"])


def test_pixels__colours_change_in_training_alone() -> None:
    batch = collate([{**VIEWS.train(picture(), view), "skipped": []} for view in range(3)])
    plain = batch["image"].float() / 255
    torch.testing.assert_close(VIEWS.pixels(batch, training=False), plain, rtol=0, atol=1e-7)
    changed = VIEWS.pixels(batch, training=True)
    assert torch.equal(changed, photometric(VIEWS.pixels(batch, training=False), batch["colour"], VIEWS.colour))
    assert not torch.equal(changed, plain)


def test_stream__gives_named_views_of_an_image_that_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    ordinary = Squares.read

    def counted(self: Squares, row: int, shortest: int = 0) -> Tensor:
        read.append(row)
        return ordinary(self, row)

    monkeypatch.setattr(Squares, "read", counted)
    stream = Stream(squares(6, bad=(4,)), VIEWS.train, VIEWS.seed)
    found = stream.views(2, range(3))
    assert read == [2]
    for number, view in enumerate(found):
        own = VIEWS.train(stream.source.read(2), key(5, 2, number))
        assert all(torch.equal(view[name], own[name]) for name in own)
    for position in range(12):  # two epochs
        sample = stream[position]
        index = int(sample["index"])
        (named,) = stream.views(index, [position // 6])
        assert torch.equal(named["image"], sample["image"])
        assert torch.equal(named["colour"], sample["colour"])
    with pytest.raises(BadImage):
        stream.views(4, [0])
