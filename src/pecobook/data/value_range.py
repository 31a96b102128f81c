"""Gives an image source the range of its values, for images with more than 8 bits (`--value-range`).

One range belongs to a whole data set and to all that is trained on it: a range of each image would turn the noise of a
dark image into full contrast. Images of 8 bits keep their values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from pecobook.data.decode import BadImage
from pecobook.data.deep import Survey, ValueRange
from pecobook.data.sampler import fixed_permutation
from pecobook.data.source import ImageSource
from pecobook.errors import DataError
from pecobook.settings.images import AUTO, RangeSetting
from pecobook.utils.printer import say

_SAMPLE = 64
"""Number of images at which `auto` looks."""


def apply_value_range(
    setting: RangeSetting,
    sources: Sequence[ImageSource],
    *,
    trained: RangeSetting = AUTO,
    quiet: bool = False,
) -> None:
    """Set the range of the values of image sources, and print what was taken.

    Args:
        setting: the value of --value-range, `AUTO` or (low, high).
        sources: the sources, of which the sample takes equal parts.
        trained: the range with which the given model was trained; `auto` takes this range, if there is one.
        quiet: print nothing.

    Raises:
        DataError: `auto` finds no range that fits all images of the sample.
    """
    name = sources[0].name if sources else ""
    survey = _survey(sources)
    given = trained if setting == AUTO else setting
    try:
        chosen = ValueRange(*map(float, given)) if given != AUTO else survey.value_range()
    except ValueError as error:
        raise DataError(f"--data '{name}': {error}. Give one range with --value-range LOW HIGH.") from None
    for source in sources:
        source.use_range(chosen)
    if not quiet:
        for line in _notes(name, setting, trained, chosen, survey):
            say(line)


def _survey(sources: Sequence[ImageSource]) -> Survey:
    survey = Survey()
    for source in sources:
        source.use_range(survey)
        for number in range(min(_SAMPLE // len(sources) or 1, len(source))):
            with contextlib.suppress(BadImage):  # reported when it is its turn
                source.read(fixed_permutation(number, len(source)))
        source.use_range(None)
    return survey


def _notes(
    name: str, setting: RangeSetting, trained: RangeSetting, chosen: ValueRange | None, survey: Survey
) -> list[str]:
    usual = survey.usual_values()
    is_deep = bool(survey.num_deep)
    lines = []
    if is_deep and chosen is not None:
        origin = f"from a sample of {survey.num_deep} images"
        origin = "as in the training of the given model" if trained != AUTO else origin
        origin = "as --value-range says" if setting != AUTO else origin
        lines.append(f"Values of '{name}': {chosen} becomes 0..255, {origin}.")
    elif setting != AUTO and usual is not None:
        lines.append(f"--value-range changes nothing: the images of '{name}' have 8 bits, and keep their values.")
    whole = chosen if is_deep and chosen is not None else ValueRange(0, 255)
    if usual is not None and usual.high - usual.low < (whole.high - whole.low) / 8:
        remedy = f"give --value-range {usual.low:.6g} {usual.high:.6g}" if is_deep else "brighten the files"
        lines.append(
            f"Warning: '{name}' uses less than an eighth of the range {whole}: 99.8% of the values lie in "
            f"{usual.low:.6g}..{usual.high:.6g}. If that is not meant, {remedy}."
        )
    return lines
