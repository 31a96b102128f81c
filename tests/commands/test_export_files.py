"""What each exported form computes for image files, without a manual step, against `pecobook predict`."""

from __future__ import annotations

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from pecobook import Backbone, Classifier, PerceptualTokenizer, Segmenter, cli, read_image
from pecobook.models.weights import create_network, load_backbone
from tests.runs import shapes, train

SIZES = {"wide": (40, 97), "tall": (131, 43), "small": (9, 14), "square": (24, 24)}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"embed_dim": 24},
    "beit_base_patch16_224": {"embed_dim": 24, "init_values": 0.1},
}
CLASSES = ("ape", "bee", "cat", "dög", "eel")
MEAN, STD = (0.5, 0.45, 0.4), (0.2, 0.25, 0.3)
# Nothing but NumPy, Pillow and onnxruntime may be imported by the lines of a README.
_GUARD = """\
import sys
for name in ("torch", "pecobook", "timm", "torchvision"):
    sys.modules[name] = None
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs of several shapes: smooth, with details."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        for number in range(2):
            coarse, fine = (random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (4, 12))
            first, second = (
                Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC) for x in (coarse, fine)
            )
            Image.blend(first, second, 0.3).save(folder / f"{name}{number}.png")
    values = np.asarray(Image.open(folder / "wide0.png").convert("L"), dtype=np.uint16) * 12 + 400
    Image.fromarray(values).save(folder / "deep.png")  # 12 bits in a container of 16
    return folder


def network(name: str, num_classes: int, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "depth": 2, "num_heads": 2, **NETWORKS[name], **more}
    body = create_network(name, num_classes=num_classes, **args)
    for parameter_name, parameter in body.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3 if parameter_name.startswith(("patch_embed", "head")) else 0.05)
    return body, args


def classifier(name: str, out: Path, crop: float = 1.0) -> Path:
    """Write the export of a classifier whose outputs differ from image to image; return the run."""
    body, args = network(name, len(CLASSES), global_pool="avg")
    model = Classifier(body, name, args, MEAN, STD, 32, classes=CLASSES, crop=crop)
    model.value_range = (300.0, 3800.0)
    model.save_pretrained(out / "export")
    return out


def run_export(run: Path, out: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Export a run; return the printed lines of Python."""
    capsys.readouterr()
    cli.main(["export", str(run), "--format", kind, "--out", str(out)])
    return capsys.readouterr().err.split("\n\n", 1)[1]


def predicted(run: Path, photos: Path, out: Path) -> dict[str, list[tuple[str, float]]]:
    """Return classes and probabilities of each image, as `pecobook predict` writes them."""
    cli.main(["predict", str(run), str(photos), "--out", str(out), "--no-pictures"])
    with (out / "predictions.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    return {row[0]: [(name, float(p)) for name, p in zip(row[1::2], row[2::2], strict=True)] for row in rows}


def on_photo(lines: str, photo: Path) -> str:
    assert lines.count('"photo.jpg"') == 1
    return lines.replace('"photo.jpg"', json.dumps(str(photo)))


def values(lines: str, photo: Path, name: str) -> npt.NDArray[Any]:
    """Run pasted lines on an image file; return the variable `name`."""
    scope: dict[str, Any] = {}
    exec(on_photo(lines, photo), scope)
    return np.asarray(scope[name])


def readme_lines(folder: Path) -> str:
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def run_alone(folder: Path, photo: Path) -> str:
    """Run the lines of a README in its folder, where pecobook and PyTorch cannot be imported; return the output."""
    code = _GUARD + on_photo(readme_lines(folder), photo)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout


# Largest difference of a probability. Pillow and the library agree to a rounding of 8 bits. timm's own transform
# resizes before it crops, so its crop lies up to half a pixel of the image beside ours; transformers rounds down the
# side of a crop below 1. Both matter for an image of 9 pixels, which stays out of these comparisons.
TOLERANCE = {
    "closing": {1.0: 3e-3, 0.875: 3e-3},
    "onnx": {1.0: 3e-3},
    "hf": {1.0: 1e-4, 0.875: 0.1},
    "timm": {1.0: 3e-3, 0.875: 3e-3},
    "timm's transform": {1.0: 0.03, 0.875: 0.15},
}


@pytest.mark.parametrize("crop", [1.0, 0.875])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_classifier__predicts_the_same_for_files_in_every_form(
    name: str, crop: float, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = classifier(name, tmp_path / "run", crop)
    expected = predicted(run, photos, tmp_path / "predictions")
    assert len({best[0][0] for best in expected.values()}) > 2  # so that equal predictions mean something
    forms = {"closing": Classifier.from_pretrained(run).loading_code(str(run / "export"))}
    for form in ("onnx", "timm", "hf"):
        if crop in TOLERANCE[form] and (form != "hf" or name.startswith("beit")):
            forms[form] = run_export(run, tmp_path / form, form, capsys)
    if "hf" in forms:  # below, the processor of transformers crops to nothing
        pytest.importorskip("transformers")  # its versions for the lowest huggingface-hub are too old
        from transformers import AutoImageProcessor

        card = (tmp_path / "hf" / "README.md").read_text()
        assert ("The image processor needs images of 2 x 2 pixels or more." in card) == (crop < 1)
        processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
        side = 2 if crop < 1 else 1
        pixels = processor(Image.new("RGB", (side, 40), (90, 80, 70)), return_tensors="pt")["pixel_values"]
        assert float(pixels.std((2, 3)).max()) < 1e-5
    forms["timm's transform"] = f"""\
import timm
from PIL import Image
model = timm.create_model("local-dir:{tmp_path / "timm"}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
probabilities = model(transform(Image.open("photo.jpg"))[None]).softmax(1)[0].detach()"""
    for photo in sorted(photos.iterdir()):
        best = expected[photo.name]
        for form, lines in forms.items():
            if TOLERANCE[form][crop] > 0.01 and photo.name.startswith("small"):
                continue
            if form == "timm's transform" and photo.name == "deep.png":  # it knows no range of values
                continue
            actual = values(lines, photo, "probabilities")
            wanted = np.array([dict(best)[class_name] for class_name in CLASSES], dtype=np.float32)
            assert np.abs(actual - wanted).max() < TOLERANCE[form][crop], (form, photo.name)
            is_close_call = best[0][1] - best[1][1] < 2 * TOLERANCE[form][crop]
            assert is_close_call or CLASSES[int(actual.argmax())] == best[0][0], (form, photo.name)
    for form in forms.keys() & {"timm", "hf", "onnx"}:
        assert "300.0, 3800.0" in re.sub(r"\s+", " ", (tmp_path / form / "config.json").read_text())
        assert "300..3800" in (tmp_path / form / "README.md").read_text() or form == "onnx"
    if "onnx" in forms:
        alone = ast.literal_eval(run_alone(tmp_path / "onnx", photos / "wide0.png"))
        assert [class_name for _, class_name in alone] == [class_name for class_name, _ in expected["wide0.png"]]


@pytest.mark.parametrize("name", list(NETWORKS))
def test_masked_backbone__gives_the_mean_of_its_patches_in_every_form(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masked modelling trains no class token."""
    body, args = network(name, 0, global_pool="avg")
    Backbone(body, name, args, MEAN, STD, 32, target="tokens").save_pretrained(tmp_path / "run/export")
    run, library = tmp_path / "run", Backbone.from_pretrained(tmp_path / "run")
    forms = {"closing": library.loading_code(str(run / "export"))}
    for form in ("onnx", "timm", "hf") if name.startswith("beit") else ("onnx", "timm"):
        forms[form] = run_export(run, tmp_path / form, form, capsys)
    finetuned = load_backbone(str(run), pool_mean=True)
    for photo in sorted(photos.iterdir()):
        pixels = read_image(photo, 32)[None] / 255
        with torch.no_grad():
            (patches,) = body.eval().forward_intermediates(  # type: ignore[operator]
                (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None],
                indices=1,
                intermediates_only=True,
                output_fmt="NLC",
            )
            expected = nn.functional.layer_norm(patches.mean(1), (24,), eps=1e-6)[0]
            assert_close(library(pixels)[0], expected)
            assert_close(finetuned(pixels)[0], expected)
        for form, lines in forms.items():
            actual = torch.as_tensor(values(lines, photo, "features"))
            assert (actual - expected).abs().max() < 0.02, (form, photo.name)
    alone = np.array(re.findall(r"-?\d+\.\d*(?:e-?\d+)?", run_alone(tmp_path / "onnx", photo)), dtype=np.float32)
    assert_close(torch.from_numpy(alone), expected, atol=0.02, rtol=0.0)


def test_tokenizer__onnx_gives_the_codes_of_files(
    codebook_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run_export(codebook_run, tmp_path / "onnx", "onnx", capsys)
    tokenizer, example = PerceptualTokenizer.from_pretrained(codebook_run), codebook_run / "samples" / "example.png"
    assert json.dumps(str(example)) in lines  # a run keeps an image on which its lines can be tried
    equal = []
    for photo in (photos / name for name in ("wide0.png", "tall0.png", "small0.png")):
        codes = tokenizer.encode(read_image(photo, 16)[None] / 255)
        alone = run_alone(tmp_path / "onnx", photo)
        equal += (np.array(re.findall(r"\d+", alone), dtype=np.int64) == codes.flatten().numpy()).tolist()
        restored = np.asarray(Image.open(tmp_path / "onnx" / "restored.png"))
    assert np.mean(equal) > 0.95  # a rounding of 8 bits may choose the codeword beside
    expected = tokenizer.decode(codes)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(restored - expected).mean() < 2


def test_segmenter__onnx_gives_the_masks_of_predict(
    vit_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train("segment", shapes(), tmp_path / "trained", backbone=str(vit_run), max_steps="2", image_size=24)
    model, run = Segmenter.from_pretrained(trained), tmp_path / "run"
    nn.init.normal_(model.head.classifier.weight)  # so that the masks contain all classes
    model.save_pretrained(run / "export")
    run_export(run, tmp_path / "onnx", "onnx", capsys)
    cli.main(["predict", str(run), str(photos), "--out", str(tmp_path / "out"), "--test.mode", "slide"])
    for name in ("wide0.png", "tall0.png", "small0.png"):
        expected = np.asarray(Image.open(tmp_path / "out" / "masks" / name))
        alone = ast.literal_eval(run_alone(tmp_path / "onnx", photos / name))
        actual = np.asarray(Image.open(tmp_path / "onnx" / "classes.png"))
        assert alone == {model.classes[number]: int((actual == number).sum()) for number in np.unique(actual)}
        assert np.bincount(expected.flatten()).max() < 0.9 * expected.size
        assert (actual == expected).mean() > 0.98
