"""Pictures made of pictures: reconstructions, masked predictions, galleries of patches.

Every function returns PNG bytes on a transparent ground (see `canvas`). Images are float (N, 3, H, W) in [0,
1].
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pecobook.analysis.canvas import INK, escape_text, new_figure, picture_array, png
from pecobook.analysis.codewords import Gallery, GalleryPatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 4.9  # inches
_GAP = 0.045  # between pictures, in units of a picture's side


def reconstruction_grid(
    images: Tensor, reconstructions: Mapping[str, Tensor], *, rows: int = 6, original: str = "original"
) -> bytes:
    """Rows = images, columns = the original and each tokenizer's reconstruction, with column titles.

    `images` (N, 3, H, W); `reconstructions` maps a column title to (N, 3, H, W). The first `rows` are shown.
    """
    return image_columns([(original, images), *reconstructions.items()], rows=rows)


def masked_prediction_grid(images: Tensor, masked: Tensor, decoded: Mapping[str, Tensor], *, rows: int = 6) -> bytes:
    """Rows = images, columns = original, masked, and what each run believes is there (paper, Figures 4 and
    5).

    All are (N, 3, H, W); `masked` comes from `masked_prediction.hide`, `decoded` from `decode_prediction`.
    """
    return image_columns([("original", images), ("masked", masked), *decoded.items()], rows=rows)


def image_columns(columns: Sequence[tuple[str, Tensor]], *, rows: int = 6) -> bytes:
    """A grid of pictures with one titled column for each of `columns`, (N, 3, H, W) each; titles may be alike."""
    rows = min([rows, *(len(images) for _, images in columns)])
    if not columns or rows < 1:
        raise ValueError("image_columns needs at least one column and one image in each")
    titles = [_wrapped(title, 54 // len(columns)) for title, _ in columns]
    lines = max(title.count("\n") + 1 for title in titles)
    step = 1 + _GAP
    unit = _WIDTH / (len(columns) * step)  # inches of one picture
    head = 0.24 * lines / unit
    axes = _sheet(len(columns) * step, head + rows * step, unit)
    for column, (title, (_, images)) in enumerate(zip(titles, columns, strict=True)):
        left = column * step
        axes.text(left + 0.5, head - 0.1 / unit, escape_text(title), ha="center", va="bottom", color=INK, fontsize=10.5)
        for row in range(rows):
            _place(axes, images[row], left, head + row * step, 1.0)
    return png(axes.figure)  # type: ignore[arg-type]


def gallery_picture(gallery: Gallery, *, per_line: int = 6, title: str | None = None) -> bytes:
    """One block a codeword: its number and use, then its patches, each outlined within its surroundings."""
    side, step, label = 1.0, 1 + 2 * _GAP, 0.5
    unit = 4.1 / (per_line * step)
    head = 0.34 / unit if title else 0.0
    lines = [max(1, -(-len(row.patches) // per_line)) for row in gallery.rows]
    height = head + sum(label + line * step + 0.12 for line in lines)
    axes = _sheet(per_line * step, max(height, 1.0), unit)
    if title:
        axes.text(0, 0.0, escape_text(title), ha="left", va="top", color=INK, fontsize=11.5, weight="bold")
    top = head
    for row, line in zip(gallery.rows, lines, strict=True):
        use = f"codeword {row.codeword}  ·  {_count(row.count, 'patch', 'patches')}"
        use += f" in {_count(row.images, 'image', 'images')}"
        axes.text(0, top + label - 0.1, use, ha="left", va="bottom", color=INK, fontsize=10.5)
        for place, patch in enumerate(row.patches):
            _place_patch(axes, patch, place % per_line * step, top + label + place // per_line * step, side)
        top += label + line * step + 0.12
    return png(axes.figure)  # type: ignore[arg-type]


def position_map(codes: Tensor, num_codewords: int) -> bytes:
    """How many different codewords occur at each place of the grid, as a share of what could: codes int (N, h, w)."""
    N, h, w = codes.shape
    different = codes.sort(0).values.diff(dim=0).ne(0).sum(0) + 1  # (h, w)
    share = different.float() / min(N, num_codewords)
    figure = new_figure(3.1, 3.1 * h / w + 0.4)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title("different codewords at each place", color=INK, fontsize=10, loc="left")
    shown = axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="viridis")
    bar = figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(colors=INK, labelcolor=INK, labelsize=8.5)
    return png(figure)


def _sheet(width: float, height: float, unit: float) -> Axes:
    """Axes without any ink over a whole figure, in units of pictures, the origin at the top left."""
    figure = new_figure(width * unit, height * unit)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    return axes


def _place(axes: Axes, image: Tensor, left: float, top: float, side: float) -> None:
    """One picture in a square of `side`; imshow changes the limits of the sheet, so they are put back."""
    limits = axes.get_xlim(), axes.get_ylim()
    height, width = image.shape[-2:]
    tall, wide = (side, side * width / height) if height >= width else (side * height / width, side)
    left, top = left + (side - wide) / 2, top + (side - tall) / 2
    axes.imshow(picture_array(image), extent=(left, left + wide, top + tall, top), aspect="auto")
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _place_patch(axes: Axes, patch: GalleryPatch, left: float, top: float, side: float) -> None:
    from matplotlib.patches import Rectangle

    _place(axes, patch.window, left, top, side)
    height, width = patch.window.shape[-2:]
    scale = side / max(height, width)
    box_top, box_left, box_height, box_width = (value * scale for value in patch.box)
    x = left + (side - width * scale) / 2 + box_left
    y = top + (side - height * scale) / 2 + box_top
    # White on black: one of the two shows on any picture.
    for colour, line in (("#000000", 2.2), ("#ffffff", 1.0)):
        axes.add_patch(Rectangle((x, y), box_width, box_height, fill=False, edgecolor=colour, linewidth=line, zorder=3))


def _wrapped(title: str, width: int) -> str:
    return "\n".join(textwrap.wrap(title, max(width, 6))) or " "


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}".replace(",", "\u2009")
