"""The EXIF orientation, in every place and form, and the size that a header gives, against Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pecobook.data.decode import decode, header_size
from pecobook.data.deep import ValueRange
from tests.data.pictures import assert_close, encode, picture, scaled, tiff


def exif_bytes(orientation: int, order: str = "<", kind: str = "H") -> bytes:
    """Make EXIF data with an orientation of the type SHORT (H) or LONG (I), in either order of bytes."""
    value = struct.pack(order + kind, orientation).ljust(4, b"\0")
    entry = struct.pack(order + "HHI", 0x0112, 3 if kind == "H" else 4, 1) + value
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return b"Exif\0\0" + head + struct.pack(order + "H", 1) + entry + b"\0" * 4


def assert_upright(data: bytes, orientation: int, levels: int = 0) -> None:
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((24, 40) if orientation >= 5 else (40, 24))
    assert_close(decode(data), expected, levels=levels)
    assert header_size(data) == (expected.height, expected.width)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format_name: str, orientation: int) -> None:
    for mode in ("RGB", "L"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(Image.fromarray(picture()).convert(mode), format_name, exif=exif)
        assert_upright(data, orientation, levels=2 * (format_name == "JPEG"))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["H", "I"])
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_of_every_type(format_name: str, kind: str, order: str) -> None:
    exif = exif_bytes(6, order, kind)
    assert_upright(encode(Image.fromarray(picture()), format_name, exif=exif), 6, levels=2 * (format_name == "JPEG"))


@pytest.mark.parametrize("marker", [b"\xff\xe1", b"\xff\xe2"])
@pytest.mark.parametrize("size", [40, 60_000])
def test_exif_orientation_behind_another_segment(marker: bytes, size: int) -> None:
    data = encode(Image.fromarray(picture()), "JPEG", exif=exif_bytes(8))
    text = b"http://ns.adobe.com/xap/1.0/\0<x/>".ljust(size)
    segment = marker + struct.pack(">H", len(text) + 2) + text
    assert_upright(data[:2] + segment + data[2:], 8, levels=2)


@pytest.mark.parametrize("where", ["before", "after"])
def test_exif_orientation_beside_the_pixels_of_a_png(where: str) -> None:
    data = encode(Image.fromarray(picture()), "PNG")
    body = exif_bytes(5)[6:]
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    at = data.index(b"IDAT" if where == "before" else b"IEND") - 4
    assert_upright(data[:at] + chunk + data[at:], 5)


@pytest.mark.parametrize("kind", ["exif", "APP1"])  # as old and new versions of ImageMagick call it
def test_exif_orientation_in_a_text_of_a_png(kind: str) -> None:
    body = exif_bytes(6)
    text = f"\n{kind}\n{len(body):8}\n{body.hex()}\n".encode()
    chunk_body = f"Raw profile type {kind}".encode() + b"\0\0" + zlib.compress(text)
    chunk = (
        struct.pack(">I", len(chunk_body)) + b"zTXt" + chunk_body + struct.pack(">I", zlib.crc32(b"zTXt" + chunk_body))
    )
    for mark in (b"IDAT", b"IEND"):
        data = encode(Image.fromarray(picture()), "PNG")
        at = data.index(mark) - 4
        assert_close(decode(data[:at] + chunk + data[at:]), np.rot90(picture(), -1))
        assert header_size(data[:at] + chunk + data[at:]) == (40, 24)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"bigtiff": True}])
def test_orientation_of_a_tiff_that_pillow_does_not_read(options: dict[str, Any]) -> None:
    upright = picture(channels=1)[..., 0]
    data = tiff(np.rot90(upright) / 255.0, extratags=[(0x0112, "H", 1, 6, True)], **options)
    assert_close(decode(data), np.repeat(upright[..., None], 3, axis=-1))
    assert header_size(data) == upright.shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw"])
def test_orientation_of_a_16_bit_tiff(compression: str | None, orientation: int) -> None:
    samples = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(samples), "TIFF", compression=compression, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (expected.shape == (40, 24)) == (orientation >= 5)
    assert decode(data, value_range=ValueRange(0, 959))[0].equal(torch.from_numpy(scaled(expected, 0, 959)).byte())
    assert header_size(data) == expected.shape


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_invalid_orientation_is_ignored(value: int) -> None:
    data = encode(Image.fromarray(picture()), "JPEG", exif=exif_bytes(value))
    assert decode(data).shape == (3, 24, 40)
    assert header_size(data) == (24, 40)
