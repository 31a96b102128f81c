"""All stages alike: the checks before a run, and exports that other libraries can load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pecobook import api
from pecobook.data.images import check_readable
from pecobook.data.source import ImageSource, Splits
from pecobook.errors import DataError, PreflightError
from pecobook.models.weights import load_backbone
from pecobook.recipes import recipe
from pecobook.settings.values import replace
from pecobook.stages import classify
from pecobook.stages.classify import ClassifyStage
from pecobook.stages.codebook import CodebookStage
from pecobook.stages.training import preflight
from tests.runs import SMALL, Squares, export_bytes, squares, train

_EXPORT = {"model.safetensors", "model.safetensors.sha256", "config.json", "config.json.sha256", "README.md"}

FILES = {
    "contrast": _EXPORT | {"training.safetensors", "training.safetensors.sha256"},
    "codebook": _EXPORT | {"training.safetensors", "training.safetensors.sha256"},
    "pretrain": _EXPORT | {"mim.safetensors", "mim.safetensors.sha256"},
    "finetune": _EXPORT,
    "segment": _EXPORT,
    "detect": _EXPORT,
}


@pytest.mark.parametrize("command", list(FILES))
def test_train__prints_code_that_loads_the_export(
    command: str, images: Path, needs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a run"
    settings: dict[str, Any] = {"data": str(images), **SMALL[command], **needs}
    assert getattr(api, command)("tiny", out=str(out), **{**settings, "max_steps": "2"}) == out
    assert set(export_bytes(out)) == FILES[command]
    stderr = capsys.readouterr().err
    done, _, code = stderr[stderr.index("Done: ") :].partition("\n\n")
    assert done == f"Done: {out / 'export'}"
    names: dict[str, Any] = {}
    exec(code, names)
    exported = load_file(out / "export" / "model.safetensors")
    loaded = names["tokenizer" if command == "codebook" else "model"]
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in exported.items())
    if command == "segment":
        assert loaded.predict(torch.zeros(3, 20, 30, dtype=torch.uint8)).shape == (20, 30)
        return
    if command == "detect":
        assert loaded.predict(torch.zeros(3, 20, 30, dtype=torch.uint8)).boxes.shape[1] == 4
        return
    pictures = torch.rand(2, 3, loaded.image_size if command == "codebook" else settings.get("image_size", 32), 16)
    if command == "codebook":
        codes = loaded.encode(pictures[..., :16])
        assert codes.shape == (2, 4, 4)
        assert loaded.decode(codes).shape == (2, 3, 16, 16)
    elif command == "finetune":
        assert loaded(torch.rand(2, 3, 16, 16)).shape == (2, 3)
        config = json.loads((out / "export" / "config.json").read_text())
        assert config["classes"] == ["blue", "green", "red"]
    else:
        side = 32 if command == "contrast" else 16
        assert loaded(torch.rand(2, 3, side, side)).shape[0] == 2


@pytest.mark.parametrize("command", ["contrast", "pretrain", "finetune"])
def test_train__a_run_is_a_backbone_of_other_commands(
    command: str, images: Path, needs: dict[str, str], tmp_path: Path
) -> None:
    run = train(command, images, tmp_path / "run", max_steps="1", **needs)
    backbone = load_backbone(str(run))
    exported = load_file(run / "export" / "model.safetensors")
    state = backbone.network.state_dict()
    assert state
    assert all(torch.equal(value, exported[name]) for name, value in state.items())
    card = (run / "export" / "README.md").read_text()
    assert backbone.name in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", f"{run}/export")
    exec(code.replace("photo.jpg", str(next(images.rglob("*.png")))), {})


def test_train__exports_the_trained_weights(images: Path, tmp_path: Path) -> None:
    run = train("codebook", images, tmp_path / "run", max_steps="3")
    state = torch.load(run / "checkpoints" / "step-00000003" / "state.pt", weights_only=True)["model"]
    exported = load_file(run / "export" / "model.safetensors")
    assert exported
    assert all(torch.equal(state[f"tokenizer.{name}"], value) for name, value in exported.items())
    assert not any("ema" in name for name in exported)


# ------------------------------------------------------------------------------------------------------ before the run


def config(**more: Any) -> Any:
    return replace(recipe("codebook", "tiny"), {**SMALL["codebook"], **more})


def test_preflight__reports_every_problem_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    broken = config(
        data=str(tmp_path / "none"), out=str(tmp_path / "full"), precision="fp32", loggers=("wandb",), devices="3"
    )
    broken = dataclasses.replace(broken, perceptual=dataclasses.replace(broken.perceptual, network="timm:nothing"))
    with pytest.raises(PreflightError) as caught:
        preflight(CodebookStage, broken)
    messages = [str(problem) for problem in caught.value.problems]
    for part in ("is not empty", "does not exist", "timm has no network 'nothing'", "3 devices", "--loggers wandb"):
        assert sum(part in message for message in messages) == 1, (part, messages)
    assert len(messages) == 5
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "full"]


@pytest.mark.parametrize(("name", "layer"), [("timm:vit_tiny_patch16_224", 3), ("torchvision:resnet18", "layer2")])
def test_preflight__nothing_is_downloaded_for_a_run_that_is_refused(
    name: str, layer: int | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise OSError("a request")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    wrong = config(data=str(tmp_path / "none"), out=str(tmp_path / "run"), precision="fp32")
    perceptual = dataclasses.replace(wrong.perceptual, network=name, layers=(layer,), weights="")
    for data, part in ((wrong.data, "does not exist"), ("photos", "cannot be downloaded (a request)")):
        with pytest.raises(PreflightError) as caught:
            preflight(CodebookStage, dataclasses.replace(wrong, data=data, perceptual=perceptual))
        assert len(caught.value.problems) == 1
        assert part in str(caught.value)


def test_preflight__only_the_first_rank_checks_the_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").touch()  # the first rank has already written to the folder
    settings = config(data=str(images), out=str(tmp_path))
    with pytest.raises(PreflightError, match="is not empty"):
        preflight(CodebookStage, settings)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(preflight(CodebookStage, settings).splits.train) == 22


def test_preflight__held_out_images_need_labels_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    labelled = squares(10)
    unlabelled = ImageSource(Squares(10), name="squares", split="evaluation")
    monkeypatch.setattr(classify, "open_images", lambda _: Splits(labelled, unlabelled, "test"))
    with pytest.raises(PreflightError, match=r"has no labels for its held-out images \(test\)"):
        preflight(ClassifyStage, replace(recipe("finetune", "tiny"), {"out": str(tmp_path / "run")}))


def test_check_readable__one_readable_image_is_enough(tmp_path: Path) -> None:
    check_readable(squares(20, bad=(0, 1, 2, 3, 4, 5, 6)))
    with pytest.raises(DataError, match="None of the first 8 images of 'squares' can be read; the first: square 0"):
        check_readable(squares(20, bad=tuple(range(8))))


def test_train__unreadable_images_do_not_end_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (20, 20), (20 * number, 0, 0)).save(folder / f"{number:02d}.png")
    for number in (3, 4, 8, 9):
        (folder / f"{number:02d}.png").write_bytes(b"broken")
    run = train("codebook", folder, tmp_path / "run", max_steps="4")
    log = (run / "train.log").read_text()
    reported = {number for number in range(12) if f"{number:02d}.png" in log}
    assert reported == {3, 4, 8, 9}
    assert log.count("skipped: ") == 4
    assert "4 images could not be read" in log
