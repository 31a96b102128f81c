"""Gives an image source its value range, for images with more than 8 bits (`--value-range`).

One range belongs to a whole data set and to everything trained on it: a range per image would turn the noise of a dark
image into full contrast. 8-bit images keep their values.
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
"""Number of images that `auto` inspects."""
_MANY = 0.01
"""A larger share of values outside a model's range triggers a warning."""
_NO_EFFECT = "--value-range changes nothing: the images of '{name}' have 8 bits, and keep their values."


def apply_value_range(setting: RangeSetting, sources: Sequence[ImageSource], *, trained: RangeSetting = AUTO) -> None:
    """Set the value range of image sources, and print what was chosen.

    Args:
        setting: the value of --value-range, `AUTO` or (low, high).
        sources: the sources; the sample takes equal parts of them.
        trained: the range that the given model was trained with; `auto` uses it, if there is one.

    Raises:
        DataError: `auto` finds no range that fits all images of the sample.
    """
    name = sources[0].name if sources else ""
    survey = _survey(sources)
    given, learned = (None if value == AUTO else ValueRange(*map(float, value)) for value in (setting, trained))
    try:
        chosen = given or learned or survey.value_range()
    except ValueError as error:
        raise DataError(f"--data '{name}': {error}. Give one range with --value-range LOW HIGH.") from None
    for source in sources:
        source.use_range(chosen)
    for line in _notes(name, given, learned, chosen, survey):
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
    name: str, given: ValueRange | None, learned: ValueRange | None, chosen: ValueRange | None, survey: Survey
) -> list[str]:
    """Return the notes on the range `chosen`: given by --value-range, a model, or else the survey."""
    usual = survey.usual_values()
    if chosen is None or not survey.num_deep:
        lines = [] if given is None or usual is None else [_NO_EFFECT.format(name=name)]
        return lines + _narrow(name, usual, ValueRange(0, 255), "brighten the files")
    origin = f"from a sample of {survey.num_deep} images"
    origin = "as in the training of the given model" if learned else origin
    origin = "as --value-range says" if given else origin
    lines = [f"Values of '{name}': {chosen} becomes 0..255, {origin}."]
    if given and learned and given != learned:
        lines.append(f"Warning: the given model was trained with --value-range {learned.low:.6g} {learned.high:.6g}.")
    outside = survey.share_outside(chosen)
    if not given and outside > _MANY:
        text = f"{100 * outside:.0f}% of the values of '{name}' lie outside of {chosen}, and become black or white"
        lines.append(f"Warning: {text}. If that is not meant, give --value-range LOW HIGH.")
    remedy = "" if usual is None else f"give --value-range {usual.low:.6g} {usual.high:.6g}"
    return lines + _narrow(name, usual, chosen, remedy)


def _narrow(name: str, usual: ValueRange | None, whole: ValueRange, remedy: str) -> list[str]:
    """Return a warning about images that use a small part of their range."""
    if usual is None or usual.high - usual.low >= (whole.high - whole.low) / 8:
        return []
    if usual.low == usual.high:
        return [f"Warning: all values of '{name}' that were looked at are {usual.low:.6g}: there is nothing to see."]
    return [
        f"Warning: '{name}' uses less than an eighth of the range {whole}: 99.8% of the values lie in "
        f"{usual.low:.6g}..{usual.high:.6g}. If that is not meant, {remedy}."
    ]
