"""The atlas of a codebook: one patch of each codeword in use, on a grid on which similar codewords are neighbours.

`make_atlas` computes it, `atlas_picture` draws it as a PNG, and `sprite` and `as_json` return what a page needs to show
it with a zoom, coloured by use, place, colour or class.

Shapes: N images, codes int64 (N, h, w) with values in [0, K), M codewords in use, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pecobook.analysis.codebook_map import grid_cells, project_to_plane
from pecobook.analysis.occurrences import ClassShare, Occurrences, occurrences
from pecobook.analysis.reconstruction import float_parts
from pecobook.utils.images import encode_picture, to_pillow

_SIDE, _TILES = 1536, (16, 48)
"""Width of a sprite in pixels, and smallest and largest side to which large patches are reduced: the patches of 8,192
codewords are reduced to 16 pixels."""
_DETAIL = 4
"""A patch is compared with the mean patch of its codeword at 4 x 4 colours."""


@dataclass(frozen=True)
class Atlas:
    """The codewords in use, ordered by their cells: row by row, from the left."""

    num_codewords: int
    """K, including unused codewords."""
    columns: int
    """Width of the grid in cells; codeword m is in row m // columns and column m % columns."""
    codewords: NDArray[np.int64]
    """(M,)"""
    tiles: NDArray[np.uint8] = field(repr=False)
    """The patch of each codeword, (M, t, t, 3)."""
    counts: NDArray[np.int64] = field(repr=False)
    """Number of patches of each codeword, (M,)."""
    images: NDArray[np.int64] = field(repr=False)
    """Number of images with each codeword, (M,)."""
    colours: NDArray[np.uint8] = field(repr=False)
    """Mean colour of each codeword's patches, (M, 3)."""
    positions: NDArray[np.int64] = field(repr=False)
    """Number of patches of each codeword at each position of the code grid, (M, h, w)."""
    classes: tuple[ClassShare | None, ...] = field(repr=False)
    """The class with the highest lift for each codeword; None if no class is more frequent than by chance."""

    @property
    def rows(self) -> int:
        """Height of the grid in cells."""
        return -(-len(self.codewords) // self.columns)


def make_atlas(
    images: Tensor, codes: Tensor, codebook: Tensor, *, shares: Mapping[int, ClassShare] | None = None, seed: int = 0
) -> Atlas:
    """Arrange the codewords in use by the similarity of their vectors, and choose a patch for each.

    The patch of a codeword is the one nearest to the mean of all its patches, so it is typical and not drawn at random.

    Args:
        images: float (N, 3, H, W) in [0, 1], or uint8.
        codes: their codes, int64 (N, h, w).
        codebook: float (K, D).
        shares: the classes of the codewords (see `class_shares`); None without labels.
        seed: seed of the arrangement. Equal arguments give equal atlases.
    """
    typical, colours = _typical_patches(images, codes, len(codebook))
    patch = -(-images.shape[-1] // codes.shape[2])
    return arrange(
        occurrences(codes, len(codebook)),
        codebook,
        255 * colours.numpy(),
        patch,
        lambda code, side: _tile(images, int(typical[code]), codes.shape[1:], side),
        shares or {},
        seed=seed,
    )


def arrange(
    found: Occurrences,
    codebook: Tensor,
    colours: NDArray[np.float32],
    patch: int,
    tile: Callable[[int, int], NDArray[np.uint8]],
    shares: Mapping[int, ClassShare],
    *,
    seed: int = 0,
) -> Atlas:
    """Arrange codewords by the similarity of their vectors.

    Args:
        found: the patches of all images.
        codebook: float (K, D).
        colours: mean colours of the codewords' patches, (K, 3) in 0..255.
        patch: side of a patch in pixels.
        tile: returns the tile (t, t, 3) of a codeword, given the codeword and t.
        shares: the classes of the codewords.
        seed: seed of the arrangement.
    """
    used, num_places = np.flatnonzero(found.counts), found.grid[0] * found.grid[1]
    plane = project_to_plane(codebook.detach().float().cpu()[torch.from_numpy(used)], seed=seed)
    cells = grid_cells(_turned(plane, colours[used].mean(1)))
    order, columns = np.lexsort((cells[:, 1], cells[:, 0])), int(cells[:, 1].max()) + 1
    side = min(int(np.clip(_SIDE // columns, *_TILES)), patch)
    pairs = np.searchsorted(used, found.codewords()) * num_places + found.patches % num_places
    positions = np.bincount(pairs, minlength=len(used) * num_places).reshape(-1, *found.grid)
    used = used[order]
    return Atlas(
        num_codewords=len(codebook),
        columns=columns,
        codewords=used,
        tiles=np.stack([tile(code, side) for code in used.tolist()]),
        counts=found.counts[used],
        images=found.images_with[used],
        colours=colours[used].round().astype(np.uint8),
        positions=positions[order],
        classes=tuple(shares.get(code) for code in used.tolist()),
    )


def _turned(plane: NDArray[np.float32], brightness: NDArray[np.float32]) -> NDArray[np.float32]:
    """Orient the plane (M, 2), whose axes are arbitrary, so that bright patches are on the right of every atlas."""
    towards = ((plane - plane.mean(0)) * (brightness - brightness.mean())[:, None]).sum(0)
    axis = int(np.abs(towards).argmax())
    return plane[:, [axis, 1 - axis]] * np.where(towards[axis] < 0, -1, 1)


def _typical_patches(images: Tensor, codes: Tensor, num_codewords: int) -> tuple[Tensor, Tensor]:
    """Return the index (K,) of the patch nearest to the mean patch of each codeword, and the mean colours (K, 3).

    The index counts the patches of all images, row by row; it has no meaning for an unused codeword.
    """
    K, (h, w) = num_codewords, codes.shape[1:]
    size = _DETAIL * h, _DETAIL * w
    flat = codes.flatten()
    mean = torch.zeros(K, 3 * _DETAIL**2)

    def parts() -> Any:
        for part, part_codes in zip(float_parts(images), torch.split(codes, 64), strict=True):
            blocks = F.interpolate(part.float().cpu(), size, mode="area").reshape(-1, 3, h, _DETAIL, w, _DETAIL)
            patches = blocks.permute(0, 2, 4, 1, 3, 5)  # (n, h, w, 3, detail, detail)
            yield patches.reshape(part_codes.numel(), -1), part_codes.flatten()

    for patches, part_codes in parts():
        mean.index_add_(0, part_codes, patches)
    mean /= flat.bincount(minlength=K).clamp_min(1)[:, None]
    distance = torch.cat([(patches - mean[part_codes]).square().sum(1) for patches, part_codes in parts()])
    order = np.lexsort((distance.numpy(), flat.numpy()))  # by codeword, the nearest patch first
    first = torch.searchsorted(flat[order], torch.arange(K)).clamp_max(len(flat) - 1)
    return torch.from_numpy(order)[first], mean.reshape(K, 3, -1).mean(2)


def _tile(images: Tensor, patch: int, grid: tuple[int, ...], side: int) -> NDArray[np.uint8]:
    """Cut a patch out of the images, given its number among those of all images, and reduce it to a tile."""
    (h, w), (height, width) = grid, images.shape[-2:]
    image, row, column = (int(place) for place in np.unravel_index(patch, (len(images), h, w)))
    top, left = row * height // h, column * width // w
    pixels = images[image, :, top : (row + 1) * height // h, left : (column + 1) * width // w]
    return tile_of(pixels if pixels.dtype == torch.uint8 else (255 * pixels.clamp(0, 1)).round(), side)


def tile_of(pixels: Tensor, side: int) -> NDArray[np.uint8]:
    """Reduce a patch (3, H, W) with values in 0..255 to a tile (side, side, 3)."""
    return np.asarray(to_pillow(pixels.to(torch.uint8)).resize((side, side), Image.Resampling.LANCZOS))


def sprite(atlas: Atlas) -> Image.Image:
    """Return one picture with all tiles at their cells, without gaps, in RGB; empty cells are white."""
    side = atlas.tiles.shape[1]
    empty = atlas.rows * atlas.columns - len(atlas.tiles)
    tiles = np.concatenate([atlas.tiles, np.full((empty, side, side, 3), 255, np.uint8)])
    grid = tiles.reshape(atlas.rows, atlas.columns, side, side, 3).swapaxes(1, 2)
    return Image.fromarray(np.ascontiguousarray(grid.reshape(atlas.rows * side, atlas.columns * side, 3)))


def sprite_jpeg(atlas: Atlas) -> bytes:
    """Encode the sprite as JPEG, a fifth of the size of a PNG."""
    return encode_picture(sprite(atlas), "JPEG", quality=88, subsampling=0, optimize=True)


def atlas_picture(atlas: Atlas) -> bytes:
    """Draw the atlas as a PNG of at most 2,000 pixels, with gaps between the tiles and a transparent background."""
    side = atlas.tiles.shape[1]
    scale = int(np.clip(1800 // (atlas.columns * side), 1, max(96 // side, 1)))
    pitch = side * scale + max(side * scale // 16, 1)
    pixels = np.zeros((atlas.rows * pitch, atlas.columns * pitch, 4), np.uint8)
    for cell, tile in enumerate(atlas.tiles):
        top, left = (place * pitch for place in divmod(cell, atlas.columns))
        pixels[top : top + side * scale, left : left + side * scale, :3] = tile.repeat(scale, 0).repeat(scale, 1)
        pixels[top : top + side * scale, left : left + side * scale, 3] = 255
    return encode_picture(Image.fromarray(pixels), "PNG")


def as_json(atlas: Atlas) -> dict[str, Any]:
    """Return what a page shows next to the sprite, as lists with one entry per codeword; the keys are short.

    `place` is the mean row and column of the patches in percent of the image, and `bound` the percentage of patches at
    the most frequent position. `class` is an index into `classes`, the shares of the class in the codeword's images and
    in all images in percent, and its lift; empty if there is none.
    """
    h, w = atlas.positions.shape[1:]
    counts = np.maximum(atlas.counts, 1)
    row = (atlas.positions.sum(2) @ (np.arange(h) + 0.5)) / counts / h
    column = (atlas.positions.sum(1) @ (np.arange(w) + 0.5)) / counts / w
    names = sorted({share.name for share in atlas.classes if share is not None})
    number = {name: index for index, name in enumerate(names)}
    shares = [(number[s.name], round(s.share), round(s.base, 1), round(s.lift, 1)) if s else () for s in atlas.classes]
    return {
        "columns": atlas.columns,
        "codeword": atlas.codewords.tolist(),
        "count": atlas.counts.tolist(),
        "images": atlas.images.tolist(),
        "colour": [f"{r:02x}{g:02x}{b:02x}" for r, g, b in atlas.colours.tolist()],
        "place": np.stack([100 * row, 100 * column], 1).round().astype(int).tolist(),
        "bound": (100 * atlas.positions.max((1, 2)) / counts).round().astype(int).tolist(),
        "class": shares,
        "classes": names,
    }
