"""Decodes image files of every mode to tensors. Any decoding error becomes a `BadImage`.

torchvision decodes 8-bit JPEG and WebP, in half to three quarters of Pillow's time; Pillow decodes all other images,
and those that torchvision refuses. The header determines which. A usual JPEG's header is read here, in 3 microseconds;
all other headers are read by Pillow, which takes up to 100.

PNG images go to Pillow on purpose: torchvision 0.29's `decode_png` crashes the process (segmentation fault) on some
corrupt files, which would end a run of many hours, and it prints libpng's warnings about colour profiles.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import struct
import warnings
import zlib
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pecobook.data.deep import UNIT, DeepImage, Survey, ValueRange, read_deep, to_8_bits
from pecobook.errors import ConfigError, first_line, printable

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

MAX_PIXELS = 2**27
"""An image with more pixels is bad: it would take more than 512 MiB as RGBA. PECOBOOK_MAX_PIXELS overrides this."""
MAX_BYTES = 2**30
"""An image file with more bytes is bad; it is not read."""
REDUCED_PIXELS = 2**23
"""A JPEG with more pixels may be decoded at a smaller size."""
Range: TypeAlias = ValueRange | Survey
_STRIP_PIXELS = 2**22
_ORIENTATION, _WIDTH, _HEIGHT = 0x0112, 256, 257
"""Tags of EXIF and TIFF."""
_RGB = 3
"""torchvision's code for its mode RGB."""
_SCAN = 0xDA
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_HARMLESS = frozenset({0xC4, 0xDB, 0xDD, 0xE0, 0xED, 0xEE, 0xFE})
_PROFILE = 0xE2
"""Markers of a JPEG: the start of the pixels; frames with Huffman codes; tables, JFIF, Photoshop, Adobe, a comment; a
colour profile, or further images."""

# Pillow tries only these formats. It also supports formats that start other programs (EPS) or that have no signature
# (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "DEEPTIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "NUMPY", "DIB")


class BadImage(Exception):  # noqa: N818 (it is counted, and ends no run)
    """Raised for an image that cannot be read. A run skips the image, counts it and lists it.

    Attributes:
        name: the image's name, as `ImageSource.identify` returns it, with escaped control characters.
        reason: what is wrong with the image, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # pickling between processes needs both as arguments
        self.name = printable(name)
        self.reason = printable(reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode(data: bytes, *, name: str = "image", value_range: Range | None = None, shortest: int = 0) -> Tensor:
    """Decode the bytes of an image file.

    The EXIF orientation is applied. Only the first frame of an animation, or page of a multi-page file, is used.
    Transparent images are composited on white. 8-bit images keep their values. In images with more bits, `value_range`
    is mapped to 0..255; without it the range is that of the type: 0..65535 for 16 bits, 0..1 for floats within [0, 1].
    Colour profiles are ignored.

    Args:
        data: the file's bytes.
        name: the image's name in an error.
        value_range: the values mapped to black and white in images with more than 8 bits; a `Survey` inspects the
            values, and the returned pixels then have no meaning.
        shortest: if above 0, a JPEG with more than `REDUCED_PIXELS` may be decoded at a half, a quarter or an eighth of
            its size, as long as its shorter side keeps this many pixels; that saves memory and half of the time.

    Returns:
        uint8 (3, H, W), RGB. The memory layout is usually H, W, channels, which is the fastest to resize, so the tensor
        is not contiguous.

    Raises:
        BadImage: the bytes are empty, not an image, truncated or otherwise damaged; the image has more than
            `max_pixels()` pixels; or its values have no stated range.
    """
    max_pixels()  # an invalid limit is not the image's fault
    if not data:
        raise BadImage(name, "empty file")
    if data.startswith(b"version https://git-lfs"):
        raise BadImage(name, "a pointer of Git LFS, not an image: 'git lfs pull' fetches the images")
    try:
        if not isinstance(value_range, Survey) and _is_plain_jpeg(data, shortest):
            with contextlib.suppress(RuntimeError):  # Pillow tolerates more damage, such as a missing end marker
                return _decode_fast(data, "JPEG")
        with warnings.catch_warnings():
            # Pillow warns about odd metadata and large images; neither matters here.
            warnings.simplefilter("ignore")
            return _decode(data, value_range, shortest)
    except BadImage as error:
        raise BadImage(name, error.reason) from None
    # On arbitrary bytes a decoder may raise any exception (SyntaxError, struct.error, KeyError, MemoryError, ...).
    except Exception as error:
        raise BadImage(name, _reason(error)) from error


def _decode(data: bytes, value_range: Range | None, shortest: int) -> Tensor:
    with open_image(io.BytesIO(data)) as image:
        if isinstance(value_range, Survey):
            value_range.see(image, data)
            height, width = header_size(data) or (0, 0)
            return torch.zeros((), dtype=torch.uint8).expand(3, height, width)
        if _is_fast(image):
            if shortest and _is_reduced(image, shortest):
                return from_pillow(image)
            with contextlib.suppress(RuntimeError):
                return turn(_decode_fast(data, image.format), orientation_of(image))
        if image.format == "PNG":
            check_png(data)
        deep = read_deep(image, data)
        if deep is not None:
            return turn(_from_values(deep, value_range), orientation_of(image))
        return from_pillow(image)


def _is_plain_jpeg(data: bytes, shortest: int) -> bool:
    """Return whether a file is an 8-bit JPEG, grey or with three colours, that only needs to be decoded.

    Metadata that may contain an orientation or further images, an unusual header order, too many pixels, and a size
    that may be reduced are left to Pillow.
    """
    if data[:3] != b"\xff\xd8\xff":
        return False
    position, num_pixels, end = 2, 0, len(data) - 10
    while position < end and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _SCAN:
            limit = max_pixels()
            return 0 < num_pixels <= (min(limit, REDUCED_PIXELS) if shortest else limit)
        if marker in _FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, position + 4)
            if num_pixels or bits != 8 or channels not in (1, 3):
                return False
            num_pixels = height * width
        elif marker not in _HARMLESS and not (marker == _PROFILE and data.startswith(b"ICC_", position + 4)):
            return False
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    return False


def open_image(file: IO[bytes] | Path, *, name: str = "image") -> Image:
    """Open an image with Pillow, which reads only the header. Raises BadImage for more than `max_pixels()` pixels."""
    import PIL.Image

    from pecobook.data.formats import register

    register()
    limit = max_pixels()
    if PIL.Image.MAX_IMAGE_PIXELS is not None and limit > MAX_PIXELS:
        PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS, limit)
    image = PIL.Image.open(file, formats=[kind for kind in _FORMATS if kind in PIL.Image.OPEN])
    width, height = image.size
    if width * height > limit:
        image.close()
        raise BadImage(name, f"{width} x {height} is {_too_many(limit)}")
    return image


def check_png(data: bytes, name: str = "") -> None:
    """Raise BadImage if a PNG's pixels do not match their checksum: Pillow fills missing pixels with zeros."""
    start, kind = 8, b""
    while kind != b"IEND" and start + 8 < len(data):
        kind, end = data[start + 4 : start + 8], start + 8 + int.from_bytes(data[start : start + 4], "big")
        stated = data[end : end + 4]
        if kind == b"IDAT" and len(stated) == 4:
            found = zlib.crc32(memoryview(data)[start + 4 : end])
            if found != int.from_bytes(stated, "big"):
                raise BadImage(name, "damaged: the pixels of the PNG do not have their checksum")
        start = end + 4


def _is_fast(image: Image) -> bool:
    """Return whether torchvision can decode the image to the same pixels as Pillow."""
    if image.format in ("JPEG", "MPO"):
        return image.mode in ("RGB", "L")
    if image.format == "WEBP":  # torchvision ignores the frames of a WebP
        return image.mode == "RGB" and not getattr(image, "is_animated", False)
    return False


def _is_reduced(image: Image, shortest: int) -> bool:
    """Let a large JPEG's decoder reduce it while its sides keep `shortest` pixels; return whether it will."""
    size = image.size
    if image.format != "WEBP" and size[0] * size[1] > REDUCED_PIXELS:
        image.draft(image.mode, (shortest, shortest))
    return image.size != size


def _decode_fast(data: bytes, format_name: str | None) -> Tensor:
    """Decode with torchvision, not rotated. Raises RuntimeError for a damaged file, and if torchvision cannot."""
    decoder = _decoders().get("WEBP" if format_name == "WEBP" else "JPEG")
    if decoder is None:
        raise RuntimeError("this torchvision has no decoders")
    buffer = torch.frombuffer(data, dtype=torch.uint8)
    # torchvision finds the orientation in fewer files than Pillow does: `turn` applies it.
    return decoder(buffer, _RGB)  # type: ignore[no-any-return]


@functools.cache
def _decoders() -> dict[str, Any]:
    """Return torchvision's operators; the functions of torchvision.io warn that they may be removed."""
    import torchvision.io  # noqa: F401 (registers the operators)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"0", dtype=torch.uint8)  # torch warns once about read-only memory: no decoder writes
    operators = {"JPEG": "decode_jpeg", "WEBP": "decode_webp"}
    return {kind: getattr(torch.ops.image, name) for kind, name in operators.items() if hasattr(torch.ops.image, name)}


def from_pillow(image: Image) -> Tensor:
    """Decode an opened 8-bit image with Pillow, upright: uint8 (3, H, W)."""
    image.load()
    width, height = image.size
    rows = max(_STRIP_PIXELS // max(width, 1), 1)
    if rows >= height:
        pixels = _convert(image)
    else:  # a conversion of the whole image would hold several copies of it
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            strip = image.crop((0, top, width, min(top + rows, height)))
            pixels[top : top + rows] = _convert(strip)
    return turn(torch.from_numpy(pixels).permute(2, 0, 1), orientation_of(image))


def _convert(image: Image) -> npt.NDArray[np.uint8]:
    """Convert a loaded image to uint8 (H, W, 3), on white."""
    import PIL.Image

    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _from_values(deep: DeepImage, value_range: ValueRange | None) -> Tensor:
    """Convert values to uint8 (3, H, W), not rotated. Raises BadImage if they have no range."""
    natural_range = deep.natural_range
    if deep.values.dtype.kind == "f":
        finite = deep.values[np.isfinite(deep.values)]
        if not finite.size:
            raise BadImage("", "no value is a finite number")
        natural_range = UNIT if finite.min() >= 0 and finite.max() <= 1 else None
    chosen = value_range or natural_range
    if chosen is None:
        raise BadImage("", f"{deep.values.dtype} values have no agreed range: give --value-range LOW HIGH")
    return torch.from_numpy(to_8_bits(deep, chosen)).permute(2, 0, 1).expand(3, -1, -1)


def orientation_of(image: Image) -> int:
    """Return the EXIF orientation of an opened image, 1 to 8; 1 if there is none or no valid one.

    The orientation in an XMP segment counts if the image has no EXIF orientation, as in Pillow. A PNG can state its
    orientation after its pixels: it must be loaded first, unless `_has_late_metadata` is False.
    """
    import PIL.Image

    if "Raw profile type APP1" in image.info:  # as ImageMagick calls EXIF data in a PNG
        image.info.setdefault("Raw profile type exif", image.info["Raw profile type APP1"])
    try:
        value = PIL.Image.Image.getexif(image).get(_ORIENTATION, 1)  # that of a PNG would load the image
    except Exception:  # damaged EXIF data may raise any exception; the image itself can be read
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turn(pixels: Tensor, orientation: int) -> Tensor:
    """Rotate an image (..., H, W) upright, given its EXIF orientation; 5 to 8 exchange height and width."""
    if orientation >= 5:
        pixels = pixels.transpose(-1, -2)
    sides = {2: [-1], 3: [-2, -1], 4: [-2], 6: [-1], 7: [-2, -1], 8: [-2]}.get(orientation)
    return pixels if sides is None else pixels.flip(sides)


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image, or an unsupported format"
    if isinstance(error, Image.DecompressionBombError):
        return _too_many(max_pixels())
    return first_line(error)


def max_pixels() -> int:
    """Return the maximum number of pixels of an image: the environment variable PECOBOOK_MAX_PIXELS or `MAX_PIXELS`."""
    text = os.environ.get("PECOBOOK_MAX_PIXELS", "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise ConfigError(f"The environment variable PECOBOOK_MAX_PIXELS is '{text}': it must be a whole number.")
    return int(text or MAX_PIXELS)


def _too_many(limit: int) -> str:
    return f"more than {limit:,} pixels (the environment variable PECOBOOK_MAX_PIXELS raises this limit)"


def read_file(path: Path | bytes, name: str = "") -> bytes:
    """Read an image file, which must be a regular file of at most `MAX_BYTES`. Raises BadImage, with `name` or path.

    A named pipe would block forever, and a device such as /dev/zero never ends, so neither is opened.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (bytes)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            check_regular(status, "")
            check_bytes(status.st_size, "")
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (bytes)
            return file.read()
    except (OSError, BadImage) as error:
        reason = error.reason if isinstance(error, BadImage) else error.strerror or str(error)
        raise BadImage(name or os.fsencode(path).decode(errors="replace"), reason) from None


def check_regular(status: os.stat_result, name: str) -> None:
    """Raise BadImage unless `status` is that of a regular file, also if it is reached through a link."""
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise BadImage(name, f"{kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, not a regular file")


def check_bytes(size: int, name: str) -> None:
    """Raise BadImage for an encoded image of more than `MAX_BYTES` bytes, before it is read."""
    if size > MAX_BYTES:
        raise BadImage(name, f"{size:,} bytes are more than {MAX_BYTES:,}, the limit of an image file")


def header_size(file: Path | bytes) -> tuple[int, int] | None:
    """Read the height and width of an image from its header, as `decode` orients it; None if the header is unreadable.

    Args:
        file: the image's path, or its bytes.
    """
    try:
        if not isinstance(file, bytes):
            check_regular(file.stat(), str(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                tags = getattr(image, "tag_v2", {})  # Pillow gives the size of a TIFF after rotation
                width, height = tags.get(_WIDTH, image.width), tags.get(_HEIGHT, image.height)
                if image.format == "PNG" and _has_late_metadata(image):
                    image.load()
                orientation = orientation_of(image)
    except Exception:  # a header of arbitrary bytes may raise any exception
        return None
    return (width, height) if orientation >= 5 else (height, width)


def _has_late_metadata(image: Image) -> bool:
    """Return whether a PNG contains text or EXIF data after its first pixels."""
    file = getattr(image, "fp", None)
    assert file is not None
    start, position, has_pixels, kind = file.tell(), 8, False, b""
    while kind != b"IEND":
        file.seek(position)
        header = file.read(8)
        kind = header[4:]
        if len(header) < 8 or (has_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")):
            break
        has_pixels |= kind == b"IDAT"
        position += 12 + int.from_bytes(header[:4], "big")
    file.seek(start)
    return kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
