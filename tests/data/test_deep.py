"""Images with more than 8 bits: every type of number, in every order of bytes, under a range of values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pecobook.data.decode import BadImage, decode, header_size
from pecobook.data.deep import ValueRange
from tests.data.pictures import assert_close, encode, picture, png_16, scaled, tiff


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


def test_values_that_are_no_numbers() -> None:
    values = np.zeros((3, 4), np.float32)
    values[0] = np.nan
    assert decode(encode(Image.fromarray(values), "TIFF")).sum() == 0
    for value_range in (None, ValueRange(0, 1)):
        with pytest.raises(BadImage, match="no value is a finite number"):
            decode(encode(Image.fromarray(np.full_like(values, np.nan)), "TIFF"), value_range=value_range)


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
