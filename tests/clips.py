"""Generated clips: a bright square moves over noise, and the class is the direction, which no single frame shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

STEPS = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}


def moving_square(
    direction: str, seed: int, *, frames: int = 8, height: int = 32, width: int = 32, speed: int = 3
) -> npt.NDArray[np.uint8]:
    """Return a clip uint8 (frames, height, width, 3); the square leaves at one border and comes back at the other."""
    random = np.random.default_rng(seed)
    row, column = random.integers(height), random.integers(width)
    clip = random.integers(0, 90, (frames, height, width, 3), dtype=np.uint8)
    for number, frame in enumerate(clip):
        down, right = (step * speed * number for step in STEPS[direction])
        rows = np.arange(row + down, row + down + height // 3) % height
        columns = np.arange(column + right, column + right + width // 3) % width
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
    """Write `train` and `held_out` clips of each direction; with `shuffled` the frames are in a random order."""
    for split, count in (("train", train), ("val", held_out)):
        for label, direction in enumerate(STEPS):
            for number in range(count):
                seed = 1000 * (split == "val") + 100 * label + number
                clip = moving_square(direction, seed)
                if shuffled:
                    clip = clip[np.random.default_rng(seed).permutation(len(clip))]
                place = root / split / direction / f"clip{number}"
                if video:
                    write_video(place.with_suffix(".mp4"), clip)
                else:
                    write_frames(place, clip)
    return root
