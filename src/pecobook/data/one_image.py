"""One image: reads a file as all commands do, for use in Python, and writes an example of a source."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pecobook.data.decode import BadImage, decode, read_file
from pecobook.data.deep import ValueRange
from pecobook.data.source import ImageSource
from pecobook.data.views import center_crop
from pecobook.errors import DataError
from pecobook.utils.files import write_atomically
from pecobook.utils.images import fitted_size, resize

_MAX_SIDE = 512


def read_image(
    path: str | Path, size: int | None = None, *, crop: float = 1.0, value_range: tuple[float, float] | None = None
) -> Tensor:
    """Read an image file: any format, mode and orientation that the commands read.

    Args:
        path: the file.
        size: side to which the central square is resized, pixels; None keeps the whole image at its size.
        crop: side of the central square, as a share of the image's shorter side.
        value_range: the values that become black and white in an image with more than 8 bits, as in a network's
            `value_range`; None takes the range of the file's type.

    Returns:
        uint8 (3, H, W) in RGB, or (3, size, size).

    Raises:
        DataError: the file is missing or no image.
    """
    try:
        image = decode(read_file(Path(path)), name=str(path), value_range=value_range and ValueRange(*value_range))
    except BadImage as error:
        raise DataError(f"'{path}' cannot be read: {error.reason}.") from None
    return image.contiguous() if size is None else center_crop(image, size, share=crop)


def write_example(source: ImageSource, file: Path, attempts: int = 8) -> None:
    """Write the first readable image of a source as a PNG of at most 512 pixels a side.

    Nothing is written if none of the first `attempts` images can be read.
    """
    from torchvision.io import encode_png

    for index in range(min(attempts, len(source))):
        try:
            image = source.read(index)
        except BadImage:
            continue
        height, width = int(image.shape[1]), int(image.shape[2])
        if max(height, width) > _MAX_SIDE:
            image = resize(image, *fitted_size(height, width, min(height, width), _MAX_SIDE))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, bytes(encode_png(image.contiguous()).numpy()))
        return
