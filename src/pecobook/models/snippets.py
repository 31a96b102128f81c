"""Python code for model cards, README files and the end of a run. Pasted, it applies a network to an image file.

No line starts a block (`with`, `for`) unless an empty line ends it, so the code can also be pasted into an interactive
Python.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pecobook.settings.images import AUTO, RangeSetting

PHOTO = "photo.jpg"
"""Placeholder for the user's image in all code; `with_image` replaces it."""

BEST_CLASSES = "print(sorted(zip(probabilities.tolist(), classes), reverse=True)[:5])"
"""Prints the most probable classes; reads `probabilities` (C,) and the names `classes`."""

TO_GREY = "images = 0.2989 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]  # grey\n"
"""Converts `images` (B, 3, H, W) for a single-channel tokenizer."""


def quoted(text: str | Path) -> str:
    """Return a text as a double-quoted Python literal."""
    return json.dumps(str(text), ensure_ascii=False)


def with_image(lines: str, image: Path) -> str:
    """Return the code with the path of an existing image in place of `PHOTO`; unchanged if `image` is missing."""
    return lines.replace(quoted(PHOTO), quoted(image)) if image.is_file() else lines


def example_image(run: str | Path) -> Path:
    """Return the path of the held-out image that a finished run keeps, for `with_image`; the file may be missing."""
    return Path(run) / "samples" / "example.png"


def open_image(value_range: RangeSetting = AUTO) -> str:
    """Return code that reads an image of any mode; it needs `np`, and `Image` and `ImageOps` from Pillow.

    Here Pillow computes what `data.decode` and `data.views.center_crop` compute, up to 8-bit rounding. For 16-bit
    colours Pillow reads only the high bytes.

    Args:
        value_range: the values mapped to black and white in images with more than 8 bits, the network's `value_range`;
            `AUTO` uses the 16-bit range.
    """
    deep, values = 'image.mode.startswith("I;16")', "np.asarray(image) / 257"
    if value_range != AUTO:
        low, high = map(float, value_range)
        deep = 'image.mode[0] in "IF"'
        values = f"(np.asarray(image, float).clip({low:.10g}, {high:.10g}) - {low:.10g}) / {high - low:.10g} * 255"
    return f"""\
image = ImageOps.exif_transpose(Image.open({quoted(PHOTO)}))
image = Image.fromarray(np.uint8(np.rint({values}))) if {deep} else image
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")"""


def read_image_call(value_range: RangeSetting, *arguments: object) -> str:
    """Return a call of `pecobook.read_image` for `PHOTO` with additional arguments and a network's range."""
    ranged = [] if value_range == AUTO else [f"value_range=({', '.join(f'{float(v):.10g}' for v in value_range)})"]
    return f"read_image({', '.join([quoted(PHOTO), *map(str, arguments), *ranged])})"


def range_text(value_range: RangeSetting) -> str:
    """Return a sentence on the value range that a network was trained with; empty for `AUTO`."""
    if value_range == AUTO:
        return ""
    low, high = (f"{float(value):.10g}" for value in value_range)
    return f"In images with more than 8 bits the values {low}..{high} become black..white, as in training."


def open_square(size: int, crop: float = 1.0, value_range: RangeSetting = AUTO) -> str:
    """Return code that reads an image with Pillow, crops the central square, and resizes it.

    It needs the same imports as that of `open_image`.

    Args:
        size: side of the result, in pixels.
        crop: side of the square, as a fraction of the image's shorter side.
        value_range: as in `open_image`.
    """
    side = "min(image.size)" if crop == 1 else f"round(min(image.size) * {crop})"
    return f"""\
{open_image(value_range)}
side = {side}
left, top = (image.width - side) // 2, (image.height - side) // 2
image = image.crop((left, top, left + side, top + side)).resize(({size}, {size}), Image.Resampling.BICUBIC)"""


def normalise(mean: Sequence[float], std: Sequence[float]) -> str:
    """Return code that makes the network's input `pixels`, float (3, S, S), from the `image` of `open_square`.

    It needs `np` and `torch`.
    """
    mean_text, std_text = (f"torch.tensor({list(values)})[:, None, None]" for values in (mean, std))
    return f"""\
pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
pixels = (pixels - {mean_text}) / {std_text}"""


def transformers_lines(folder: str, *, is_classifier: bool, value_range: RangeSetting) -> str:
    """Return code that applies an export in transformers' format."""
    auto = "AutoModelForImageClassification" if is_classifier else "AutoModel"
    result = (
        """\
probabilities = model(**inputs).logits.softmax(1)[0].detach()
classes = [model.config.id2label[number] for number in range(len(probabilities))]
"""
        + BEST_CLASSES
    )
    return f"""\
import numpy as np
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained({quoted(folder)})
model = {auto}.from_pretrained({quoted(folder)}).eval()
{open_image(value_range)}
inputs = processor(image, return_tensors="pt")
{result if is_classifier else "features = model(**inputs).pooler_output[0].detach()" + chr(10) + "print(features)"}"""
