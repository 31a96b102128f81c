"""The ground that all pictures share: transparent, neutral ink, one colour a name, PNG bytes.

A picture must read on a white page, on a dark page and in a README on GitHub, 350 px wide on a phone. So the
ground is transparent, text and axes are a grey with a contrast of at least 4 on both, colours are of
middling lightness and told apart by marker and dash as well, and figures are narrow with large type rather
than wide. matplotlib is used without pyplot: no global state, no display, safe in threads.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

INK = "#7b7b80"
"""Text and axes: contrast 4.2 on white, 4.5 on the report's dark ground."""
FAINT = "#8f8f9455"
"""Grid lines and frames."""
DPI = 220
"""Dots per inch. Reports show a picture at half its pixels, so it stays sharp on dense screens."""

# Okabe and Ito's palette, moved to middling lightness. The demo's roles keep their colour in every figure.
_ROLES = {"perceptual": "#2a8fd8", "control": "#d9822b", "pixel": "#1fa37c", "untrained": "#8a8a90"}
_OTHERS = ("#c0699f", "#a3912a", "#7d7fd1", "#c94f3d", "#5f9ea8")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_DASHES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, marker and dash for each of `names`, as keyword arguments of matplotlib's `plot`.

    `perceptual`, `control` and `pixel` always look the same; other names are served in their order.
    """
    free = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    roles = list(_ROLES)
    out: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(dict.fromkeys(names)):
        slot = roles.index(name) if name in _ROLES else len(roles) + place
        colour = _ROLES[name] if name in _ROLES else next(free)
        out[name] = {
            "color": colour,
            "marker": _MARKERS[slot % len(_MARKERS)],
            "linestyle": _DASHES[slot % len(_DASHES)],
        }
    return out


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches with its own Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="none")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, *, grid: str = "both") -> None:
    """Two quiet spines, neutral ticks, faint grid lines along `grid` (`x`, `y`, `both` or `none`)."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelcolor=INK, labelsize=9.5, length=0, pad=4)
    axes.tick_params(which="minor", length=0)
    if grid != "none":
        axes.grid(True, axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def plain(text: str) -> str:
    """Text that matplotlib draws as it stands: a dollar sign would begin a formula, and legends leave out `_name`."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """The figure as PNG, cut to its contents, without a time stamp so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=DPI,
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.04,
        metadata={"Software": None},
    )
    return buffer.getvalue()


def picture_array(image: Tensor) -> NDArray[Any]:
    """One image (3, H, W) in [0, 1] as matplotlib draws it, (H, W, 3); NaN is black."""
    clean = image.detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    return np.asarray(clean.permute(1, 2, 0).numpy())
