"""`pecobook finetune --clip.frames`: from a pre-trained ViT and a folder of clips to predictions."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import pecobook
from pecobook import api, cli
from pecobook.commands.check import check
from pecobook.commands.predict.writers import ClipWriter
from pecobook.commands.push import push
from pecobook.data.clips import open_clips, random_clip
from pecobook.data.stream import Stream, collate
from pecobook.data.views import shortest_side
from pecobook.errors import ConfigError, PecobookError, WeightsError
from pecobook.recipes import recipe
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.images import ClipConfig
from pecobook.settings.predict import PredictConfig
from pecobook.settings.values import replace
from pecobook.stages.classify import ClassifyStage, load_for_classification
from tests.clips import CLASSES, write_moving
from tests.distributed import TwoProcesses
from tests.runs import export_bytes, logged, losses, train

CLIPS: dict[str, Any] = {
    **{"clip.frames": 4, "clip.sampling": "segments", "clip.flip": False, "rand_augment": "", "random_erasing": 0.0},
    **{"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "drop_path": 0.0, "min_crop": 0.8},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moving(tmp_path_factory.mktemp("clips"), train=8, held_out=3)


@pytest.fixture(scope="module")
def clip_run(clips: Path, vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {**CLIPS, "clip.crops": 3, "max_steps": "4"}
    return train("finetune", clips, tmp_path_factory.mktemp("clip_run"), backbone=str(vit_run), **more)


def accuracy(data: Path, vit: Path, out: Path) -> float:
    settings = {**CLIPS, "optim.lr": 1e-2, "optim.layer_decay": 1.0, "max_steps": "400", "batch_size": 32}
    return float(
        logged(train("finetune", data, out, backbone=str(vit), log_every=50, **settings))[-1]["evaluation/top1"]
    )


def test_predict__a_clip_that_waits_keeps_one_frame() -> None:
    writer = object.__new__(ClipWriter)
    writer.model = cast("Any", SimpleNamespace(clip=ClipConfig(frames=4)))
    writer.square, writer.waiting = {"size": 8, "share": 1.0}, []
    frames = torch.randint(256, (4, 3, 30, 40), dtype=torch.uint8)
    writer.add("a.mp4", "a", frames)
    ((_, _, picture, _),) = writer.waiting
    assert torch.equal(picture, frames[2])
    assert picture.untyped_storage().nbytes() == 3 * 30 * 40


def test_predict__reads_frames_as_the_evaluation_does(clip_run: Path, tmp_path: Path) -> None:
    config = PredictConfig(run=str(clip_run), images="unused", pictures=False)
    settings = replace(recipe("finetune", "tiny"), CLIPS)
    assert ClipWriter(config, tmp_path).shortest == shortest_side(ClassifyStage.evaluation_view(settings))


def test_finetune__of_clips_says_clips(clips: Path, clip_run: Path, tmp_path: Path) -> None:
    lines = (clip_run / "train.log").read_text().replace("reads images minus", "")
    assert "16 clips to train on, 6 held out" in lines
    assert "8 clips a step" in lines
    assert "step 4, 6 held-out clips, too few for any claim" in lines
    assert "image" not in lines
    table = pq.read_table(clip_run / "predictions.parquet")
    assert table.column("clip").to_pylist() == [f"{clips}/val/{name}/clip{n}" for name in CLASSES for n in range(3)]
    shutil.copytree(clips / "val", tmp_path / "val")
    (tmp_path / "val" / "receding" / "clip1" / "1.png").write_bytes(b"no image")
    summary = said_by(["predict", str(clip_run), str(tmp_path / "val"), "--out", str(tmp_path / "p"), "--no-pictures"])
    assert "predictions.csv: 5 clips.\n1 of 6 clips were skipped;" in summary
    for name in ("clip0", "clip2"):
        shutil.rmtree(tmp_path / "val" / "receding" / name)
    shutil.rmtree(tmp_path / "val" / "approaching")
    with pytest.raises(PecobookError, match="None of the 1 clip of"):
        api.predict(run=str(clip_run), images=str(tmp_path / "val"), out=str(tmp_path / "q"))
    (tmp_path / "notes").mkdir()
    with pytest.raises(PecobookError, match=r"^'.*notes': neither this folder nor its subfolders hold a clip"):
        api.predict(run=str(clip_run), images=str(tmp_path / "notes"), out=str(tmp_path / "r"))


def said_by(command: list[str]) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        cli.main(command)
    return said.getvalue()


def test_predict__one_folder_of_frames_has_its_name(clips: Path, clip_run: Path, tmp_path: Path) -> None:
    shutil.copytree(clips / "val" / "receding" / "clip0", tmp_path / "a clip")
    said_by(["predict", str(clip_run), str(tmp_path / "a clip"), "--out", str(tmp_path / "p")])
    (row,) = csv.DictReader((tmp_path / "p" / "predictions.csv").open())
    assert row["clip"] == "a clip"
    assert (tmp_path / "p" / "pictures" / "a clip.jpg").is_file()


def test_finetune__of_frames_as_images_is_told_of_clips(clips: Path, images: Path, vit_run: Path) -> None:
    config = stage_settings(vit_run, **{"clip.frames": 0, "data": str(clips)})
    (note,) = ClassifyStage.open(config).notes
    assert "--clip.frames 8 reads each folder as a clip" in note
    assert f"'{clips}/train/approaching/clip0'" in note
    assert ClassifyStage.open(replace(config, {"clip.frames": 4})).notes == ()
    assert ClassifyStage.open(replace(config, {"data": str(images)})).notes == ()


def test_transform__of_images_and_clips_exclude_each_other(clips: Path, vit_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"transform= takes single images, and clip.frames reads clips"):
        train("finetune", clips, tmp_path / "a", backbone=str(vit_run), transform=lambda image: image, **CLIPS)


def test_value_range__of_a_clip_run_is_that_of_its_frames_everywhere(vit_run: Path, tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for label in ("a", "b"):
            for clip in range(count):
                folder = tmp_path / "deep" / split / label / f"{clip}"
                folder.mkdir(parents=True)
                for number in range(4):
                    values = np.full((16, 16), 1000 * (number + 1), np.uint16)
                    Image.fromarray(values).save(folder / f"{number}.png")
    more = {**CLIPS, "value_range": (1000.0, 4000.0), "max_steps": "1"}
    run = train("finetune", tmp_path / "deep", tmp_path / "run", backbone=str(vit_run), **more)
    model = pecobook.ClipClassifier.from_pretrained(run)
    code = model.loading_code(str(run))
    assert "value_range=model.value_range" in code
    frames = pecobook.read_clip(tmp_path / "deep/val/a/0", model.clip, 16, value_range=model.value_range)
    assert frames[:, 0, 0, 0].tolist() == [0, 85, 170, 255]
    said_by(["predict", str(run), str(tmp_path / "deep/val"), "--out", str(tmp_path / "p")])
    row = next(csv.DictReader((tmp_path / "p" / "predictions.csv").open()))
    assert float(row["probability"]) == pytest.approx(float(model(frames[None]).softmax(1).max().detach()), abs=1e-4)
    code = code.replace('"clip.mp4"', repr(str(tmp_path / "deep/val/a/0")))
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, {})


def test_finetune__two_processes_equal_one(
    clips: Path, vit_run: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    more = {**CLIPS, "backbone": str(vit_run), "max_steps": "3", "optim.eps": 1e-3, "clip.crops": 3}
    alone = train("finetune", clips, tmp_path / "one", **more)
    two_processes.run(train_on_each, str(clips), str(tmp_path / "two"), {**more, "devices": "2"})
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=2e-5)
    assert logged(tmp_path / "two")[-1]["evaluation/loss"] == pytest.approx(
        logged(alone)[-1]["evaluation/loss"], rel=1e-4
    )


def train_on_each(rank: int, world_size: int, data: str, out: str, more: dict[str, Any]) -> None:
    train("finetune", data, Path(out), **more)


@pytest.mark.slow
def test_finetune__learns_from_the_order_of_frames_alone(vit_run: Path, tmp_path: Path) -> None:
    ordered = write_moving(tmp_path / "ordered", train=100, held_out=40)
    shuffled = write_moving(tmp_path / "shuffled", train=100, held_out=40, shuffled=True)
    assert accuracy(ordered, vit_run, tmp_path / "a") > 90
    assert 30 < accuracy(shuffled, vit_run, tmp_path / "b") < 70  # two classes


def test_finetune__on_clips_writes_a_classifier_that_predicts(clips: Path, clip_run: Path, tmp_path: Path) -> None:
    settings = json.loads((clip_run / "export" / "config.json").read_text())
    assert settings["kind"] == "clip classifier"
    assert settings["clip"] == {"frames": 4, "sampling": "segments", "stride": 32, "flip": False, "crops": 3}
    assert len(losses(clip_run)) == 4
    cli.main(["predict", str(clip_run), str(clips / "val"), "--out", str(tmp_path / "p")])
    rows = list(csv.DictReader((tmp_path / "p" / "predictions.csv").open()))
    assert [row["clip"] for row in rows] == [f"{name}/clip{n}" for name in CLASSES for n in range(3)]
    model = pecobook.ClipClassifier.from_pretrained(clip_run)
    crops = torch.stack([pecobook.read_clip(clips / "val" / row["clip"], model.clip, 16) for row in rows])
    best = model(crops).softmax(1).max(1)
    assert [row["class"] for row in rows] == [CLASSES[number] for number in best.indices.tolist()]
    assert [float(row["probability"]) for row in rows] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(list((tmp_path / "p" / "pictures").rglob("*.jpg"))) == 6


def test_finetune__evaluates_the_mean_probability_of_the_crops(clips: Path, vit_run: Path) -> None:
    config = stage_settings(vit_run, **{"clip.crops": 3})
    stage = ClassifyStage(config, CLASSES).eval()
    torch.nn.init.normal_(stage.network.get_classifier().weight)  # type: ignore[operator]
    stream = Stream(open_clips(str(clips)).evaluation, ClassifyStage.evaluation_view(config), 0)
    batch = collate([stream[position] for position in range(6)])
    assert batch["image"].shape == (6, 3, 4, 3, 16, 16)
    stage.requires_grad_(False)
    output = stage(batch)
    each = [stage({**batch, "image": batch["image"][:, n]}).rows for n in range(3)]
    dense = [torch.zeros(6, 2).scatter(1, rows["classes"], rows["probabilities"]) for rows in each]
    mean = torch.stack(dense).mean(0)
    assert torch.allclose(torch.zeros(6, 2).scatter(1, output.rows["classes"], output.rows["probabilities"]), mean)
    assert float(output.loss) == pytest.approx(-float(mean[range(6), batch["label"].tolist()].log().mean()))


def stage_settings(vit: Path, **more: Any) -> FinetuneConfig:
    changes = {**CLIPS, "image_size": 16, "backbone": str(vit), "batch_size": 8, **more}
    config: FinetuneConfig = replace(recipe("finetune", "tiny"), changes)
    return config


def test_augmentations__are_the_same_in_all_frames(vit_run: Path) -> None:
    config = stage_settings(vit_run, mixup=0.8, cutmix=1.0, random_erasing=1.0)
    stage = ClassifyStage(config, CLASSES).train()
    frames = torch.rand(4, 1, 3, 16, 16).expand(-1, 4, -1, -1, -1).clone()
    before = frames.clone()
    images, targets = stage._augment(frames, torch.eye(2)[[0, 1, 0, 1]])
    changed: Tensor = (images != before).any(2)  # (B, T, H, W)
    assert changed.any()
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    assert torch.allclose(targets.sum(1), torch.ones(4))
    output = stage({"image": torch.randint(256, (4, 4, 3, 16, 16), dtype=torch.uint8), "label": torch.arange(4) % 2})
    assert output.loss is not None


def test_head_rate__multiplies_the_rate_of_the_head_alone(vit_run: Path) -> None:
    for frames in (0, 4):
        stage = ClassifyStage(stage_settings(vit_run, **{"clip.frames": frames, "head_rate": 10.0}), CLASSES)
        groups = stage.parameter_groups(stage.config.optim)
        rates = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
        assert len(rates) == len(list(stage.network.parameters())) == sum(len(group["params"]) for group in groups)
        head = {id(parameter) for parameter in stage.network.get_classifier().parameters()}  # type: ignore[operator]
        assert {rate for key, rate in rates.items() if key in head} == {10.0}
        assert max(rate for key, rate in rates.items() if key not in head) <= 1


def test_finetune__resumes_exactly_and_with_any_number_of_workers(clips: Path, vit_run: Path, tmp_path: Path) -> None:
    settings = {**CLIPS, "backbone": str(vit_run), "max_steps": "4", "rand_augment": "rand-m5-mstd0.5-inc1"}
    whole = train("finetune", clips, tmp_path / "a", **settings)
    with pytest.raises(RuntimeError, match="stop"), pecobook_stops_after(2):
        train("finetune", clips, tmp_path / "b", save_every=1, **settings)
    train("finetune", clips, tmp_path / "b", save_every=1, resume=True, workers=2, **settings)
    first, second = (export_bytes(run)["model.safetensors"] for run in (whole, tmp_path / "b"))
    assert first == second


@contextlib.contextmanager
def pecobook_stops_after(step: int) -> Any:
    calls = []

    def stop(self: ClassifyStage, number: int, total: int) -> None:
        calls.append(number)
        if len(calls) > step:
            raise RuntimeError("stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifyStage, "after_step", stop)
        yield


def test_check__reads_clips(clips: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        report = check(task="finetune", data=str(clips), clip={"frames": 4})
    assert report["summary"]["clips"] == "16 clips to train on, 6 held out (validation)"
    assert report["ok"]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
        cli.main(["check", "finetune", "--data", str(clips), "--clip.frames", "4"])
    assert said.getvalue().endswith("Nothing is wrong with these clips.\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert check(data=str(clips), clip={"frames": 4})["task"] == "finetune"
    with pytest.raises(ConfigError, match=r"--clip.frames is a setting of finetune, not of pretrain\."):
        check(task="pretrain", data=str(clips), clip={"frames": 4})


def test_clip_run__other_commands_refuse_it_by_name(clips: Path, clip_run: Path, images: Path, tmp_path: Path) -> None:
    for settings in ({"format": "timm"}, {"format": "hf"}, {"format": "onnx"}):
        with pytest.raises(ConfigError, match="is a clip classifier, for which no format has a network"):
            api.export(run=str(clip_run), out=str(tmp_path / "e"), **settings)
    with pytest.raises(PecobookError, match="is a clip classifier, not a backbone"):
        pecobook.embed(backbone=str(clip_run), data=str(images), out=str(tmp_path / "e.npy"))
    with pytest.raises(PecobookError, match="is a clip classifier, not a backbone"):
        pecobook.probe(backbone=str(clip_run), data=str(images))
    with pytest.raises(PecobookError, match=r"'--init|--init .* is a clip classifier"):
        train("finetune", images, tmp_path / "f", init=str(clip_run))
    with pytest.raises(ConfigError, match=r"--init starts a classifier of images; for one of clips give --backbone"):
        train("finetune", clips, tmp_path / "f", init=str(clip_run), **CLIPS)
    with pytest.raises(PecobookError, match=r"attack.names needs a finetune run of images.*is a clip classifier"):
        api.predict(run=str(clip_run), images=str(images), out=str(tmp_path / "g"), attack={"names": ("bim",)})


def test_clip_run__push_describes_it(clip_run: Path) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        push(run=str(clip_run), repo="me/clips", dry_run=True)
    assert "video-classification" in said.getvalue()
    assert "trained on clips of 4 frames of 16 pixels" in said.getvalue()
    assert "ClipClassifier.from_pretrained" in said.getvalue()


def test_finetune__networks_that_cannot_read_clips_are_refused() -> None:
    config: FinetuneConfig = replace(
        recipe("finetune", "tiny"), {**CLIPS, "backbone": "timm:resnet10t", "weights": "random"}
    )
    with pytest.raises(WeightsError, match=r"'resnet10t' cannot read clips: it is no transformer of patches"):
        load_for_classification(replace(config, {"drop_path": 0.0}))


def test_view__is_a_function_of_the_key(clips: Path, vit_run: Path) -> None:
    view = ClassifyStage.view(stage_settings(vit_run))
    assert view.func is random_clip  # type: ignore[attr-defined]
    source = open_clips(str(clips)).train
    first, again, other = (Stream(source, view, seed)[3]["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
