"""The token bank: precomputed tokens of views of every image, read instead of running the tokenizer.

    bank/config.json              the source, the tokenizer, and the settings of the views
    bank/train/codes-00000.npy    uint16 (n, V, h, w): V views of n images, in the order of the source; uint32 if the
                                  tokenizer has more than 65,536 codewords
    bank/train/skipped-00000.json if some images could not be read: number -> name and reason; the codes of these are 0
    bank/evaluation/...           the central view of each held-out image

Each shard is stored with its checksum, which is verified when the bank is opened.

(seed, image, view number) identifies a view, so a bank of V views serves any training run with the same seed and crop
settings: epoch e uses view e mod V. Any number of processes can write shards; each shard is written atomically and read
through memory mapping.

V views, h x w latent grid, K codewords.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pecobook.data.decode import BadImage
from pecobook.errors import DataError, loading_reason
from pecobook.settings.images import PhotometricConfig
from pecobook.utils.checksums import SKIP_VARIABLE, checksum_file, checksums_skipped, damage, write_with_checksum
from pecobook.utils.files import write_atomically
from pecobook.utils.json_files import ANY, COUNT, NUMBER, TEXT, WHOLE, Kind, Schema, list_of, read_json
from pecobook.utils.printer import say, show

MAX_CODEWORDS = 2**32
_LARGE_CODEBOOK = 2**16  # number of codewords above which codes are uint32
SHARD_IMAGES = 8192
_SHARD_BYTES = 2**26
_LARGE = 256  # MiB

_AGAIN = "Make a token bank with 'pecobook tokenize'."
_REASON = list_of(TEXT, 2)
BANK: Schema = {
    "kind": Kind('"token bank"', lambda value: value == "token bank"),
    "tokenizer": TEXT,
    "grid": list_of(WHOLE, 2),
    "data": ANY,
    "evaluation_data": ANY,
    "views": WHOLE,
    "num_images": WHOLE,
    "num_evaluation_images": WHOLE,
    # the fields of `NamedViews`
    "seed": COUNT,
    "image_size": WHOLE,
    "tokenizer_size": WHOLE,
    "min_crop": NUMBER,
    "colour": {field.name: NUMBER.or_none for field in dataclasses.fields(PhotometricConfig)},
    "code_type": Kind("uint16 or uint32", lambda value: value in ("uint16", "uint32"), optional=True),
}
"""The fields of a bank's config.json."""

OF_IMAGES = ("data", "evaluation_data", "num_images", "num_evaluation_images")
"""The entries of a bank's config.json that describe the images."""

Codes: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


def code_type(num_codewords: int) -> dict[str, str]:
    """Return the entry of a bank's config.json for the type of its codes; none for uint16, which is usual."""
    return {"code_type": "uint32"} if num_codewords > _LARGE_CODEBOOK else {}


@dataclass(frozen=True)
class BankLayout:
    """The distribution of the images of one split over shards."""

    split: str
    """"train" or "evaluation"."""
    num_images: int
    num_views: int
    grid: tuple[int, int]
    code_type: str = "uint16"

    @property
    def shard_images(self) -> int:
        """Number of images in each shard except the last."""
        bytes_per_image = np.dtype(self.code_type).itemsize * self.num_views * self.grid[0] * self.grid[1]
        return max(1, min(SHARD_IMAGES, _SHARD_BYTES // bytes_per_image))

    @property
    def num_shards(self) -> int:
        """Number of shards of the split."""
        return -(-self.num_images // self.shard_images)

    def images_of(self, shard: int) -> range:
        """Return the numbers of the images in a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.num_images))

    def file(self, bank: Path, shard: int) -> Path:
        """Return the path of a shard."""
        return bank / self.split / f"codes-{shard:05d}.npy"


def _skipped_file(file: Path) -> Path:
    """Return the path of the file that lists the unreadable images of a shard."""
    return file.with_name(f"skipped-{file.stem.rpartition('-')[2]}.json")


def write_shard(file: Path, codes: Codes, skipped: dict[int, BadImage] | None = None) -> None:
    """Write the codes of a shard atomically, together with the list of images that could not be read.

    Args:
        file: the path of the shard.
        codes: (n, V, h, w), with the bank's type.
        skipped: the error of each unreadable image, by the image's number.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # The list is written first, so that every existing shard has its list; a missing shard is made again with its list.
    if skipped:
        reasons = {str(number): [error.name, error.reason] for number, error in skipped.items()}
        write_atomically(_skipped_file(file), (json.dumps(reasons, indent=1) + "\n").encode())
    else:
        _skipped_file(file).unlink(missing_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, codes)
    write_with_checksum(file, buffer.getvalue())


class TokenBank:
    """A finished bank, open for reading.

    A bank can be pickled and forked: each process maps a file when it first reads from it.

    Attributes:
        skipped: numbers of the training images that could not be read, in ascending order, int64; their codes are
            meaningless.

    Args:
        folder: the folder of the bank.
        num_codewords: K of the bank's tokenizer; a code of K or above is refused.
        verify: whether to read all shards and compare them with their checksums, which one process per machine does for
            all.

    Raises:
        DataError: the folder contains no bank, the bank is unfinished, or a shard does not match its checksum.
    """

    def __init__(self, folder: str | Path, num_codewords: int = MAX_CODEWORDS, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.config = read_bank_config(self.folder)
        self.layouts = bank_layouts(self.config)
        missing = next(missing_shards(self.folder, self.layouts), None)
        if missing is not None:  # counted without a list, since a damaged config.json may name any number of images
            total = sum(layout.num_shards for layout in self.layouts.values())
            count = max(total - len(list(self.folder.glob("*/codes-*.npy"))), 1)
            raise DataError(
                f"The token bank '{folder}' is unfinished: {count} of its files are missing; the first is "
                f"'{missing.relative_to(self.folder)}'.\nContinue with the same command and --resume."
            )
        self._skipped = {split: read_skipped(self.folder, layout) for split, layout in self.layouts.items()}
        self.skipped = np.array(sorted(self._skipped["train"]), dtype=np.int64)
        self._num_codewords = num_codewords
        self._open: dict[Path, Codes] = {}
        if verify and not checksums_skipped():
            self._verify()

    def _verify(self) -> None:
        """Compare all shards with their checksums, and say how long that took."""
        files, began = list(shard_files(self.folder, self.layouts)), time.monotonic()
        size = sum(file.stat().st_size for file in files) / 2**20
        if size > _LARGE:
            show(f"verifying the token bank '{self.folder}', {size:,.0f} MiB ({SKIP_VARIABLE}=1 skips this)")
        if sentence := damage(files):
            raise DataError(
                f"{sentence}\nDelete that file and continue with the command that made the bank and --resume."
            )
        # A checksum shows that a shard is what a tokenizer wrote; one without may hold any codes.
        for layout in self.layouts.values():
            for number in range(layout.num_shards):
                codes = self.shard(layout.split, number)  # a shard of another bank differs in shape
                if not checksum_file(layout.file(self.folder, number)).exists():
                    self._check_codes(layout.file(self.folder, number), int(codes.max()))
        say(f"token bank '{self.folder}': {size:,.0f} MiB verified in {time.monotonic() - began:.1f} s")

    def _check_codes(self, file: Path, highest: int) -> None:
        if highest >= self._num_codewords:
            raise DataError(
                f"'{file}' of the token bank holds the code {highest}, but its tokenizer has {self._num_codewords} "
                "codewords: the bank is damaged, or was not made by pecobook. Make it again with 'pecobook tokenize'."
            )

    @property
    def num_views(self) -> int:
        """V, the number of views of each training image."""
        return self.layouts["train"].num_views

    def read(self, split: str, image: int, view: int) -> Tensor:
        """Read the codes of one view: int64 (h, w).

        Raises:
            BadImage: the image could not be read when the bank was made.
            DataError: the shard of the image is damaged.
        """
        if image in self._skipped[split]:
            raise self._skipped[split][image]
        shard, row = divmod(image, self.layouts[split].shard_images)
        file = self.layouts[split].file(self.folder, shard)
        if file not in self._open:
            self._open[file] = self.shard(split, shard)
        codes = self._open[file][row, view].astype(np.int64)
        self._check_codes(file, int(codes.max()))
        return torch.from_numpy(codes)

    def shard(self, split: str, number: int) -> Codes:
        """Map the codes of one shard into memory: (n, V, h, w), in the bank's type. Raises DataError."""
        layout = self.layouts[split]
        shape = (len(layout.images_of(number)), layout.num_views, *layout.grid)
        return _map(layout.file(self.folder, number), shape, layout.code_type)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def _map(file: Path, shape: tuple[int, ...], code_type: str) -> Codes:
    try:
        codes: Codes = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"'{file}' of the token bank cannot be read: {loading_reason(error)}. "
            "Delete the file and continue with --resume."
        ) from None
    if codes.shape != shape or codes.dtype != code_type:
        raise DataError(
            f"'{file}' of the token bank holds {codes.dtype} {codes.shape}, not {code_type} {shape}. "
            "Delete the file and continue with --resume."
        )
    return codes


def bank_layouts(config: dict[str, Any]) -> dict[str, BankLayout]:
    """Return the layout of each split from the content of a bank's config.json."""
    grid, kind = (config["grid"][0], config["grid"][1]), config.get("code_type") or "uint16"
    return {
        "train": BankLayout("train", config["num_images"], config["views"], grid, kind),
        "evaluation": BankLayout("evaluation", config["num_evaluation_images"], 1, grid, kind),
    }


def shard_files(folder: Path, splits: dict[str, BankLayout]) -> Iterator[Path]:
    """Yield the paths of all shards of a bank."""
    for layout in splits.values():
        yield from (layout.file(folder, shard) for shard in range(layout.num_shards))


def missing_shards(folder: Path, splits: dict[str, BankLayout]) -> Iterator[Path]:
    """Yield the paths of the shards that are still to be written."""
    for layout in splits.values():
        existing = {path.name for path in (folder / layout.split).glob("codes-*.npy")}
        yield from (file for file in shard_files(folder, {layout.split: layout}) if file.name not in existing)


def read_skipped(folder: Path, layout: BankLayout) -> dict[int, BadImage]:
    """Read the errors of a split's unreadable images, by image number. Raises DataError if a list is damaged."""
    skipped: dict[int, BadImage] = {}
    for file in sorted((folder / layout.split).glob("skipped-*.json")):
        reasons = read_json(file, error=DataError, remedy=_AGAIN)
        if not all(number.isdecimal() and _REASON.holds(reason) for number, reason in reasons.items()):
            raise DataError(f"'{file}' does not hold the name and the reason of each skipped image. {_AGAIN}")
        skipped |= {int(number): BadImage(name, reason) for number, (name, reason) in reasons.items()}
    return skipped


def read_bank_config(folder: Path) -> dict[str, Any]:
    """Read a bank's config.json. Raises DataError if the folder contains no token bank, or the file is damaged."""
    if sentence := damage([folder / "config.json"]):
        raise DataError(f"{sentence}\n{_AGAIN}")
    try:
        return read_json(folder / "config.json", BANK, error=DataError, remedy=_AGAIN)
    except FileNotFoundError:
        raise DataError(f"'{folder}' is not a token bank. {_AGAIN}") from None


def bank_differences(bank_config: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """List the settings in `current` that differ from the bank's, as `tokenizer: 1a2b of the bank, 3c4d now`."""
    return [
        f"{name}: {bank_config.get(name)} of the bank, {value} now"
        for name, value in current.items()
        if bank_config.get(name) != value
    ]
