"""Formats beside those of Pillow: NumPy arrays, HEIC and AVIF."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from pecobook.data.decode import BadImage, decode, header_size
from pecobook.data.deep import ValueRange
from tests.data.pictures import assert_close, encode, picture


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
def test_integer_arrays(shape: tuple[int, ...], dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape)
    factor = 1 if dtype == "u1" else 257
    data = npy((values * factor).astype(dtype))
    expected = np.broadcast_to(values.reshape(4, 6, -1), (4, 6, 3)).transpose(2, 0, 1)
    assert decode(data).numpy().tolist() == expected.tolist()
    assert header_size(data) == (4, 6)


def test_arrays_of_12_bits_floats_and_alpha() -> None:
    assert decode(npy(np.array([[0, 4095]], np.uint16)), value_range=ValueRange(0, 4095))[0].tolist() == [[0, 255]]
    assert decode(npy(np.array([[0, 0.2, 1]], np.float32)))[0].tolist() == [[0, 51, 255]]
    assert decode(npy(np.array([[[9, 9, 9, 255], [9, 9, 9, 0]]], np.uint8)))[0].tolist() == [[9, 255]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.zeros((3, 4, 6), np.uint8)), r"an array of uint8 \(3, 4, 6\) is no image"),
        (npy(np.zeros((4, 6), np.int64)), r"an array of int64 \(4, 6\) is no image"),
        (npy(np.zeros((4, 6), np.uint8).T), r"in the order of Fortran is no image"),
        (npy(np.array(["text"], object)), "an array of object"),
        (npy(np.zeros((4, 6), np.uint8))[:-3], "truncated"),
        (b"\x93NUMPY", "."),
    ],
)
def test_arrays_that_are_no_images(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")
def test_avif() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 100, 50)).save(buffer, "AVIF", quality=100)
    difference = decode(buffer.getvalue()).float() - torch.tensor([200.0, 100, 50])[:, None, None]
    assert difference.abs().max() < 4


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_heic_names_what_to_install() -> None:
    with pytest.raises(BadImage, match=r"pip install 'pecobook\[heic\]'"):
        decode(b"\0\0\0\x18ftypheic" + bytes(40))


def test_a_bitmap_without_a_file_header() -> None:
    assert_close(decode(encode(Image.fromarray(picture()), "DIB")), picture())


def test_a_pointer_of_git_lfs_is_named() -> None:
    with pytest.raises(BadImage, match=r"a.png: a pointer of Git LFS, not an image: 'git lfs pull' fetches the images"):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", name="a.png")
