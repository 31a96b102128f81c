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
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pecobook.data import decode as decode_module
from pecobook.data.decode import MAX_PIXELS, BadImage, decode, header_size, read_file
from pecobook.data.deep import ValueRange
from pecobook.errors import ConfigError
from tests.data.pictures import Pixels, assert_close, encode, picture


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
def test_colour_and_grey(format_name: str, mode: str) -> None:
    data = encode(Image.fromarray(picture()).convert(mode), format_name)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert_close(decode(data), expected, levels=2)


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


def test_1_bit() -> None:
    bits = picture(channels=1)[..., 0] > 128
    data = encode(Image.fromarray(bits), "PNG")
    assert_close(decode(data), np.repeat((bits * 255)[..., None], 3, axis=-1))


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


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


PLAIN = {
    "usual": (b"", True),
    "comment": (segment(0xFE, b"x" * 100), True),
    "colour profile": (segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 200), True),
    "further images": (segment(0xE2, b"MPF\0" + b"x" * 40), False),
    "EXIF": (segment(0xE1, b"Exif\0\0" + b"x" * 40), False),
    "XMP": (segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), False),
    "unknown": (segment(0xEC, b"Ducky"), False),
    "a length beyond the file": (b"\xff\xfe\xff\xff", False),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_pillow_reads_no_header_of_a_usual_jpeg(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more, is_plain = PLAIN[kind]
    usual = valid("JPEG")
    data = usual[:2] + more + usual[2:]
    opened: list[object] = []
    open_image = decode_module.open_image

    def counted(*arguments: Any) -> Image.Image:
        opened.append(arguments)
        return open_image(*arguments)

    monkeypatch.setattr(decode_module, "open_image", counted)
    if kind == "a length beyond the file":
        with pytest.raises(BadImage):
            decode(data)
    else:
        assert decode(data).equal(decode(usual))
    assert (not opened) == is_plain


def test_a_large_jpeg_is_left_to_pillow_where_it_may_be_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "REDUCED_PIXELS", 200)
    assert decode(encode(Image.fromarray(picture()), "JPEG"), shortest=6).shape == (3, 6, 10)


def test_without_torchvisions_decoders_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = valid("JPEG")
    expected = decode(data)
    monkeypatch.setattr(decode_module, "_decoders", dict)
    assert_close(decode(data), expected.permute(1, 2, 0).numpy(), levels=2)


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
        assert decode(data).shape == (3, 9_000, 10_000)
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
