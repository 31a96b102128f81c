"""The common style of all pictures: white paper, dark text, a fixed style for each name, PNG bytes.

A picture must be readable on a white page, on a dark page, in a README on GitHub, in print, and 350 px wide on a
phone. It therefore has its own paper; text has a contrast of at least 7 and each colour one of at least 4.5 on it (WCAG
AA), so that names can be written in their colours; roles also differ to colour-blind readers, and curves in marker and
dash; figures are narrow with large type. matplotlib is used without pyplot, so there is no global state, no display is
needed, and threads are safe.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

PAPER = "#ffffff"
"""Colour of the background."""
INK = "#50535a"
"""Colour of text and axes."""
FAINT = "#00000024"
"""Colour of grid lines and frames."""
DPI = 220
"""Dots per inch. Reports show a picture at half its size in pixels, so that it is sharp on high-resolution screens."""

# The three codebooks have the same colours in every figure, in the order of lightness too.
ROLES = {"perceptual": "#1565c0", "control": "#c05600", "pixel": "#004a3f", "untrained": "#74747c"}
OTHERS = ("#8e3a80", "#756500", "#5a55c8", "#b23a2e", "#39717d")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_DASHES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Choose a colour, marker and dash for each of `names`, as keyword arguments of matplotlib's `plot`.

    `perceptual`, `control`, `pixel` and `untrained` have the same style in every figure; other names get styles in
    their order.
    """
    unused_colours = iter(OTHERS * (1 + len(names) // len(OTHERS)))
    roles = list(ROLES)
    style_of: dict[str, dict[str, Any]] = {}
    for position, name in enumerate(dict.fromkeys(names)):
        slot = roles.index(name) if name in ROLES else len(roles) + position
        colour = ROLES[name] if name in ROLES else next(unused_colours)
        style_of[name] = {
            "color": colour,
            "marker": _MARKERS[slot % len(_MARKERS)],
            "linestyle": _DASHES[slot % len(_DASHES)],
        }
    return style_of


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of `width` x `height` inches with an Agg canvas."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, *, grid: str = "both") -> None:
    """Show only the left and bottom spines, and draw neutral ticks and faint grid lines.

    `grid` is `x`, `y`, `both` or `none`.
    """
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.set_facecolor(PAPER)
    axes.tick_params(colors=INK, labelcolor=INK, labelsize=9.5, length=0, pad=4)
    axes.tick_params(which="minor", length=0)
    if grid != "none":
        axes.grid(True, axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def escape_text(text: str) -> str:
    """Escape text so that matplotlib draws it unchanged: "$" would start a formula, and legends omit "_name"."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """Encode a figure as PNG, cropped to its contents, without a time stamp, so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # in the name of a class; it is drawn as a box
        figure.savefig(
            buffer,
            format="png",
            dpi=DPI,
            bbox_inches="tight",
            pad_inches=0.06,
            metadata={"Software": None},
        )
    return buffer.getvalue()


def picture_array(image: Tensor) -> NDArray[Any]:
    """Convert an image (3, H, W) in [0, 1] to an array (H, W, 3) for matplotlib; NaN becomes black."""
    finite = image.detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    return np.asarray(finite.permute(1, 2, 0).numpy())
