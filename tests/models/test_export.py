"""Exports of every kind: written, read back, uploaded, and readable by earlier versions."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import pecobook
from pecobook import Backbone, Classifier, Detector, PerceptualTokenizer, Segmenter, read_image
from pecobook.errors import WeightsError
from pecobook.models.dense.pyramid import FeaturePyramid, describe_pyramid
from pecobook.models.export import Exported
from pecobook.models.weights import create_network, load_backbone
from pecobook.settings.dense import PyramidConfig
from pecobook.settings.detect import DetectorConfig
from pecobook.settings.images import AUTO
from pecobook.settings.segment import SegmenterConfig
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig
from pecobook.utils.checksums import write_with_checksum

NAME = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}
INPUT = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 32)
PYRAMID = {"name": NAME, "args": ARGS, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "image_size": 32, "window": 0}


def tokenizer() -> PerceptualTokenizer:
    model = AutoencoderConfig(channels=(8, 8), latent_dim=4, num_blocks=1)
    return PerceptualTokenizer(TokenizerConfig(model=model, num_codewords=16, image_size=16))


def backbone() -> Backbone:
    args = {**ARGS, "global_pool": "avg"}
    return Backbone(create_network(NAME, num_classes=0, **args), NAME, args, *INPUT, target="tokens")


def classifier() -> Classifier:
    return Classifier(create_network(NAME, num_classes=2, **ARGS), NAME, ARGS, *INPUT, classes=("cat", "dög"), crop=0.9)


def pyramid() -> tuple[FeaturePyramid, dict[str, Any]]:
    network = create_network(NAME, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True, **ARGS)
    pyramid_settings = describe_pyramid(Backbone(network, NAME, ARGS, *INPUT), PyramidConfig(), 32)
    return FeaturePyramid(network, 32, PyramidConfig()), pyramid_settings


def segmenter() -> Segmenter:
    return Segmenter(*pyramid(), classes=("sky", "sea"), config=SegmenterConfig(head_width=8, auxiliary_width=4))


def detector() -> Detector:
    heads = DetectorConfig(width=16, head_width=32, proposals=60, detections=10, score_threshold=0.01)
    return Detector(*pyramid(), classes=("disc",), category_ids=(3,), masks=True, sides=(40, 64), config=heads)


def picture() -> Tensor:
    return torch.randint(256, (3, 40, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# For every kind: a function that builds a network, and a function that computes its output for an image.
KINDS: dict[str, tuple[Callable[[], Exported], Callable[[Any], Tensor]]] = {
    "tokenizer": (tokenizer, lambda model: model.encode(picture()[None, :, :16, :16] / 255)),
    "backbone": (backbone, lambda model: model(picture()[None, :, :32, :32] / 255)),
    "classifier": (classifier, lambda model: model(picture()[None, :, :32, :32] / 255)),
    "segmenter": (segmenter, lambda model: model.predict(picture())),
    "detector": (detector, lambda model: model.predict(picture()).boxes),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def build_kind(kind: str, seed: int = 0) -> Exported:
    torch.manual_seed(seed)
    return KINDS[kind][0]().eval()


def output_of(model: nn.Module) -> Tensor:
    assert isinstance(model, Exported)
    with torch.no_grad():
        return KINDS[model.kind][1](model)


@every_kind
@pytest.mark.parametrize("inside", ["", "export"])
def test_from_pretrained__gives_back_what_was_saved(kind: str, inside: str, tmp_path: Path) -> None:
    model = build_kind(kind)
    model.save_pretrained(tmp_path / "export")
    again = type(model).from_pretrained(tmp_path / inside)
    assert not again.training
    assert again.settings() == model.settings()
    assert torch.equal(output_of(again), output_of(model))
    # Other weights give another output, so the comparison above is meaningful.
    assert kind == "segmenter" or not torch.equal(output_of(build_kind(kind, 1)), output_of(model))
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "export" / name).read_bytes()


@every_kind
def test_config__is_that_of_earlier_versions(kind: str, tmp_path: Path) -> None:
    """Readers of exports depend on these keys: a change breaks older exports, or older readers."""
    build_kind(kind).save_pretrained(tmp_path)
    shape = {"channels": [8, 8], "latent_dim": 4, "num_blocks": 1, "in_channels": 3, "kind": "cnn", "num_heads": 12}
    shape |= {"decoder_width": 1.0, "decoder_blocks": 0, "latent_norm": False, "group_size": 16, "padding": "zeros"}
    network = {"name": NAME, "args": ARGS, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "image_size": 32}
    heads = {"width": 16, "head_width": 32, "proposals": 60, "samples": 512, "detections": 10, "score_threshold": 0.01}
    expected: dict[str, dict[str, Any]] = {
        "tokenizer": {"model": shape, "num_codewords": 16, "image_size": 16},
        "backbone": {**network, "args": {**ARGS, "global_pool": "avg"}, "target": "tokens"},
        "classifier": {**network, "classes": ["cat", "dög"], "crop": 0.9},
        "segmenter": {"classes": ["sky", "sea"], "image_size": 32, "width": 8, "pyramid": PYRAMID},
        "detector": {
            **{"pyramid": PYRAMID, "classes": ["disc"], "category_ids": [3], "masks": True},
            **{"sides": [40, 64], "heads": heads},
        },
    }
    assert json.loads((tmp_path / "config.json").read_text()) == {"kind": kind, **expected[kind]}


def test_exports_before_0_1_0__are_refused(tmp_path: Path) -> None:
    build_kind("tokenizer").save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "config.json"
    config = json.loads(file.read_text())
    del config["model"]["group_size"]
    write_with_checksum(file, json.dumps(config).encode())
    with pytest.raises(
        WeightsError, match=r"no 'model\.group_size', a whole number, which exports have since version 0\.1"
    ):
        PerceptualTokenizer.from_pretrained(tmp_path / "tokenizer")
    network = Backbone(create_network(NAME, num_classes=0, **ARGS), NAME, ARGS, *INPUT, target="tokens")
    network.save_pretrained(tmp_path / "backbone")
    for load in (Backbone.from_pretrained, load_backbone):
        with pytest.raises(WeightsError, match=r"masked modelling before version 0\.1\.0"):
            load(str(tmp_path / "backbone"))
    assert load_backbone(str(tmp_path / "backbone"), pool_mean=True).args["global_pool"] == "avg"


def test_state__is_plain_and_without_training_only_weights(tmp_path: Path) -> None:
    for kind in KINDS:
        build_kind(kind).save_pretrained(tmp_path / kind)
    names = {kind: set(load_file(tmp_path / kind / "model.safetensors")) for kind in KINDS}
    assert names["backbone"] == set(create_network(NAME, num_classes=0, global_pool="avg", **ARGS).state_dict())
    headless = set(create_network(NAME, num_classes=0, **ARGS).state_dict())
    assert names["classifier"] - headless == {"head.weight", "head.bias"}
    assert not any(name.startswith("auxiliary.") for name in names["segmenter"])
    assert names["detector"] == set(detector().state_dict())
    assert {name for name in names["tokenizer"] if name.startswith("quantizer.")} == {"quantizer.codebook"}


def write_photo(folder: Path) -> Path:
    """Write a wide image with transparency and an orientation, under the name that the lines of Python read."""
    pixels = torch.randint(256, (61, 40, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: 61 pixels wide
    Image.fromarray(pixels.numpy()).save(folder / "photo.png", exif=exif)
    return (folder / "photo.png").rename(folder / "photo.jpg")


def write_deep_photo(folder: Path) -> Path:
    """Write 12 bits in a container of 16, under the name that the lines of Python read."""
    pixels = torch.randint(300, 3800, (40, 61), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy().astype("uint16")).save(folder / "photo.png")
    return (folder / "photo.png").rename(folder / "photo.jpg")


def output_of_lines(scope: dict[str, Any]) -> Tensor:
    """Return what the lines of Python of any kind computed."""
    result: Any = next(
        scope[name] for name in ("codes", "features", "probabilities", "found", "classes") if name in scope
    )
    return result.boxes if hasattr(result, "boxes") else result  # type: ignore[no-any-return]


def expected_of_lines(model: Any, photo: Path) -> Tensor:
    """Return what the library computes for the image file."""
    value_range = None if model.value_range == AUTO else model.value_range
    if model.kind in ("segmenter", "detector"):
        result = model.predict(read_image(photo, value_range=value_range))
        return result.boxes if model.kind == "detector" else result  # type: ignore[no-any-return]
    crop = getattr(model, "crop", 1.0)
    square = read_image(photo, model.image_size, crop=crop, value_range=value_range)[None] / 255
    if model.kind == "tokenizer":
        return model.encode(square)  # type: ignore[no-any-return]
    with torch.no_grad():
        return model(square).softmax(1)[0] if model.kind == "classifier" else model(square)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("value_range", [AUTO, (300.0, 3800.0)])
@every_kind
def test_loading_code__applies_the_network_to_an_image_file(
    kind: str, value_range: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_kind(kind)
    model.value_range = value_range
    model.save_pretrained(tmp_path / "export", origin="a test")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    photo = write_photo(tmp_path) if value_range == AUTO else write_deep_photo(tmp_path)
    exec(model.loading_code(str(tmp_path / "export")), scope)
    assert_close(output_of_lines(scope), expected_of_lines(model, photo), atol=2e-3, rtol=1e-3)
    assert capsys.readouterr().out
    loaded = scope["tokenizer" if kind == "tokenizer" else "model"]
    assert not loaded.training
    state = loaded.state_dict()
    assert all(
        torch.equal(state[name], value) for name, value in load_file(tmp_path / "export/model.safetensors").items()
    )
    card = (tmp_path / "export" / "README.md").read_text()
    assert model.loading_code("path/to/this/folder") in card
    assert card.startswith("---\nlibrary_name: ")
    expected_text = {"tokenizer": "a test", "backbone": "trained by a test", "classifier": "trained by a test"}
    expected_text["detector"] = '1 class: "disc". Images of any size'
    assert expected_text.get(kind, "on vit_tiny_patch16_224") in card
    assert ("300..3800 become black..white" in card) == (value_range != AUTO)


@every_kind
def test_from_pretrained__keeps_how_the_network_was_trained(kind: str, tmp_path: Path) -> None:
    model = build_kind(kind)
    model.save_pretrained(tmp_path / "export", origin="a test")
    type(model).from_pretrained(tmp_path / "export").save_pretrained(tmp_path / "again")
    for name in ("config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["origin"] == "a test"


def test_push_to_hub__refuses_a_name_that_the_hub_does_not_take() -> None:
    with pytest.raises(WeightsError, match="'bad name!!' is no name of the Hugging Face hub: give owner/name"):
        build_kind("tokenizer").push_to_hub("bad name!!")


@every_kind
def test_push_to_hub__and_back(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> str:
            assert options == {"private": True, "exist_ok": True}
            return f"https://hub/{repo_id}"

        def model_info(self, _: str) -> types.SimpleNamespace:
            return types.SimpleNamespace(private=True)

        def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> None:
            assert options == {"commit_message": "Upload by pecobook", "revision": None}
            (hub / repo_id).mkdir(parents=True)
            for operation in operations:
                with operation.as_file() as file:
                    (hub / repo_id / operation.path_in_repo).write_bytes(file.read())

    def download(repo_id: str, **options: Any) -> str:
        # no pickles, no code
        assert options == {"revision": None, "allow_patterns": ["model.safetensors", "config.json"]}
        return str(hub / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, file: str(hub / repo_id / file))
    model = build_kind(kind)
    assert model.push_to_hub("me/mine", private=True) == "https://hub/me/mine"
    assert torch.equal(output_of(type(model).from_pretrained("me/mine")), output_of(model))
    assert sorted(file.name for file in (hub / "me/mine").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    monkeypatch.chdir(tmp_path)
    photo = write_photo(tmp_path)
    scope: dict[str, Any] = {}
    exec((hub / "me/mine/README.md").read_text().split("```python\n")[1].split("```")[0], scope)
    assert_close(output_of_lines(scope), expected_of_lines(model, photo), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_from_pretrained__refuses_a_file_with_a_flipped_bit(name: str, tmp_path: Path) -> None:
    build_kind("tokenizer").save_pretrained(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(
        WeightsError, match=rf"{name}' is damaged.*\nIf you changed it yourself, delete '{name}.sha256'"
    ):
        PerceptualTokenizer.from_pretrained(tmp_path)
    (tmp_path / name).write_bytes(data)
    PerceptualTokenizer.from_pretrained(tmp_path)


@every_kind
def test_from_pretrained__refuses_another_kind_and_a_damaged_one(kind: str, tmp_path: Path) -> None:
    model = build_kind(kind)
    model.save_pretrained(tmp_path)
    for checksum in tmp_path.glob("*.sha256"):  # as in an export of an older version
        checksum.unlink()
    other = Segmenter if kind == "detector" else Detector
    with pytest.raises(
        WeightsError, match=f"is a {kind}, not a {other.kind}: give a run of pecobook {other.trained_by}"
    ):
        other.from_pretrained(tmp_path)
    state, file = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    weight = sorted(state)[-1]
    save_file({name: value for name, value in state.items() if name != weight}, file)
    with pytest.raises(WeightsError, match=rf"The {kind} in .* is damaged: .*{weight}"):
        type(model).from_pretrained(tmp_path)
    save_file({**state, weight: torch.zeros(2, 3, 5)}, file)
    with pytest.raises(WeightsError, match=rf"(?s)The {kind} in .* is damaged: .*{weight}"):
        type(model).from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    save_file(state, file)
    (tmp_path / "config.json").write_text(json.dumps({"kind": kind}))
    if kind != "tokenizer":  # all settings of a tokenizer have defaults
        with pytest.raises(WeightsError, match=r"config\.json' has no"):
            type(model).from_pretrained(tmp_path)
    del config["kind"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="is no export of pecobook"):
        type(model).from_pretrained(tmp_path)


def test_all_kinds__are_public() -> None:
    assert {type(make()).__name__ for make, _ in KINDS.values()} <= set(pecobook.__all__)
