"""`pecobook analyze`: the numbers, the pictures, the page, and the errors."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pecobook
from pecobook import cli
from pecobook.analysis.codewords import mean_codewords
from pecobook.analysis.position import information_given_position, moved_codes, position_dependence
from pecobook.analysis.probe import linear_probe
from pecobook.analysis.reconstruction import decode_all, encode_all, psnr
from pecobook.analysis.semantics import patch_edges
from pecobook.analysis.wording import file_part, unique_names
from pecobook.commands.analyze import check_and_open
from pecobook.commands.analyze.classifier import open_classifier
from pecobook.commands.analyze.measure import at_most_fifty
from pecobook.commands.masked_run import load_masked_run
from pecobook.data.images import open_images
from pecobook.data.stream import read_all
from pecobook.errors import PreflightError
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.utils.images import to_float
from tests.analysis.test_similarity import write_triplets
from tests.runs import train

CONTRACT = {"name", "codes_used", "perplexity", "psnr", "codeword_probe", "bag_probe"}


def run(out: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    """Run the analysis and return the contents of `analysis.json` and the page."""
    with contextlib.redirect_stderr(io.StringIO()):
        report = pecobook.analyze(out=str(out), **settings)
    assert report == out / "report.html"
    return json.loads((out / "analysis.json").read_text()), report.read_text()


@pytest.fixture(scope="module")
def coarse_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a different stride and a different image size."""
    more = {"model.channels": (8, 16), "image_size": 24, "quantizer.num_codewords": 16}
    return train("codebook", images, tmp_path_factory.mktemp("coarse"), **more)


@pytest.fixture(scope="module")
def analysis(
    images: Path, codebook_run: Path, coarse_run: Path, vit_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("analysis") / "a"
    return out, *run(
        out,
        tokenizer=str(codebook_run),
        against=(str(coarse_run),),
        backbone=(str(vit_run),),
        data=str(images),
        perceptual="timm:resnet10t",
        perceptual_layers=(1, 2),
        perceptual_weights="random",
        codewords=(0, 5),
    )


def test_analyze__keeps_the_contract(analysis: tuple[Path, dict[str, Any], str], codebook_run: Path) -> None:
    out, results, page = analysis
    first, second = results["tokenizers"]
    assert first["name"] == codebook_run.name
    assert set(first) >= CONTRACT
    assert (first["stride"], second["stride"]) == (4, 2)
    assert (first["image_size"], second["image_size"]) == (16, 24)
    for tokenizer in (first, second):
        assert tokenizer["stability"]["none"] == 100
        assert set(tokenizer["information"]) == {"label", "colour", "edges"}
        assert all(0 <= values["given_position"] <= 1 for values in tokenizer["information"].values())
        assert all(0 <= share <= 100 for share in tokenizer["position"]["moved"].values())
        assert 0 <= tokenizer["crossed_probe"] <= 100
        assert set(tokenizer["similarity"]["shifted_over_blurred"]) == {"pixels", "codewords", "perceptual"}
        assert tokenizer["perceptual_distance"] > 0
        for picture in tokenizer["pictures"].values():
            assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (out / "pictures").glob("masked-*")} == {
        "masked-23.png",
        "masked-38.png",
        "masked-61.png",
    }
    assert "Training curves" in page
    assert (out / "pictures" / "curves-tokenizers.png").is_file()
    assert (out / "pictures" / "curves-vits.png").is_file()
    assert len(page) < 10e6
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_analyze__numbers_equal_those_of_the_functions(
    analysis: tuple[Path, dict[str, Any], str], images: Path, codebook_run: Path
) -> None:
    metrics = analysis[1]["tokenizers"][0]
    tokenizer = PerceptualTokenizer.from_pretrained(codebook_run)
    splits = open_images(str(images))
    x, labels = to_float(read_all(splits.evaluation, 16)[0]), read_all(splits.evaluation, 16)[1]
    train_images, train_labels, _ = read_all(splits.train, 16)
    codes, train_codes = encode_all(tokenizer, x), encode_all(tokenizer, to_float(train_images))
    assert metrics["psnr"] == pytest.approx(
        float(psnr(x, decode_all(tokenizer, encode_all(tokenizer, x))).mean()), abs=1e-3
    )
    assert metrics["codes_used"] == len(set(codes.flatten().tolist()))
    share = torch.bincount(codes.flatten()).double() / codes.numel()
    assert metrics["perplexity"] == pytest.approx(math.exp(-float(torch.special.xlogy(share, share).sum())), abs=0.01)
    assert train_labels is not None
    assert labels is not None
    train_x, test_x = (mean_codewords(part, tokenizer.codebook) for part in (train_codes, codes))
    probe = linear_probe(train_x, train_labels, test_x, labels, seed=0)
    assert metrics["codeword_probe"] == pytest.approx(probe.accuracy, abs=1e-3)
    position = position_dependence(codes)
    assert metrics["position"]["share"] == pytest.approx(position.share, abs=1e-4)
    assert metrics["position"]["null_share"] == pytest.approx(position.null_share, abs=1e-4)
    moved = moved_codes(tokenizer, to_float(read_all(splits.evaluation, 16 + 4)[0]), 4)
    assert metrics["position"]["moved"] == pytest.approx(moved, abs=1e-3)
    given_position = information_given_position(codes, patch_edges(x, (4, 4)))
    assert metrics["information"]["edges"]["given_position"] == pytest.approx(given_position, abs=1e-4)


def test_analyze__scores_masked_predictions_as_the_formula(
    analysis: tuple[Path, dict[str, Any], str], images: Path, vit_run: Path
) -> None:
    (record,) = analysis[1]["masked_prediction"]
    assert [part["masked"] for part in record["by_share"]] == [4, 6, 10]  # of 16 patches: 45, 75, 120 of 196
    masked_run = load_masked_run(vit_run)
    x = to_float(read_all(open_images(str(images)).evaluation, 16)[0])
    mask = torch.zeros(len(x), 4, 4, dtype=torch.bool)
    mask[:, 1, :3] = True
    accuracy, perplexity = masked_run.score(x, masked_run.encode(x), mask, batch_size=1)
    with torch.no_grad():
        logits, targets = masked_run(x, mask).double(), masked_run.encode(x)[mask]
    log_likelihood = logits.log_softmax(1).gather(1, targets[:, None])
    assert accuracy == pytest.approx(100 * float((logits.argmax(1) == targets).double().mean()))
    assert perplexity == pytest.approx(float((-log_likelihood.mean()).exp()), rel=1e-5)


def test_analyze__is_deterministic(
    analysis: tuple[Path, dict[str, Any], str], images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    run(tmp_path / "a", tokenizer=str(codebook_run), data=str(images), codewords=(0, 5))
    again, _ = run(tmp_path / "b", tokenizer=str(codebook_run), data=str(images), codewords=(0, 5))
    for path in (tmp_path / "a" / "pictures").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "pictures" / path.name).read_bytes(), path.name
    together = analysis[1]["tokenizers"][0]
    for name in CONTRACT | {
        "stability",
        "information",
        "position",
        "crossed_probe",
    }:  # a second tokenizer changes nothing
        assert again["tokenizers"][0][name] == together[name]


def test_analyze__without_labels_says_so(unlabelled_images: Path, codebook_run: Path, tmp_path: Path) -> None:
    results, page = run(tmp_path / "out", tokenizer=str(codebook_run), data=str(unlabelled_images))
    (metrics,) = results["tokenizers"]
    assert metrics["codeword_probe"] is None
    assert metrics["bag_probe"] is None
    assert set(metrics["information"]) == {"colour", "edges"}
    assert "have no labels" in page
    assert set(metrics) >= CONTRACT


def test_analyze__of_one_image_an_unused_codeword_and_hostile_names(codebook_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "<script>alert(1)<" / "test" / "😀 & co"
    train_data = data.parents[1] / "train" / data.name
    for folder in (data, train_data):
        folder.mkdir(parents=True)
    pixels = np.full((20, 20, 3), 128, dtype=np.uint8)  # flat, so one codeword or a few
    Image.fromarray(pixels).save(data / "%2e%2e<b>.png")
    Image.fromarray(pixels).save(train_data / "x.png")
    (tmp_path / "<i>").symlink_to(codebook_run)
    results, page = run(tmp_path / "out", tokenizer=str(tmp_path / "<i>"), data=str(data.parents[1]), codewords=(23,))
    (metrics,) = results["tokenizers"]
    assert metrics["name"] == "<i>"
    assert metrics["num_images"] == 1
    assert metrics["codeword_probe"] is None or 0 <= metrics["codeword_probe"] <= 100
    assert "<i>" not in page
    assert "<script>alert" not in page
    assert "&lt;i&gt;" in page
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in (tmp_path / "out" / "pictures").iterdir())


def test_analyze__classifies_originals_and_reconstructions(
    images: Path, codebook_run: Path, vit_run: Path, tmp_path: Path
) -> None:
    classifier = train("finetune", images, tmp_path / "classifier", backbone=str(vit_run))
    settings: dict[str, Any] = {"tokenizer": str(codebook_run), "data": str(images), "classifier": str(classifier)}
    results, _ = run(tmp_path / "out", **settings)
    accuracies = results["tokenizers"][0]["classifier"]
    opened = open_classifier(AnalyzeConfig(**settings), open_images(str(images)))
    x, labels, _ = read_all(open_images(str(images)).evaluation, 16)
    tokenizer = PerceptualTokenizer.from_pretrained(codebook_run)
    restored = decode_all(tokenizer, encode_all(tokenizer, to_float(x)))
    assert accuracies["originals"] == opened.accuracy(to_float(x), labels)
    assert accuracies["reconstructions"] == opened.accuracy(restored, labels)
    assert opened.accuracy(to_float(x), None) is None
    file = open_classifier(
        AnalyzeConfig(data=str(images), classifier=str(classifier / "export" / "model.safetensors")),
        open_images(str(images)),
    )
    assert file.accuracy(to_float(x), labels) == accuracies["originals"]


def test_analyze__of_a_grey_tokenizer_and_a_vit_on_it(images: Path, tmp_path: Path) -> None:
    grey = train("codebook", images, tmp_path / "grey", **{"model.in_channels": 1})
    vit = train("pretrain", images, tmp_path / "vit", tokenizer=str(grey))
    results, _ = run(tmp_path / "out", tokenizer=str(grey), backbone=(str(vit),), data=str(images))
    assert results["tokenizers"][0]["codes_used"] > 0
    assert results["masked_prediction"][0]["by_share"][0]["masked"] == 4


def test_analyze__reports_its_inputs_and_unreadable_images(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split in ("train", "test"):
        for label in ("one", "two"):
            (data / split / label).mkdir(parents=True)
            for number, file in enumerate(sorted(images.rglob("*.png"))[:4]):
                (data / split / label / f"{number}.png").write_bytes(file.read_bytes())
    (data / "test" / "one" / "broken.png").write_bytes(b"\x89PNG nonsense")
    results, page = run(tmp_path / "out", tokenizer=str(codebook_run), data=str(data), seed=3)
    splits = open_images(str(data))
    assert results["seed"] == 3
    assert results["pecobook"] == version("pecobook")
    assert results["fingerprints"] == {"train": splits.train.fingerprint, "evaluation": splits.evaluation.fingerprint}
    assert results["skipped"]["count"] == 1
    assert "broken.png" in results["skipped"]["names"][0]
    assert results["tokenizers"][0]["num_images"] == 8
    assert len(results["tokenizers"][0]["unused"]) == 24 - results["tokenizers"][0]["codes_used"]
    assert at_most_fifty(list(range(51))) is None
    assert "could not be read" in page


def test_analyze__keeps_the_numbers_if_a_picture_fails(
    images: Path, codebook_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> dict[str, bytes]:
        raise ZeroDivisionError

    monkeypatch.setattr("pecobook.commands.analyze.measure.pictures_of", fails)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", tokenizer=str(codebook_run), data=str(images))
    (metrics,) = json.loads((tmp_path / "out" / "analysis.json").read_text())["tokenizers"]
    assert set(metrics) >= CONTRACT


def test_analyze__scores_human_judgements(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    write_triplets(tmp_path / "judged" / "cnn")
    common: dict[str, Any] = {"tokenizer": str(codebook_run), "data": str(images)}
    results, page = run(tmp_path / "out", **common, judgements=str(tmp_path / "judged"))
    similarity = results["tokenizers"][0]["similarity"]
    assert similarity["judgements"] == 2
    assert similarity["agreement_with_people"]["pixels"] == 87.5
    assert "over 2 judgements" in page
    (tmp_path / "judged" / "cnn" / "judge" / "000001.npy").write_bytes(b"")
    with pytest.raises(PreflightError) as caught:
        run(
            tmp_path / "other",
            **common,
            judgements=str(tmp_path / "judged"),
            perceptual="timm:vit_tiny_patch16_224",
            perceptual_layers=(99,),
            perceptual_weights="random",
        )
    problems = "\n".join(map(str, caught.value.problems))
    assert "000001.npy' of the judgements cannot be read" in problems
    assert "--perceptual-layers 99" in problems
    assert not (tmp_path / "other").exists()


def test_analyze__refuses_a_perceptual_network_for_larger_images(
    images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(PreflightError, match=r"no features of the 16 x 16 pixel images.*--perceptual-layers"):
        run(
            tmp_path / "out",
            tokenizer=str(codebook_run),
            data=str(images),
            perceptual="torchvision:vgg11",
            perceptual_layers=(5, "avgpool"),
            perceptual_weights="random",
        )


def test_analyze__lists_all_problems_before_it_writes(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightError) as caught:
        pecobook.analyze(
            tokenizer=str(codebook_run),
            against=(str(tmp_path / "none"),),
            backbone=(str(codebook_run),),
            data=str(images),
            codewords=(24,),
            out=str(tmp_path / "out"),
        )
    problems = "\n".join(map(str, caught.value.problems))
    assert "has codewords 0 to 23" in problems
    assert "none" in problems
    assert "is not a run of pecobook pretrain" in problems
    assert not (tmp_path / "out").exists()
    with pytest.raises(PreflightError, match="--tokenizer is missing"):
        pecobook.analyze(out=str(tmp_path / "out"))


def test_analyze__deletes_only_analyses(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    common: dict[str, Any] = {"tokenizer": str(codebook_run), "data": str(images), "out": str(tmp_path)}
    with pytest.raises(PreflightError, match="is not empty"):
        pecobook.analyze(**common)
    with pytest.raises(PreflightError, match="does not look like an analysis"):
        pecobook.analyze(**common, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years"
    killed = tmp_path / "killed"  # as it wrote its first file
    killed.mkdir()
    (killed / ".analysis.json.tmp").write_text("{")
    assert check_and_open(AnalyzeConfig(**{**common, "out": str(killed)}, overwrite=True))
    (killed / "pictures").mkdir()
    with pytest.raises(PreflightError, match="does not look like an analysis"):
        pecobook.analyze(**{**common, "out": str(killed)}, overwrite=True)


def test_cli__analyzes(images: Path, codebook_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["analyze", "--tokenizer", str(codebook_run), "--data", str(images), "--out", str(tmp_path / "a")]
    cli.main(words)
    cli.main([*words, "--overwrite"])
    said = capsys.readouterr().err
    assert "images     22 images to train on, 2 held out (held-out 10% of train)\n" in said
    assert "Done: open" in said


def test_unique_names__are_the_names_of_the_folders() -> None:
    assert unique_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert unique_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert unique_names(["a", "a"]) == ["a (1)", "a (2)"]
    assert unique_names([]) == []


@pytest.mark.parametrize("name", ["a", "../../etc/passwd", "😀", "<script>", "x" * 300, ""])
def test_file_part__is_safe(name: str) -> None:
    assert re.fullmatch(r"3-[\w.-]{0,60}", file_part(3, name), flags=re.ASCII)
