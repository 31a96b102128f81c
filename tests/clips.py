"""Generated clips: a square grows or shrinks over noise, and the class is the direction, which no one frame shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

CLASSES = ("approaching", "receding")


def moving_square(
    label: int, seed: int, *, frames: int = 4, height: int = 16, width: int = 16
) -> npt.NDArray[np.uint8]:
    """Return a clip uint8 (frames, height, width, 3); all frames of a clip of one class occur in the other as well."""
    random = np.random.default_rng(seed)
    row, column = random.integers(height), random.integers(width)
    clip = random.integers(0, 90, (frames, height, width, 3), dtype=np.uint8)
    for number, frame in enumerate(clip[:: -1 if label else 1]):
        side = 2 + number * (min(height, width) - 2) // max(frames - 1, 1)
        rows, columns = (
            np.arange(place - side // 2, place - side // 2 + side) % size
            for place, size in ((row, height), (column, width))
        )
        frame[np.ix_(rows, columns)] = 255
    return clip


def write_frames(folder: Path, clip: npt.NDArray[np.uint8]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{number}.png", compress_level=1)


def write_video(file: Path, clip: npt.NDArray[np.uint8], *, codec: str = "mpeg4", gop: int = 12) -> None:
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
        stream.bit_rate, stream.gop_size = 4_000_000, gop
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_moving(
    root: Path, *, train: int = 12, held_out: int = 4, video: bool = False, shuffled: bool = False
) -> Path:
    """Write `train` and `held_out` clips of each class; with `shuffled` the frames are in a random order."""
    for split, count in (("train", train), ("val", held_out)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                seed = 1000 * (split == "val") + 100 * label + number
                clip = moving_square(label, seed)
                if shuffled:
                    clip = clip[np.random.default_rng(seed).permutation(len(clip))]
                place = root / split / name / f"clip{number}"
                if video:
                    write_video(place.with_suffix(".mp4"), clip)
                else:
                    write_frames(place, clip)
    return root
