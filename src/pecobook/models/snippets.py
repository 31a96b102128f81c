"""Lines of Python for model cards, README files and the end of a run. Pasted, they apply a network to an image file.

No line starts a block (`with`, `for`) unless an empty line ends it, so the lines can also be pasted into an interactive
Python.
"""

from __future__ import annotations

import json
from pathlib import Path

PHOTO = "photo.jpg"
"""Stands for the user's image in all lines; `with_image` replaces it."""

BEST_CLASSES = "print(sorted(zip(probabilities.tolist(), classes), reverse=True)[:5])"
"""Prints the most probable classes; reads `probabilities` (C,) and the names `classes`."""


def quoted(text: str | Path) -> str:
    """Return a text as a literal of Python in double quotes."""
    return json.dumps(str(text), ensure_ascii=False)


def with_image(lines: str, image: Path) -> str:
    """Return the lines with the path of an image that exists in place of `PHOTO`; unchanged if `image` is missing."""
    return lines.replace(quoted(PHOTO), quoted(image)) if image.is_file() else lines


def example_image(run: str | Path) -> Path:
    """Return the path of the held-out image that a finished run keeps, for `with_image`; the file may be missing."""
    return Path(run) / "samples" / "example.png"


# Pillow computes here what `data.decode` and `data.views.center_crop` compute, to within rounding of 8 bits.
OPEN_IMAGE = f"""\
image = ImageOps.exif_transpose(Image.open({quoted(PHOTO)})).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")"""


def open_square(size: int, crop: float = 1.0) -> str:
    """Return lines that read an image with Pillow, crop the central square, and resize it.

    The lines need `Image` and `ImageOps` of Pillow. They read 8-bit images of any mode, as the library does.

    Args:
        size: side of the result, pixels.
        crop: side of the square, as a share of the image's shorter side.
    """
    side = "min(image.size)" if crop == 1 else f"round(min(image.size) * {crop})"
    return f"""\
{OPEN_IMAGE}
side = {side}
left, top = (image.width - side) // 2, (image.height - side) // 2
image = image.crop((left, top, left + side, top + side)).resize(({size}, {size}), Image.Resampling.BICUBIC)"""
