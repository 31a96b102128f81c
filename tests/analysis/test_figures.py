"""Figures are transparent PNGs of a reasonable size, are deterministic, and accept unusual input."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pecobook.analysis.canvas import escape_text, styles
from pecobook.analysis.charts import Score, code_usage_chart, read_metrics, score_chart, training_curves
from pecobook.analysis.codewords import code_gallery
from pecobook.analysis.figures import gallery_picture, image_columns, position_shares


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0))[3] == 0  # type: ignore[index]
    assert 200 < image.width < 1400
    assert image.height > 50
    return image


def test_image_columns_show_the_images_in_their_columns() -> None:
    images = torch.zeros(3, 3, 8, 8)
    red, green = images.clone(), images.clone()
    red[:, 0], green[:, 1] = 1, 1
    picture = opened(image_columns([("original", images), ("red", red), ("a rather long name", green[:2])]))
    pixels = np.asarray(picture)
    middle = pixels[round(pixels.shape[0] * 0.7)]
    colours = [tuple(middle[round(pixels.shape[1] * share)].tolist()) for share in (1 / 6, 0.5, 5 / 6)]
    assert colours == [(0, 0, 0, 255), (255, 0, 0, 255), (0, 255, 0, 255)]


def test_names_are_drawn_unchanged() -> None:
    images, hostile = torch.zeros(2, 3, 8, 8), r"a$\frac{$"
    one, three = (opened(image_columns([(name, images) for name in names])) for names in (["a"], ["a", "a", hostile]))
    assert three.height < one.height  # three columns, also if two have the same title
    opened(code_usage_chart({"_first": np.array([5, 1]), hostile: np.array([1, 2])}))
    steps = [{"step": step, "loss": float(step)} for step in range(5)]
    opened(training_curves({"_a": steps, hostile: steps}))
    assert escape_text("_a$") == r" _a\$"


def test_grids_survive_nan_wide_images_and_few_rows() -> None:
    images = torch.rand(1, 3, 6, 12)
    broken = torch.full_like(images, float("nan"))
    opened(image_columns([("original", images), ("masked", images * 2 - 1), ("run", broken)]))
    with pytest.raises(ValueError, match="image_columns needs"):
        image_columns([("original", torch.rand(0, 3, 4, 4))])
    with pytest.raises(ValueError, match="image_columns needs"):
        image_columns([])


def test_gallery_picture_grows_with_its_rows() -> None:
    images, codes = torch.rand(6, 3, 16, 16), torch.randint(0, 3, (6, 4, 4))
    short = opened(gallery_picture(code_gallery(images, codes, codewords=1)))
    tall = opened(gallery_picture(code_gallery(images, codes, codewords=3, chosen=[77])))
    assert tall.height > 2 * short.height


def test_gallery_picture_maps_the_positions_of_each_codeword() -> None:
    """The first codeword is bound to the upper right position; the second occurs everywhere else."""
    codes = torch.ones(6, 2, 2, dtype=torch.long)
    codes[:, 0, 1] = 0
    bound, elsewhere = code_gallery(torch.zeros(6, 3, 8, 8), codes, codewords=2, chosen=[0])
    assert position_shares(bound.positions).tolist() == [[0, 1], [0, 0]]
    assert position_shares(elsewhere.positions).tolist() == [[1, 0], [1, 1]]
    assert position_shares(np.array([[0, 1], [2, 4]])).tolist() == [[0, 0.25], [0.5, 1]]
    assert position_shares(np.zeros((2, 2), dtype=np.int64)).tolist() == [[0, 0], [0, 0]]
    pixels = np.asarray(opened(gallery_picture([bound])))
    light, dark = (np.argwhere((pixels[..., :3] == colour).all(-1)) for colour in ((253, 231, 36), (68, 1, 84)))
    assert 0.9 < 3 * len(light) / len(dark) < 1.1  # one field of viridis' largest value, three of its smallest
    assert light[:, 0].mean() < dark[:, 0].mean()
    assert dark[:, 1].mean() < light[:, 1].mean() < pixels.shape[1] / 6  # upper right, at the left of the patches


def test_training_curves_of_runs_that_differ_in_length_and_metrics() -> None:
    long = [{"step": i, "loss": 1 / (i + 1), "psnr": float(i), "lr": 0.1 * i, "note": "x"} for i in range(120)]
    short = [{"step": 0, "loss": 1.0}, {"step": 5, "loss": float("nan")}, {"step": 9, "loss": 0.5}]
    first = training_curves({"pixel": long, "other <run>": short})
    opened(first)
    assert first == training_curves({"pixel": long, "other <run>": short})
    opened(training_curves({"one": short}))
    with pytest.raises(ValueError, match="no metric"):
        training_curves({"empty": []})


def test_read_metrics_skips_a_line_that_a_crash_truncated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n" + '{"step": 2, "lo', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_usage_and_score_charts() -> None:
    opened(code_usage_chart({"pixel": np.array([5, 0, 100, 1]), "unused": np.zeros(4, dtype=np.int64)}))
    scores = [Score("pixel", 27.0, 0.5), Score("control", 28.0, 0.0), Score("perceptual", 100.0, 0.0)]
    opened(score_chart({"linear": scores, "k-NN": scores[:1]}, chance=10))
    opened(score_chart({"linear": [Score("one", float("nan"), float("nan"))]}))


def test_roles_keep_their_style_and_no_two_names_share_one() -> None:
    alone, together = styles(["control"]), styles(["a", "perceptual", "control", "pixel", "b", "untrained"])
    assert alone["control"] == together["control"]
    assert len({(style["color"], style["marker"]) for style in together.values()}) == 6
