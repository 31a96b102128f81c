"""The numbers of a mask file: the right values, or a refusal by name."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pecobook.data.dense.mask_files import InvalidMask
from tests.data.dense.masks import decode_mask, png, tiff


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_decode_mask__grey_of_every_depth_holds_its_samples(depth: int) -> None:
    samples = np.array([[0, 1, min(2, 2**depth - 1)], [2**depth - 1, 0, 1]])
    assert decode_mask(png(samples, depth), None, name="x").tolist() == samples.tolist()


def test_decode_mask__grey_with_a_largest_value_of_its_own() -> None:
    for data in (
        b"P5\n3 1\n2\n\0\1\2",
        b"P2\n3 1\n2\n0 1 2\n",
        b"P5\n3 1\n65535\n\0\0\0\1\0\2",
        b"P5\n3 1\n255\n\0\1\2",
    ):
        assert decode_mask(data, None, name="x").tolist() == [[0, 1, 2]]
    assert decode_mask(b"P5\n3 1\n300\n\0\1\0\2\1\x2c", None, name="x").tolist() == [[1, 2, 300]]


def test_decode_mask__whole_numbers_in_wide_formats() -> None:
    values = np.array([[0, 3, 255]])
    for kind in (np.int32, np.uint16, np.int16, np.float32):
        assert decode_mask(tiff(values.astype(kind)), None, name="x").tolist() == [[0, 3, 255]]
    grey = np.repeat(values[..., None], 3, -1).astype(np.uint8)
    assert decode_mask(png(grey, 8, 2), None, name="x").tolist() == [[0, 3, 255]]
    opaque = np.concatenate([grey, np.full((1, 3, 1), 255)], -1)
    assert decode_mask(png(opaque, 8, 6), None, name="x").tolist() == [[0, 3, 255]]
    hidden = opaque.copy()
    hidden[0, 0, 3] = 0  # transparent and black
    assert decode_mask(png(hidden, 8, 6), None, name="x").tolist() == [[0, 3, 255]]


def numpy_file(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32])
def test_decode_mask__numpy_arrays(kind: Any) -> None:
    values = np.array([[0, 3, 255], [1, 1, 2]])
    for array in (values, values[None], values[..., None]):
        assert decode_mask(numpy_file(array.astype(kind)), None, name="x").tolist() == values.tolist()


def test_decode_mask__is_turned_by_its_own_orientation() -> None:
    values = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", exif=exif)
    assert np.array_equal(decode_mask(buffer.getvalue(), None, name="x"), np.rot90(values, -1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (numpy_file(np.zeros((2, 2, 3))), "is an array of shape"),
        (numpy_file(np.array([[0.5, 1]])), "holds fractions"),
        (numpy_file(np.array([[-1, 1]])), "holds a negative value"),
        (tiff(np.array([[-1, 0, 2]], np.int32)), "holds the value -1"),
        (tiff(np.array([[0, 0.5]], np.float32)), "holds fractions"),
        (tiff(np.array([[0, np.nan]], np.float32)), "holds fractions"),
        (tiff(np.zeros((2, 2), np.uint8), tiffinfo={262: 0}), "whose 0 is white"),
        (png(np.ones((2, 2, 3), int), 16, 2), "a colour picture of 16 bits"),
        (png(np.ones((2, 2, 2), int), 16, 4), "a colour picture of 16 bits"),
        (png([[[7, 7, 7, 0], [1, 1, 1, 255]]], 8, 6), "transparent pixels that are not black"),
    ],
)
def test_decode_mask__refuses_what_has_no_class_numbers(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidMask, match=reason):
        decode_mask(data, None, name="x")


def test_decode_mask__refuses_several_pages() -> None:
    buffer = io.BytesIO()
    pages = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 1)]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(InvalidMask, match="has 2 pages"):
        decode_mask(buffer.getvalue(), None, name="x")
