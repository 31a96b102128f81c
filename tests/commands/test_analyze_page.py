"""The page of `analyze` and `demo`: each number is in its cell, and the text claims only what the numbers show."""

import dataclasses
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pecobook.analysis.comparison import PERCENT_METRICS
from pecobook.analysis.report import Report, render, write_report
from pecobook.commands.analyze.comparing import comparisons, probe_chart
from pecobook.commands.analyze.page import compose
from tests.analysis.test_report import EVIL, png, read

Number = float | None


def results(
    pixel: Number = 27.0,
    control: Number = 28.0,
    perceptual: Number = 34.0,
    *,
    num_test: int | None = 10_000,
    **more: Any,
) -> dict[str, Any]:
    probes = {"pixel": pixel, "control": control, "perceptual": perceptual}
    books = [
        {
            "name": name, "codes_used": 400, "perplexity": 250.0, "psnr": 19.0, "perceptual_distance": 0.5,
            "codeword_probe": probe, "mim": {"loss": 5.0, "accuracy": 10.0, "linear": probe + 7, "knn": probe},
        }
        for name, probe in probes.items()
        if probe is not None
    ]  # fmt: skip
    floor = {"linear": 33.0, "knn": 27.0}
    return {
        "data": "photos", "seed": 0, "seconds": 400.0, "floor": floor, "comparisons": (), "tokenizers": books,
        "num_test": num_test, "num_classes": 10, **more,
    }  # fmt: skip


class Cells(HTMLParser):
    """The rows of every table of a page, each row a list of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.inside = False

    def handle_starttag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data.replace("\u00a0", " ")


def cells(report: Report, corner: str, column: str) -> dict[tuple[str, str], str]:
    """Return the cells, by (row, column), of the table whose header begins with `corner` and contains `column`."""
    reader = Cells()
    reader.feed(render(report))
    (table,) = [rows for rows in reader.tables if rows[0][0].strip() == corner and column in rows[0]]
    header, *rows = table
    return {(row[0].strip(), name): text for row in rows for name, text in zip(header[1:], row[1:], strict=False)}


def distinct() -> dict[str, Any]:
    """Return results in which all printed numbers differ."""
    names, tokenizers = ("pixel", "control", "perceptual"), []
    for i, name in enumerate(names):
        tokenizers.append(
            {
                "name": name, "num_codewords": 512, "stride": 8 + i, "image_size": 32 + i, "num_images": 400,
                "codes_used": 401 + i, "perplexity": 211.0 + i, "psnr": 13.25 + i, "ssim": 0.125 + i / 10,
                "perceptual_distance": 3.5 + i, "codeword_probe": 20.5 + i, "codeword_probe_error": 2.5 + i,
                "bag_probe": 30.5 + i, "bag_probe_error": 5.5 + i,
                "crossed_probe": 70.5 + i, "crossed_probe_error": 3.25 + i,
                "crossed_bag_probe": 80.5 + i, "crossed_bag_probe_error": 6.25 + i,
                "position": {
                    "share": 0.9 + i / 100, "null_share": 0.2 + i / 100, "bound": 62.5 + i, "null_bound": 1.5 + i,
                    "moved": {"roll": 8.5 + i, "crop": 11.5 + i},
                },
                "information": {
                    kind: {
                        "share": 0.1 * k + i / 100, "given_position": 0.04 + 0.1 * k + i / 100,
                        "purity": 51.75 + 10 * k + i, "null_purity": 21.75 + 10 * k + i,
                    }
                    for k, kind in enumerate(("label", "colour", "edges"))
                },
                "mim": {"loss": 4.25 + i, "accuracy": 17.5 + i, "linear": 50.0 + i, "knn": 60.0 + i}
                | {"accuracy_of_position": 12.5 + i},
            }
        )  # fmt: skip
    pairs = [
        {
            "metric": metric,
            "a": "perceptual",
            "b": b,
            "difference": 10.0 * (j + 1) + k,
            "standard_error": 1.1 + j + k / 2,
        }
        for j, metric in enumerate(PERCENT_METRICS)
        for k, b in enumerate(("control", "pixel", "floor"))
    ]
    return {
        "data": "photos", "evaluation": "test", "seed": 0, "seconds": 400.0, "num_test": 400, "num_train": 900,
        "num_classes": 10, "tokenizers": tokenizers, "comparisons": pairs, "floor": {"linear": 41.5, "knn": 42.5},
        "masked_prediction": [
            {
                "name": "vit",
                "by_share": [{"masked": 6, "accuracy": 12.5, "perplexity": 90.0, "position_baseline": 8.5}],
            },
        ],
    }  # fmt: skip


def section_cells(title: str, data: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Return the cells of the section with this title."""
    report = compose(data, {}, [], {})
    sections = tuple(section for section in report.sections if section.title == title)
    return cells(dataclasses.replace(report, sections=sections), "", "pixel")


def test_each_number_of_a_tokenizer_is_in_its_row() -> None:
    data = distinct()
    table = section_cells("Overview", data)
    for i, name in enumerate(("pixel", "control", "perceptual")):
        assert {row: text for (row, column), text in table.items() if column == name} == {
            "pixels a token": f"{8 + i} x {8 + i}",
            "image size, pixels": f"{32 + i}",
            "codewords used": f"{401 + i} of 512",
            "perplexity": f"{211 + i}",
            "PSNR, dB": f"{13.25 + i:.2f}",
            "SSIM": f"{0.125 + i / 10:.3f}",
            "perceptual distance": f"{3.5 + i:.3f}",
        }
    for tokenizer in data["tokenizers"]:
        del tokenizer["position"]  # an analysis of an earlier version
    assert section_cells("Overview", data)["linear probe of bags of codes, %", "pixel"] == "30.5 ± 5.5"


def test_position_and_content_are_in_their_rows() -> None:
    table = section_cells("Position or content", distinct())
    for i, name in enumerate(("pixel", "control", "perceptual")):
        assert {row: text for (row, column), text in table.items() if column == name} == {
            "information about the position, %": f"{90 + i:.1f} ({20 + i:.1f})",
            "codewords bound to one position, %": f"{62.5 + i:.1f} ({1.5 + i:.1f})",
            "codes that move with a crop, %": f"{11.5 + i:.1f}",
            "codes that move with a rolled image, %": f"{8.5 + i:.1f}",
            "linear probe of mean codewords, %": f"{20.5 + i:.1f} ± {2.5 + i:.1f}",
            "linear probe of bags of codes, %": f"{30.5 + i:.1f} ± {5.5 + i:.1f}",
            "position removed: linear probe of mean codewords, %": f"{70.5 + i:.1f} ± {3.25 + i:.1f}",
            "position removed: linear probe of bags of codes, %": f"{80.5 + i:.1f} ± {6.25 + i:.1f}",
        }


def test_missing_numbers_are_dashes_and_rows_of_dashes_are_left_out() -> None:
    data = distinct()
    for tokenizer in data["tokenizers"]:
        tokenizer |= {"codeword_probe": None, "position": {"share": 0.5, "null_share": 0.25, "moved": {"roll": None}}}
    data["tokenizers"][0]["position"]["moved"]["crop"] = 8.25
    table = section_cells("Position or content", data)
    assert {row: text for (row, column), text in table.items() if column == "control"} == {
        "information about the position, %": "50.0 (25.0)",
        "codes that move with a crop, %": "–",
    }
    assert table["codes that move with a crop, %", "pixel"] == "8.2"


def test_information_is_in_its_rows() -> None:
    data = distinct()
    report = compose(data, {}, [], {})
    (section,) = [section for section in report.sections if section.title == "Semantics or texture"]
    assert section.table is not None
    assert section.table.header == ("", "pixel", "control", "perceptual")
    rows = iter(section.table.rows)
    for k, words in enumerate(("the image's class", "the patch's colour", "the patch's edges")):
        expected = {f"information about {words}, %": [f"{10 * k + i:.1f}" for i in range(3)]}
        expected[f"   given position: {words}, %"] = [f"{4 + 10 * k + i:.1f}" for i in range(3)]
        expected[f"   purity: {words}, %"] = [f"{51.75 + 10 * k + i:.1f} ({21.75 + 10 * k + i:.1f})" for i in range(3)]
        for title, numbers in expected.items():
            assert next(rows) == (title, *numbers)
    assert not list(rows)


def test_the_summary_says_which_accuracy_has_position_removed() -> None:
    data = distinct()
    del data["comparisons"]
    report = compose(data, {}, [], {})
    found, first, second, *_ = report.summary
    assert found == (
        "Whether the codes of perceptual or of control tell more about the class is not shown here: a linear "
        "classifier, with position removed, is right in 72.5% (perceptual) and 71.5% (control)."
    )
    assert [picture.alt.partition(":")[0] for picture in report.lead] == ["Chart of probe accuracies"]
    assert "20.5% (pixel)" in first
    assert second.startswith("With position removed")
    assert "70.5% (pixel), 71.5% (control), 72.5% (perceptual)" in second
    (of_pixel,) = [line for line in report.summary if line.startswith("A code of pixel contains")]
    assert of_pixel.endswith("About its position in the image it contains 90.0%, where permuted codes contain 20.0%.")


def test_an_analysis_begins_with_its_finding() -> None:
    data = distinct()
    del data["comparisons"]
    data["tokenizers"][2]["crossed_probe"] = 90.0
    report = compose(data, {}, [], {})
    assert report.summary[0].startswith("The codes of perceptual tell most about the class of an image:")
    assert report.summary[0].endswith("90.0% (perceptual) and 71.5% (control), higher by 18.5 ± 2.7 points.")
    html = render(report)
    assert html.index("The codes of perceptual") < html.index("<figure>") < html.index("The accuracy of a linear")
    data["tokenizers"] = data["tokenizers"][:1]
    assert "20.5% (pixel)" in compose(data, {}, [], {}).summary[0]  # one tokenizer is compared with nothing


def test_the_summary_claims_no_accuracy_on_few_images() -> None:
    data = distinct()
    del data["comparisons"]
    for tokenizer in data["tokenizers"]:
        tokenizer["codeword_probe_error"] = None
    summary = " ".join(compose(data, {}, [], {}).summary)
    assert "Fewer than 20 held-out images are too few" in summary
    assert "20.5%" not in summary


def test_each_number_of_a_transformer_is_in_its_column() -> None:
    data = distinct()
    data["tokenizers"][1]["mim"] = None
    table = cells(compose(data, {}, [], {}), "Trained on codes of", "Loss")
    by_position = "Commonest code of the position, %"
    expected = {("untrained", name): "–" for name in ("Loss", "Code accuracy, %", by_position)}
    expected |= {("untrained", "Linear, %"): "41.5 ± 2.5", ("untrained", "k-NN, %"): "42.5 ± 2.5"}
    for i, name in ((0, "pixel"), (2, "perceptual")):
        expected |= {
            (name, "Loss"): f"{4.25 + i:.2f}",
            (name, "Code accuracy, %"): f"{17.5 + i:.1f}",
            (name, by_position): f"{12.5 + i:.1f}",
            (name, "Linear, %"): f"{50 + i:.1f} ± 2.5",
            (name, "k-NN, %"): f"{60 + i:.1f} ± 2.4",
        }
    assert table == expected


def test_each_masked_prediction_is_in_its_column() -> None:
    table = cells(compose(distinct(), {}, [], {}), "Run", "Perplexity")
    assert table == {("vit, 6 masked", "Accuracy, %"): "12.5", ("vit, 6 masked", "Perplexity"): "90.0"} | {
        ("vit, 6 masked", "Commonest code of the position, %"): "8.5"
    }


def test_each_difference_is_below_its_metric() -> None:
    sections = compose(distinct(), {}, [], {}).sections
    (section,) = [section for section in sections if section.title == "Probe accuracy of the codebooks"]
    assert section.table is not None
    assert section.table.header == ("Comparison", "Points", "Conclusion")
    rows, metric = {}, ""
    for first, points, _ in section.table.rows:
        metric = metric if points else first
        rows[metric, first] = points
    for j, title in enumerate(PERCENT_METRICS.values()):
        for k, b in enumerate(("control", "pixel", "untrained")):
            expected = f"+{10 * (j + 1) + k:.1f} ± {1.1 + j + k / 2:.1f}"
            if b != "untrained" or title.endswith("masked model"):
                assert rows[title, f"perceptual − {b}"] == expected


def test_the_chart_draws_each_score_in_its_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, list[tuple[str, float]]]] = []

    def record(panels: Any, *, chance: float | None) -> bytes:
        drawn.append({title: [(score.name, score.value) for score in scores] for title, scores in panels.items()})
        return png()

    monkeypatch.setattr("pecobook.commands.analyze.comparing.score_chart", record)
    probe_chart(distinct())
    names = ("pixel", "control", "perceptual")
    assert drawn == [
        {
            "Linear probe on codewords": [(name, 20.5 + i) for i, name in enumerate(names)],
            "Linear probe on codewords, position removed": [(name, 70.5 + i) for i, name in enumerate(names)],
            "Linear probe on code counts": [(name, 30.5 + i) for i, name in enumerate(names)],
            "Linear probe of the masked model": [
                *((name, 50 + i) for i, name in enumerate(names)),
                ("untrained", 41.5),
            ],
            "k-NN of the masked model": [*((name, 60 + i) for i, name in enumerate(names)), ("untrained", 42.5)],
        }
    ]


def test_the_cost_of_a_step_is_in_its_row() -> None:
    table = cells(compose(distinct(), {}, [("train", 30.0), ("probe", 10.0)], {}), "Step", "Share")
    assert (table["train", "Time"], table["train", "Share"]) == ("30s", "75%")
    assert table["Sum", "Time"] == "40s"


def text_of(report: Report) -> str:
    """Return the text of a report, as a reader sees it."""
    return " ".join(" ".join(read(render(report)).text).replace("\u00a0", " ").replace("’", "'").split())


def test_a_full_report_has_all_sections(tmp_path: Path) -> None:
    names = ("reconstructions", "usage", "masked-38", "curves-contrast", "curves-tokenizers", "curves-vits", "patches")
    pictures = {f"{name}.png": png() for name in names}
    masked = [{"name": "vit", "by_share": [{"masked": 6, "accuracy": 12.5, "perplexity": 90.0}]}]
    data = results(masked_prediction=masked)
    data["tokenizers"][0]["pictures"] = {"gallery": "pictures/patches.png"}
    report = compose(data, pictures, [("codebook", 61.0), ("probe", 30.0)], {"seed": 0})
    titles = [section.title for section in report.sections]
    assert titles == [
        "What was compared",
        "Overview",
        "Probe accuracy of the codebooks",
        "Patches that share a codeword",
        "Reconstructions",
        "Codebook usage",
        "Pre-trained transformers",
        "Masked prediction",
        "Training curves",
        "How to read this page",
        "Cost and settings",
    ]
    assert len([picture for section in report.sections for picture in section.pictures]) == len(names) + 1
    assert len(report.lead) == 1
    assert len(comparisons(results())) == 2 + 2 * 5
    assert write_report(tmp_path, report).stat().st_size < 10_000_000


def test_missing_parts_are_left_out() -> None:
    bare = {"tokenizers": [{"name": "pixel", "psnr": None, "codeword_probe": 30.0, "mim": None}], "comparisons": ()}
    report = compose(bare, {}, [], {})
    assert [section.title for section in report.sections] == [
        "What was compared",
        "Overview",
        "Probe accuracy of the codebooks",
        "How to read this page",
        "Cost and settings",
    ]
    assert "–" not in text_of(report)  # a row that was measured for no tokenizer is left out
    render(compose({"tokenizers": [], "comparisons": ()}, {}, [], {}))


def test_names_from_outside_are_escaped() -> None:
    data = results(data=EVIL)
    data["tokenizers"][0] |= {"name": EVIL, "pictures": {"gallery": f"pictures/{EVIL}"}}
    report = compose(data, {EVIL: png()}, [(EVIL, 3.0)], {EVIL: EVIL}, title=EVIL, subtitle=EVIL)
    assert "script" not in read(render(report)).tags
