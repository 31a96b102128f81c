"""`pecobook export`: an exported model gives the same outputs in each library as the run itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.testing import assert_close

from pecobook import Backbone, Classifier, cli
from pecobook.commands.export import export
from pecobook.errors import ConfigError, RunFolderError, WeightsError
from pecobook.models.dense.segmenter import Segmenter, resize_maps
from pecobook.models.export import read_export
from pecobook.models.weights import load_backbone
from pecobook.settings.export import ExportConfig
from tests.runs import shapes, train

_BEIT: dict[str, Any] = {
    "model.name": "beit_base_patch16_224",
    "model.args": '{"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2, "init_values": 0.1, '
    '"use_rel_pos_bias": false, "use_shared_rel_pos_bias": true}',
}


@pytest.fixture(scope="module")
def beit_run(images: Path, codebook_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("pretrain", images, tmp_path_factory.mktemp("beit"), tokenizer=str(codebook_run), **_BEIT)


@pytest.fixture(scope="module")
def classifier_run(images: Path, beit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("finetune", images, tmp_path_factory.mktemp("classifier"), backbone=str(beit_run))


def pictures() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run_export(run: Path, out: Path, kind: str) -> Path:
    cli.main(["export", str(run), "--format", kind, "--out", str(out)])
    return out


@pytest.mark.parametrize("which", ["vit_run", "beit_run", "classifier_run"])
def test_timm__loads_an_export_in_two_lines(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: Path = request.getfixturevalue(which)
    out = run_export(run, tmp_path / "timm", "timm")
    network = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    config, state = read_export(run)
    expected = timm.create_model(config["name"], num_classes=len(config.get("classes", ())), **config["args"])
    expected.load_state_dict(state)
    assert_close(network(pictures()), expected.eval()(pictures()), atol=1e-5, rtol=1e-5)
    assert list(network.pretrained_cfg["mean"]) == config["mean"] == [0.485, 0.456, 0.406]
    again = timm.create_model(
        config["name"],
        num_classes=len(config.get("classes", ())),
        checkpoint_path=str(out / "model.safetensors"),
        **config["args"],
    )
    assert_close(again.eval()(pictures()), expected(pictures()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["vit_run", "classifier_run"])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_timm__loads_an_export_with_other_classes(
    which: str, num_classes: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: Path = request.getfixturevalue(which)
    out = run_export(run, tmp_path / "timm", "timm")
    network = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=num_classes).eval()
    assert network(pictures()).shape == (2, num_classes or 32 if which == "vit_run" else num_classes or 24)
    ours = load_backbone(str(run)).network.eval()
    assert_close(network.forward_features(pictures()), ours.forward_features(pictures()))  # type: ignore[operator]


def test_hf__a_run_on_pixels_becomes_a_model_without_a_head(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")  # its versions for the lowest huggingface-hub are too old
    from transformers import BeitModel

    run = train("pretrain", images, tmp_path / "run", target="pixels", **_BEIT)
    assert read_export(run)[0]["target"] == "pixels"
    out = run_export(run, tmp_path / "hf", "hf")
    assert "vocab_size" not in json.loads((out / "config.json").read_text())
    theirs, loading_info = BeitModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    hidden = load_backbone(str(run)).network.eval().forward_features(pictures())  # type: ignore[operator]
    assert hidden.shape == theirs.eval()(pictures()).last_hidden_state.shape


def test_hf__a_pretrained_run_becomes_a_masked_image_model(beit_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")  # its versions for the lowest huggingface-hub are too old
    from transformers import AutoImageProcessor, AutoModel, BeitForMaskedImageModeling

    from pecobook.models.checkpoints import read_weights
    from pecobook.models.masked_vit import MaskedImageModel

    out = run_export(beit_run, tmp_path / "hf", "hf")
    theirs, loading_info = BeitForMaskedImageModeling.from_pretrained(out, output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "mismatched_keys"))
    pooler = {f"beit.pooler.layernorm.{part}" for part in ("weight", "bias")}  # for AutoModel
    assert set(loading_info["unexpected_keys"]) == pooler
    ours = MaskedImageModel(load_backbone(str(beit_run)).network, 24).eval()
    ours.load_state_dict(read_weights(str(beit_run / "export" / "mim.safetensors")), strict=False)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 1, 2] = mask[:, 3, 0] = True
    expected = ours(pictures(), mask, 2)
    logits = theirs.eval()(pictures(), bool_masked_pos=mask.flatten(1)).logits[mask.flatten(1)]
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    pooled = AutoModel.from_pretrained(out).eval()(pictures()).pooler_output
    assert_close(pooled, load_backbone(str(beit_run)).network.eval()(pictures()), atol=1e-5, rtol=1e-5)
    processor = AutoImageProcessor.from_pretrained(out)
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    mean, std = (np.array(read_export(beit_run)[0][name]) for name in ("mean", "std"))
    assert_close(
        torch.as_tensor(processor(pixels, return_tensors="pt")["pixel_values"])[0, :, 0, 0].double(),
        torch.from_numpy(-mean / std),
        atol=1e-4,
        rtol=1e-4,
    )


def test_hf__a_fine_tuned_run_becomes_a_classifier(classifier_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")  # its versions for the lowest huggingface-hub are too old
    from transformers import BeitForImageClassification

    out = run_export(classifier_run, tmp_path / "hf", "hf")
    theirs, loading_info = BeitForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config, state = read_export(classifier_run)
    ours = timm.create_model(config["name"], num_classes=3, **config["args"])
    ours.load_state_dict(state)
    assert_close(theirs.eval()(pictures()).logits, ours.eval()(pictures()), atol=1e-5, rtol=1e-5)
    assert theirs.config.id2label == dict(enumerate(config["classes"]))


@pytest.mark.parametrize("which", ["vit_run", "classifier_run"])
def test_onnx__normalises_inside_the_graph(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import onnxruntime

    run: Path = request.getfixturevalue(which)
    out = run_export(run, tmp_path / "onnx", "onnx")
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    network = (Backbone if which == "vit_run" else Classifier).from_pretrained(run)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for count in (1, 2):
        (output,) = session.run(None, {"images": images[:count].numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(output), network(images[:count]), atol=1e-5, rtol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["images"] == "float32 (batch, 3, 16, 16), RGB in [0, 1]; the graph normalises them"
    assert metadata["image_size"] == "16"
    config = json.loads((out / "config.json").read_text())
    assert "mean" not in config  # whoever applied it would normalise twice
    if isinstance(network, Classifier):
        assert json.loads(metadata["classes"]) == config["classes"] == list(network.classes)


def test_export__refuses(vit_run: Path, codebook_run: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a vit_tiny_patch16_224: use --format timm"):
        export(ExportConfig(run=str(vit_run), format="hf", out=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="is a tokenizer: --format onnx"):
        export(ExportConfig(run=str(codebook_run), format="timm", out=str(tmp_path / "x")))
    with pytest.raises(WeightsError, match="There is no run 'nowhere'"):
        export(ExportConfig(run="nowhere", out=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="--out is missing"):
        export(ExportConfig(run=str(vit_run)))
    assert not (tmp_path / "x").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(RunFolderError, match="is not empty"):
        export(ExportConfig(run=str(vit_run), out=str(tmp_path / "full")))


# test_export_files.py compares the masks of a ViT.
@pytest.mark.parametrize("kind", [pytest.param("vit", marks=pytest.mark.slow), "beit"])
def test_segmenter__onnx_gives_the_same_scores(kind: str, vit_run: Path, beit_run: Path, tmp_path: Path) -> None:
    """The size differs from the backbone's own size, so that its positional embeddings were interpolated."""
    import onnxruntime

    backbone = str(vit_run if kind == "vit" else beit_run)
    run = train("segment", shapes(), tmp_path / "run", backbone=backbone, max_steps="2", image_size=32)
    out = run_export(run, tmp_path / "onnx", "onnx")
    model = Segmenter.from_pretrained(run)
    images = torch.rand(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    with torch.no_grad():
        expected = resize_maps(model(images)[0], (32, 32))
    assert_close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), expected, atol=1e-4, rtol=1e-4)
    assert json.loads((out / "config.json").read_text()) == {"image_size": 32, "classes": ["ground", "red", "green"]}
    with pytest.raises(ConfigError, match="is a segmenter"):
        export(ExportConfig(run=str(run), format="timm", out=str(tmp_path / "timm")))
