"""Clips for `--clip.frames`: a folder whose items are videos, or folders of frames, with the usual splits and classes.

    train/CLASS/x.mp4         videos, which PyAV decodes (the extra `video`); of a file only what is needed is decoded
    train/CLASS/x/00001.jpg   a folder of frames for each clip, in the order of the numbers in their names

Which frames of a clip are read, and their crop, is a pure function of the key of the view, as for images. All frames of
a clip share the crop, the flip and the operations of RandAugment.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pecobook.data.decode import BadImage, check_regular, decode, max_pixels, read_file
from pecobook.data.folders import FileStore, Listing, walk
from pecobook.data.images import check_labels
from pecobook.data.layout import count_unused, parts_of, read_layout
from pecobook.data.names import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from pecobook.data.parts import Contents, assemble
from pecobook.data.sampler import key, uniform
from pecobook.data.source import ImageSource, Integers, Splits, arrow_binary
from pecobook.data.views import rand_augment, random_crop
from pecobook.errors import DataError, first_line
from pecobook.settings.images import ClipConfig
from pecobook.utils.distributed import made_by_first_rank
from pecobook.utils.extras import require
from pecobook.utils.images import resize

Choice = Callable[[int], Sequence[int]]
"""From the number of frames of a video to the numbers of the frames to read, in ascending order."""
_FORWARD = 48
"""Frames that are decoded in passing; from a larger distance on, the reader seeks."""
_MISSING = 0.05
"""Share of the frames that a video may lack at its end: the header's length is often a little wrong."""
_OPTIONS = {  # a file can name others, also on other machines: only these formats are read, and no other file
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,flv,asf",
    "protocol_whitelist": "file",
}


class ClipStore(FileStore):
    """Clips under one folder: video files, or folders of frames.

    Read as an image, a clip is its middle frame.

    Args:
        root: the folder.
        paths: relative paths of the clips, in an Arrow column.
        starts: number of the first frame of each clip in `frames`, and the number of all frames; None for videos.
        frames: relative paths of all frames, in an Arrow column; None for videos.
    """

    unit = "clips"

    def __init__(self, root: Path, paths: Any, starts: Integers | None = None, frames: Any = None) -> None:
        super().__init__(root, paths)
        self._starts, self._frames = starts, frames

    def frames(self, row: int) -> list[bytes] | None:
        """Return the paths of the frames of a clip, in order; None for a video."""
        if self._starts is None:
            return None
        start, end = int(self._starts[row]), int(self._starts[row + 1])
        paths = [self._prefix + path for path in self._frames[start:end].to_pylist()]
        return sorted(paths, key=lambda path: [(text, int(n or 0)) for text, n in re.findall(rb"(\D*)(\d*)", path)])

    def file(self, row: int) -> Any:
        """Return the path of the middle frame of a folder of frames; None for a video, which is no file of an image."""
        frames = self.frames(row)
        return None if frames is None else Path(os.fsdecode(frames[len(frames) // 2]))

    def files(self, rows: Integers) -> Iterator[bytes]:
        """Yield the paths of the videos, or of the middle frames."""
        if self._starts is None:
            yield from super().files(rows)
        else:
            yield from (os.fsencode(self.file(row)) for row in rows.tolist())

    def read(self, row: int, shortest: int = 0) -> Tensor:
        """Read the middle frame of a clip, uint8 (3, H, W). Raises BadImage."""
        return self.clip(row, shortest)(lambda count: [count // 2])[0]

    def sample(self, row: int, shortest: int = 0) -> tuple[Any, ...]:
        """Return the reader of a clip, of which a view reads the frames that it chooses."""
        return (self.clip(row, shortest),)

    def clip(self, row: int, shortest: int = 0) -> Callable[[Choice], Tensor]:
        """Return a function from a choice to the frames, uint8 (T, 3, H, W), that raises BadImage."""
        frames, name = self.frames(row), self.identify(row)

        def read(choose: Choice) -> Tensor:
            if frames is None:
                return read_video(Path(os.fsdecode(self._prefix + self._paths[row].as_py())), choose)
            chosen = [frames[number] for number in choose(len(frames))]
            decoded = {
                path: decode(
                    read_file(path),
                    name=os.fsencode(path).decode(errors="replace"),
                    value_range=self.value_range,
                    shortest=shortest,
                )
                for path in dict.fromkeys(chosen)
            }
            return _stacked(name, [decoded[path] for path in chosen])

        return read

    def identify(self, row: int) -> str:
        """Return the path of the video, or of the folder of frames."""
        return str((self._prefix + self._paths[row].as_py()).decode(errors="replace"))


class SampledClips(ClipStore):
    """Clips that are read as the frames of evaluation, uint8 (T, 3, H, W), for `predict`."""

    config: ClipConfig

    def read(self, row: int, shortest: int = 0) -> Tensor:
        """Read the frames of a clip. Raises BadImage."""
        return self.clip(row, shortest)(lambda count: frame_numbers(count, self.config))


# --------------------------------------------------------------------------------------------------------- opening


def open_clips(data: str) -> Splits:
    """Open a folder of videos or of folders of frames; splits and classes are read as those of images.

    Raises:
        DataError: there is no such folder, it holds no clip, or its clips have no classes.
        ConfigError: it holds videos, and PyAV is not installed.
    """
    root = Path(data).expanduser()
    if not data or not root.is_dir():
        raise DataError(f"--data '{data}' is no folder: --clip.frames reads a folder of videos or of frames.")
    store, groups, left_out = list_clips(root)
    layout = read_layout(data, groups)
    folder_of = np.arange(len(groups))
    parts = parts_of(layout, store, folder_of)
    splits = assemble(data, Contents(parts, dict(left_out + count_unused(layout, folder_of)), layout.notes))
    if splits.train.labels is None and store.frames(0) is not None:
        raise DataError(
            f"--data '{data}': its {len(store):,} folders of images are taken for clips, without classes. "
            "Clips are videos or folders of frames: CLASS/clip.mp4 or CLASS/clip/0001.jpg."
        )
    check_labels(splits, data)
    return splits


def list_clips(root: Path, kind: type[ClipStore] = ClipStore) -> tuple[ClipStore, list[tuple[str, ...]], Any]:
    """List the clips of a folder: videos, or folders with images where there are more of these.

    Args:
        root: the folder, or a video.
        kind: class of the store.

    Returns:
        the clips, the folder of each as names on the way from the top, and why other files are not used.

    Raises:
        DataError: there is no clip.
        ConfigError: there are videos, and PyAV is not installed.
    """
    import pyarrow as pa

    if root.is_file():
        require("video", f"The video '{root}'")
        return kind(root.parent, arrow_binary([os.fsencode(root.name)])), [()], {}
    videos = _listed(root, VIDEO_EXTENSIONS)
    others = not videos.chunks or any(f"extension .{name}" in videos.left_out for name in IMAGE_EXTENSIONS)
    images = _listed(root, IMAGE_EXTENSIONS) if others else Listing()
    if len(videos.group_of) >= max(len(images.groups), 1):
        require("video", f"'{root}', a folder of videos,")
        groups = [videos.groups[number] for number in videos.group_of]
        return kind(root, pa.chunked_array(videos.chunks)), groups, videos.left_out
    if not images.chunks:
        raise DataError(
            f"--data '{root}': neither this folder nor its subfolders hold a clip, which is a video "
            f"({', '.join(VIDEO_EXTENSIONS)}) or a folder of frames."
        )
    counts = np.bincount(images.group_of, minlength=len(images.groups))
    paths = arrow_binary([os.fsencode("/".join(group)) for group in images.groups])
    if empty := [group for group in images.without_images if group]:
        images.left_out["folder without a frame"] += len(empty)
    store = kind(root, paths, np.concatenate(([0], np.cumsum(counts))), pa.chunked_array(images.chunks))
    return store, [group[:-1] for group in images.groups], images.left_out


def _listed(root: Path, extensions: Sequence[str]) -> Listing:
    return made_by_first_rank(f"listing of the clips of {root}", lambda: walk(root, extensions))


def all_clips(source: str, config: ClipConfig) -> ImageSource:
    """Open all clips of a folder, or one video, read as the frames of evaluation. Raises DataError and ConfigError."""
    root = Path(source).expanduser()
    if not root.exists():
        raise DataError(f"'{source}' does not exist: give a folder of videos or of frames, or a video.")
    store, _, _ = list_clips(root, SampledClips)
    assert isinstance(store, SampledClips)
    store.config = config
    return ImageSource(store, name=source, split="train")


# ---------------------------------------------------------------------------------------------------------- frames


def frame_numbers(count: int, config: ClipConfig, view_key: int | None = None) -> list[int]:
    """Return which frames of a video a clip takes, in ascending order.

    Args:
        count: number of frames of the video.
        config: number of frames of the clip, and how they are sampled.
        view_key: the key of the view; None takes the frames of evaluation.
    """
    frames = config.frames
    draws = [0.5 if view_key is None else uniform(key(view_key, 4), number) for number in range(frames)]
    if config.sampling == "segments":  # of TSN (arXiv 1608.00859)
        return [min(int(count * (number + draws[number]) / frames), count - 1) for number in range(frames)]
    step = min(config.stride, (count - 1) / max(frames - 1, 1))
    first = int((count - step * (frames - 1)) * draws[0])
    return [min(first + round(number * step), count - 1) for number in range(frames)]


def read_video(path: Path, choose: Choice) -> Tensor:
    """Decode chosen frames of a video file: uint8 (T, 3, H, W), RGB, upright.

    The reader seeks to the key frame before a frame that is far away. Raises BadImage.
    """
    import av

    name = os.fsencode(path).decode(errors="replace")
    try:
        check_regular(path.stat(), name)
        with av.open(os.fspath(path), options=_OPTIONS) as container:
            if not container.streams.video:
                raise BadImage(name, "it holds no video")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # many processes read videos
            if stream.codec_context.width * stream.codec_context.height > max_pixels():
                raise BadImage(name, f"more than {max_pixels():,} pixels a frame")
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            count = stream.frames or _estimated_frames(container, stream, rate)
            return _stacked(name, list(_frames_at(container, stream, choose(count), count, rate)))
    except BadImage as error:
        raise BadImage(name, error.reason) from None
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError) as error:
        raise BadImage(name, getattr(error, "strerror", None) or first_line(error)) from error


def _stacked(name: str, frames: list[Tensor]) -> Tensor:
    if len({frame.shape for frame in frames}) > 1:
        raise BadImage(name, "its frames differ in size")
    return torch.stack(frames)


def _estimated_frames(container: Any, stream: Any, rate: Fraction) -> int:
    """Return the number of frames by the duration in the header, or else by that of the packets; at least 1."""
    if stream.duration is not None:
        seconds = stream.duration * stream.time_base
    elif container.duration is not None and len(container.streams) == 1:  # else it may be the duration of the sound
        seconds = Fraction(container.duration, 1_000_000)
    else:
        packets = [packet for packet in container.demux(stream) if packet.size]
        container.seek(0)
        ends = [packet.pts + (packet.duration or 0) for packet in packets if packet.pts is not None]
        seconds = (max(ends) - (stream.start_time or 0)) * stream.time_base if ends else len(packets) / rate
    return max(round(float(seconds * rate)), 1)


def _frames_at(container: Any, stream: Any, numbers: Sequence[int], count: int, rate: Fraction) -> Iterator[Tensor]:
    """Yield the frames of ascending numbers, of `count`. Raises BadImage where the video ends long before."""
    first, step = stream.start_time or 0, 1 / (rate * stream.time_base)  # in units of the time stamps
    decoded, place, shown, pixels = container.decode(stream), -1, 0, None
    for number in numbers:
        if number - place > _FORWARD:
            decoded = _decoded_from(container, stream, first + int(number * step))
            frame = next(decoded, None)
            if frame is not None and frame.pts is not None and round((frame.pts - first) / step) <= number:
                decoded = itertools.chain((frame,), decoded)
            else:  # the file has no index that helps
                decoded = _decoded_from(container, stream, first)
            place = -1
        while place < number:
            frame = next(decoded, None)
            if frame is None:
                break
            place = place + 1 if frame.pts is None else round((frame.pts - first) / step)
            shown = round((getattr(frame, "duration", 0) or 0) / step)  # a slide stands for many frames
            pixels = _pixels(frame) if place >= number else frame
        if isinstance(pixels, Tensor) and place >= number:
            yield pixels
        elif pixels is not None and number - place <= max(_MISSING * count, shown, 2):
            pixels = pixels if isinstance(pixels, Tensor) else _pixels(pixels)
            yield pixels
        else:
            raise BadImage("", f"it ends at frame {max(place, 0)} of {count}")


def _decoded_from(container: Any, stream: Any, stamp: int) -> Iterator[Any]:
    """Return the frames from the last key frame before a time stamp on."""
    with contextlib.suppress(OSError):  # some files cannot be sought in
        container.seek(stamp, stream=stream)
    return iter(container.decode(stream))


def _pixels(frame: Any) -> Tensor:
    """Return a decoded frame, uint8 (3, H, W), upright."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return pixels.rot90(int(getattr(frame, "rotation", 0)) // 90, (1, 2))


# ----------------------------------------------------------------------------------------------------------- views


def random_clip(
    clip: Callable[[Choice], Tensor], view_key: int, *, size: int, min_area: float, policy: str, config: ClipConfig
) -> dict[str, Tensor]:
    """Return a random, augmented crop of a clip, the same for all frames: {"image": uint8 (T, 3, size, size)}."""
    frames = clip(lambda count: frame_numbers(count, config, view_key))
    crop = random_crop(frames.flatten(0, 1), size, view_key, min_area=min_area, flip=config.flip)
    crops = crop.view(-1, 3, size, size)
    if policy:
        crops = torch.stack([rand_augment(frame, policy, key(view_key, 3)) for frame in crops])
    return {"image": crops}


def central_clip(
    clip: Callable[[Choice], Tensor],
    view_key: int,  # noqa: ARG001
    *,
    size: int,
    share: float = 1.0,
    config: ClipConfig,
) -> dict[str, Tensor]:
    """Return the view of a held-out clip, {"image": uint8 (T, 3, size, size)}, or (V, T, 3, size, size) of V crops."""
    return {"image": central_crops(clip(lambda count: frame_numbers(count, config)), config, size, share)}


def central_crops(frames: Tensor, config: ClipConfig, size: int, share: float = 1.0) -> Tensor:
    """Crop squares along the longer side of frames uint8 (T, 3, H, W).

    Args:
        frames: the frames.
        config: number of crops.
        size: side of the result, pixels.
        share: side of a square, as a share of the shorter side.

    Returns:
        uint8 (T, 3, size, size), or (3, T, 3, size, size): the middle, the beginning and the end of the longer side.
    """
    height, width = frames.shape[2:]
    side = max(round(min(height, width) * share), 1)
    crops = []
    for place in (0.5, 0.0, 1.0)[: config.crops]:
        top = int((height - side) * (place if height > width else 0.5))
        left = int((width - side) * (place if width >= height else 0.5))
        square = frames[..., top : top + side, left : left + side].flatten(0, 1)
        crops.append(resize(square, size, size).view(-1, 3, size, size))
    return crops[0] if config.crops == 1 else torch.stack(crops)


def read_clip(path: str | Path, config: ClipConfig, size: int, *, crop: float = 1.0) -> Tensor:
    """Read the clip of a video file, or of a folder of frames, as a classifier of clips reads it in evaluation.

    Args:
        path: the video, or the folder.
        config: which frames to read, the `clip` of a `ClipClassifier`.
        size: side of the squares, pixels.
        crop: side of the squares before they are resized, as a share of the shorter side of the video.

    Returns:
        uint8 (T, 3, size, size), or (3, T, 3, size, size) with three crops.

    Raises:
        DataError: the file is missing or no video, or the folder holds no frame.
    """
    clips = all_clips(str(path), config)
    if len(clips) > 1:
        raise DataError(f"'{path}' holds {len(clips):,} clips: give one of them.")
    try:
        return central_crops(clips.read(0), config, size, crop)
    except BadImage as error:
        raise DataError(f"'{path}' cannot be read: {error.reason}.") from None
