"""Draw the idea of pecobook, idea-light.svg and idea-dark.svg, with the runs of a demo.

    pecobook demo --out runs/demo
    python docs/images/idea.py runs/demo

All pictures are real: a photograph of scikit-image, its codes by the demo's perceptual codebook, the image that these
codes give, and what the demo's ViT predicts behind a mask. The photograph is read in 6 x 6 tiles of the size of the
training images, and all of its codes are decoded together.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from pecobook import blockwise_mask
from pecobook.commands.masked_run import load_masked_run

TILES = 6
SIDE, GAP, LEFT = 160, 70, 10
THEMES: dict[str, dict[str, Any]] = {
    "light": {"text": "#24292f", "line": "#57606a", "loss": "#0b7285", "hole": (208, 215, 222)},
    "dark": {"text": "#e6edf3", "line": "#9ba4ae", "loss": "#5cc8da", "hole": (61, 68, 77)},
}
Picture = npt.NDArray[np.uint8]


def tiles_of(picture: Tensor, side: int) -> Tensor:
    """Cut (C, H, W) into (N, C, side, side), row by row."""
    return (
        picture.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).reshape(-1, len(picture), side, side)
    )


def joined(tiles: Tensor) -> Tensor:
    """Return tiles (N, C, S, S) as one picture (C, H, W)."""
    side = tiles.shape[-1]
    grid = tiles.reshape(TILES, TILES, -1, side, side).permute(2, 0, 3, 1, 4)
    return grid.reshape(-1, TILES * side, TILES * side)


def to_bytes(picture: Tensor) -> Picture:
    """Return (3, H, W) in [0, 1] as an array (H, W, 3) of bytes."""
    pixels: Picture = (255 * picture.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels


def colours(codebook: Tensor) -> Tensor:
    """Return a colour (K, 3) in [0, 1] for each codeword, so that near codewords have similar colours."""
    centred = codebook - codebook.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    ranks = (centred @ axes.T).argsort(0).argsort(0) / (len(codebook) - 1)
    scaled: Tensor = 0.12 + 0.8 * ranks
    return scaled


def embedded(picture: Picture, x: float, y: float, *, smooth: bool) -> str:
    """Return the SVG element of a picture at a place."""
    file = io.BytesIO()
    kind = "jpeg" if smooth else "png"
    Image.fromarray(picture).save(file, kind, quality=88, optimize=True)
    href = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    style = "" if smooth else ' style="image-rendering:pixelated"'
    return f'<image x="{x}" y="{y}" width="{SIDE}" height="{SIDE}"{style} href="{href}"/>'


def compute(demo: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Return image, codes, rebuilt, mask, predicted codes, the picture of these, and the number of codewords."""
    run = load_masked_run(demo / "vit-perceptual").eval()
    size, tokenizer = run.image_size, run.tokenizer
    cat = Image.fromarray(data.chelsea()).crop((90, 0, 390, 300)).resize((TILES * size,) * 2, Image.Resampling.LANCZOS)
    image = torch.from_numpy(np.array(cat)).permute(2, 0, 1) / 255
    tiles = tiles_of(image, size)
    generator = torch.Generator().manual_seed(1)
    masks = torch.stack([blockwise_mask(run.grid, num_masked=6, min_block=2, generator=generator) for _ in tiles])
    with torch.inference_mode():
        codes = run.encode(tiles).reshape(-1, *run.grid)
        predicted = codes.clone()
        predicted[masks] = run(tiles, masks).argmax(-1)
        grids = [joined(grid[:, None]) for grid in (codes, masks, predicted)]
        rebuilt, completed = tokenizer.decode(grids[0])[0], tokenizer.decode(grids[2])[0]
    return image, grids[0], rebuilt, grids[1], grids[2], completed, tokenizer.num_codewords


def panels(demo: Path, look: dict[str, Any], x: list[int], top: int, low: int) -> list[str]:
    """Return the six pictures with their captions, the first three at height `top`, the others at `low`."""
    image, codes, rebuilt, mask, predicted, completed, number = compute(demo)
    colour = colours(load_masked_run(demo / "vit-perceptual").codebook)
    hole = torch.tensor(look["hole"])[:, None, None] / 255
    patch = image.shape[1] // mask.shape[1]
    large = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    map_of = {name: colour[grid[0]].permute(2, 0, 1) for name, grid in (("true", codes), ("predicted", predicted))}
    only_predicted = torch.where(mask, map_of["predicted"], hole)
    parts = [
        embedded(to_bytes(image), x[0], top, smooth=True),
        embedded(to_bytes(map_of["true"]), x[1], top, smooth=False),
        embedded(to_bytes(rebuilt), x[2], top, smooth=True),
        embedded(to_bytes(torch.where(large, hole, image)), x[0], low, smooth=True),
        embedded(to_bytes(only_predicted), x[1], low, smooth=False),
        embedded(to_bytes(completed), x[2], low, smooth=True),
    ]
    captions = [
        (x[0], top, ("an image",)),
        (x[1], top, ("for each patch a code:", f"one of {number} codewords")),
        (x[2], top, ("rebuilt from", "the codes")),
        (x[0], low, ("the image with", "masked patches")),
        (x[1], low, ("the codes that the ViT", "predicts for them")),
        (x[2], low, ("decoded, to look at",)),
    ]
    for left, upper, lines in captions:
        for place, line in enumerate(lines):
            parts.append(f'<text x="{left + SIDE / 2}" y="{upper + SIDE + 20 + 18 * place}">{line}</text>')
    return parts


def draw(demo: Path, theme: str) -> str:
    """Return the drawing as SVG."""
    look = THEMES[theme]
    x = [LEFT + place * (SIDE + GAP) for place in range(3)]
    top, low = 8, 300
    parts = panels(demo, look, x, top, low)
    for upper, words in ((top, ("encoder", "decoder")), (low, ("ViT", "decoder"))):
        for left, word in zip(x, words, strict=False):
            middle = upper + SIDE / 2
            start, end = left + SIDE + 8, left + SIDE + GAP - 8
            parts.append(f'<path class="arrow" d="M{start} {middle}H{end}" marker-end="url(#tip)"/>')
            parts.append(f'<text class="verb" x="{(start + end) / 2}" y="{middle - 10}">{word}</text>')
    below = top + SIDE + 46
    ends = (x[0] + SIDE / 2, x[2] + SIDE / 2)
    parts.append(f'<path class="loss" d="M{ends[0]} {below}V{below + 10}H{ends[1]}V{below}"/>')
    middle = (x[0] + x[1] + SIDE) / 2
    for place, line in enumerate(("1. compared in pixels and in the", "features of a frozen network")):
        parts.append(f'<text class="learn" x="{middle}" y="{below + 32 + 18 * place}">{line}</text>')
    across = x[1] + SIDE + 18
    parts.append(f'<path class="loss" d="M{x[1] + SIDE + 6} {top + SIDE - 12}H{across}V{low + 12}H{x[1] + SIDE + 6}"/>')
    parts.append(f'<text class="learn side" x="{across + 10}" y="{below + 32}">2. the codes are</text>')
    parts.append(f'<text class="learn side" x="{across + 10}" y="{below + 50}">what it shall predict</text>')
    width, height = x[2] + SIDE + LEFT, low + SIDE + 50
    style = (
        f"text{{font:16px system-ui,sans-serif;fill:{look['text']};text-anchor:middle}}"
        f".verb{{font-size:14px;fill:{look['line']}}}.learn{{fill:{look['loss']};font-weight:600;font-size:15px}}"
        f".side{{text-anchor:start}}.arrow{{stroke:{look['line']};stroke-width:2;fill:none}}"
        f".loss{{stroke:{look['loss']};stroke-width:2;fill:none}}"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{look["line"]}"/></marker>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, f"<style>{style}</style><defs>{tip}</defs>", *parts, "</svg>\n"])


if __name__ == "__main__":
    for name in THEMES:
        (Path(__file__).parent / f"idea-{name}.svg").write_text(draw(Path(sys.argv[1]), name))
