"""Tests `decode` against Pillow for every image mode, and on every kind of broken file."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from pecobook.data import decode as decode_module
from pecobook.data.decode import MAX_PIXELS, BadImage, decode

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


def test_float_tiff() -> None:
    unit = np.linspace(0.25, 0.75, 24 * 40, dtype=np.float32).reshape(24, 40)
    data = encode(Image.fromarray(unit), "TIFF")
    assert_close(decode(data), np.repeat(np.rint(unit.astype(float) * 255)[..., None], 3, axis=-1))
    wide = unit * 1000 - 500  # no agreed range: stretched
    decoded = decode(encode(Image.fromarray(wide), "TIFF"))
    assert (int(decoded.min()), int(decoded.max())) == (0, 255)
    wide[0, 0], wide[0, 1] = np.nan, np.inf
    decoded = decode(encode(Image.fromarray(wide), "TIFF"))
    assert decoded[0, 0, 0] == 0
    assert decoded[0, 0, 1] == 255


@pytest.mark.parametrize("value", [np.nan, 7.0, 0.0])
def test_constant_float(value: float) -> None:
    data = encode(Image.fromarray(np.full((3, 4), value, np.float32)), "TIFF")
    assert decode(data).sum() == 0


def test_32_bit_integers_are_stretched() -> None:
    samples = np.array([[-5, 0, 100_000]], dtype=np.int32)
    expected = np.rint((samples + 5) / 100_005 * 255)
    assert_close(decode(encode(Image.fromarray(samples), "TIFF")), np.repeat(expected[..., None], 3, axis=-1))


def test_1_bit() -> None:
    bits = picture(channels=1)[..., 0] > 128
    data = encode(Image.fromarray(bits), "PNG")
    assert_close(decode(data), np.repeat((bits * 255)[..., None], 3, axis=-1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format_name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(picture()), format_name, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert_close(decode(data), expected, levels=2 * (format_name == "JPEG"))


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_one_pixel(format_name: str) -> None:
    data = encode(Image.new("RGB", (1, 1), (255, 255, 255)), format_name)
    assert decode(data).tolist() == [[[255]]] * 3


@pytest.mark.parametrize("format_name", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(format_name: str) -> None:
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
