"""Objects of Python in place of names: data sets, files, networks, a transform, a hook; docs/python.md."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from pecobook import Backbone, Classifier, PerceptualTokenizer, cli
from pecobook.data.given import as_bytes, given_contents
from pecobook.data.images import open_images
from pecobook.engine.hooks import Step
from pecobook.errors import ConfigError, DataError, PecobookError, WeightsError
from pecobook.models.given_networks import GivenTokenizer, as_backbone
from pecobook.utils.given import giving, name_of
from tests import keywords
from tests.runs import codebook_run, export_bytes, logged, losses, train

__all__ = ["codebook_run"]  # the fixture


class Pictures(Dataset[tuple[Image.Image, int]]):
    """The images of a folder with class folders, as torchvision's ImageFolder gives them."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.rglob("*.png"))
        self.classes = sorted({file.parent.name for file in self.files})
        self.targets = [self.classes.index(file.parent.name) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[index]), self.targets[index]


def settings_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "config.json").read_text())
    return content


def test_keywords__are_those_of_the_settings() -> None:
    """Editors complete them: `python -m tests.keywords` writes the file."""
    assert keywords.FILE.read_text() == keywords.render()


# --------------------------------------------------------------------------------------------------------------- data


def test_data__a_data_set_and_files_train_as_their_folder_does(
    images: Path, unlabelled_images: Path, tmp_path: Path
) -> None:
    files = sorted(unlabelled_images.rglob("*.png"))
    expected = losses(train("codebook", unlabelled_images, tmp_path / "folder"))

    def from_code(data: Any, name: str) -> Path:
        return train("codebook", "", tmp_path / name, data=data)

    listed = from_code(files, "files")
    assert sorted(losses(listed)) != []
    assert settings_of(listed)["data"] == f"python:list of {len(files)} files"
    run = from_code(Pictures(images), "set")
    assert settings_of(run)["data"] == "python:Pictures"
    assert json.loads((run / "environment.json").read_text())["images"] == {
        "training": 22, "held_out": 2, "classes": 3,
    }  # fmt: skip
    same_order = [unlabelled_images / name for name in sorted(file.name for file in files)]
    assert losses(from_code(list(map(str, same_order)), "again")) == expected


def test_data__a_resumed_run_goes_on_and_the_command_line_says_what_it_needs(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train("codebook", "", tmp_path / "whole", data=Pictures(images), save_every=4)
    run = train("codebook", "", tmp_path / "run", data=Pictures(images), save_every=4)
    (run / "checkpoints" / "step-00000008" / "state.pt").unlink()
    train("codebook", "", run, data=Pictures(images), save_every=4, resume=True)
    assert losses(run) == losses(whole)
    assert export_bytes(run)["model.safetensors"] == export_bytes(whole)["model.safetensors"]
    with pytest.raises(SystemExit):
        cli.main(["codebook", "--config", str(run), "--resume"])
    said = capsys.readouterr().err
    assert "--data 'python:Pictures' is an object of Python, which no file holds: call the function of pecobook" in said
    assert "data=... (to go on with a run, also with resume=True)" in said


def test_data__splits_by_name(images: Path) -> None:
    data = {"train": Pictures(images), "validation": Pictures(images)}
    with giving({"data": data}):
        splits = open_images(name_of(data))
    assert name_of(data) == "python:train Pictures, validation Pictures"
    assert (len(splits.train), len(splits.evaluation), splits.evaluation_name) == (24, 24, "validation")
    assert splits.train.classes == ("blue", "green", "red")
    expected = np.asarray(Image.open(Pictures(images).files[3])).transpose(2, 0, 1)
    assert np.array_equal(splits.train.read(3).numpy(), expected)


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Endless(), "a data set needs __len__ and __getitem__"),
        ({"val": [1]}, "give the splits train and validation or test, not val"),
        (["/nowhere/a.png"], "1 of 1 files do not exist, the first: '/nowhere/a.png'"),
        (7, "a data set needs __len__ and __getitem__"),
    ],
)
def test_data__refuses_what_is_none(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        given_contents(data, name_of(data))


def test_data__refuses_targets_that_do_not_fit(images: Path) -> None:
    data = Pictures(images)
    data.targets = data.targets[1:]
    with pytest.raises(DataError, match="targets must be 24 whole numbers, one for each image"):
        given_contents(data, "python:Pictures")
    data.targets = [5] * 24
    with pytest.raises(DataError, match="targets must lie from 0 to 2: there are 3 classes"):
        given_contents(data, "python:Pictures")


def test_as_bytes__of_every_kind_of_image() -> None:
    pixels = torch.arange(2 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 3)
    expected = pixels.permute(2, 0, 1)
    for image in (Image.fromarray(pixels.numpy()), pixels.numpy(), expected, expected.float() / 255):
        assert torch.equal(as_bytes(image), expected)
    grey = pixels[..., 0]
    for image in (Image.fromarray(grey.numpy()), grey.numpy(), grey[None]):
        assert torch.equal(as_bytes(image), grey.expand(3, -1, -1))
    for wrong in (expected.float(), expected.short(), expected[:2], "photo.jpg", pixels.numpy().astype(float)):
        with pytest.raises(ValueError):
            as_bytes(wrong)


# ----------------------------------------------------------------------------------------------------------- networks


def test_perceptual__a_module_measures_and_stays_as_it_was(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(OrderedDict(low=nn.Conv2d(3, 4, 3), act=nn.ReLU(), high=nn.Conv2d(4, 4, 3))).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run = train("codebook", images, tmp_path / "run", perceptual=network, **{"perceptual.layers": ("low", "high")})
    assert settings_of(run)["perceptual"]["network"] == "python:Sequential"
    assert all("perceptual" in line for line in logged(run))
    again = train(
        "codebook",
        images,
        tmp_path / "again",
        perceptual={"network": network, "layers": ("low", "high"), "weight": 0.1},
    )
    assert losses(again) == losses(run)
    assert network.training
    assert all(value.requires_grad for value in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_tokenizer__a_module_gives_the_targets(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    class Mine(nn.Module):
        """The tokenizer of a run behind the smallest interface."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = PerceptualTokenizer.from_pretrained(codebook_run)
            self.num_codewords, self.stride = self.inner.num_codewords, self.inner.stride

        def encode(self, images: Tensor) -> Tensor:
            return self.inner.encode(images)

        def decode(self, codes: Tensor) -> Tensor:
            return self.inner.decode(codes)

    inner = PerceptualTokenizer.from_pretrained(codebook_run)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(GivenTokenizer(Mine()).encode(pixels), inner.encode(pixels))
    run = train("pretrain", images, tmp_path / "run", tokenizer=Mine())
    assert losses(run) == losses(train("pretrain", images, tmp_path / "inner", tokenizer=inner))
    assert settings_of(run)["tokenizer"].startswith("python:")
    with pytest.raises(PecobookError, match="tokenizer=Linear has no encode, decode, num_codewords, stride"):
        train("pretrain", images, tmp_path / "none", tokenizer=nn.Linear(1, 1))


def test_backbone__a_network_of_timm_is_fine_tuned_and_exported(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=0)
    run = train("finetune", images, tmp_path / "run", backbone=network, image_size=32, max_steps="2")
    assert settings_of(run)["backbone"] == "python:Backbone"
    classifier = Classifier.from_pretrained(run)
    assert (classifier.name, classifier.classes) == ("resnet18", ("blue", "green", "red"))
    own, trained = network.state_dict(), classifier.network.state_dict()
    gaps = [float((trained[name] - own[name]).abs().max()) for name in own if name.endswith("weight")]
    assert max(gaps) < 0.05  # the training began with these weights


def test_as_backbone__takes_what_timm_builds_again() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    backbone = as_backbone(vit)
    assert (backbone.name, backbone.args, backbone.image_size) == ("vit_tiny_patch16_224", {"img_size": 64}, 64)
    assert as_backbone(backbone) is backbone
    for other in (nn.Linear(1, 1), timm.create_model("vit_tiny_patch16_224", depth=2)):
        with pytest.raises(WeightsError, match="an export must be able to build it again"):
            as_backbone(other)
    assert isinstance(backbone, Backbone)


# --------------------------------------------------------------------------------------------------- transform, on_step


def darker(image: Tensor) -> Tensor:
    """Return the image at a random brightness."""
    assert image.dtype == torch.uint8
    return image.float() / 255 * torch.rand(())


def test_transform__is_applied_before_the_view_and_named_in_config_json(images: Path, tmp_path: Path) -> None:
    plain = train("codebook", images, tmp_path / "plain")
    whole = train("codebook", images, tmp_path / "whole", transform=darker, save_every=4)
    assert losses(whole) != losses(plain)
    assert settings_of(whole)["python"] == {"transform": "python:darker"}
    run = train("codebook", images, tmp_path / "run", transform=darker, save_every=4)
    (run / "checkpoints" / "step-00000008" / "state.pt").unlink()
    with pytest.raises(PecobookError, match=r"took the transform python:darker from Python, and now it is none"):
        train("codebook", images, run, save_every=4, resume=True)
    train("codebook", images, run, transform=darker, save_every=4, resume=True)
    assert losses(run) == losses(whole)
    with pytest.raises(SystemExit):
        cli.main(["codebook", "--config", str(run), "--resume"])


def test_transform__is_refused_where_it_would_move_images_alone(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would move images and not their masks or boxes: segment takes none"):
        train("segment", images, tmp_path / "a", transform=darker)
    with pytest.raises(ConfigError, match="data= takes the name of a source: detect reads masks or boxes"):
        train("detect", "", tmp_path / "a", data=Pictures(images))
    with pytest.raises(ConfigError, match="transform= and tokens= exclude each other"):
        train("pretrain", images, tmp_path / "a", transform=darker, tokens="bank")
    with pytest.raises(ConfigError, match="on_step= takes a function, not 3"):
        train("codebook", images, tmp_path / "a", on_step=3)


def test_on_step__is_called_after_each_step_with_what_was_logged(images: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    run = train("codebook", images, tmp_path / "run", on_step=steps.append, log_every=2)
    assert [step.number for step in steps] == list(range(1, 9))
    assert {step.total for step in steps} == {8}
    assert [step.metrics["loss"] for step in steps if step.metrics] == losses(run)
    assert [bool(step.metrics) for step in steps] == [False, True] * 4
    assert hasattr(steps[0].model, "tokenizer")
    assert losses(run) == losses(train("codebook", images, tmp_path / "plain", log_every=2))


def test_docs__python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    blocks = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs/python.md").read_text(), re.DOTALL
    )
    for block in blocks:
        assert "max_steps=20" in block
        exec(re.sub("max_steps=20+", "max_steps=2", block), scope)
    assert scope["seen"] == [1, 2]
    assert scope["tokenizer"].num_codewords > 1
    assert settings_of(tmp_path / "runs/fakes")["perceptual"]["network"] == "python:ResNet"
