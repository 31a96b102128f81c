"""Pictures that consist of images: reconstructions, masked predictions, galleries of patches.

Every picture is returned as PNG bytes (see `canvas`). Images are float (N, 3, H, W) in
[0, 1].
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.canvas import INK, escape_text, new_figure, picture_array, png, styles
from pecobook.analysis.codewords import GalleryPatch, GalleryRow
from pecobook.analysis.occurrences import ClassShare
from pecobook.analysis.wording import thousands

_WIDTH = 4.9  # inches
_PATCHES_PER_LINE = 6
_GAP = 0.045  # between images, in units of an image's side


def image_columns(columns: Sequence[tuple[str, Tensor]]) -> bytes:
    """Draw a grid of images with one titled column for each of `columns`, (N, 3, H, W) each.

    Two columns may have the same title. The number of rows is that of the images in the shortest column.
    """
    rows = min((len(images) for _, images in columns), default=0)
    if rows < 1:
        raise ValueError("image_columns needs at least one column and one image in each")
    titles = [_wrapped(title, 54 // len(columns)) for title, _ in columns]
    lines = max(title.count("\n") + 1 for title in titles)
    step = 1 + _GAP
    unit = _WIDTH / (len(columns) * step)  # side of an image in inches
    head = 0.24 * lines / unit
    axes = _empty_axes(len(columns) * step, head + rows * step, unit)
    for column, (title, (_, images)) in enumerate(zip(titles, columns, strict=True)):
        left = column * step
        axes.text(left + 0.5, head - 0.1 / unit, escape_text(title), ha="center", va="bottom", color=INK, fontsize=10.5)
        for row in range(rows):
            _draw_image(axes, picture_array(images[row]), left, head + row * step)
    return png(axes.figure)  # type: ignore[arg-type]


def gallery_picture(rows: Sequence[GalleryRow], shares: Mapping[int, ClassShare] | None = None) -> bytes:
    """Draw one block per codeword: number and usage, then a map of its positions and patches in their surroundings.

    With `shares` (see `class_shares`) a second line names the class that the codeword indicates best, if any.
    """
    step, label = 1 + 2 * _GAP, 0.5 if shares is None else 0.95
    lines = [max(1, -(-len(row.patches) // _PATCHES_PER_LINE)) for row in rows]
    height = sum(label + line * step + 0.12 for line in lines)
    axes = _empty_axes((1 + _PATCHES_PER_LINE) * step, max(height, 1.0), 4.1 / (_PATCHES_PER_LINE * step))
    top = 0.0
    for row, line in zip(rows, lines, strict=True):
        text = f"codeword {row.codeword}  ·  {_count(row.count, 'patch', 'patches')}"
        text += f" in {_count(row.images, 'image', 'images')}"
        if shares is not None:
            text += f"\n{class_words(shares.get(row.codeword))}"
        axes.text(0, top + label - 0.1, escape_text(text), ha="left", va="bottom", color=INK, fontsize=10.5)
        _draw_image(axes, position_shares(row.positions), 0, top + label, vmin=0, vmax=1, cmap="viridis")
        for number, patch in enumerate(row.patches):
            line_number, column = divmod(number, _PATCHES_PER_LINE)
            _draw_patch(axes, patch, (1 + column) * step, top + label + line_number * step)
        top += label + line * step + 0.12
    return png(axes.figure)  # type: ignore[arg-type]


def class_words(share: ClassShare | None) -> str:
    """Return the class of a codeword as text: `church: 62% of these images, 10% of all`."""
    if share is None:
        return "no class more often than by chance"
    return f"{share.name[:32]}: {share.share:.0f}% of these images, {share.base:.0f}% of all"


def matches_picture(queries: Sequence[GalleryPatch], columns: Sequence[tuple[str, Sequence[GalleryRow]]]) -> bytes:
    """Draw query patches, and next to each the patches that share its codeword, one column per codebook.

    Args:
        queries: one patch per row of the picture.
        columns: the name of each codebook, with the codeword of each query (see `matches`).
    """
    across, down, step, head, label = 3, 2, 1 + 2 * _GAP, 0.75, 0.42
    width = down * step + len(columns) * (across * step + 0.35)
    axes = _empty_axes(width, head + len(queries) * (down * step + label + 0.2), 6.6 / width)
    style_of = styles([name for name, _ in columns])
    axes.text(0, head - 0.2, "query", ha="left", va="bottom", color=INK, fontsize=10.5)
    for number, query in enumerate(queries):
        top = head + number * (down * step + label + 0.2)
        _draw_patch(axes, query, 0, top + label, side=down * step - 2 * _GAP)
        for column, (name, rows) in enumerate(columns):
            left, row = down * step + 0.35 + column * (across * step + 0.35), rows[number]
            if number == 0:
                colour = style_of[name]["color"]
                title = escape_text(_wrapped(name, 20))
                axes.text(left, head - 0.2, title, va="bottom", color=colour, fontsize=11, fontweight="bold")
            text = f"codeword {row.codeword}, {_count(row.count, 'patch', 'patches')}"
            axes.text(left, top + label - 0.08, text, va="bottom", color=INK, fontsize=8.5)
            for place, patch in enumerate(row.patches[: across * down]):
                line, place_in_line = divmod(place, across)
                _draw_patch(axes, patch, left + place_in_line * step, top + label + line * step)
    return png(axes.figure)  # type: ignore[arg-type]


def position_shares(positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how often a codeword occurs at each position, relative to its most frequent position: (h, w) in [0, 1]."""
    return np.asarray(positions / max(positions.max(), 1), dtype=np.float64)


def position_map(codes: Tensor, num_codewords: int) -> bytes:
    """Draw how many different codewords occur at each position of the grid, as a share of the maximum.

    `codes` is int (N, h, w).
    """
    N, h, w = codes.shape
    distinct = codes.sort(0).values.diff(dim=0).ne(0).sum(0) + 1  # (h, w)
    share = distinct.float() / min(N, num_codewords)
    figure = new_figure(3.1, 3.1 * h / w + 0.4)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title("different codewords at each position", color=INK, fontsize=10, loc="left")
    heatmap = axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="viridis")
    bar = figure.colorbar(heatmap, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(colors=INK, labelcolor=INK, labelsize=8.5)
    return png(figure)


def _empty_axes(width: float, height: float, unit: float) -> Axes:
    """Make empty axes that fill a figure, in units of an image's side, with the origin at the top left."""
    figure = new_figure(width * unit, height * unit)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    return axes


def _draw_image(axes: Axes, pixels: NDArray[Any], left: float, top: float, *, side: float = 1, **colours: Any) -> None:
    """Draw pixels (H, W, 3), or (H, W) with a colour map, in the middle of a square.

    The limits of the axes, which imshow changes, are restored.
    """
    limits = axes.get_xlim(), axes.get_ylim()
    height, width = (side * length / max(pixels.shape[:2]) for length in pixels.shape[:2])
    left, top = left + (side - width) / 2, top + (side - height) / 2
    axes.imshow(pixels, extent=(left, left + width, top + height, top), aspect="auto", **colours)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _draw_patch(axes: Axes, patch: GalleryPatch, left: float, top: float, *, side: float = 1) -> None:
    _draw_image(axes, picture_array(patch.window), left, top, side=side)
    height, width = patch.window.shape[-2:]
    scale = side / max(height, width)
    box_top, box_left, box_height, box_width = (value * scale for value in patch.box)
    x = left + (side - width * scale) / 2 + box_left
    y = top + (side - height * scale) / 2 + box_top
    # A white line on a wider black line is visible on any image.
    for colour, line in (("#000000", 2.2), ("#ffffff", 1.0)):
        axes.add_patch(Rectangle((x, y), box_width, box_height, fill=False, edgecolor=colour, linewidth=line, zorder=3))


def _wrapped(title: str, width: int) -> str:
    return "\n".join(textwrap.wrap(title, max(width, 6))) or " "


def _count(number: int, singular: str, plural: str) -> str:
    return f"{thousands(number)} {singular if number == 1 else plural}"
