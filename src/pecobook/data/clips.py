"""Clips for `--clip.frames`: a folder whose items are videos, or folders of frames, with the usual splits and classes.

    train/CLASS/x.mp4         videos, which PyAV decodes (the extra `video`); only the needed part of a file is decoded
    train/CLASS/x/00001.jpg   a folder of frames for each clip, in the order of the numbers in their names

The choice of frames and their crop are a pure function of the view's key, as for images. All frames of a clip share the
crop, the flip and the operations of RandAugment.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pecobook.data.decode import BadImage, decode, read_file
from pecobook.data.deep import ValueRange
from pecobook.data.folders import FileStore, Listing, walk
from pecobook.data.images import check_labels
from pecobook.data.layout import Folder, count_unused, parts_of, read_layout
from pecobook.data.mapped import mapped
from pecobook.data.names import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from pecobook.data.parts import Contents, assemble
from pecobook.data.sampler import key, uniform
from pecobook.data.source import ImageSource, Integers, Splits, arrow_binary
from pecobook.data.videos import Choice, read_video, stacked
from pecobook.data.views import rand_augment, random_crop
from pecobook.errors import DataError
from pecobook.settings.images import AUTO, ClipConfig, RangeSetting
from pecobook.utils.distributed import made_by_first_rank
from pecobook.utils.extras import require
from pecobook.utils.images import resize

_FEWEST_FRAMES = 4
"""Minimum number of numbered images in a folder that may be the frames of a video."""
_LOOKED_AT = 16
"""Number of classes of which two folders each are checked for frames."""


class ClipStore(FileStore):
    """Clips under one folder: video files, or folders of frames.

    Args:
        root: the folder.
        paths: relative paths of the clips, in an Arrow column.
        starts: index of each clip's first frame in `frames`, and the total number of frames; None for videos.
        frames: relative paths of all frames, in an Arrow column; None for videos.
        config: which frames `read` returns; with None it returns the middle one, as an image.
    """

    unit = "clips"

    def __init__(
        self,
        root: Path,
        paths: Any,
        starts: Integers | None = None,
        frames: Any = None,
        config: ClipConfig | None = None,
    ) -> None:
        super().__init__(root, paths)
        self._starts = None if starts is None else mapped(starts)
        self._frames: Any = None if frames is None else mapped(frames)
        self._config = config

    def frames(self, row: int) -> list[bytes] | None:
        """Return the paths of a clip's frames, in the order of their numbers; None for a video."""
        if self._starts is None:
            return None
        return sorted((self._prefix + path for path in self._frames_of(row)), key=_numbered)

    def _frames_of(self, row: int) -> list[bytes]:
        assert self._starts is not None
        paths: list[bytes] = self._frames[int(self._starts[row]) : int(self._starts[row + 1])].to_pylist()
        return paths

    def file(self, row: int) -> Any:
        """Return the path of the middle frame of a folder of frames; None for a video, which is not an image file."""
        frames = self.frames(row)
        return None if frames is None else Path(os.fsdecode(frames[len(frames) // 2]))

    def read(self, row: int, shortest: int = 0) -> Tensor:
        """Read the evaluation frames, uint8 (T, 3, H, W), or without `config` the middle frame (3, H, W).

        Raises:
            BadImage: a frame cannot be read; without `config` also the first or the last one.
        """
        clip, config = self.clip(row, shortest), self._config
        if config is not None:
            return clip(lambda count: frame_numbers(count, config))
        return clip(lambda count: [0, count // 2, count - 1])[1]

    def sample(self, row: int, shortest: int = 0) -> tuple[Any, ...]:
        """Return the reader of a clip, from which a view reads the frames that it chooses."""
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
                    read_file(path), name=path.decode(errors="replace"), value_range=self.value_range, shortest=shortest
                )
                for path in dict.fromkeys(chosen)
            }
            return stacked(name, [decoded[path] for path in chosen])

        return read

    def identify(self, row: int) -> str:
        """Return the path of the video, or of the folder of frames."""
        path = (self._prefix + self._paths[row].as_py()).rstrip(b"/") or b"."
        return str(path.decode(errors="replace"))

    def _names(self, rows: Integers) -> Iterator[list[bytes]]:
        return super()._names(rows) if self._starts is None else map(self._frames_of, rows.tolist())


def _numbered(name: bytes) -> list[tuple[bytes, int]]:
    """Return a sort key that orders names by their numbers."""
    return [(text, int(number or 0)) for text, number in re.findall(rb"(\D*)(\d*)", name)]


# --------------------------------------------------------------------------------------------------------- opening


def open_clips(data: str) -> Splits:
    """Open a folder of videos or of folders of frames; splits and classes are found as for images.

    Raises:
        DataError: there is no such folder, it contains no clip, or its clips have no classes.
        ConfigError: it contains videos, and PyAV is not installed.
    """
    root = Path(data).expanduser()
    if not data or not root.is_dir():
        raise DataError(f"--data '{data}' is no folder: --clip.frames reads a folder of videos or of frames.")
    store, groups, left_out = find_clips(root)
    layout = read_layout(data, groups)
    folder_of = np.arange(len(groups))
    parts = parts_of(layout, store, folder_of)
    splits = assemble(data, Contents(parts, dict(left_out + count_unused(layout, folder_of)), layout.notes))
    if splits.train.labels is None and not splits.train.unlabelled and store.frames(0) is not None:
        raise DataError(
            f"--data '{data}': its {len(store):,} folders of images are taken for clips, without classes. "
            "Clips are videos or folders of frames: CLASS/clip.mp4 or CLASS/clip/0001.jpg."
        )
    check_labels(splits, data)
    return splits


def find_clips(root: Path, config: ClipConfig | None = None) -> tuple[ClipStore, list[Folder], Any]:
    """List the clips of a folder: videos, or folders of images if there are more of these.

    Args:
        root: the folder, or a video.
        config: see `ClipStore`.

    Returns:
        the clips, the folder of each as names from the top downwards, and why other files are not used.

    Raises:
        DataError: there is no clip.
        ConfigError: there are videos, and PyAV is not installed.
    """
    import pyarrow as pa

    if root.is_file():
        require("video", f"The video '{root}'")
        return ClipStore(root.parent, arrow_binary([os.fsencode(root.name)]), config=config), [()], {}
    videos = _listed(root, VIDEO_EXTENSIONS)
    others = not videos.chunks or any(f"extension .{name}" in videos.left_out for name in IMAGE_EXTENSIONS)
    images = _listed(root, IMAGE_EXTENSIONS) if others else Listing()
    if len(videos.group_of) >= max(len(images.groups), 1):
        require("video", f"'{root}', a folder of videos,")
        groups = [videos.groups[number] for number in videos.group_of]
        return ClipStore(root, pa.chunked_array(videos.chunks), config=config), groups, videos.left_out
    if not images.chunks:
        raise DataError(
            f"--data '{root}': neither this folder nor its subfolders hold a clip, which is a video "
            f"({', '.join(VIDEO_EXTENSIONS)}) or a folder of frames."
        )
    counts = np.bincount(images.group_of, minlength=len(images.groups))
    paths = arrow_binary([os.fsencode("/".join(group)) for group in images.groups])
    empty = Counter({"folder without a frame": sum(map(bool, images.without_images))})
    starts = np.concatenate(([0], np.cumsum(counts)))
    store = ClipStore(root, paths, starts, pa.chunked_array(images.chunks), config)
    return store, [group[:-1] for group in images.groups], images.left_out + empty


def _listed(root: Path, extensions: Sequence[str]) -> Listing:
    return made_by_first_rank(f"listing of {root}: {extensions[0]}", lambda: walk(root, extensions))


def clips_of(source: str, config: ClipConfig) -> ImageSource:
    """Open all clips of a folder, or one video, read as in evaluation. Raises DataError and ConfigError."""
    root = Path(source).expanduser()
    if not root.exists():
        raise DataError(f"'{source}' does not exist: give a folder of videos or of frames, or a video.")
    try:
        store, _, left_out = find_clips(root, config)
    except DataError as error:
        raise DataError(str(error).removeprefix("--data ")) from None
    return ImageSource(store, name=source, split="train", left_out=left_out)


def notes_on_frames(images: ImageSource) -> tuple[str, ...]:
    """Return a note if the images of every class lie in folders of numbered images, as the frames of videos do.

    The names in two folders of a class are compared, for some of the classes; otherwise at most one folder is listed.
    """
    if images.labels is None:
        return ()
    example = ""
    for label in np.unique(images.labels)[:_LOOKED_AT].tolist():
        numbers = np.flatnonzero(images.labels == label)[[0, -1]].tolist()
        try:
            files = [images.file(number) for number in numbers]
        except BadImage:  # in a table or a shard
            return ()
        folders = {file.parent for file in files if isinstance(file, Path)}
        if len(folders) < 2 or not all(map(_holds_frames, folders)):
            return ()
        example = example or str(min(folders))
    return (
        f"Each class has folders of numbered images, such as '{example}', and each image is learned by itself; if they "
        "are the frames of videos, --clip.frames 8 reads each folder as a clip.",
    )


def _holds_frames(folder: Path) -> bool:
    """Return whether a folder has no subfolders, and its images share one name with all numbers from 0 or 1 on."""
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    matches = [match for name in names if (match := re.fullmatch(r"(.*?)([0-9]+)\.(\w+)", name))]
    if not len(names) == len(matches) >= _FEWEST_FRAMES or len({(match[1], match[3]) for match in matches}) > 1:
        return False
    numbers = sorted(int(match[2]) for match in matches)
    return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


# ---------------------------------------------------------------------------------------------------------- frames


def frame_numbers(count: int, config: ClipConfig, view_key: int | None = None) -> list[int]:
    """Return which frames of a video a clip takes, in ascending order.

    Args:
        count: number of frames of the video.
        config: number of frames in the clip, and how they are sampled.
        view_key: the key of the view; None chooses the frames for evaluation.
    """
    frames = config.frames
    draws = [0.5 if view_key is None else uniform(key(view_key, 4), number) for number in range(frames)]
    if config.sampling == "segments":  # of TSN (arXiv 1608.00859)
        return [min(int(count * (number + draws[number]) / frames), count - 1) for number in range(frames)]
    step = min(config.stride, (count - 1) / max(frames - 1, 1))
    first = int((count - step * (frames - 1)) * draws[0])
    return [min(first + round(number * step), count - 1) for number in range(frames)]


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
        size: side of the result, in pixels.
        share: side of a square, as a fraction of the shorter side.

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


def read_clip(
    path: str | Path, config: ClipConfig, size: int, *, crop: float = 1.0, value_range: RangeSetting = AUTO
) -> Tensor:
    """Read a video file, or a folder of frames, as a video classifier reads it in evaluation.

    Args:
        path: the video, or the folder.
        config: which frames to read; the `clip` of a `ClipClassifier`.
        size: side of the squares, in pixels.
        crop: side of the squares before resizing, as a fraction of the video's shorter side.
        value_range: the values mapped to black and white in frames with more than 8 bits; a network's `value_range`.

    Returns:
        uint8 (T, 3, size, size), or (3, T, 3, size, size) with three crops.

    Raises:
        DataError: the file is missing or not a video, or the folder contains no frame.
    """
    clips = clips_of(str(path), config)
    if len(clips) > 1:
        raise DataError(f"'{path}' holds {len(clips):,} clips: give one of them.")
    clips.use_range(None if value_range == AUTO else ValueRange(*map(float, value_range)))
    try:
        return central_crops(clips.read(0), config, size, crop)
    except BadImage as error:
        raise DataError(f"'{path}' cannot be read: {error.reason}.") from None
