"""Decodes chosen frames of a video file with PyAV. Any problem with a file is a `BadImage`.

A video of n frames has n moments, equally spaced by its average rate, and frame k is what a player shows at moment k:
if the rate varies, one may stand for many moments. Only groups of pictures with a chosen frame are decoded.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecobook.data.decode import BadImage, check_regular, from_pillow, max_pixels
from pecobook.errors import first_line

Choice = Callable[[int], Sequence[int]]
"""Maps the number of frames of a video to the indices of the frames to read, in ascending order."""
Opened = Callable[[], tuple[Any, Any]]
"""Returns a video file, at its beginning, and its video."""
_FORWARD = 48
"""Number of frames that are decoded and skipped; over a larger distance the reader seeks."""
_MISSING = 0.05
"""Share of the frames that a video may lack at its end: the header's length is often slightly wrong."""
_ROUNDED = 0.1
"""Share of a frame by which a time stamp may be later than its moment: many files store milliseconds."""
_OPTIONS = {  # a file can refer to others, even remote ones: only these formats are read, and no other file
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,flv,asf",
    "protocol_whitelist": "file",
}
_TS_PACKETS = (188, 192, 204)
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def read_video(path: Path, choose: Choice) -> Tensor:
    """Decode chosen frames of a video file: uint8 (T, 3, H, W), RGB, upright.

    A transparent video is composited on white. Values with more than 8 bits, including high dynamic range, are scaled.

    Raises:
        BadImage: the file is not a video, is cut off or otherwise damaged, or its frames are too large, differ in size
            or are rotated by an angle that is not a multiple of 90 degrees.
    """
    import av

    name = os.fsencode(path).decode(errors="replace")
    try:
        check_regular(path.stat(), name)
        with contextlib.ExitStack() as files:

            def opened() -> tuple[Any, Any]:
                """Return the file, at its beginning, and its video; "a:b.mp4" alone would be b.mp4 of protocol a."""
                container = files.enter_context(av.open(f"file:{path}", options=_OPTIONS))
                cover = av.stream.Disposition.attached_pic  # album art, which is not a video
                videos = [each for each in container.streams.video if not each.disposition & cover]
                if not videos:
                    raise BadImage(name, "it holds no video")
                videos[0].codec_context.thread_count = 1  # many processes read videos
                return container, videos[0]

            container, stream = opened()
            if stream.codec_context.width * stream.codec_context.height > max_pixels():
                raise BadImage(name, f"more than {max_pixels():,} pixels a frame")
            _check_end(path, container)
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            seconds = _seconds(container, stream)
            frames = stream.frames if seconds is None else round(float(seconds * rate))
            count = max(frames or _num_packets(*opened(), rate), 1)
            return stacked(name, list(_frames_at(container, stream, choose(count), count, rate, opened)))
    except BadImage as error:
        raise BadImage(name, error.reason) from None
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError) as error:
        raise BadImage(name, getattr(error, "strerror", None) or first_line(error)) from error


def stacked(name: str, frames: list[Tensor]) -> Tensor:
    """Stack the frames of a clip, (3, H, W) each. Raises BadImage if their sizes differ."""
    if len({frame.shape for frame in frames}) > 1:
        raise BadImage(name, "its frames differ in size")
    return torch.stack(frames)


def _check_end(path: Path, container: Any) -> None:
    """Raise BadImage if a file is cut off whose length FFmpeg infers from what is left of it."""
    size, is_cut = path.stat().st_size, False
    if container.format.name == "mpegts":
        is_cut = all(size % packet for packet in _TS_PACKETS)
    elif container.format.name == "asf":
        with path.open("rb") as file:
            _, found, header = file.read(2**16).partition(_ASF_PROPERTIES)
        is_cut = bool(found) and size < int.from_bytes(header[24:32], "little")
    if is_cut:
        raise BadImage("", "it is cut off at its end")


def _seconds(container: Any, stream: Any) -> Fraction | None:
    """Return a video's length according to its header; None if the header has a number of frames, or neither."""
    formats = container.format.name.split(",")
    if "mpeg" in formats or (stream.frames and "mov" not in formats):
        return None  # mpeg has few time stamps; mov also counts the frames before the start of an edit list
    if stream.duration is not None:
        return Fraction(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # in matroska and webm
    if tag:
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + Fraction(tag[3]) - _start(stream)
    if container.duration is not None and len(container.streams) == 1:  # otherwise it may be the length of the audio
        return Fraction(container.duration, 1_000_000)
    return None


def _start(stream: Any) -> Fraction:
    return Fraction((stream.start_time or 0) * stream.time_base)


def _num_packets(container: Any, stream: Any, rate: Fraction) -> int:
    """Return the number of frames by counting packets. Raises BadImage if the file ends before its header says."""
    packets = [  # only what is needed of each, because the packets hold the whole file
        (
            packet.stream is stream,
            packet.is_corrupt,
            None if packet.pts is None else (packet.pts + (packet.duration or 0)) * packet.time_base,
        )
        for packet in container.demux()
        if packet.size
    ]
    ends = [end for _, _, end in packets if end is not None]
    begin, stated = (Fraction(time or 0, 1_000_000) for time in (container.start_time, container.duration))
    is_short = bool(ends) and max(ends) - begin < (1 - _MISSING) * stated
    if is_short or any(is_corrupt for _, is_corrupt, _ in packets[-2:]):
        raise BadImage("", "it is cut off at its end")
    of_video = [end for is_video, _, end in packets if is_video]
    known = [end for end in of_video if end is not None]
    return round(float((max(known) - _start(stream)) * rate)) if known else len(of_video)


def _frames_at(
    container: Any, stream: Any, numbers: Sequence[int], count: int, rate: Fraction, opened: Opened
) -> Iterator[Tensor]:
    """Yield the frames at ascending moments, of `count`. Raises BadImage if the video ends long before."""
    first, step = stream.start_time or 0, 1 / (rate * stream.time_base)  # in units of the time stamps

    def decoded(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
        """Yield moments and frames from here on."""
        for place, frame in enumerate(container.decode(stream)):
            yield place if frame.pts is None else float((frame.pts - first) / step), frame

    frames, can_seek = decoded(container, stream), True
    shown, following = next(frames, None), next(frames, None)
    last, pixels = None, None
    for number in numbers:
        if can_seek and shown is not None and number - shown[0] > _FORWARD:
            frames, shown = iter(()), None
            with contextlib.suppress(OSError):
                container.seek(first + int(number * step), stream=stream)
                frames = decoded(container, stream)
                shown = next(frames, None)
            if shown is None or shown[1].pts is None or shown[0] > number + _ROUNDED:
                frames, can_seek = decoded(*opened()), False  # the file has no index that helps
                shown = next(frames, None)
            following = next(frames, None)
        while following is not None and following[0] <= number + _ROUNDED:
            shown, following = following, next(frames, None)
        if shown is None:
            raise BadImage("", "none of its frames can be decoded")
        place, frame = shown
        length = float((frame.duration or 0) / step)  # a slide stands for many frames
        if following is None and number - place > max(_MISSING * count, length, 2):
            raise BadImage("", f"it ends at frame {max(round(place), 0)} of {count}")
        if frame is not last or pixels is None:
            last, pixels = frame, _pixels(frame)
        yield pixels


def _pixels(frame: Any) -> Tensor:
    """Return a decoded frame, uint8 (3, H, W), upright. Raises BadImage."""
    if any(component.is_alpha for component in frame.format.components):
        from PIL import Image

        pixels = from_pillow(Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA"))
    else:
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])  # x' = a x + c y, y' = b x + d y
    is_turned = abs(b * c) > abs(a * d)
    across, down, *others = (c, b, a, d) if is_turned else (a, d, b, c)
    if 100 * max(map(abs, others)) > min(abs(across), abs(down)):
        raise BadImage("", "its frames are turned by an angle that is no multiple of 90 degrees")
    pixels = pixels.transpose(1, 2) if is_turned else pixels
    return pixels.flip([axis for axis, sign in ((2, across), (1, down)) if sign < 0])
