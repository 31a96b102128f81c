"""Figures are PNGs of a reasonable size with readable colours, are deterministic, and accept unusual input."""

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pecobook.analysis.canvas import INK, OTHERS, PAPER, ROLES, escape_text, styles
from pecobook.analysis.charts import Score, code_usage_chart, score_chart, training_curves
from pecobook.analysis.codewords import code_gallery, matches, query_points
from pecobook.analysis.figures import class_words, gallery_picture, image_columns, matches_picture, position_shares
from pecobook.analysis.occurrences import ClassShare
from pecobook.utils.json_files import read_metrics


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (255, 255, 255, 255)
    assert 200 < image.width < 1500
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


def _linear(colour: str) -> np.ndarray:
    """Return the intensities of red, green and blue, which add up, unlike the values in a file (sRGB)."""
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _contrast(colour: str, paper: str) -> float:
    """Return the contrast of WCAG 2, from 1 to 21."""
    dark, bright = sorted(float(_linear(part) @ [0.2126, 0.7152, 0.0722]) for part in (colour, paper))
    return (bright + 0.05) / (dark + 0.05)


def _lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear.clip(0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes (2009), for a complete lack of one kind of cone.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def test_text_and_colours_have_the_contrast_of_wcag_aa() -> None:
    assert round(_contrast("#000000", "#ffffff"), 3) == 21
    assert _contrast(INK, PAPER) >= 7
    assert min(_contrast(colour, PAPER) for colour in (*ROLES.values(), *OTHERS)) >= 4.5


@pytest.mark.parametrize("vision", VISION)
def test_roles_differ_to_colour_blind_readers(vision: str) -> None:
    seen = [_lab(np.array(VISION[vision]) @ _linear(colour)) for colour in ROLES.values()]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 15


def test_the_text_of_a_page_has_the_contrast_of_wcag_aa() -> None:
    template = Path("src/pecobook/analysis/templates/report.html.j2").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", part)) for part in re.findall(r":root \{(.*?)\}", template, re.S)
    ]
    assert len(schemes) == 3  # light, dark, paper
    for scheme in schemes:
        colours = {**schemes[0], **scheme}
        for text, paper in itertools.product(("ink", "soft", "accent"), ("page", "panel")):
            assert _contrast(colours[text], colours[paper]) >= 4.5, (text, paper, colours)


def test_matches_are_patches_of_other_images_with_the_codeword_of_the_query() -> None:
    codes = torch.arange(16).reshape(1, 4, 4).repeat(20, 1, 1) % 3
    images = torch.rand(20, 3, 16, 16)
    points = query_points(20, 4, seed=1)
    assert len({image for image, _, _ in points}) == 4
    assert all(0.25 <= place < 0.75 for _, *places in points for place in places)
    assert points == query_points(20, 4, seed=1)
    found = matches(images, codes, points, seed=1)
    for (image, y, x), (query, row) in zip(points, found, strict=True):
        assert (query.image, query.row, query.column) == (image, int(4 * y), int(4 * x))
        assert row.codeword == codes[image, query.row, query.column]
        assert len(row.patches) == 6
        for patch in row.patches:
            assert patch.image != image
            assert codes[patch.image, patch.row, patch.column] == row.codeword
    queries, rows = [query for query, _ in found], [row for _, row in found]
    opened(matches_picture(queries, [("pixel", rows), ("_a$", rows), ("perceptual", rows)]))
    opened(matches_picture(queries[:1], [("pixel", rows)]))


def test_a_gallery_names_the_class_of_each_codeword() -> None:
    rows = code_gallery(torch.rand(6, 3, 16, 16), torch.randint(0, 3, (6, 4, 4)), codewords=2)
    share = ClassShare("a$class", 62.5, 10.0, 6.25)
    assert class_words(share) == "a$class: 62% of these images, 10% of all"
    assert class_words(None) == "no class more often than by chance"
    plain, named = (opened(gallery_picture(rows, shares)) for shares in (None, {rows[0].codeword: share}))
    assert named.height > plain.height
