from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pecobook.engine import run_folder
from pecobook.errors import RunFolderError
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.segment import SegmentConfig, SegmentTestConfig
from pecobook.settings.training import OptimConfig, TrainConfig
from pecobook.settings.values import load, replace, to_dict
from pecobook.utils.folder_lock import FolderLock


def config(out: Path, **more: Any) -> TrainConfig:
    return TrainConfig(out=str(out), precision="fp32", **more)


def make_run(out: Path, command: str = "codebook", **more: Any) -> None:
    run_folder.prepare(config(out, **more), command).release()


def test_check__accepts_a_new_or_empty_folder_and_creates_nothing(tmp_path: Path) -> None:
    run_folder.check(config(tmp_path / "deep" / "run"), "codebook")
    (tmp_path / "empty").mkdir()
    run_folder.check(config(tmp_path / "empty"), "codebook")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("more", [{}, {"overwrite": True}])
def test_check__ignores_the_lock_file_of_a_killed_process(tmp_path: Path, more: Any) -> None:
    (tmp_path / ".lock").touch()
    run_folder.check(config(tmp_path, **more), "codebook")
    make_run(tmp_path, **more)
    assert not (tmp_path / ".lock").exists()


def test_check__refuses_a_missing_out() -> None:
    with pytest.raises(RunFolderError, match="--out is missing"):
        run_folder.check(TrainConfig(), "codebook")


def test_check__refuses_a_filled_folder_and_names_both_flags(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(RunFolderError, match=r"is not empty: .*--resume.*--overwrite"):
        run_folder.check(config(tmp_path), "codebook")


def test_check__refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(RunFolderError, match="is a file"):
        run_folder.check(config(tmp_path / "a"), "codebook")


@pytest.mark.parametrize("flag", ["resume", "overwrite", ""])
def test_check__refuses_a_path_through_a_file(tmp_path: Path, flag: str) -> None:
    (tmp_path / "a").touch()
    more = {flag: True} if flag else {}
    with pytest.raises(RunFolderError, match=re.escape(str(tmp_path / "a"))):
        run_folder.check(config(tmp_path / "a" / "b", **more), "codebook")


def test_check__refuses_to_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"there is no run in .*Leave --resume out"):
        run_folder.check(config(tmp_path / "none", resume=True), "codebook")


def test_resume_auto__starts_where_there_is_no_run_and_else_resumes(tmp_path: Path) -> None:
    auto = config(tmp_path / "run", resume="auto")
    run_folder.check(auto, "codebook")
    run_folder.prepare(auto, "codebook").release()
    written = (tmp_path / "run" / "config.json").read_bytes()
    assert json.loads(written)["resume"] is False
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir()
    run_folder.prepare(auto, "codebook").release()
    assert (tmp_path / "run" / "config.json").read_bytes() == written
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").exists()
    with pytest.raises(RunFolderError, match="seed: 0 -> 1"):
        run_folder.check(replace(auto, {"seed": 1}), "codebook")
    with pytest.raises(RunFolderError, match="is not a run of 'pecobook pretrain'"):
        run_folder.check(auto, "pretrain")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="is not empty and holds no run: delete it with --overwrite"):
        run_folder.check(config(tmp_path, resume="auto"), "codebook")


def test_check__refuses_to_resume_a_run_of_another_command(tmp_path: Path) -> None:
    make_run(tmp_path, "codebook")
    with pytest.raises(RunFolderError, match="not a run of 'pecobook pretrain'"):
        run_folder.check(config(tmp_path, resume=True), "pretrain")
    run_folder.check(config(tmp_path, resume=True), "codebook")


@pytest.mark.parametrize("text", ["{", "[1]", "3", "\x00"])
def test_check__refuses_to_resume_with_a_broken_config(tmp_path: Path, text: str) -> None:
    make_run(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"config\.json' (cannot be read|does not hold a JSON object)"):
        run_folder.check(config(tmp_path, resume=True), "codebook")


def test_check__lists_all_changed_settings_of_a_resumed_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    changed = config(tmp_path, resume=True, seed=5, batch_size=64, optim=OptimConfig(lr=0.5), save_every=3, workers=2)
    with pytest.raises(RunFolderError) as caught:
        run_folder.check(changed, "codebook")
    first, second = str(caught.value).splitlines()
    assert first.endswith("batch-size: 256 -> 64; optim.lr: 0.0015 -> 0.5; seed: 0 -> 5.")
    assert "name another --out" in second
    assert "save-every" not in first  # the setting does not change any result


def test_check__resumes_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    now = CodebookConfig(out=str(tmp_path), resume=True)
    settings = {**to_dict(now), "command": "codebook"}
    del settings["pixel_weight"], settings["adversarial"]["start"]
    settings["quantizer"]["learning"] = "ema"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    run_folder.check(now, "codebook")
    later = replace(now, {"adversarial.start": 5})
    with pytest.raises(RunFolderError, match=r"those of the run in .*: adversarial\.start: 0 -> 5\."):
        run_folder.check(later, "codebook")
    del settings["value_range"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RunFolderError, match=r"--resume: the run in .* is of a version before 0\.1\.0: name another"):
        run_folder.check(now, "codebook")


def test_check__resume_may_change_devices_and_logging(tmp_path: Path) -> None:
    make_run(tmp_path)
    run_folder.check(config(tmp_path, resume=True, devices="2", micro_batch_size=4, log_every=1), "codebook")


def test_check__resume_may_change_the_test_of_a_segmenter_but_not_its_training_images(tmp_path: Path) -> None:
    def settings(**more: Any) -> SegmentConfig:
        return SegmentConfig(out=str(tmp_path), precision="fp32", **more)

    run_folder.prepare(settings(), "segment").release()
    free = SegmentTestConfig(mode="slide", stride=0.5, scales=(1.0, 0.5), flip=True)
    run_folder.check(settings(test=free, resume=True), "segment")
    with pytest.raises(RunFolderError, match=r"test\.max-side: 2048 -> 512"):
        run_folder.check(settings(test=SegmentTestConfig(max_side=512), resume=True), "segment")
    with pytest.raises(RunFolderError, match=r"scales: .*0\.5, 2\.0.* -> "):
        run_folder.check(settings(scales=(1.0, 1.0), resume=True), "segment")


@pytest.mark.parametrize("content", ["holiday.jpg", "config.json"])
def test_check__refuses_to_overwrite_a_folder_that_is_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(RunFolderError, match="does not look like a run,"):
        run_folder.check(config(tmp_path, overwrite=True), "codebook")
    assert (tmp_path / content).exists()


def test_check__overwrites_a_run_and_a_run_interrupted_at_its_start(tmp_path: Path) -> None:
    make_run(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / ".config.json.tmp").write_text('{"seed')
    run_folder.check(config(tmp_path / "whole", overwrite=True), "pretrain")
    run_folder.check(config(tmp_path / "cut", overwrite=True), "pretrain")


def test_prepare__overwrite_keeps_images_in_folders_that_bear_our_names(tmp_path: Path) -> None:
    for name in ("samples/a.jpg", "checkpoints/b.jpg", "checkpoints/epoch=3.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for data in ("photos", str(tmp_path)):
        with pytest.raises(RunFolderError, match=r"does not look like a run|is the folder of images"):
            run_folder.prepare(config(tmp_path, data=data, overwrite=True), "codebook")
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 3


def test_check__refuses_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who has every permission
    with pytest.raises(RunFolderError, match="no permission"):
        run_folder.check(config(tmp_path / "a" / "b"), "codebook")


def test_prepare__writes_a_config_that_can_be_run_again(tmp_path: Path) -> None:
    make_run(tmp_path, seed=3, max_steps="7 epochs", overwrite=True)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["command"] == "codebook"
    assert load(TrainConfig(), tmp_path / "config.json") == config(tmp_path, seed=3, max_steps="7 epochs")
    environment = json.loads((tmp_path / "environment.json").read_text())
    names = {"command_line", "working_directory", "python", "platform", "cpus", "gpus", "versions"}
    assert set(environment) == names
    assert environment["versions"]["pecobook"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "config.json",
        "environment.json",
        "samples",
    ]


def test_command_line__can_be_pasted_into_a_shell() -> None:
    """A folder with spaces, a value in JSON, and the three ways to start pecobook."""
    words = ["codebook", "tiny", "--data", "my pictures/it's", "--model.args", '{"depth": 2}']
    for program, start in {
        "/env/bin/pecobook": ["/env/bin/pecobook"],
        "/env/lib/pecobook/__main__.py": [sys.executable, "-m", "pecobook"],
        "my script.py": [sys.executable, "my script.py"],
    }.items():
        echo = "import json, sys; print(json.dumps(sys.argv[1:]))"
        line = run_folder.command_line([program, *words])
        shell = shlex.join([sys.executable, "-c", echo]) + " " + line
        pasted = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True)
        assert json.loads(pasted.stdout) == [*start, *words]


def test_prepare__overwrite_empties_and_resume_keeps(tmp_path: Path) -> None:
    make_run(tmp_path, seed=1)
    written = ["samples/step-00000005.png", "checkpoints/step-00000005/state.pt", "export/model.safetensors"]
    foreign = ["samples/a.png", "checkpoints/epoch=3.ckpt", "export/model.onnx", "notes.txt"]
    for name in (*written, *foreign):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    make_run(tmp_path, seed=1, resume=True, log_every=3)
    assert (tmp_path / written[0]).exists()
    assert json.loads((tmp_path / "config.json").read_text())["log_every"] == 10
    make_run(tmp_path, seed=2, overwrite=True)
    assert [name for name in (*written, *foreign) if (tmp_path / name).exists()] == foreign
    assert not (tmp_path / "checkpoints/step-00000005").exists()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2


@pytest.mark.parametrize("change", [{}, {"overwrite": True}])
def test_prepare__checks_the_folder_again_under_the_lock(tmp_path: Path, change: Any) -> None:
    out = tmp_path / "run"
    mine = config(out, seed=1, **change)
    run_folder.check(mine, "codebook")
    if change:
        out.mkdir()
        (out / "thesis.doc").touch()
    else:
        make_run(out, seed=2)  # another run begins and ends
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(RunFolderError, match=r"is not empty|does not look like a run,"):
        run_folder.prepare(mine, "codebook")
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    FolderLock(out).release()


def test_prepare__reports_a_disk_error_and_releases_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_json", full)
        with pytest.raises(RunFolderError, match=r"cannot be written: .*No space left"):
            run_folder.prepare(config(tmp_path), "codebook")
    make_run(tmp_path, overwrite=True)


def test_prepare__a_resume_with_other_versions_says_so_and_keeps_the_earlier_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path)
    file = tmp_path / "environment.json"
    first = json.loads(file.read_text())
    older = {**first, "versions": {**first["versions"], "torch": "2.0.0"}}
    file.write_text(json.dumps(older))
    capsys.readouterr()
    for _ in range(2):
        make_run(tmp_path, resume=True)
        assert json.loads(file.read_text()) == {**first, "earlier": [older]}
    said = capsys.readouterr().err
    assert said.count("Versions differ") == 1
    assert f"torch 2.0.0 -> {first['versions']['torch']}." in said
