"""The atlas shows each codeword in use once, with a typical patch, beside similar codewords."""

import io

import numpy as np
import torch
from PIL import Image

from pecobook.analysis.atlas import as_json, atlas_picture, make_atlas, sprite, sprite_jpeg
from pecobook.analysis.occurrences import ClassShare, class_shares
from tests.analysis.fakes import GreyTokenizer


def grey_images() -> torch.Tensor:
    """Return 32 images of 4 x 4 patches of a grey level each; all images have the same 8 levels."""
    levels = torch.arange(16).reshape(4, 4) % 8
    grid = torch.stack([levels.roll(n, 0) for n in range(32)]).float() / 7
    return grid.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1).contiguous()


def test_an_atlas_has_each_used_codeword_once_from_dark_to_bright() -> None:
    tokenizer, images = GreyTokenizer(levels=10), grey_images() * 7 / 9  # levels 8 and 9 are not used
    codes = tokenizer.encode(images)
    atlas = make_atlas(images, codes, tokenizer.codebook)
    assert sorted(atlas.codewords.tolist()) == list(range(8))
    assert (atlas.num_codewords, atlas.rows, atlas.columns) == (10, 3, 3)
    assert atlas.counts.tolist() == [64] * 8
    assert atlas.images.tolist() == [32] * 8
    assert atlas.positions.sum() == codes.numel()
    expected = (255 * atlas.codewords / 9).round()
    assert np.abs(atlas.tiles.reshape(8, -1) - expected[:, None]).max() <= 1  # the patch of each codeword is its own
    assert np.abs(atlas.colours - expected[:, None]).max() <= 1
    cells = np.append(atlas.codewords, -1).reshape(3, 3)  # 8 codewords in 9 cells
    assert cells[:, 0].mean() < cells[:2, 2].mean()
    again = make_atlas((255 * images).round().to(torch.uint8), codes, tokenizer.codebook)
    assert np.array_equal(atlas.codewords, again.codewords)
    assert np.abs(atlas.tiles.astype(int) - again.tiles).max() <= 1


def test_the_patch_of_a_codeword_is_typical() -> None:
    """Of four patches of one codeword the one nearest to their mean is shown."""
    images = torch.zeros(4, 3, 4, 4)
    images[0], images[1], images[2], images[3] = 0.2, 0.5, 0.6, 1.0
    atlas = make_atlas(images, torch.zeros(4, 1, 1, dtype=torch.long), torch.zeros(2, 3))
    assert atlas.tiles[0, 0, 0].tolist() == [round(255 * 0.6)] * 3  # the mean is 0.575
    assert as_json(atlas)["place"] == [[50, 50]]


def test_pictures_show_the_tiles_in_their_cells() -> None:
    tokenizer, images = GreyTokenizer(), grey_images()
    atlas = make_atlas(images, tokenizer.encode(images), tokenizer.codebook)
    side = atlas.tiles.shape[1]
    pixels = np.asarray(sprite(atlas))
    assert pixels.shape == (3 * side, 3 * side, 3)
    assert np.array_equal(pixels[side : 2 * side, :side], atlas.tiles[3])
    assert Image.open(io.BytesIO(sprite_jpeg(atlas))).size == (3 * side, 3 * side)
    picture = Image.open(io.BytesIO(atlas_picture(atlas)))
    assert picture.mode == "RGBA"
    assert picture.width == 3 * (96 + 6)
    assert picture.getpixel((picture.width // 6, picture.height // 2))[:3] == tuple(atlas.tiles[3, 0, 0])  # type: ignore[index]
    assert side == 4  # a tile is never larger than the patch
    assert picture.getpixel((picture.width - 40, picture.height - 40))[3] == 0  # type: ignore[index]


def test_class_shares_name_a_class_that_is_more_frequent_than_by_chance() -> None:
    """Codeword 0 is in all eight images of "cat" and in no other; codeword 1 is in one image of "dog"."""
    codes = torch.full((32, 2, 2), 2)
    codes[:8, 0] = 0
    codes[8, 0, 0] = 1
    labels = torch.tensor([0] * 8 + [1] * 16 + [2] * 8)
    shares = class_shares(codes, labels, 5, ["cat", "dog", "cow", "unseen"])
    assert shares == {0: ClassShare("cat", 100, 25, 4)}
    atlas = make_atlas(torch.rand(32, 3, 4, 4), codes, torch.rand(5, 3), shares=shares)
    listed = as_json(atlas)
    classes = dict(zip(listed["codeword"], listed["class"], strict=True))
    assert (classes, listed["classes"]) == ({0: (0, 100, 25.0, 4.0), 1: (), 2: ()}, ["cat"])
