"""The token bank: the tokens of named views of every image, made once and read in place of running the tokenizer.

    bank/config.json              what was tokenized, by which tokenizer, how views are made
    bank/train/codes-00000.npy    uint16 (n, V, h, w): V views of n images, in the order of the source
    bank/train/skipped-00000.json where some could not be read, by number: name and reason; their codes are 0
    bank/evaluation/...           the one central view of the held-out images

A view is named by (seed, image, view number), so a bank of V views serves any training with that seed and those crops:
epoch e replays view e mod V. Shards are written whole or not at all, by any number of processes, and memory-mapped.

V views, h w latent grid, K codewords.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pecobook.data.decode import BadImage
from pecobook.errors import DataError, first_line
from pecobook.utils.files import write_atomically

MOST_CODEWORDS = 2**16
_SHARD_IMAGES = 8192
_SHARD_BYTES = 2**26

Codes = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class BankLayout:
    """How the images of one split lie in shards."""

    split: str
    """train or evaluation."""
    num_images: int
    num_views: int
    grid: tuple[int, int]

    @property
    def shard_images(self) -> int:
        """Images in each shard but the last."""
        each = 2 * self.num_views * self.grid[0] * self.grid[1]
        return max(1, min(_SHARD_IMAGES, _SHARD_BYTES // each))

    @property
    def num_shards(self) -> int:
        """Files of this split."""
        return -(-self.num_images // self.shard_images)

    def images_of(self, shard: int) -> range:
        """Numbers of the images in a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.num_images))

    def file(self, bank: Path, shard: int) -> Path:
        """Where a shard lies."""
        return bank / self.split / f"codes-{shard:05d}.npy"


def _list_of(file: Path) -> Path:
    """Where the unreadable images of a shard are listed."""
    return file.with_name(f"skipped-{file.stem.rpartition('-')[2]}.json")


def write_shard(file: Path, codes: Codes, skipped: dict[int, BadImage] | None = None) -> None:
    """Write the codes (n, V, h, w) of a shard, whole or not at all, and the numbers of its images that have none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # The list first: a shard that is there has its list too, and one that is not is made again with another.
    if skipped:
        listed = {str(number): [error.name, error.reason] for number, error in skipped.items()}
        write_atomically(_list_of(file), (json.dumps(listed, indent=1) + "\n").encode())
    else:
        _list_of(file).unlink(missing_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, codes)
    write_atomically(file, buffer.getvalue())


class TokenBank:
    """A finished bank, opened for reading. It can be pickled and forked: each process maps files when it reads them.

    Attributes:
        skipped: numbers of the training images that could not be read, in order, int64; their codes mean nothing.

    Args:
        folder: the bank.

    Raises:
        DataError: there is no bank, or it is unfinished or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_bank_config(self.folder)
        self.layouts = layouts(self.config)
        missing = list(missing_shards(self.folder, self.layouts))
        if missing:
            raise DataError(
                f"The token bank '{folder}' is unfinished: {len(missing)} of its files are missing, the first is "
                f"'{missing[0].relative_to(self.folder)}'.\nGo on with the same command and --resume."
            )
        self._skipped = {split: read_skipped(self.folder, layout) for split, layout in self.layouts.items()}
        self.skipped = np.array(sorted(self._skipped["train"]), dtype=np.int64)
        self._open: dict[Path, Codes] = {}

    @property
    def num_views(self) -> int:
        """V of the training images."""
        return self.layouts["train"].num_views

    def read(self, split: str, image: int, view: int) -> Tensor:
        """Codes of one view: int64 (h, w).

        Raises:
            BadImage: the image could not be read when the bank was made.
            DataError: its file is damaged.
        """
        if image in self._skipped[split]:
            raise self._skipped[split][image]
        shard, row = divmod(image, self.layouts[split].shard_images)
        file = self.layouts[split].file(self.folder, shard)
        if file not in self._open:
            self._open[file] = self.shard(split, shard)
        return torch.from_numpy(self._open[file][row, view].astype(np.int64))

    def shard(self, split: str, number: int) -> Codes:
        """Codes of the images of one file, mapped: uint16 (n, V, h, w). Raises DataError when it is damaged."""
        layout = self.layouts[split]
        shape = (len(layout.images_of(number)), layout.num_views, *layout.grid)
        return _map(layout.file(self.folder, number), shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def _map(file: Path, shape: tuple[int, ...]) -> Codes:
    try:
        codes: Codes = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"'{file}' of the token bank cannot be read: {first_line(error)}. Delete it and --resume."
        ) from None
    if codes.shape != shape or codes.dtype != np.uint16:
        raise DataError(f"'{file}' of the token bank holds {codes.dtype} {codes.shape}, not uint16 {shape}.")
    return codes


def layouts(config: dict[str, Any]) -> dict[str, BankLayout]:
    """The layout of each split, from a bank's config.json."""
    grid = (int(config["grid"][0]), int(config["grid"][1]))
    return {
        "train": BankLayout("train", int(config["num_images"]), int(config["views"]), grid),
        "evaluation": BankLayout("evaluation", int(config["num_evaluation_images"]), 1, grid),
    }


def missing_shards(folder: Path, splits: dict[str, BankLayout]) -> Iterator[Path]:
    """Files that are still to be written."""
    for layout in splits.values():
        there = {path.name for path in (folder / layout.split).glob("codes-*.npy")}
        files = (layout.file(folder, shard) for shard in range(layout.num_shards))
        yield from (file for file in files if file.name not in there)


def read_skipped(folder: Path, layout: BankLayout) -> dict[int, BadImage]:
    """Images of a split that could not be read, by number. Raises DataError when a list is damaged."""
    found: dict[int, BadImage] = {}
    for file in sorted((folder / layout.split).glob("skipped-*.json")):
        try:
            listed = json.loads(file.read_text())
            found |= {int(number): BadImage(name, reason) for number, (name, reason) in listed.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"'{file}' of the token bank cannot be read: {first_line(error)}.") from None
    return found


def read_bank_config(folder: Path) -> dict[str, Any]:
    """A bank's config.json. Raises DataError when there is none."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(f"'{folder}' is no token bank: make one with 'pecobook tokenize'.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"'{file}' cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("kind") != "token bank":
        raise DataError(f"'{folder}' is no token bank: make one with 'pecobook tokenize'.")
    return config


def bank_differences(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """`tokenizer: 1a2b of the bank, 3c4d now` for everything that `want` names and a bank's config has otherwise."""
    return [
        f"{name}: {have.get(name)} of the bank, {value} now" for name, value in want.items() if have.get(name) != value
    ]
