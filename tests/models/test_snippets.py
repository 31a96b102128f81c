"""Lines of Python for users read image files of every mode as the library does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pecobook import read_image
from pecobook.errors import DataError
from pecobook.models.snippets import open_square, quoted, with_image


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 60, 3), dtype=np.uint8))


def write_picture(mode: str, file: Path) -> None:
    if mode == "I;16":
        Image.fromarray(np.random.default_rng(0).integers(0, 65536, (41, 60), dtype=np.uint16)).save(file)
    elif mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 8
        picture().save(file, exif=exif)
    elif mode == "transparent palette":
        picture().convert("P").save(file, transparency=3)
    else:
        image = picture().convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(picture().convert("L"))
        image.save(file)


@pytest.mark.parametrize("crop", [1.0, 0.875])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "transparent palette", "LA", "RGBA", "I;16", "turned", "CMYK"])
def test_open_square__is_read_image(mode: str, crop: float, tmp_path: Path) -> None:
    file = tmp_path / f'a "photo" of {mode.replace(";", "")}.{"jpg" if mode == "CMYK" else "png"}'
    write_picture(mode, file)
    scope: dict[str, Any] = {"np": np, "Image": Image, "ImageOps": ImageOps}
    exec(with_image(open_square(32, crop), file), scope)
    actual = np.asarray(scope["image"]).transpose(2, 0, 1).astype(int)
    expected = read_image(file, 32, crop=crop).numpy().astype(int)
    assert np.abs(actual - expected).max() <= 1  # Pillow and torch round differently
    assert expected.std() > 5


def test_with_image__keeps_the_placeholder_of_a_missing_file(tmp_path: Path) -> None:
    assert quoted("photo.jpg") in with_image(open_square(32), tmp_path / "missing.png")


def test_read_image__names_a_file_that_is_no_image(tmp_path: Path) -> None:
    assert read_image_error(tmp_path / "missing.png").endswith("cannot be read: No such file or directory.")
    (tmp_path / "text.png").write_text("text")
    assert read_image_error(tmp_path / "text.png").endswith("cannot be read: not an image, or an unsupported format.")


def read_image_error(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_image(file)
    assert str(file) in str(caught.value)
    return str(caught.value)
