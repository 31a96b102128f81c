"""Videos: which frames are decoded, upright and in which colours, and what is noticed about damaged files."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pecobook.data.decode import BadImage
from pecobook.data.videos import read_video
from tests.clips import write_video

av = pytest.importorskip("av")


def video(file: Path, frames: int = 120, **more: object) -> np.ndarray:
    """Write a video whose frame n has the grey value 2 n, and return it."""
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


def cut(source: Path, size: int) -> Path:
    target = source.with_name(f"cut{source.suffix}")
    target.write_bytes(source.read_bytes()[:size])
    return target


@pytest.mark.parametrize(("name", "codec"), [("x.ts", "mpeg2video"), ("x.mpg", "mpeg2video"), ("x.wmv", "wmv2")])
def test_read_video__a_file_that_is_cut_off_is_no_shorter_video(name: str, codec: str, tmp_path: Path) -> None:
    video(tmp_path / name, codec=codec)
    assert len(read_video(tmp_path / name, range)) == 120
    size = (tmp_path / name).stat().st_size
    for length in (size // 2 - 5, size * 9 // 10 - 3):
        with pytest.raises(BadImage, match=f"cut{name[1:]}: it is cut off at its end"):
            read_video(cut(tmp_path / name, length), lambda _: [0])


@pytest.mark.parametrize(("kind", "codec"), [("mkv", "mpeg4"), ("flv", "flv")])
def test_read_video__a_file_with_sound_that_is_cut_off_is_noticed(kind: str, codec: str, tmp_path: Path) -> None:
    video(tmp_path / f"y.{kind}", codec=codec)
    file = remux(tmp_path / f"x.{kind}", tmp_path / f"y.{kind}", seconds_of_sound=5)
    assert [grey // 10 for grey in greys(read_video(file, lambda count: [0, 75, count - 1]))] == [0, 7, 11]
    with pytest.raises(BadImage, match=r"it is cut off at its end|it ends at frame"):
        read_video(cut(file, file.stat().st_size // 4), lambda count: [count - 1])


MATRICES: dict[tuple[float, ...], Callable[[Tensor], Tensor]] = {
    (0, 1, -1, 0): lambda x: x.rot90(-1, (2, 3)),
    (-1, 0, 0, -1): lambda x: x.rot90(2, (2, 3)),
    (0, -1, 1, 0): lambda x: x.rot90(1, (2, 3)),
    (-1, 0, 0, 1): lambda x: x.flip(3),  # mirrored, as front cameras do
    (1, 0, 0, -1): lambda x: x.flip(2),
    (0, 1, 1, 0): lambda x: x.transpose(2, 3),
    (0, -1, -1, 0): lambda x: x.transpose(2, 3).flip(2, 3),
    (1.5, 0, 0, 1): lambda x: x,
}


def displayed(file: Path, matrix: tuple[float, ...]) -> Path:
    """Write the display matrix into the header of the track: x' = a x + c y, y' = b x + d y."""
    a, b, c, d = (int(number * 65536) for number in matrix)
    data = file.read_bytes()
    old, new = (struct.pack(">9i", *first, 0, 0, 1 << 30) for first in ((65536, 0, 0, 0, 65536, 0), (a, b, 0, c, d, 0)))
    place = data.index(old, data.index(b"tkhd"))
    turned = file.with_name("turned.mp4")
    turned.write_bytes(data[:place] + new + data[place + len(old) :])
    return turned


def test_read_video__is_upright_and_as_mirrored_as_a_player_shows_it(tmp_path: Path) -> None:
    corner = np.full((3, 16, 24, 3), 250, np.uint8)
    write_video(tmp_path / "x.mp4", np.pad(corner, ((0, 0), (0, 16), (0, 24), (0, 0))))
    plain = read_video(tmp_path / "x.mp4", lambda _: [0])
    for matrix, expected in MATRICES.items():
        assert torch.equal(read_video(displayed(tmp_path / "x.mp4", matrix), lambda _: [0]), expected(plain)), matrix
    with pytest.raises(BadImage, match=r"turned.mp4: its frames are turned by an angle that is no multiple of 90"):
        read_video(displayed(tmp_path / "x.mp4", (0.7, 0.7, -0.7, 0.7)), lambda _: [0])


def encode(
    file: Path, frames: list[Any], *, codec: str = "mpeg4", pixels: str = "yuv420p", times: list[int] | None = None
) -> None:
    """Encode frames uint8 (H, W, 3 or 4), shown at these milliseconds."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=25)
        (stream.height, stream.width), stream.pix_fmt = frames[0].shape[:2], pixels
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgba" if array.shape[2] == 4 else "rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_read_video__where_the_rate_varies_the_frame_is_the_one_shown(name: str, tmp_path: Path) -> None:
    frames = [np.full((32, 48, 3), 20 * number, np.uint8) for number in range(12)]
    times = [*range(0, 240, 40), *range(4200, 4440, 40)]  # the sixth is shown for four seconds
    encode(tmp_path / name, frames, times=times)
    shown = [round(grey / 10) for grey in greys(read_video(tmp_path / name, range))]
    middle = len(shown) // 2
    assert (shown[0], shown[middle]) == (0, 5)
    ends = [*times[1:], 4440]
    for place, number in enumerate(shown):
        moment = 4440 * place / len(shown)
        assert times[number] - 40 <= moment <= ends[number] + 1


def test_read_video__frames_in_front_of_the_beginning_of_an_edit_list_do_not_count(tmp_path: Path) -> None:
    video(tmp_path / "y.mp4", gop=250)
    with (
        av.open(str(tmp_path / "y.mp4")) as source,
        av.open(str(tmp_path / "x.mp4"), "w") as out,
    ):  # ffmpeg -ss 3 -c copy
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.pts, packet.dts = (stamp - int(3 / packet.time_base) for stamp in (packet.pts, packet.dts))
                packet.stream = stream
                out.mux(packet)
    seen = read_video(tmp_path / "x.mp4", lambda count: [0, count // 2, count - 1])
    assert [abs(grey - number) <= 1 for grey, number in zip(greys(seen), (75, 97, 119), strict=True)] == [True] * 3


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.avi", "x.mov"])
def test_read_video__one_frame_is_all_frames(name: str, tmp_path: Path) -> None:
    video(tmp_path / name, 1)
    assert read_video(tmp_path / name, lambda count: [count - 1] * 3).shape == (3, 3, 32, 48)


COLOUR = (200, 60, 30)


@pytest.mark.parametrize(
    "pixels", ["yuv420p", "yuv444p", "yuv420p10le", "yuv444p16le", "gbrp10le", "rgb48le", "bgr0", "gray", "gray16le"]
)
def test_read_video__pixel_formats_give_the_colours(pixels: str, tmp_path: Path) -> None:
    encode(tmp_path / "x.mkv", [np.full((33, 47, 3), COLOUR, np.uint8)] * 3, codec="ffv1", pixels=pixels)
    frames = read_video(tmp_path / "x.mkv", lambda _: [1])
    grey = 0.299 * COLOUR[0] + 0.587 * COLOUR[1] + 0.114 * COLOUR[2]
    expected = torch.tensor([grey] * 3 if pixels.startswith("gray") else COLOUR)
    assert frames.shape == (1, 3, 33, 47)
    assert (frames.float().mean((0, 2, 3)) - expected).abs().max() <= 2.5


@pytest.mark.parametrize(
    ("name", "codec", "pixels"), [("x.mkv", "ffv1", "yuva420p"), ("x.mov", "png", "rgba"), ("x.mov", "qtrle", "argb")]
)
def test_read_video__transparent_frames_are_composited_on_white(
    name: str, codec: str, pixels: str, tmp_path: Path
) -> None:
    frames = [np.full((32, 48, 4), (*COLOUR, alpha), np.uint8) for alpha in (0, 128, 255)]
    encode(tmp_path / name, frames, codec=codec, pixels=pixels)
    means = read_video(tmp_path / name, range).float().mean((2, 3))
    for mean, share in zip(means, (0, 128 / 255, 1), strict=True):
        assert (mean - (255 * (1 - share) + share * torch.tensor(COLOUR))).abs().max() <= 3


@pytest.mark.parametrize("matrix", [1, 5, 9])
@pytest.mark.parametrize("range_", [1, 2])
def test_read_video__converts_by_the_stated_matrix_and_range(matrix: int, range_: int, tmp_path: Path) -> None:
    red, green, blue = (value / 255 for value in COLOUR)
    of_red, of_blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]  # BT.709, 601, 2020
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    chroma = (blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red)
    low, span, span_of_chroma = ((16, 219, 224), (0, 255, 255))[range_ - 1]
    values = [low + span * luma, *(128 + span_of_chroma * value for value in chroma)]
    planes = np.concatenate([np.full((32, 48), round(value), np.uint8) for value in values])
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, range_
        frame = av.VideoFrame.from_ndarray(planes.reshape(3, 32, 48), format="yuv444p")
        frame.colorspace, frame.color_range = matrix, range_
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    mean = read_video(tmp_path / "x.mkv", lambda _: [0]).float().mean((0, 2, 3))
    assert (mean - torch.tensor(COLOUR)).abs().max() <= 2


@pytest.mark.parametrize("name", ["a b.mp4", "a:b.mp4", "%03d.mp4", "-x#?'.mp4", "ü.mp4", os.fsdecode(b"\xff\xfe.mp4")])
def test_read_video__takes_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video(tmp_path / "x.mp4", 3)
    shutil.move(tmp_path / "x.mp4", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(read_video(Path(name), range)) == 3


def test_read_video__sound_is_no_video_nor_is_its_cover(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 48, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 8000, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
        container.mux(
            cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8)).reformat(format="yuvj420p"))
        )
        container.mux(cover.encode(None))
    with pytest.raises(BadImage, match=r"x.mp4: it holds no video"):
        read_video(tmp_path / "x.mp4", lambda _: [0])
