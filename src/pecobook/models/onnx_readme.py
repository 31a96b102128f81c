"""README.md of an ONNX export: the file's inputs and outputs, and Python that needs onnxruntime, NumPy and Pillow.

The code opens the files by name, in the folder of the README.
"""

from __future__ import annotations

from typing import Any

from pecobook.models.snippets import BEST_CLASSES, TO_GREY, open_image, open_square
from pecobook.settings.images import MAX_IMAGE_SIZE, RangeSetting
from pecobook.settings.segment import SegmentTestConfig

_IMPORTS = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps
"""
_TO_ARRAY = "images = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None] / 255"
_CLASSES = 'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])'


def readme(metadata: dict[str, Any], lines: str) -> str:
    """Return the text of README.md; long lists of class names are not repeated."""
    rows = [
        f"- `{name}`: {f'{len(value)} names, in the order of the scores' if name == 'classes' else value}"
        for name, value in metadata.items()
    ]
    return (
        "# ONNX files, written by pecobook\n\nThe files carry this as metadata; lists are JSON:\n\n"
        f"{chr(10).join(rows)}\n\n"
        "The normalisation is inside the graph. This needs `pip install onnxruntime numpy pillow` and nothing else; "
        f"run it in this folder:\n\n```python\n{lines}\n```\n"
    )


def backbone_lines(size: int, value_range: RangeSetting) -> str:
    """Return Python code that computes the features of an image at S = `size`."""
    return f"""\
{_IMPORTS}
session = onnxruntime.InferenceSession("model.onnx")
{open_square(size, value_range=value_range)}
{_TO_ARRAY}
features = session.run(None, {{"images": images}})[0][0]
print(features)"""


def classifier_lines(size: int, crop: float, value_range: RangeSetting) -> str:
    """Return Python code that classifies an image's central square, `crop` of the shorter side, at S = `size`."""
    return f"""\
import json

{_IMPORTS}
session = onnxruntime.InferenceSession("model.onnx")
{_CLASSES}
{open_square(size, crop, value_range)}
{_TO_ARRAY}
logits = session.run(None, {{"images": images}})[0][0]
probabilities = np.exp(logits - logits.max())
probabilities = probabilities / probabilities.sum()
{BEST_CLASSES}"""


def tokenizer_lines(size: int, channels: int, value_range: RangeSetting, *, draws: bool = True) -> str:
    """Return Python code that encodes an image's central square at `size` pixels and decodes the codes.

    A decoder that does not draw images predicts features.
    """
    as_rgb = "restored.repeat(3, axis=1)" if channels == 1 else "restored"
    decoded = f"""\
restored = decoder.run(None, {{"codes": codes}})[0]
picture = {as_rgb}[0].transpose(1, 2, 0) * 255
Image.fromarray(picture.round().astype(np.uint8)).save("restored.png")"""
    if not draws:
        decoded = 'print(decoder.run(None, {"codes": codes})[0].shape)  # the features that the decoder predicts'
    return f"""\
{_IMPORTS}
encoder, decoder = onnxruntime.InferenceSession("encoder.onnx"), onnxruntime.InferenceSession("decoder.onnx")
{open_square(size, value_range=value_range)}
{_TO_ARRAY}
{TO_GREY if channels == 1 else ""}codes = encoder.run(None, {{"images": images.astype(np.float32)}})[0]
print(codes)
{decoded}"""


def segmenter_lines(size: int, step: int, value_range: RangeSetting) -> str:
    """Return Python code that segments an image of any size with windows of S = `size`, `step` pixels apart.

    It computes what `pecobook predict --test.mode slide` computes: the mean over square windows. The graph reads only
    windows of S x S, so the short side becomes S even if `--test.max-side` would make the image smaller.
    """
    ratio = SegmentTestConfig().max_side / size
    return f"""\
import json

{_IMPORTS}
session = onnxruntime.InferenceSession("model.onnx")
{_CLASSES}
{open_image(value_range)}
# As `pecobook predict --test.mode slide`: the mean over square windows; the short side becomes {size} pixels.
# Only images more than {ratio:.2g} times as long as wide differ: predict makes them smaller, unless it is given
# `--test.max-side {MAX_IMAGE_SIZE}`.
scale = {size} / min(image.size)
width, height = (max(int(side * scale + 0.5), {size}) for side in image.size)
small = image.resize((width, height), Image.Resampling.BICUBIC)
images = np.asarray(small, dtype=np.float32).transpose(2, 0, 1)[None] / 255
tops, lefts = ([*range(0, side - {size}, {step}), side - {size}] for side in (height, width))
scores, count = np.zeros((len(classes), height, width), np.float32), np.zeros((height, width), np.float32)
for top, left in [(top, left) for top in tops for left in list(lefts)]:
    window = np.s_[:, top : top + {size}, left : left + {size}]
    scores[window] += session.run(None, {{"images": images[:, :, window[1], window[2]]}})[0][0]
    count[window[1:]] += 1

def stretched(plane, size, axis):  # bilinear
    place = ((np.arange(size) + 0.5) * plane.shape[axis] / size - 0.5).clip(0, plane.shape[axis] - 1)
    low, part = place.astype(int), np.expand_dims(place % 1, 1 - axis).astype(np.float32)
    high = np.minimum(low + 1, plane.shape[axis] - 1)
    return plane.take(low, axis) * (1 - part) + plane.take(high, axis) * part

best, result = np.full((image.height, image.width), -np.inf), np.zeros((image.height, image.width), np.int64)
for number, plane in enumerate(scores / count):
    plane = stretched(stretched(plane, image.height, 0), image.width, 1)
    result[plane > best] = number
    best = np.maximum(best, plane)

print({{classes[number]: int((result == number).sum()) for number in np.unique(result)}})  # pixels of each class
Image.fromarray(result.astype(np.uint8 if len(classes) <= 256 else np.uint16)).save("classes.png")"""
