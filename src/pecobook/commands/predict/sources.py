"""Opens the inputs of `predict`: images from any source, or clips."""

from __future__ import annotations

import os
from pathlib import Path

from pecobook.data.clips import clips_of
from pecobook.data.folders import FileStore, walk
from pecobook.data.images import open_all_splits, say_left_out
from pecobook.data.names import IMAGE_EXTENSIONS
from pecobook.data.source import ImageSource
from pecobook.errors import DataError
from pecobook.settings.images import ClipConfig

Sources = list[tuple[ImageSource, str]]
"""Sources, each with the prefix of its image names that is to be removed."""


def list_images(source: str) -> Sources:
    """Open all images of a file, a folder or another source, of every split.

    Raises:
        DataError: the source does not exist or contains no image.
    """
    import pyarrow as pa

    path = Path(source).expanduser()
    if path.is_dir():
        tree = walk(path)
        if tree.chunks:
            say_left_out(source, tree.left_out)
            store = FileStore(path, pa.chunked_array(tree.chunks))
            return [(ImageSource(store, name=source, split="train"), f"{path}/")]
    elif path.is_file() and path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
        store = FileStore(path.parent, pa.array([os.fsencode(path.name)]))
        return [(ImageSource(store, name=source, split="train"), f"{path.parent}/")]
    try:
        splits = open_all_splits(source)
    except DataError as error:
        raise DataError(str(error).replace("--data '", "'")) from None
    if not splits:
        raise DataError(f"'{source}' holds no image.")
    return [(split, "") for split in splits]


def list_clips(source: str, config: ClipConfig) -> Sources:
    """Open all clips of a folder, or one video or folder of frames, as `list_images` opens images."""
    clips = clips_of(source, config)
    say_left_out(source, clips.left_out)
    top = Path(source).expanduser()
    is_one = clips.identify(0) == os.fsencode(top).decode(errors="replace")
    return [(clips, f"{top.parent if is_one else top}/")]
