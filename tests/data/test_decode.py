"""Tests `decode` against Pillow for every image mode, and on every kind of broken file."""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from pecobook.data import decode as decode_module
from pecobook.data.decode import MAX_PIXELS, BadImage, decode, header_size, read_file
from pecobook.data.deep import ValueRange
from pecobook.errors import ConfigError

Pixels = npt.NDArray[np.uint8]


def picture(height: int = 24, width: int = 40, channels: int = 3) -> Pixels:
    """Make a picture that is smooth, as JPEG needs, and without symmetry, so that a wrong orientation is detected."""
    y, x = np.mgrid[:height, :width]
    planes = [
        60 + 150 * x / width + 30 * np.sin(y / 5),
        40 + 180 * y / height,
        200 - 120 * x * y / (width * height),
        40 + 200 * (x + y) / (width + height),
    ]
    return np.stack(planes[:channels], axis=-1).clip(0, 255).astype(np.uint8)


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def to_pixels(tensor: Tensor) -> Pixels:
    assert tensor.dtype == torch.uint8
    return np.asarray(tensor.permute(1, 2, 0).numpy())


def assert_close(decoded: Tensor, expected: Image.Image | npt.NDArray[Any], levels: int = 0) -> None:
    expected_pixels = np.asarray(expected).astype(int)
    pixels = to_pixels(decoded).astype(int)
    assert pixels.shape == expected_pixels.shape
    assert np.abs(pixels - expected_pixels).max() <= levels


def tiff(values: npt.NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    options = {"photometric": "rgb" if values.ndim == 3 else "minisblack", **options}
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def png_16(samples: npt.NDArray[np.uint16], colour_type: int) -> bytes:
    """Encode a 16-bit PNG by hand, because Pillow writes 16 bits only for grey images."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_8_bits_in_every_format(format_name: str, mode: str) -> None:
    data = encode(Image.fromarray(picture()).convert(mode), format_name)
    assert_close(decode(data), Image.open(io.BytesIO(data)).convert("RGB"), levels=2 * (format_name == "JPEG"))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_variants(options: dict[str, Any]) -> None:
    data = encode(Image.fromarray(picture()), "JPEG", **options)
    assert_close(decode(data), Image.open(io.BytesIO(data)), levels=2)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_one_channel(format_name: str, mode: str) -> None:
    data = encode(Image.fromarray(picture()).convert(mode), format_name)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"))[..., None]
    assert_close(decode(data, channels=1), expected, levels=2)


def test_cmyk_jpeg() -> None:
    data = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG")
    assert_close(decode(data), Image.open(io.BytesIO(data)).convert("RGB"), levels=2)


def test_ycck_jpeg() -> None:
    data = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x02"  # transform 2: the channels are YCCK
    at = data.find(b"\xff\xee")
    ycck = data[:2] + adobe + (data[2:] if at < 0 else data[2:at] + data[at + 16 :])
    assert_close(decode(ycck), Image.open(io.BytesIO(ycck)).convert("RGB"), levels=2)


def on_white(rgba: Pixels) -> npt.NDArray[Any]:
    alpha = rgba[..., 3:].astype(float) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "TIFF"])
def test_transparent_images_are_composited_on_white(format_name: str) -> None:
    options = {"lossless": True, "exact": True} if format_name == "WEBP" else {}
    data = encode(Image.fromarray(picture(channels=4), "RGBA"), format_name, **options)
    assert_close(decode(data), on_white(picture(channels=4)), levels=1)


def test_grey_with_alpha() -> None:
    rgba = picture(channels=4)
    grey = Image.fromarray(rgba[..., 0])
    grey.putalpha(Image.fromarray(rgba[..., 3]))
    rgba[..., 1] = rgba[..., 2] = rgba[..., 0]
    assert_close(decode(encode(grey, "PNG")), on_white(rgba), levels=1)


def test_16_bits_a_pixel_in_a_bmp() -> None:
    """Five or six bits of each colour: no deep values, so a range changes nothing."""
    words = np.array([[0xF800, 0x07E0], [0x001F, 0xFFFF]], "<u2")[::-1]  # red, green; blue, white; from the bottom up
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)
    data = struct.pack("<2sIHHI", b"BM", 74, 0, 0, 66) + header + masks + words.tobytes()
    expected = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]])
    assert_close(decode(data), expected)
    assert_close(decode(data, value_range=ValueRange(0, 4095)), expected)


def test_palette() -> None:
    image = Image.fromarray(picture()).quantize(16)
    assert_close(decode(encode(image, "PNG")), image.convert("RGB"))


def test_palette_with_transparency() -> None:
    image = Image.fromarray(picture()).quantize(16)
    clear = np.asarray(image) == 3
    assert clear.any()
    expected = np.asarray(image.convert("RGB")).copy()
    expected[clear] = 255
    assert_close(decode(encode(image, "PNG", transparency=3)), expected)


def test_transparent_colour_of_a_grey_png() -> None:
    grey = picture(channels=1)[..., 0]
    expected = np.where(grey == grey[0, 0], 255, grey)
    data = encode(Image.fromarray(grey), "PNG", transparency=int(grey[0, 0]))
    assert_close(decode(data), np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(format_name: str) -> None:
    samples = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    expected = np.repeat(np.rint(samples / 257)[..., None], 3, axis=-1)
    assert_close(decode(encode(Image.fromarray(samples), format_name)), expected)


def test_16_bit_big_endian_tiff() -> None:
    samples = np.linspace(0, 65535, 6).astype(">u2").reshape(2, 3)
    image = Image.frombytes("I;16B", (3, 2), samples.tobytes())
    decoded = decode(encode(image, "TIFF"))[0].numpy()
    assert (decoded == np.rint(samples.astype(float) / 257)).all()


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_png(colour_type: int, channels: int) -> None:
    samples = np.linspace(0, 65535, 24 * 40 * channels).reshape(24, 40, channels).astype(np.uint16)
    rgba = np.full((24, 40, 4), 255.0)
    rgba[..., :3] = (samples[..., :1] if channels == 2 else samples[..., :3]) / 257
    if channels != 3:
        rgba[..., 3] = samples[..., -1] / 257
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert_close(decode(png_16(samples, colour_type)), np.rint(expected), levels=2)


def test_floats_within_0_and_1_need_no_range() -> None:
    unit = np.linspace(0.25, 0.75, 24 * 40, dtype=np.float32).reshape(24, 40)
    data = encode(Image.fromarray(unit), "TIFF")
    assert_close(decode(data), np.repeat(np.rint(unit.astype(float) * 255)[..., None], 3, axis=-1))


@pytest.mark.parametrize("values", [np.full((3, 4), 7.0, np.float32), np.array([[-5, 0, 100_000]], np.int32)])
def test_other_values_without_a_range_are_refused(values: npt.NDArray[Any]) -> None:
    data = encode(Image.fromarray(values), "TIFF")
    with pytest.raises(BadImage, match="give --value-range LOW HIGH"):
        decode(data)


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_constant_float(value: float) -> None:
    data = encode(Image.fromarray(np.full((3, 4), value, np.float32)), "TIFF")
    assert decode(data).sum() == 0


def scaled(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[Any]:
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255)


def test_a_range_keeps_the_levels_of_12_bits_in_16_and_of_noise() -> None:
    samples = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    data = encode(Image.fromarray(samples), "PNG")
    assert len(np.unique(decode(data)[0])) == 17  # 0..65535 is the range of the type
    ranged = decode(data, value_range=ValueRange(0, 4095))
    assert len(np.unique(ranged[0])) == 256
    assert (ranged[0].numpy() == scaled(samples, 0, 4095)).all()
    noise = np.random.default_rng(0).normal(1000, 3, (24, 40)).astype(np.float32)
    noise[0, :3] = np.nan, np.inf, -np.inf
    pixels = decode(encode(Image.fromarray(noise), "TIFF"), value_range=ValueRange(0, 2000))[0]
    assert pixels[0, :3].tolist() == [0, 255, 0]
    assert int(pixels[1:].max()) - int(pixels[1:].min()) <= 3


def test_a_range_does_not_change_8_bits() -> None:
    for data in (encode(Image.fromarray(picture()), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF")):
        assert decode(data, value_range=ValueRange(5, 20)).equal(decode(data))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_range_of_16_bit_tiff(channels: int, order: str, compression: str | None) -> None:
    samples = np.random.default_rng(1).integers(0, 4096, (6, 9, channels)).astype(np.uint16)
    data = tiff(samples.squeeze(), byteorder=order, compression=compression)
    expected = np.broadcast_to(scaled(samples, 0, 4095), (6, 9, 3))
    assert_close(decode(data, value_range=ValueRange(0, 4095)), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["int16", "int32", "float32"])
def test_a_range_of_signed_integers_and_floats(dtype: str, order: str, compression: str | None) -> None:
    samples = np.random.default_rng(2).uniform(-1024, 3071, (6, 9)).astype(dtype)
    data = tiff(samples, byteorder=order, compression=compression)
    expected = np.repeat(scaled(samples, -1024, 3071)[..., None], 3, axis=-1)
    assert_close(decode(data, value_range=ValueRange(-1024, 3071)), expected)


def test_a_range_of_unsigned_32_bit_integers() -> None:
    samples = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    data = tiff(samples, byteorder="<")
    assert decode(data, value_range=ValueRange(0, 2**32 - 1))[0].tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_range_of_16_bit_png(channels: int) -> None:
    samples = np.random.default_rng(3).integers(0, 4096, (6, 9, channels)).astype(np.uint16)
    opaque = scaled(samples[..., : 3 if channels > 2 else 1], 0, 4095)
    if channels in (2, 4):
        samples[..., -1] = np.where(np.arange(9) % 2, 65535, 0)  # every second column is clear: white
        opaque[:, ::2] = 255
    data = png_16(samples, {1: 0, 2: 4, 3: 2, 4: 6}[channels])
    assert_close(decode(data, value_range=ValueRange(0, 4095)), np.broadcast_to(opaque, (6, 9, 3)))
    luma = decode(data, channels=1, value_range=ValueRange(0, 4095))
    rgb = Image.fromarray(np.broadcast_to(opaque, (6, 9, 3)).astype(np.uint8))
    assert_close(luma, np.asarray(rgb.convert("L"))[..., None])


def test_transparent_value_of_a_16_bit_png() -> None:
    samples = np.array([[5, 700, 4095]], np.uint16)
    data = encode(Image.fromarray(samples), "PNG", transparency=5)
    assert decode(data, value_range=ValueRange(0, 4095))[0].tolist() == [[255, 44, 255]]


@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_pgm_and_ppm_state_their_largest_value(kind: str) -> None:
    samples = np.array([[[0, 100, 200], [1000, 500, 250]]], ">u2")[..., : 3 if kind == "P6" else 1]
    data = f"{kind} 2 1 1000\n".encode() + samples.tobytes()
    assert_close(decode(data), np.broadcast_to(scaled(samples, 0, 1000), (1, 2, 3)))
    assert_close(decode(data, value_range=ValueRange(0, 500)), np.broadcast_to(scaled(samples, 0, 500), (1, 2, 3)))


def test_white_is_zero() -> None:
    grey = np.array([[0, 40, 255]], np.uint8)
    assert decode(tiff(grey, photometric="miniswhite"))[0].tolist() == [[255, 215, 0]]
    deep = np.array([[0, 16 * 40, 4095]], np.uint16)
    data = tiff(deep, photometric="miniswhite", byteorder="<")
    assert decode(data, value_range=ValueRange(0, 4095))[0].tolist() == [[255, 215, 0]]
    assert decode(tiff(deep * 16, photometric="miniswhite", byteorder="<"))[0].tolist() == [[255, 215, 0]]


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "int64", "uint64", "float16", "float64"])
def test_every_type_of_a_tiff(dtype: str, compression: str | None, order: str, photometric: str) -> None:
    samples = np.random.default_rng(4).uniform(0, 3000, (6, 9)).astype(dtype)
    data = tiff(samples, byteorder=order, compression=compression, photometric=photometric)
    share = np.clip(samples.astype(float) / 3000, 0, 1)
    expected = np.rint(255 * (1 - share if photometric == "miniswhite" else share))
    assert_close(decode(data, value_range=ValueRange(0, 3000)), np.repeat(expected[..., None], 3, axis=-1), levels=1)
    assert header_size(data) == (6, 9)


def test_16_bit_colours_in_planes_are_refused() -> None:
    data = tiff(np.zeros((3, 5, 7), np.uint16), planarconfig="separate", photometric="rgb")
    with pytest.raises(BadImage, match="separate planes"):
        decode(data)


def test_1_bit() -> None:
    bits = picture(channels=1)[..., 0] > 128
    data = encode(Image.fromarray(bits), "PNG")
    assert_close(decode(data), np.repeat((bits * 255)[..., None], 3, axis=-1))


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


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_one_pixel(format_name: str) -> None:
    data = encode(Image.new("RGB", (1, 1), (255, 255, 255)), format_name)
    assert decode(data).tolist() == [[[255]]] * 3


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_and_first_page(format_name: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format_name == "WEBP" else {}
    data = encode(frames[0], format_name, save_all=True, append_images=frames[1:], **options)
    assert decode(data)[:, 3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format_name", ["JPEG", "WEBP"])
def test_common_photographs_take_the_fast_path(format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("Pillow decoded it")

    monkeypatch.setattr(decode_module, "from_pillow", refuse)
    assert decode(encode(Image.fromarray(picture()), format_name)).shape == (3, 24, 40)


def png_header(width: int, height: int, colour_type: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + b"\0\0\0\0IDAT\0\0\0\0"
    )


def valid(format_name: str) -> bytes:
    return encode(Image.fromarray(picture()), format_name)


BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am a text file that was renamed to .jpg", "not an image"),
    "one byte": (b"\xff", "not an image"),
    "truncated jpeg": (valid("JPEG")[:-20], "truncated"),
    "truncated png": (valid("PNG")[:-200], "truncated"),
    "truncated webp": (valid("WEBP")[:-50], ""),
    "truncated tiff": (valid("TIFF")[:300], ""),
    "header only": (valid("JPEG")[:30], ""),
    "png signature only": (valid("PNG")[:8], ""),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    "rgba bomb": (png_header(13_370, 13_370, 6), "PECOBOOK_MAX_PIXELS raises this limit"),
    "no width": (png_header(0, 5, 2), ""),
    "no height": (b"P6\n5 0\n255\n", ""),
    "bomb": (b"P6\n20000 20000\n255\n", f"more than {MAX_PIXELS:,} pixels"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_bad_images(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    data, reason = BROKEN[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage) as caught:
            decode(data, name="a/b.jpg")
    assert caught.value.name == "a/b.jpg"
    assert reason in caught.value.reason
    assert caught.value.reason
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_large_image_causes_no_warning(capfd: pytest.CaptureFixture[str]) -> None:
    data = encode(Image.new("1", (10_000, 9_000)), "PNG")  # above Pillow's warning, below its error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data, channels=1).shape == (1, 9_000, 10_000)
    assert capfd.readouterr() == ("", "")


def test_pillows_limit_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImage, match="20000 x 20000"):
        decode(BROKEN["bomb"][0])


def test_the_limit_of_pixels_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.fromarray(picture()), "JPEG")
    monkeypatch.setenv("PECOBOOK_MAX_PIXELS", "960")
    assert decode(data).shape == (3, 24, 40)
    monkeypatch.setenv("PECOBOOK_MAX_PIXELS", "959")
    with pytest.raises(BadImage, match=r"a\.jpg: 40 x 24 is more than 959 pixels"):
        decode(data, name="a.jpg")
    monkeypatch.setenv("PECOBOOK_MAX_PIXELS", "many")
    with pytest.raises(ConfigError, match="PECOBOOK_MAX_PIXELS is 'many'"):
        decode(data)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "RGB"])
def test_large_images_are_converted_in_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(picture(channels=4), "RGBA")
    image = image.convert("RGB").convert(mode) if mode in ("CMYK", "P") else image.convert(mode)
    data = encode(image, "TIFF" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    whole = decode(data)
    monkeypatch.setattr(decode_module, "_STRIP_PIXELS", 7 * 40)
    assert decode(data).equal(whole)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.png"))
    kinds = {"pipe": "a named pipe", "link": "a device", "folder": "a folder", "s": "a socket"}
    for stem, kind in kinds.items():
        with pytest.raises(BadImage, match=f"{stem}.png: {kind}, not a regular file"):
            read_file(tmp_path / f"{stem}.png")
        assert header_size(tmp_path / f"{stem}.png") is None
    with pytest.raises(BadImage, match="No such file"):
        read_file(tmp_path / "none.png")


def test_a_file_of_40_gb_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    with file.open("wb") as sparse:
        sparse.truncate(40 * 10**9)
    with pytest.raises(BadImage, match="40,000,000,000 bytes are more than 1,073,741,824"):
        read_file(file)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=12),
    st.floats(0.1, 1),
)
def test_damaged_files_are_decoded_or_bad_images(
    format_name: str, changes: list[tuple[float, int]], share: float
) -> None:
    data = bytearray(valid(format_name))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        pixels = decode(bytes(data[: max(1, int(share * len(data)))]))
    except BadImage:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3


def test_bad_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImage("x.jpg", "empty file")))
    assert (error.name, error.reason, str(error)) == ("x.jpg", "empty file", "x.jpg: empty file")


def test_channels_are_checked() -> None:
    with pytest.raises(ValueError, match="channels"):
        decode(valid("PNG"), channels=2)
