"""Clips: which frames are read, from videos and from folders of frames, and what is done about bad ones."""

from __future__ import annotations

import contextlib
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pecobook import read_clip
from pecobook.data.clips import central_crops, find_clips, frame_numbers, open_clips, random_clip
from pecobook.data.decode import BadImage
from pecobook.data.images import open_images
from pecobook.data.record import take
from pecobook.data.summary import describe
from pecobook.data.videos import read_video
from pecobook.data.views import random_crop
from pecobook.errors import ConfigError, DataError
from pecobook.settings.images import ClipConfig
from pecobook.utils import extras
from tests.clips import moving_square, write_frames, write_moving, write_video

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


# ---------------------------------------------------------------------------------------------------------- video files


def video(file: Path, frames: int = 120, **more: object) -> np.ndarray:
    """Write a video whose frame n has the grey value 2 n, and return it."""
    pytest.importorskip("av")
    clip = np.repeat(2 * np.arange(frames, dtype=np.uint8), 32 * 48 * 3).reshape(frames, 32, 48, 3)
    write_video(file, clip, **more)  # type: ignore[arg-type]
    return clip


def greys(frames: Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / 2) for frame in frames]


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.avi"])
def test_read_video__reads_the_chosen_frames(name: str, tmp_path: Path) -> None:
    video(tmp_path / name)
    everything = read_video(tmp_path / name, range)
    assert everything.shape == (120, 3, 32, 48)
    assert all(abs(grey - number) <= 1 for number, grey in enumerate(greys(everything)))  # the codec loses a little
    for chosen in ([0], [119], [3, 3, 4, 100], [60, 61, 118], [2, 70, 119], [49, 98]):
        assert torch.equal(read_video(tmp_path / name, lambda _, chosen=chosen: chosen), everything[chosen])  # type: ignore[misc]


def test_read_video__decodes_only_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video(tmp_path / "x.mp4", gop=12)
    av = pytest.importorskip("av")
    decoded: list[int] = []

    class Counted:
        def __init__(self, container: object) -> None:
            self.container = container

        def __getattr__(self, name: str) -> object:
            return getattr(self.container, name)

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *_: object) -> None:
            self.container.close()  # type: ignore[attr-defined]

        def decode(self, stream: object) -> object:
            for frame in self.container.decode(stream):  # type: ignore[attr-defined]
                decoded.append(1)
                yield frame

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: Counted(opened(*args, **kwargs)))
    assert greys(read_video(tmp_path / "x.mp4", lambda _: [0, 112])) == [0, 112]
    assert len(decoded) < 20


def test_read_video__damaged_files_are_bad_images(tmp_path: Path) -> None:
    video(tmp_path / "x.avi")
    data = (tmp_path / "x.avi").read_bytes()
    for name, content in {"empty": b"", "noise": bytes(range(256)) * 40, "text": b"#EXTM3U\n/etc/passwd\n"}.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        with pytest.raises(BadImage, match=f"{name}.mp4"):
            read_video(tmp_path / f"{name}.mp4", lambda _: [0])
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadImage, match=r"ends at frame \d+ of 120|Invalid data"):
        read_video(tmp_path / "cut.avi", lambda _: [0, 110])
    assert len(read_video(tmp_path / "cut.avi", lambda _: [0, 20])) == 2
    with pytest.raises(BadImage):
        read_video(tmp_path / "nothing.mp4", lambda _: [0])


def remux(file: Path, *sources: Path, last: int = 1, seconds_of_sound: int = 0) -> Path:
    """Write the packets of the sources one after the other; the last one of all is shown `last` times as long."""
    av = pytest.importorskip("av")
    with contextlib.ExitStack() as stack:
        inputs = [stack.enter_context(av.open(str(source))) for source in sources]
        out = stack.enter_context(av.open(str(file), "w"))
        stream = out.add_stream_from_template(inputs[0].streams.video[0])
        sound = out.add_stream("aac", rate=8000) if seconds_of_sound else None
        packets = [[packet for packet in each.demux(each.streams.video[0]) if packet.size] for each in inputs]
        packets[-1][-1].duration *= last
        for number, group in enumerate(packets):
            for packet in group:
                packet.pts = packet.dts = packet.pts + number * (packets[0][-1].pts + packets[0][0].duration)
                packet.stream = stream
                out.mux(packet)
        for second in range(seconds_of_sound):
            assert sound is not None
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 8000, second * 8000
            out.mux(sound.encode(frame))
        if sound:
            out.mux(sound.encode(None))
    return file


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_read_video__a_slide_at_the_end_stands_for_many_frames(name: str, tmp_path: Path) -> None:
    video(tmp_path / "y.mp4", 20)
    file = remux(tmp_path / name, tmp_path / "y.mp4", last=100)
    assert greys(read_video(file, lambda count: [0, 4 * count // 5, count - 1])) == [0, 19, 19]


def test_read_video__sound_that_is_longer_adds_no_frames(tmp_path: Path) -> None:
    video(tmp_path / "y.mp4", 20)
    file = remux(tmp_path / "x.mkv", tmp_path / "y.mp4", seconds_of_sound=4)
    assert greys(read_video(file, lambda count: [count - 1])) == [19]


def test_read_video__frames_of_two_sizes_are_a_bad_image(tmp_path: Path) -> None:
    video(tmp_path / "a.mkv", 12, codec="mpeg2video")  # whose packets hold their sizes
    write_video(tmp_path / "b.mkv", np.zeros((12, 48, 64, 3), np.uint8), codec="mpeg2video")
    file = remux(tmp_path / "x.mkv", tmp_path / "a.mkv", tmp_path / "b.mkv")
    with pytest.raises(BadImage, match=r"x.mkv.*its frames differ in size"):
        read_video(file, lambda count: [0, count - 1])


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_read_video__is_upright(matrix: tuple[int, ...], turns: int, tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", np.pad(np.full((3, 16, 24, 3), 250, np.uint8), ((0, 0), (0, 16), (0, 24), (0, 0))))
    plain = read_video(tmp_path / "x.mp4", lambda _: [0])
    a, b, c, d = (number * 65536 for number in matrix)  # of the track's header: x' = a x + c y, y' = b x + d y
    data = (tmp_path / "x.mp4").read_bytes()
    old, new = (struct.pack(">9i", *first, 0, 0, 1 << 30) for first in ((65536, 0, 0, 0, 65536, 0), (a, b, 0, c, d, 0)))
    place = data.index(old, data.index(b"tkhd"))
    (tmp_path / "x.mp4").write_bytes(data[:place] + new + data[place + len(old) :])
    assert torch.equal(read_video(tmp_path / "x.mp4", lambda _: [0]), plain.rot90(turns, (2, 3)))


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
