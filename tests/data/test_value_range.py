"""The range of values of a data set: what `auto` takes, what it says, and that images share it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pecobook.data.deep import ValueRange
from pecobook.data.images import open_images
from pecobook.data.source import Splits
from pecobook.data.value_range import apply_value_range
from pecobook.errors import ConfigError, DataError
from pecobook.settings.images import AUTO, RangeSetting
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import replace
from pecobook.utils.printer import of_run

Values = npt.NDArray[Any]


def write(root: Path, *images: Values, extension: str = "tif") -> Splits:
    root.mkdir(exist_ok=True)
    for number, values in enumerate(images):
        Image.fromarray(values).save(root / f"{number:03}.{extension}")
    return open_images(str(root))


def apply(splits: Splits, setting: RangeSetting = AUTO, **options: Any) -> ValueRange | None:
    apply_value_range(setting, [splits.train, splits.evaluation], **options)
    assert splits.train.value_range == splits.evaluation.value_range
    return splits.train.value_range


def noise(low: float, high: float, dtype: Any, count: int = 4) -> list[Values]:
    generator = np.random.default_rng(0)
    values = [generator.uniform(low, high, (20, 30)).astype(dtype) for _ in range(count)]
    for image in values:
        image[0, :2] = low, high
    return values


@pytest.mark.parametrize(
    ("low", "high", "dtype", "expected"),
    [
        (0, 4095, np.uint16, (0, 4095)),
        (0, 4096, np.uint16, (0, 16383)),
        (30, 900, np.uint16, (0, 1023)),
        (0, 200, np.uint16, (0, 255)),
        (0, 65535, np.uint16, (0, 65535)),
        (0, 100_000, np.int32, (0, 2**18 - 1)),
        (-1024, 3071, np.int32, (-1024, 3071)),
        (-1024, 3071, np.float32, (-1024, 3071)),
        (0.25, 0.75, np.float32, (0, 1)),
        (0.5, 250.5, np.float32, (0.5, 250.5)),
        (7, 7, np.float32, (0, 255)),
        (-7, -7, np.float32, (-7, -6)),
    ],
)
def test_auto_takes_one_range(tmp_path: Path, low: float, high: float, dtype: Any, expected: Any) -> None:
    assert apply(write(tmp_path, *noise(low, high, dtype))) == ValueRange(*expected)


def test_a_dark_image_stays_dark(tmp_path: Path) -> None:
    dark, bright = np.arange(600).reshape(20, 30) % 5, np.arange(600).reshape(20, 30) * 2
    splits = write(tmp_path, *[image.astype(np.int32) for image in (dark, bright, bright)])
    apply(splits)
    images = [source.read(index) for source in (splits.train, splits.evaluation) for index in range(len(source))]
    assert sorted(int(image.max()) for image in images) == [0, 75, 75]  # 4 and 1198 of 0..4095


def test_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apply(write(tmp_path / "a", *noise(0, 4095, np.uint16)))
    assert (
        capsys.readouterr().err == f"Values of '{tmp_path / 'a'}': 0..4095 becomes 0..255, from a sample of 4 images.\n"
    )
    apply(write(tmp_path / "b", *noise(20_000, 21_000, np.uint16)))
    said = capsys.readouterr().err
    assert "less than an eighth of the range 0..65535: 99.8% of the values lie in 2000" in said
    assert "give --value-range 2000" in said
    apply(write(tmp_path / "c", *noise(0, 4095, np.uint16)), (0.0, 65535.0))
    said = capsys.readouterr().err
    assert "0..65535 becomes 0..255, as --value-range says" in said
    assert "less than an eighth" in said
    apply(write(tmp_path / "d", *noise(0, 255, np.uint8), extension="png"))
    assert capsys.readouterr().err == ""
    apply(write(tmp_path / "e", *noise(3, 20, np.uint8, 20), extension="png"))
    assert "less than an eighth of the range 0..255" in capsys.readouterr().err
    apply(write(tmp_path / "few", *noise(3, 20, np.uint8), extension="png"))
    assert capsys.readouterr().err == ""
    apply(write(tmp_path / "f", *noise(0, 255, np.uint8, 20), extension="png"), (0.0, 9.0))
    assert "--value-range changes nothing: the images of" in capsys.readouterr().err
    with of_run(quiet=True):
        apply(write(tmp_path / "g", *noise(0, 4095, np.uint16)), (0.0, 9.0))
    assert capsys.readouterr().err == ""


def test_auto_of_a_model_takes_its_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = write(tmp_path, *noise(0, 4095, np.uint16))
    assert apply(splits, trained=(0.0, 8191.0)) == ValueRange(0, 8191)
    assert "0..8191 becomes 0..255, as in the training of the given model" in capsys.readouterr().err
    assert apply(splits, (0.0, 100.0)) == ValueRange(0, 100)


def test_a_range_beside_that_of_the_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = write(tmp_path, *noise(0, 4095, np.uint16))
    assert apply(splits, (0.0, 8000.0), trained=(0.0, 4095.0)) == ValueRange(0, 8000)
    assert "Warning: the given model was trained with --value-range 0 4095." in capsys.readouterr().err
    assert apply(splits, trained=(0.0, 1023.0)) == ValueRange(0, 1023)
    assert re.search(r"7[3-7]% of the values of .* lie outside of 0\.\.1023, and become black", capsys.readouterr().err)
    apply(splits, (0.0, 1023.0))  # a window that the user chose
    apply(splits, trained=(0.0, 4080.0))
    apply(splits, (0.0, 4095.0), trained=(0.0, 4095.0))
    assert "Warning" not in capsys.readouterr().err


def test_no_impossible_range_is_advised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apply(write(tmp_path, *noise(3000, 3000, np.uint16)))
    said = capsys.readouterr().err
    assert f"all values of '{tmp_path}' that were looked at are 3000" in said
    assert "give" not in said


def test_the_range_of_a_sample_is_written_as_a_given_one(tmp_path: Path) -> None:
    for name, values in (("integers", noise(0, 4095, np.uint16)), ("unit", noise(0.1, 0.9, np.float32))):
        value_range = apply(write(tmp_path / name, *values))
        assert json.dumps(value_range) in ("[0.0, 4095.0]", "[0.0, 1.0]")


def test_auto_refuses_fractions_beside_integers(tmp_path: Path) -> None:
    splits = write(tmp_path, *noise(0, 4095, np.uint16), *noise(0.1, 0.9, np.float32))
    with pytest.raises(DataError, match=r"floats from 0 to 1, others integers\. Give one range with --value-range LOW"):
        apply(splits)
    assert splits.train.read(0).max() > 0  # the pixels of an image: the sample is over
    assert apply(splits, (0.0, 1.0)) == ValueRange(0, 1)


def test_unreadable_images_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path, *noise(0, 4095, np.uint16))
    (tmp_path / "000.tif").write_bytes(b"no image")
    assert apply(open_images(str(tmp_path))) == ValueRange(0, 4095)


def test_the_fingerprint_names_the_range(tmp_path: Path) -> None:
    splits = write(tmp_path, *noise(0, 4095, np.uint16))
    prints = set()
    for setting in ((0.0, 4095.0), (0.0, 1023.0), (0.0, 65535.0)):
        apply(splits, setting)
        prints.add(splits.train.fingerprint)
    assert len(prints) == 3
    assert open_images(str(tmp_path)).train.fingerprint in prints  # without a range, the range is that of the type


@pytest.mark.parametrize("value", ["auto", ["0", "4095"], (0, 4095), [-1024.5, 3071]])
def test_the_setting(value: Any) -> None:
    changed = replace(TrainConfig(), {"value_range": value})
    assert changed.value_range == (AUTO if value == "auto" else tuple(map(float, value)))


@pytest.mark.parametrize("value", ["all", ["0"], [3, 3], [5, 1], [0, "inf"], ["nan", 1], [1, 2, 3], []])
def test_the_setting_refuses(value: Any) -> None:
    with pytest.raises(ConfigError, match="--value-range is auto or two ascending numbers LOW HIGH, not"):
        replace(TrainConfig(), {"value_range": value})
