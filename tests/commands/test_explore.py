"""`pecobook explore`: what the page shows; the server: test_explore_server.py."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from pecobook.analysis.atlas import as_json
from pecobook.analysis.reconstruction import decode_all, encode_all
from pecobook.commands.explore import model
from pecobook.commands.masked_run import load_masked_run
from pecobook.data.images import open_images
from pecobook.data.views import center_crop
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.utils.images import to_float
from tests.analysis.fakes import GreyTokenizer

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def indexed(images: Path, codebook_run: Path) -> model.IndexedTokenizer:
    with contextlib.redirect_stderr(io.StringIO()):
        source = open_images(str(images)).evaluation
        return model.index("small", PerceptualTokenizer.from_pretrained(codebook_run), source, 100)


@pytest.fixture(scope="module")
def crops(images: Path, indexed: model.IndexedTokenizer) -> Tensor:
    """Return the indexed images as the tokenizer reads them, uint8 (N, 3, 16, 16)."""
    source = open_images(str(images)).evaluation
    return torch.stack([center_crop(source.read(int(row)), 16) for row in indexed.rows])


def grey(codes: Tensor, labels: list[int] | None = None, levels: int = 64) -> model.IndexedTokenizer:
    """Index made-up codes (N, h, w) of a tokenizer of grey levels."""
    source = SimpleNamespace(labels=None if labels is None else np.array(labels), classes=CLASSES)
    examples = torch.zeros(levels, 3, 4, 4, dtype=torch.uint8)
    rows, tokenizer = np.arange(len(codes)), GreyTokenizer(levels=levels)
    return model.indexed("grey", tokenizer, cast("Any", source), rows, codes.numpy().astype(np.int32), examples)


def test_index__holds_codes_of_all_held_out_images(
    indexed: model.IndexedTokenizer, images: Path, crops: Tensor
) -> None:
    assert len(indexed.codes) == len(open_images(str(images)).evaluation)
    codes = indexed.tokenizer.encode(to_float(crops))
    assert np.array_equal(codes, indexed.codes)
    assert indexed.counts.tolist() == torch.bincount(codes.flatten(), minlength=24).tolist()
    patches = crops.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)  # (N, h, w, 3, 4, 4)
    for code, example in enumerate(indexed.examples):
        if (codes == code).any():
            assert any(torch.equal(example, patch) for patch in patches[codes == code])
        else:
            assert (example == 128).all()


def test_examples__are_typical_patches() -> None:
    images = torch.full((3, 3, 8, 8), 200, dtype=torch.uint8)
    images[0, :, :4, :4] = 0  # of codeword 1, most of whose patches are bright
    images[1, :, :4, :4] = 190
    codes = torch.ones(3, 2, 2, dtype=torch.long)
    codes[2, 1, 1] = 0
    images[2, :, 4:, 4:] = 7
    examples = model._Examples(3, 4)
    examples.add(images[:2], codes[:2])
    examples.add(images[2:], codes[2:])
    assert [int(patch.unique()) for patch in examples.patches] == [7, 190, 128]  # the mean before the last image is 174


def test_encode_image__equals_the_tokenizer(indexed: model.IndexedTokenizer, crops: Tensor) -> None:
    encoded = model.encode_image(indexed.tokenizer, crops[1])
    assert np.array_equal(encoded.codes, indexed.codes[1])
    x = to_float(crops[1])[None]
    restored = decode_all(indexed.tokenizer, encode_all(indexed.tokenizer, x))
    assert torch.equal(encoded.restored, model.to_picture(restored[0]))
    error = (x - restored).abs()[0].mean(0)
    assert torch.equal(encoded.error[2], model.to_picture(error / error.max()))
    values = model.image_values(indexed, encoded)
    assert values["codes"] == encoded.codes.tolist()
    assert values["distinct"] == len(np.unique(encoded.codes))
    assert values["psnr"] == pytest.approx(10 * np.log10(1 / float((x - restored).square().mean())), abs=0.06)
    colour = ",".join(str(part) for part in indexed.colours[encoded.codes[2, 1]])
    assert values["colours"][2][1] == f"rgb({colour})"


def test_codeword_values__count_images_places_and_neighbours(indexed: model.IndexedTokenizer) -> None:
    code = int(indexed.counts.argmax())
    info = model.codeword_values(indexed, code)
    has = indexed.codes == code
    assert (info["count"], info["images"]) == (has.sum(), has.any((1, 2)).sum())
    assert (info["rank"], info["share"]) == (1, 100 * has.mean())
    assert info["places"] == has.sum(0).tolist()
    row_of = {int(row): place for place, row in enumerate(indexed.rows)}
    assert len(info["exemplars"]) == min(model.EXEMPLARS, info["count"])
    for one in info["exemplars"]:
        assert has[row_of[one["image"]], one["row"], one["column"]]
        assert one["class"] == CLASSES[indexed.labels[row_of[one["image"]]]]  # type: ignore[index]
    book = indexed.tokenizer.codebook
    used = [k for k in torch.cdist(book[code][None], book)[0].argsort().tolist() if k != code and indexed.counts[k] > 0]
    assert [one["codeword"] for one in info["neighbours"]] == used[: model.NEIGHBOURS]
    assert [one["count"] for one in info["neighbours"]] == indexed.counts[used[: model.NEIGHBOURS]].tolist()


def test_codeword_values__of_an_unused_codeword_have_neighbours_alone() -> None:
    codes = torch.zeros(2, 4, 4, dtype=torch.long)
    codes[0, 0, 0] = 63  # all codewords between are unused
    indexed = grey(codes)
    assert [one["codeword"] for one in model.codeword_values(indexed, 0)["neighbours"]] == [63]
    info = model.codeword_values(indexed, 20)
    assert (info["count"], info["rank"], info["exemplars"], info["labelled"]) == (0, None, [], False)
    assert [one["codeword"] for one in info["neighbours"]] == [0, 63]


def test_codeword_values__rank_classes_by_lift_where_it_is_evidence() -> None:
    codes = torch.zeros(300, 2, 2, dtype=torch.long)
    labels = [0] * 200 + [1] * 50 + [2] * 50
    codes[200:240, 0, 0] = 7  # 40 of the 50 images of green
    codes[250:300, 0, 0] = 7  # all 50 of red
    codes[:10, 0, 0] = 7  # 10 of the 200 of blue
    info = model.codeword_values(grey(codes, labels), 7)
    assert [(one["name"], one["images"], one["size"]) for one in info["classes"]] == [
        ("red", 50, 50),
        ("green", 40, 50),
    ]
    first = info["classes"][0]
    assert (first["share"], first["base"]) == (pytest.approx(50), pytest.approx(100 / 6))
    assert first["lift"] == pytest.approx(3)
    assert info["classes_seen"] == 3
    assert model.codeword_values(grey(codes, labels), 0)["classes"] == []  # in all images


def test_codeword_list__sorts_all_codewords() -> None:
    codes = torch.zeros(40, 2, 2, dtype=torch.long)
    codes[:, 0, 0] = 5  # always at the first place
    codes[:20, 1, 1] = 9  # in all images of the first class, and in no other
    codes[:5, 0, 1] = 11  # too few patches for purity and place
    indexed = grey(codes, [0] * 20 + [1] * 20, levels=200)

    def first(sort: str, page: int = 1) -> list[tuple[Any, ...]]:
        listed = model.codeword_list(indexed, sort, page)
        assert (listed["pages"], listed["total"], listed["used"]) == (3, 200, 4)
        return [(one["codeword"], one["count"], one["value"], one["class"]) for one in listed["codewords"]]

    assert [row[:2] for row in first("use")[:5]] == [(0, 95), (5, 40), (9, 20), (11, 5), (1, 0)]
    assert first("lift")[:2] == [(9, 20, 2.0, "blue"), (0, 95, None, "")]  # 11 has five images of blue: p = 0.03
    assert first("purity")[:3] == [(9, 20, 100.0, "blue"), (0, 95, 63.2, "green"), (5, 40, 50.0, "blue")]
    assert [row[::2] for row in first("place")[:3]] == [
        (
            5,
            100.0,
        ),
        (9, 100.0),
        (0, 42.1),
    ]
    assert [row[0] for row in first("number", 3)] == list(range(160, 200))
    assert model.codeword_list(indexed, "use", 99)["page"] == 3


def test_codeword_list__without_labels_is_sorted_by_use() -> None:
    indexed = grey(torch.arange(16).view(1, 4, 4) // 8)
    for sort in model.SORTS:
        assert [one["codeword"] for one in model.codeword_list(indexed, sort, 1)["codewords"]][:3] == [0, 1, 2]


def test_tiles__are_a_decoded_patch_beside_an_example(indexed: model.IndexedTokenizer) -> None:
    tiles = model.tiles(indexed, [3, 20])
    field = model.to_picture(decode_all(indexed.tokenizer, torch.full((1, 3, 3), 20)))[0]
    assert tiles.shape == (2, 3, 4, 8)
    assert torch.equal(tiles[1, :, :, :4], field[:, 4:8, 4:8])
    assert torch.equal(tiles[0, :, :, 4:], indexed.examples[3])


def test_atlas__has_the_codewords_in_use(indexed: model.IndexedTokenizer) -> None:
    atlas = model.atlas(indexed)
    assert sorted(atlas.codewords.tolist()) == np.flatnonzero(indexed.counts).tolist()
    for place, code in enumerate(atlas.codewords.tolist()):
        has = indexed.codes == code
        assert atlas.counts[place] == has.sum()
        assert atlas.images[place] == has.any((1, 2)).sum()
        assert np.array_equal(atlas.positions[place], has.sum(0))
        example = indexed.examples[code].permute(1, 2, 0).numpy()
        assert np.array_equal(atlas.tiles[place], example)
        assert atlas.classes[place] is None  # of two images
    assert as_json(atlas)["codeword"] == atlas.codewords.tolist()


def test_code_colours__are_similar_for_similar_codewords() -> None:
    line = torch.linspace(0, 1, 9)[:, None] * torch.tensor([[3.0, 1.0, 0.0, 2.0]])
    colours = model.code_colours(line)
    assert colours.shape == (9, 3)
    first = colours[:, 0].astype(int)
    assert (first[0], first[-1]) in ((26, 242), (242, 26))
    assert len(set(np.sign(np.diff(first)))) == 1
    assert model.code_colours(torch.randn(5, 1)).shape == (5, 3)


def test_predict__changes_only_masked_patches(indexed: model.IndexedTokenizer, vit_run: Path, crops: Tensor) -> None:
    run = load_masked_run(vit_run)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = mask[3, 0] = True
    image = crops[0]
    prediction = model.predict(run, image, mask)
    is_hidden = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(prediction.picture[:, ~is_hidden], image[:, ~is_hidden])
    assert not torch.equal(prediction.picture[:, is_hidden], image[:, is_hidden])
    x = to_float(image)[None]
    with torch.inference_mode():
        probabilities = run((x), mask[None]).softmax(1)
    assert torch.equal(prediction.codes, run.encode(x)[0])
    assert torch.equal(prediction.top[:, 0], probabilities.argmax(1))
    assert torch.allclose(prediction.probabilities, probabilities.sort(descending=True).values[:, :5])
    guess = prediction.codes.clone()
    guess[mask] = prediction.top[:, 0]
    decoded = model.to_picture(decode_all(run, guess[None])[0])
    assert torch.equal(prediction.picture[:, is_hidden], decoded[:, is_hidden])


def test_prediction_values__count_what_is_right() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    top = torch.tensor([[4, 1], [5, 6], [8, 9]])
    prediction = model.Prediction(torch.zeros(3, 4, 4), torch.tensor([[4, 0], [6, 7]]), top, torch.full((3, 2), 0.25))
    values = model.prediction_values(prediction, mask)
    assert (values["masked"], values["right"], values["right_of_top"]) == (3, 1, 2)
    assert values["tokens"][1] == {"row": 1, "column": 0, "code": 6, "top": [[5, 0.25], [6, 0.25]]}


def test_chance_values__leave_out_the_image_itself() -> None:
    codes = torch.tensor([[[1, 2]], [[1, 3]], [[1, 2]], [[4, 3]]])
    indexed, mask = grey(codes), torch.tensor([[True, True]])
    assert model.chance_values(indexed, codes[1], mask, None)["place"] == 50  # the most frequent are 1 and 2
    assert model.chance_values(indexed, codes[0], mask, 0)["place"] == 50  # without it 1 and 3
    assert model.chance_values(indexed, codes[1], mask, 1) == {"uniform": 100 / 64, "place": 50}
    assert (
        model.chance_values(indexed, torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 3).bool(), None)["place"]
        is None
    )
