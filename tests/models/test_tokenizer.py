"""The tokenizer's contract, and what it does with a damaged, foreign or missing export."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor
from torch.testing import assert_close

from pecobook.errors import WeightsError
from pecobook.models.quantizer import VectorQuantizer
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig

CONFIG = TokenizerConfig(
    model=AutoencoderConfig(channels=(8, 16, 16), latent_dim=4, num_blocks=1, latent_norm=True),
    num_codewords=32,
    image_size=24,
)


@pytest.fixture(autouse=True)
def without_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read damaged files, as files of older versions are read; tests/models/test_export.py tests the checksums."""
    monkeypatch.setenv("PECOBOOK_SKIP_CHECKSUMS", "1")


def make(seed: int = 0) -> PerceptualTokenizer:
    torch.manual_seed(seed)
    return PerceptualTokenizer(CONFIG).eval()


def pictures(height: int = 24, width: int = 16) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an export."""
    make().save_pretrained(tmp_path / "run" / "export")
    return tmp_path / "run"


def test_encode__gives_codes_of_the_grid() -> None:
    tokenizer = make()
    codes = tokenizer.encode(pictures())
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 6, 4)
    assert codes.min() >= 0
    assert codes.max() < 32
    assert len(torch.unique(codes)) > 1
    assert tokenizer.stride == 4
    assert tokenizer.image_size == 24
    assert tokenizer.codebook.shape == (32, 4)
    assert tokenizer.codebook.dtype == torch.float32


def test_encode__is_what_the_quantizer_says() -> None:
    tokenizer = make()
    codes = tokenizer.encode(pictures())
    assert torch.equal(codes, tokenizer.quantizer(tokenizer.encode_latents(pictures())).codes)
    # The encoder reads [-1, 1].
    assert_close(tokenizer.encode_latents(pictures()), tokenizer.encoder(pictures() * 2 - 1))


def test_encode__learns_nothing_even_in_training() -> None:
    tokenizer = make().train()
    before = tokenizer.codebook.clone()
    codes = tokenizer.encode(pictures())
    tokenizer.quantizer.update()
    assert torch.equal(before, tokenizer.codebook)
    assert not codes.requires_grad


@pytest.mark.parametrize(("height", "width"), [(25, 24), (24, 26), (2, 4)])
def test_encode__refuses_what_is_no_multiple_of_the_stride(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"Images must be multiples of 4 pixels, not {height} x {width}"):
        make().encode(pictures(height, width))


def test_decode__gives_images() -> None:
    tokenizer = make()
    codes = torch.randint(0, 32, (2, 3, 5))
    images = tokenizer.decode(codes)
    assert images.shape == (2, 3, 12, 20)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert not images.requires_grad
    raw = tokenizer.decoder(tokenizer.codebook[codes].permute(0, 3, 1, 2))
    assert_close(images, ((raw + 1) / 2).clamp(0, 1), atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tokenizer.decode(codes).dtype == torch.float32


def test_decode__clamps() -> None:
    tokenizer = make()
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    last = list(tokenizer.decoder.children())[-1]
    for value, expected in ((5.0, 1.0), (-5.0, 0.0)):
        torch.nn.init.constant_(last.bias, value)  # type: ignore[arg-type]
        torch.nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        assert (tokenizer.decode(codes) == expected).all()


# ---------------------------------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("inside", ["", "export"])
def test_from_pretrained__gives_back_what_was_saved(run: Path, inside: str) -> None:
    tokenizer, again = make(), PerceptualTokenizer.from_pretrained(run / inside)
    assert again.config == CONFIG
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    codes = tokenizer.encode(pictures())
    assert torch.equal(again.encode(pictures()), codes)
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))
    assert torch.equal(PerceptualTokenizer.from_pretrained(str(run)).codebook, tokenizer.codebook)


def test_save_pretrained__writes_the_same_bytes_for_the_same_weights(run: Path, tmp_path: Path) -> None:
    PerceptualTokenizer.from_pretrained(run).save_pretrained(tmp_path / "again")
    trained = make()
    trained.quantizer.train()(
        trained.encode_latents(pictures()).detach()
    )  # statistics of training are not exported ...
    trained.quantizer.codebook.copy_(make().codebook)
    trained.save_pretrained(tmp_path / "trained")
    names = ["README.md", "config.json", "config.json.sha256", "model.safetensors", "model.safetensors.sha256"]
    for other in ("again", "trained"):
        assert sorted(path.name for path in (tmp_path / other).iterdir()) == names
        for name in names:
            assert (tmp_path / other / name).read_bytes() == (run / "export" / name).read_bytes()
    make(1).save_pretrained(tmp_path / "other")
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (run / "export" / weights).read_bytes()  # ... but weights are


def test_save_pretrained__writes_a_card_that_says_how_to_load(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, origin="By hand.", repo_id="me/mine")
    card = (tmp_path / "README.md").read_text()
    assert 'PerceptualTokenizer.from_pretrained("me/mine")' in card
    assert "32 codewords of dimension 4; one token for 4 x 4 pixels; trained at 24 pixels.\n\nBy hand.\n" in card


def test_save_pretrained__keeps_a_codebook_learned_by_averages(tmp_path: Path) -> None:
    quantizer = VectorQuantizer(32, 4, decay=0.5)
    tokenizer = PerceptualTokenizer(CONFIG, quantizer).train()
    for _ in range(3):
        quantizer(tokenizer.encode_latents(pictures()).detach())
        quantizer.update()
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(PerceptualTokenizer.from_pretrained(tmp_path).codebook, quantizer.codebook)


def edit(run: Path, **changes: Any) -> None:
    file = run / "export" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_from_pretrained__refuses_another_kind(run: Path) -> None:
    edit(run, kind="painter")
    with pytest.raises(WeightsError, match="is a painter, not a tokenizer: give a run of pecobook codebook"):
        PerceptualTokenizer.from_pretrained(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_codewords": 33},
        {"num_codewords": "many"},
        {"colour": "red"},
        {"model": {"channels": [8, 16], "group_size": 16}},
    ],
    ids=["other size", "wrong type", "unknown", "other shape"],
)
def test_from_pretrained__refuses_settings_that_do_not_fit(run: Path, changes: dict[str, Any]) -> None:
    edit(run, **changes)
    with pytest.raises(WeightsError, match=r"The tokenizer in .* is damaged|'num_codewords' .many., which is not"):
        PerceptualTokenizer.from_pretrained(run)


@pytest.mark.parametrize("text", ["{", "[]", "3", '"tokenizer"', "", "\udcff"])
def test_from_pretrained__refuses_a_damaged_config(run: Path, text: str) -> None:
    (run / "export" / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(WeightsError, match=r"config.json' (cannot be read|does not hold a JSON object)"):
        PerceptualTokenizer.from_pretrained(run)


@pytest.mark.parametrize("num_bytes", [0, 7, 100, 5000])
def test_from_pretrained__refuses_a_cut_off_file(run: Path, num_bytes: int) -> None:
    file = run / "export" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(WeightsError, match=r"The export in .* cannot be read"):
        PerceptualTokenizer.from_pretrained(run)


def test_from_pretrained__refuses_missing_and_unknown_weights(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = run / "export" / "model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if name != "quantizer.codebook"}, file)
    with pytest.raises(WeightsError, match=r"quantizer\.codebook"):
        PerceptualTokenizer.from_pretrained(run)
    save_file({**state, "extra": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match="extra"):
        PerceptualTokenizer.from_pretrained(run)


class Evil:
    """What runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_from_pretrained__never_unpickles(run: Path, tmp_path: Path) -> None:
    proof = tmp_path / "code ran"
    (run / "export" / "model.safetensors").write_bytes(pickle.dumps({"quantizer.codebook": Evil(proof)}))
    with pytest.raises(WeightsError, match="cannot be read"):
        PerceptualTokenizer.from_pretrained(run)
    # The old format beside, or instead: it is not even looked at.
    (run / "export" / "model.safetensors").rename(run / "export" / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"contains no export/model.safetensors"):
        PerceptualTokenizer.from_pretrained(run)
    assert not proof.exists()


def test_from_pretrained__refuses_a_missing_or_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"There is no run .*nowhere"):
        PerceptualTokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="There is no run 'nowhere'"):
        PerceptualTokenizer.from_pretrained("nowhere")
    with pytest.raises(WeightsError, match=r"it is not a finished run\. Finish it with --resume"):
        PerceptualTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("offline\nlong story"), OSError("no space"), ConnectionError()]
)
def test_from_pretrained__says_that_the_hub_gives_none(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        WeightsError, match="There is no run 'me/mine' here, and the Hugging Face hub returned none"
    ) as caught:
        PerceptualTokenizer.from_pretrained("me/mine")
    assert "\n" not in str(caught.value)


def test_from_pretrained__really_offline() -> None:
    with pytest.raises(WeightsError, match="hub returned none"):
        PerceptualTokenizer.from_pretrained("me/mine")
    with pytest.raises(WeightsError, match="hub returned none"):
        PerceptualTokenizer.from_pretrained("not a/valid name!")
    assert issubclass(HfHubHTTPError, Exception)


def test_from_pretrained__loads_from_the_hub(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    requested_ids: list[str] = []

    def download(repo_id: str, **options: Any) -> str:
        requested_ids.append(repo_id)
        assert options["allow_patterns"] == ["model.safetensors", "config.json"]  # no pickles, no code
        return str(run / "export")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(PerceptualTokenizer.from_pretrained("me/mine").codebook, make().codebook)
    assert requested_ids == ["me/mine"]


# --------------------------------------------------------------------------------------------- what encode answers to


def test_encode__takes_bytes_and_half_precision() -> None:
    tokenizer = make()
    pixels = (pictures() * 255).round().to(torch.uint8)
    expected = tokenizer.encode(pixels.float() / 255)
    assert torch.equal(tokenizer.encode(pixels), expected)
    assert torch.equal(tokenizer.encode(pixels.double() / 255), expected)
    half = (pixels.float() / 255).bfloat16()
    assert torch.equal(tokenizer.encode(half), tokenizer.encode(half.float()))
    assert tokenizer.bfloat16().encode(pixels).shape == expected.shape


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(3, 24, 16),
            r"must have the shape \(B, 3, H, W\), not \(3, 24, 16\): for one image give image\[None\]",
        ),
        (
            torch.zeros(1, 24, 16, 3),
            r"must have 3 channels, not 24: put the channels first, images\.permute\(0, 3, 1, 2\)",
        ),
        (torch.full((1, 3, 24, 16), float("nan")), "contain values that are not finite"),
        (
            torch.full((1, 3, 24, 16), 200.0),
            r"must lie in \[0, 1\], not in \[200, 200\]: divide them by 255, or give uint8",
        ),
        (torch.full((1, 3, 24, 16), -1.0), r"not in \[-1, -1\]: they seem normalised"),
        (torch.zeros(1, 3, 24, 16, dtype=torch.int64), r"uint8 in 0\.\.255 or floats in \[0, 1\], not torch\.int64"),
    ],
)
def test_encode__says_what_is_wrong(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().encode(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_decode__takes_integers_of_any_type(dtype: torch.dtype) -> None:
    tokenizer = make()
    codes = tokenizer.encode(pictures())
    assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(6, 4, dtype=torch.int64), r"shape \(B, h, w\), not \(6, 4\): for one image give codes\[None\]"),
        (torch.zeros(1, 6, 4), r"must be integers, not torch\.float32"),
        (torch.full((1, 6, 4), 32), r"must lie in \[0, 32\), not in \[32, 32\]"),
        (torch.full((1, 6, 4), -1), r"must lie in \[0, 32\), not in \[-1, -1\]"),
    ],
)
def test_decode__says_what_is_wrong(codes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().decode(codes)
