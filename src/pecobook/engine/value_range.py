"""Gives images the value range that a model was trained with."""

from __future__ import annotations

from collections.abc import Iterable

from pecobook.data.images import check_readable, open_images
from pecobook.data.source import ImageSource, Splits
from pecobook.data.value_range import apply_value_range
from pecobook.errors import WeightsError
from pecobook.models.export import read_settings
from pecobook.models.hub import resolve_source
from pecobook.settings.images import AUTO, RangeSetting
from pecobook.utils.printer import doing


def open_readable(source: str, setting: RangeSetting = AUTO, models: Iterable[str] = ()) -> Splits:
    """Open an image source with its value range; the last two arguments are those of `set_value_range`.

    Raises:
        DataError: the source cannot be opened, none of the first few training images can be read, or no range fits.
    """
    doing(f"listing {source}")
    splits = open_images(source)
    doing("reading the first images")
    set_value_range(splits, setting, models)
    check_readable(splits.train)
    return splits


def set_value_range(images: Splits | list[ImageSource], setting: RangeSetting, models: Iterable[str] = ()) -> None:
    """Set the value range of images with more than 8 bits, and print what was chosen.

    Args:
        images: the images, which then have a `value_range`.
        setting: the value of --value-range. `AUTO` uses the range of the first model that has one, otherwise a range
            from a sample of the images.
        models: runs, export folders, or `owner/name` on the Hugging Face hub; anything else is ignored.

    Raises:
        DataError: no range fits all images of the sample.
    """
    sources = [images.train, images.evaluation] if isinstance(images, Splits) else images
    apply_value_range(setting, sources, trained=_trained_range(models))


def _trained_range(models: Iterable[str]) -> RangeSetting:
    for model in models:
        if not model or model == "none" or ":" in model:  # timm:NAME, dalle:FOLDER
            continue
        try:
            value_range = read_settings(resolve_source(model)).get("value_range")
        except WeightsError:  # reported where the model is loaded
            continue
        if value_range:
            return tuple(value_range)
    return AUTO
