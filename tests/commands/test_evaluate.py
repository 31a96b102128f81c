"""`pecobook evaluate`: every figure against one that is computed otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from pecobook import cli, load_tokenizer
from pecobook.analysis.fid import FeatureSums, Gaussian, frechet_distance
from pecobook.analysis.reconstruction import psnr, ssim
from pecobook.commands.evaluate import evaluate
from pecobook.commands.evaluate.measure import Mean, gflop
from pecobook.data.images import open_images
from pecobook.data.stream import read_all
from pecobook.errors import PecobookError
from pecobook.models.dalle import DalleTokenizer
from pecobook.models.judges import load_inception, load_lpips
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig
from tests.inception import random_inception


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the flags of files with random weights of Inception and of LPIPS's trunk."""
    folder = tmp_path_factory.mktemp("judges")
    torch.save(random_inception(), folder / "inception.pth")
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), folder / "alexnet.pth")
    return {"inception_weights": str(folder / "inception.pth"), "lpips_weights": str(folder / "alexnet.pth")}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return an export of ours with 32 codewords, and DALL-E's tokenizer, small."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    model = AutoencoderConfig(channels=(8, 16), latent_dim=8, num_blocks=1)
    PerceptualTokenizer(TokenizerConfig(model=model, num_codewords=32, image_size=64)).save_pretrained(folder / "ours")
    dalle = DalleTokenizer(width=8, num_codewords=16, embedding_dim=6)
    (folder / "dalle").mkdir()
    for part in ("encoder", "decoder"):
        torch.save(getattr(dalle, part).state_dict(), folder / "dalle" / f"{part}.pt")
    return str(folder / "ours"), f"dalle:{folder / 'dalle'}"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the distance of the first features: that of all 2,048 takes half a minute, and test_fid.py tests it."""
    monkeypatch.setattr("pecobook.commands.evaluate.measure.frechet_distance", distance_of_some)


def distance_of_some(*parts: Gaussian) -> float:
    one, other = (Gaussian(part.mean[:64], part.covariance[:64, :64], part.num_images) for part in parts)
    return frechet_distance(one, other)


def held_out(count: int, size: int) -> Tensor:
    return read_all(open_images("photos").evaluation, size, limit=count)[0]


def gaussian(pixels: Tensor, weights: str) -> Gaussian:
    sums = FeatureSums()
    sums.add(load_inception(weights)(pixels)[0])
    return sums.gaussian()


def test_evaluate__every_figure_is_what_all_images_at_once_give(
    tokenizers: tuple[str, str], judges: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 4
    flags = ["--data", "photos", "--num-images", str(count), "--image-size", "64", "--batch-size", "3"]
    flags += [word for name, file in judges.items() for word in (f"--{name.replace('_', '-')}", file)]
    flags += ["--statistics", str(tmp_path / "originals.npz"), "--out", str(tmp_path / "out"), "--workers", "0"]
    cli.main(["evaluate", *tokenizers, *flags])
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [values["name"] for values in results["tokenizers"]] == ["ours", "dalle"]
    assert results["not_measured"] == {"perceptual": "Name a network: --perceptual NETWORK."}
    assert results["protocol"]["images_read"] == count
    assert results["networks"]["inception"]["original"] is False

    pixels = held_out(count, 64)
    images = pixels.float() / 255
    lpips = load_lpips("alex", judges["lpips_weights"])[0]
    reference = gaussian(pixels, judges["inception_weights"])
    for values, source in zip(results["tokenizers"], tokenizers, strict=True):
        tokenizer = load_tokenizer(source)
        codes = tokenizer.encode(images)
        restored = tokenizer.decode(codes)
        share = np.bincount(codes.flatten().numpy(), minlength=tokenizer.num_codewords) / codes.numel()
        entropy = -sum(p * math.log2(p) for p in share if p > 0)
        tokens, K = (64 // tokenizer.stride) ** 2, tokenizer.num_codewords
        distances = psnr(images, restored).double()
        expected = {
            "psnr": float(distances.mean()),
            "psnr_error": float(distances.std() / math.sqrt(count)),
            "ssim": float(ssim(images, restored).mean()),
            "lpips": float(lpips(2 * images - 1, 2 * restored - 1).mean()),
            "codes_used": int((share > 0).sum()),
            "usage": 100 * (share > 0).mean(),
            "entropy_bits": entropy,
            "perplexity": 2**entropy,
            "bits_per_pixel": math.log2(K) / tokenizer.stride**2,
            "entropy_bits_per_pixel": entropy / tokenizer.stride**2,
            "tokens": tokens,
        }
        for name, value in expected.items():
            assert values[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
        rounded = (restored * 255).round().to(torch.uint8)
        distance = distance_of_some(reference, gaussian(rounded, judges["inception_weights"]))
        assert values["rfid"] == pytest.approx(distance, rel=1e-3)
        assert values["rfid"] > 0
        assert values["is"] >= 1
        assert values["images_per_second"] < values["encode_images_per_second"]
    printed = capsys.readouterr().err
    assert "rFID (lower is better)" in printed
    assert "NOT the published file" in printed
    assert "rFID of 4 images is above that of the 50,000" in printed
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| metric | ours | dalle |" in page
    assert f"| codewords K | {32} | {16} |" in page


def test_evaluate__statistics_are_read_again_and_refused_where_they_do_not_fit(
    tokenizers: tuple[str, str], judges: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "originals.npz"
    same: dict[str, Any] = {
        "tokenizers": tokenizers[:1],
        "num_images": 3,
        "metrics": ("rfid",),
        "inception_weights": judges["inception_weights"],
        "statistics": str(file),
        "workers": 0,
        "overwrite": True,
        "out": str(tmp_path / "out"),
    }

    def rfid(**changes: Any) -> float:
        content = json.loads((evaluate(**(same | changes)) / "evaluation.json").read_text())
        value: float = content["tokenizers"][0]["rfid"]
        return value

    first, written = rfid(), file.read_bytes()
    assert rfid() == pytest.approx(first, rel=1e-6)
    assert file.read_bytes() == written
    assert "of the same 3 images" in json.loads((tmp_path / "out/evaluation.json").read_text())["protocol"]["reference"]
    with pytest.raises(PecobookError, match=r"originals.npz' does not fit: num_images: 3 of the file, 2 now"):
        rfid(num_images=2)
    with pytest.raises(PecobookError, match=r"does not fit: image_size: 64 of the file, 32 now"):
        rfid(image_size=32)
    with pytest.raises(PecobookError, match=r"does not fit: images: "):
        rfid(split="train")
    torch.save(random_inception(1), tmp_path / "others.pth")
    with pytest.raises(PecobookError, match=r"does not fit: inception: "):
        rfid(inception_weights=str(tmp_path / "others.pth"))
    with np.load(file) as content:
        np.savez(tmp_path / "foreign.npz", mu=content["mu"], sigma=content["sigma"])
    assert rfid(statistics=str(tmp_path / "foreign.npz")) == pytest.approx(first, rel=1e-6)
    reference = json.loads((tmp_path / "out" / "evaluation.json").read_text())["protocol"]["reference"]
    assert "of others" in reference
    assert "not known" in reference
    file.write_bytes(written[:1000])
    with pytest.raises(PecobookError, match=r"originals.npz' cannot be read"):
        rfid()


@pytest.mark.usefixtures("offline")
def test_evaluate__measures_the_rest_where_weights_are_missing_and_fails_where_they_were_asked_for(
    tokenizers: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, Any] = {"tokenizers": tokenizers[:1], "num_images": 4, "workers": 0}
    out = evaluate(**common, out=str(tmp_path / "out"))
    results = json.loads((out / "evaluation.json").read_text())
    assert set(results["not_measured"]) == {"rfid", "is", "lpips", "perceptual"}
    assert {"psnr", "ssim", "codes_used", "gflop"} <= set(results["tokenizers"][0])
    assert "rfid" not in results["tokenizers"][0]
    assert "not measured: rfid. The weights weights-inception" in capsys.readouterr().err
    with pytest.raises(PecobookError, match=r"--metrics rfid cannot be measured: .*--inception-weights FILE"):
        evaluate(**common, metrics=("rfid", "psnr"), out=str(tmp_path / "other"))
    with pytest.raises(PecobookError, match=r"--metrics perceptual cannot be measured: Name a network"):
        evaluate(**common, metrics=("perceptual",), out=str(tmp_path / "other"))
    with pytest.raises(PecobookError, match=r"none.pth'"):  # a file that was named must be there
        evaluate(**common, lpips_weights=str(tmp_path / "none.pth"), out=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("offline")
def test_evaluate__names_all_that_is_wrong_at_once(tokenizers: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(PecobookError) as error:
        evaluate(tokenizers=(tokenizers[1], str(tmp_path)), data="nowhere", image_size=20)
    for part in ("--out is missing", "nowhere", str(tmp_path)):
        assert part in str(error.value)
    with pytest.raises(PecobookError, match=r"reads multiples of 8 pixels, not 20: give --image-size 16"):
        evaluate(tokenizers=tokenizers[1:], image_size=20, out=str(tmp_path / "out"))
    with pytest.raises(PecobookError, match=r"Tokenizers are missing"):
        evaluate(out=str(tmp_path / "out"))
    with pytest.raises(PecobookError, match=r"--statistics is for rfid"):
        evaluate(tokenizers=tokenizers, metrics=("psnr",), statistics="x.npz", out=str(tmp_path / "out"))


@pytest.mark.usefixtures("offline")
def test_evaluate__reads_each_tokenizer_at_its_own_size_and_all_splits(
    tokenizers: tuple[str, str], tmp_path: Path
) -> None:
    common: dict[str, Any] = {"tokenizers": tokenizers, "num_images": 3, "workers": 0, "metrics": ("psnr", "usage")}
    for split in ("all", "train", "held-out"):
        out = evaluate(**common, split=split, perceptual="", out=str(tmp_path / split))
        results = json.loads((out / "evaluation.json").read_text())
        assert [values["image_size"] for values in results["tokenizers"]] == [64, 112]
        assert [values["tokens"] for values in results["tokenizers"]] == [1024, 196]
    assert len(json.loads((tmp_path / "all" / "evaluation.json").read_text())["protocol"]["fingerprints"]) == 2


@pytest.mark.usefixtures("offline")
def test_evaluate__of_the_perceptual_distance(tokenizers: tuple[str, str], tmp_path: Path) -> None:
    from pecobook import PerceptualDistance

    out = evaluate(
        tokenizers=tokenizers[:1],
        num_images=3,
        workers=0,
        metrics=("perceptual",),
        perceptual="timm:test_vit",
        perceptual_weights="random",
        perceptual_layers=(1, 2),
        out=str(tmp_path / "out"),
    )
    values = json.loads((out / "evaluation.json").read_text())["tokenizers"][0]
    tokenizer, images = load_tokenizer(tokenizers[0]), held_out(3, 64).float() / 255
    distance = PerceptualDistance("timm:test_vit", (1, 2), "random")
    with torch.no_grad():
        expected = distance(images, tokenizer.decode(tokenizer.encode(images))).mean()
    assert values["perceptual_distance"] == pytest.approx(float(expected), rel=1e-3)


def test_mean__of_infinite_values_is_unknown() -> None:
    mean = Mean()
    mean.add(torch.tensor([1.0, math.inf]))
    assert mean.result(3) == (None, None)


def test_gflop__counts_the_search_and_leaves_the_tokenizer_as_it_is() -> None:
    model = AutoencoderConfig(channels=(8, 16), latent_dim=8, num_blocks=1)
    few, many = (PerceptualTokenizer(TokenizerConfig(model=model, num_codewords=K)) for K in (64, 1064))
    counts = [gflop(tokenizer, 32) for tokenizer in (few, many)]
    assert counts[1]["encode_gflop"] - counts[0]["encode_gflop"] == pytest.approx(2e-9 * 256 * 8 * 1000, abs=2e-4)
    assert counts[0]["decode_gflop"] == counts[1]["decode_gflop"]
    assert few.codebook.device.type == "cpu"
