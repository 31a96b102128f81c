"""Clips: which frames are read, from videos and from folders of frames, and what is done about bad ones."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pecobook import read_clip
from pecobook.data import mapped
from pecobook.data.clips import central_crops, find_clips, frame_numbers, notes_on_frames, open_clips, random_clip
from pecobook.data.decode import BadImage
from pecobook.data.images import open_images
from pecobook.data.record import compare, take
from pecobook.data.source import ImageSource, Splits
from pecobook.data.summary import describe, look
from pecobook.data.views import random_crop
from pecobook.errors import ConfigError, DataError
from pecobook.settings.images import ClipConfig
from pecobook.utils import extras
from pecobook.utils.distributed import sharing
from tests.clips import moving_square, write_frames, write_moving

STRIDE = ClipConfig(frames=8, stride=32)
SEGMENTS = ClipConfig(frames=8, sampling="segments")


def test_frame_numbers__stride() -> None:
    assert frame_numbers(300, STRIDE) == list(range(38, 263, 32))  # 38 before, 37 behind
    firsts = {frame_numbers(300, STRIDE, view)[0] for view in range(2000)}
    assert firsts == set(range(76))
    assert all(np.diff(frame_numbers(300, STRIDE, view)).tolist() == [32] * 7 for view in range(50))
    assert frame_numbers(225, STRIDE) == frame_numbers(225, STRIDE, 5) == list(range(0, 225, 32))
    assert frame_numbers(50, STRIDE, 3) == [0, 7, 14, 21, 28, 35, 42, 49]  # a short video is spanned
    assert frame_numbers(1, STRIDE, 3) == [0] * 8
    assert frame_numbers(9, ClipConfig(frames=1)) == [4]


def test_frame_numbers__segments() -> None:
    assert frame_numbers(80, SEGMENTS) == [5, 15, 25, 35, 45, 55, 65, 75]
    for view in range(200):
        assert [number // 10 for number in frame_numbers(80, SEGMENTS, view)] == list(range(8))
    seen = {frame_numbers(80, SEGMENTS, view)[3] for view in range(300)}
    assert seen == set(range(30, 40))
    assert frame_numbers(3, SEGMENTS) == [0, 0, 0, 1, 1, 2, 2, 2]


def test_open_clips__splits_and_classes_as_of_images(tmp_path: Path) -> None:
    splits = open_clips(str(write_moving(tmp_path, train=3, held_out=2)))
    assert (len(splits.train), len(splits.evaluation), splits.evaluation_name) == (6, 4, "validation")
    assert splits.train.classes == ("approaching", "receding")
    assert splits.train.labels is not None
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.train.identify(4) == f"{tmp_path}/train/receding/clip1"
    assert ("clips", "6 clips to train on, 4 held out (validation)") in describe(splits)
    names = take(splits).names.to_pylist()
    assert names == sorted(
        f"{split}/{label}/clip{n}/{frame}.png".encode()
        for split, count in (("train", 3), ("val", 2))
        for label in ("approaching", "receding")
        for n in range(count)
        for frame in range(4)
    )


def test_record__sees_every_frame(tmp_path: Path) -> None:
    root = write_moving(tmp_path, train=2, held_out=1)
    before = take(open_clips(str(root)))
    frame = root / "train" / "receding" / "clip1" / "0.png"
    Image.new("RGB", (16, 16)).save(frame)
    changed = compare(before, take(open_clips(str(root))))
    assert str(changed) == "1 changed (train/receding/clip1/0.png)"
    digest = open_clips(str(root)).train.fingerprint
    frame.unlink()
    assert str(compare(before, take(open_clips(str(root))))) == "1 removed (train/receding/clip1/0.png)"
    assert open_clips(str(root)).train.fingerprint != digest


def test_look__a_middle_frame_in_common_makes_no_equal_clips(tmp_path: Path) -> None:
    for number, last in enumerate((9, 9, 8)):
        write_frames(tmp_path / str(number), np.full((3, 8, 8, 3), [[[[1]]], [[[2]]], [[[last]]]], np.uint8))
    clips = ImageSource(find_clips(tmp_path)[0], name=str(tmp_path), split="train")
    first, same, other = (look(clips, number, whole=True).digest for number in range(3))
    assert first == same != other


def test_clips__of_mapped_columns_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(write_moving(tmp_path, train=3, held_out=2))
    held = open_clips(root).train
    monkeypatch.setenv("PECOBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped, "LEAST_BYTES", 1)
    monkeypatch.setattr(mapped, "_MOUNTS", Path("/nowhere"))  # the tests themselves may run in memory
    columns, make = list[int](), mapped._file

    def noted(folder: Path, size: int, write: Callable[[IO[bytes]], object]) -> object:
        columns.append(size)
        return make(folder, size, write)

    monkeypatch.setattr(mapped, "_file", noted)
    clips = open_clips(root).train
    assert 11 * 8 in columns  # where the frames of each clip begin
    assert max(columns) >= 40 * len("val/receding/clip1/0.png")
    assert clips.fingerprint == held.fingerprint
    assert torch.equal(clips.read(5), held.read(5))


def test_find_clips__the_frames_of_the_current_folder_have_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_frames(tmp_path, moving_square(0, 0))
    monkeypatch.chdir(tmp_path)
    clips, _, _ = find_clips(Path())
    assert (clips.identify(0), len(clips.frames(0) or ())) == (".", 4)


def test_open_clips__takes_any_name_links_and_hidden_files(tmp_path: Path) -> None:
    frames = moving_square(0, 1)
    for number, name in enumerate(("a clip", "ü", os.fsdecode(b"\xff\xfe"))):
        write_frames(tmp_path / "frames" / name, frames)
        link = tmp_path / "data" / ("cat" if number else "dog") / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path / "frames" / name)
    (tmp_path / "frames" / "a clip" / ".2.png").write_bytes(b"no image")
    (tmp_path / "data" / "cat" / "missing").symlink_to(tmp_path / "frames" / "missing")  # of a list with more videos
    splits = open_clips(str(tmp_path / "data"))
    assert (len(splits.train) + len(splits.evaluation), splits.train.classes) == (3, ("cat", "dog"))
    assert splits.left_out == {"broken link": 1, "hidden": 1}
    for part in (splits.train, splits.evaluation):
        for index in range(len(part)):
            (clip,) = part.sample(index)
            assert torch.equal(clip(range), torch.from_numpy(frames).permute(0, 3, 1, 2))


def test_open_clips__a_class_without_held_out_clips_is_kept_and_one_without_training_refused(tmp_path: Path) -> None:
    root = write_moving(tmp_path, train=2, held_out=1)
    shutil.rmtree(root / "val" / "receding")
    splits = open_clips(str(root))
    assert splits.evaluation.classes == splits.train.classes == ("approaching", "receding")
    assert "held out: approaching 1, receding 0" in dict(describe(splits))["classes"]
    shutil.move(root / "train" / "receding", root / "val" / "receding")
    with pytest.raises(DataError, match="all its clips lie in the one class folder 'approaching'"):
        open_clips(str(root))


def test_notes_on_frames__only_of_folders_of_numbered_frames(tmp_path: Path) -> None:
    def notes(names: list[str]) -> tuple[str, ...]:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        for label in ("cat", "dog"):
            for name in names:
                file = tmp_path / "x" / label / name
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (4, 4)).save(file)
        return notes_on_frames(open_images(str(tmp_path / "x")).train)

    numbers = range(1, 13)
    (note,) = notes([f"{clip}/frame{n}.png" for clip in "ab" for n in numbers])  # 1, 10, 11, 12, 2, ...
    assert note.startswith(f"Each class has folders of numbered images, such as '{tmp_path}/x/cat/a', and each image")
    assert note.endswith("--clip.frames 8 reads each folder as a clip.")
    assert notes([f"{clip}/{n:05d}.png" for clip in "ab" for n in range(4)])
    assert not notes([f"{n}.png" for n in numbers])  # no subfolders
    assert not notes([f"images/{n}.png" for n in numbers])  # one subfolder
    assert not notes([f"{site}/{2 * n}.png" for site in "ab" for n in numbers])  # with gaps
    assert not notes([f"{site}/{name}.png" for site in "ab" for name in ("left", "right", "top", "below")])
    assert not notes([f"{site}/{n}.png" for site in "ab" for n in range(100, 112)])  # a part of one numbering
    assert not notes([f"{site}/{n}.png" for site in "ab" for n in range(3)])


def test_notes_on_frames__of_a_table_with_a_class_without_images(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("L", (4, 4)).save(encoded, "PNG")
    table = pa.table({"image": [encoded.getvalue(), b"", encoded.getvalue()], "label": [0, 1, 1]})
    pq.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\n")
    splits = open_images(str(tmp_path))
    assert splits.train.classes == ("cat", "dog", "emu")
    assert notes_on_frames(splits.train) == ()


def test_frames__are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for number in range(12):
            folder = tmp_path / label / "clip"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number * 10).save(folder / f"frame{number}.png")
    splits = open_clips(str(tmp_path))
    (clip,) = splits.train.sample(0)
    assert clip(lambda count: range(count))[:, 0, 0, 0].tolist() == [number * 10 for number in range(12)]
    assert splits.train.read(0)[0, 0, 0] == 60  # the middle frame


def test_read_clip__a_folder_and_three_crops(tmp_path: Path) -> None:
    clip = moving_square(0, 1, frames=4, height=16, width=24)
    write_frames(tmp_path / "x", clip)
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2)
    config = ClipConfig(frames=4, sampling="segments", crops=3)
    crops = read_clip(tmp_path / "x", config, 16)
    for crop, left in zip(crops, (4, 0, 8), strict=True):
        assert torch.equal(crop, pixels[..., left : left + 16])
    tall = central_crops(pixels.transpose(2, 3), config, 16)
    assert torch.equal(tall, crops.transpose(3, 4))
    one = read_clip(tmp_path / "x", ClipConfig(frames=4, sampling="segments"), 16)
    assert torch.equal(one, crops[0])
    with pytest.raises(DataError, match="does not exist"):
        read_clip(tmp_path / "y", config, 16)


def test_random_clip__one_crop_and_one_flip_for_all_frames() -> None:
    frames = torch.randint(256, (1, 3, 20, 30), dtype=torch.uint8).expand(8, -1, -1, -1)
    rules = {"size": 12, "min_area": 0.3, "policy": "rand-m9-mstd0.5-inc1"}
    views = []
    for view in range(20):
        image = random_clip(lambda _: frames, view, config=STRIDE, **rules)["image"]  # type: ignore[arg-type]
        assert image.shape == (8, 3, 12, 12)
        assert torch.equal(image, image[:1].expand_as(image))
        views.append(image)
    again = random_clip(lambda _: frames, 7, config=STRIDE, **rules)["image"]  # type: ignore[arg-type]
    assert torch.equal(again, views[7])
    assert len({view.numpy().tobytes() for view in views}) == 20
    plain = random_crop(frames[0], 12, 7, min_area=0.3, flip=False)
    flips = [
        torch.equal(
            random_crop(frames[0], 12, view, min_area=1.0), random_crop(frames[0], 12, view, min_area=1.0, flip=False)
        )
        for view in range(40)
    ]
    assert 10 < sum(flips) < 30
    assert plain.shape == (3, 12, 12)


def test_open_clips__videos_and_what_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("av")
    root = write_moving(tmp_path / "clips", train=2, held_out=1, video=True)
    (root / "train" / "receding" / "notes.txt").write_text("x")
    splits = open_clips(str(root))
    assert (len(splits.train), splits.left_out) == (4, {"extension .txt": 1})
    assert splits.train.read(0).shape == (3, 16, 16)
    assert splits.train.file(0) is None
    assert take(splits).names[0].as_py() == b"train/approaching/clip0.mp4"


def test_open_clips__reads_the_kind_of_which_there_are_more(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = write_moving(tmp_path / "frames", train=2, held_out=1)
    videos = write_moving(tmp_path / "videos", train=2, held_out=1, video=True)
    shutil.copy(videos / "train" / "receding" / "clip0.mp4", frames / "train" / "receding" / "stray.mp4")
    shutil.copy(frames / "train" / "receding" / "clip0" / "0.png", videos / "train" / "receding" / "clip0.png")
    for root, left_out in ((frames, {"extension .mp4": 1}), (videos, {"extension .png": 1})):
        splits = open_clips(str(root))
        assert (len(splits.train), len(splits.evaluation), splits.left_out) == (4, 2, left_out)
    with pytest.raises(DataError, match=r"extension .mp4\); pecobook finetune --clip.frames 8 reads videos"):
        open_images(str(videos / "val"))


def test_open_clips__without_pyav_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.mp4").touch()
    with pytest.raises(ConfigError, match=r"a folder of videos, needs av: pip install 'pecobook\[video\]'"):
        open_clips(str(tmp_path))


def test_open_clips__refuses_what_holds_no_clips_or_no_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'photos' is no folder: --clip.frames reads"):
        open_clips("photos")
    with pytest.raises(DataError, match="neither this folder nor its subfolders hold a clip"):
        open_clips(str(tmp_path))
    for label in ("cat", "dog"):
        write_frames(tmp_path / label, moving_square(0, 0))
    with pytest.raises(DataError, match=r"2 folders of images are taken for clips, without classes"):
        open_clips(str(tmp_path))


@pytest.mark.parametrize("open_", [open_clips, open_images])
def test_open__twice_from_one_listing_counts_what_is_left_out_once(
    open_: Callable[[str], Splits], tmp_path: Path
) -> None:
    root = write_moving(tmp_path / "set", train=2, held_out=1)
    (root / "train" / "receding" / "empty").mkdir()
    pq.write_table(pa.table({"a": [1]}), root / "x.parquet")
    lists = tmp_path / "lists"
    lists.mkdir()
    with sharing(str(lists)):
        first, second = open_(str(root)), open_(str(root))
    assert first.left_out == second.left_out
    assert set(first.left_out.values()) == {1}


def test_open_clips__counts_empty_folders_and_skips_bad_frames(tmp_path: Path) -> None:
    root = write_moving(tmp_path, train=2, held_out=1)
    (root / "train" / "receding" / "empty").mkdir()
    (root / "train" / "receding" / "clip1" / "2.png").write_bytes(b"no image")
    splits = open_clips(str(root))
    assert splits.left_out == {"folder without a frame": 1}
    (clip,) = splits.train.sample(3)
    with pytest.raises(BadImage, match=r"clip1/2.png"):
        clip(range)
    Image.new("RGB", (3, 3)).save(root / "train" / "receding" / "clip1" / "2.png")
    with pytest.raises(BadImage, match="its frames differ in size"):
        clip(range)
    shutil.rmtree(root / "train" / "receding" / "clip1")
    with pytest.raises(BadImage):
        clip(range)
    assert find_clips(root)[0].unit == "clips"
