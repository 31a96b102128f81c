"""Settings of `pecobook tokenize`, which writes a token bank."""

from __future__ import annotations

import re
from typing import Any

from pecobook.errors import ConfigError
from pecobook.settings.images import MAX_BATCH, MAX_IMAGE_SIZE, MAX_WORKERS, ImagesConfig, PhotometricConfig
from pecobook.settings.training import Precision, check_devices
from pecobook.settings.values import LARGEST, Resume, between, positive, refuse, settings_class

VIEW_SETTINGS = ("seed", "image_size", "tokenizer_size", "min_crop", "colour")
"""Settings of a bank's views that pre-training has too."""


@settings_class
class TokenizeConfig(ImagesConfig):
    """Tokenize numbered views of your images once, for any number of pre-training runs."""

    tokenizer: str = ""
    """The tokenizer: a codebook run, owner/name on the Hugging Face hub, dalle:FOLDER, diffusers:FOLDER, taming:FILE,
    llamagen:FILE or fourm:FILE."""
    out: str = ""
    """Folder to write the token bank to. It must be new or empty, unless --resume or --overwrite is given."""
    views: int = 1
    """Number of views of every image. Epoch e of pre-training replays view e modulo this number."""
    seed: int = 0
    """Seed of the crops and the colour augmentation. Pre-training must use the same seed."""
    image_size: int = 224
    """Side of the crops that the ViT will see, in pixels."""
    tokenizer_size: int = 0
    """Side to which crops are resized for the tokenizer, in pixels. 0 keeps their size."""
    min_crop: float = 0.2
    """Smallest share of an image's area that a random crop takes."""
    colour: PhotometricConfig = PhotometricConfig()
    """Colour augmentation of the crops."""
    batch_size: int = 256
    """Number of views that a device encodes at once."""
    workers: int = -1
    """Number of data-loading processes per device. -1 chooses it from the number of cores."""
    devices: str = "auto"
    """Number of devices per machine, or auto for every GPU. On a machine without a GPU, auto is one process."""
    num_nodes: int = 1
    """Number of machines."""
    precision: Precision = "auto"
    """Autocast precision of the tokenizer: fp32, bf16 or fp16. auto is bf16 on hardware where it is faster, otherwise
    fp32. With the precision of pre-training, the tokens are exactly those that pre-training would compute."""
    shard: str = ""
    """Write part I of N of the bank, given as I/N with I from 1 to N, while other processes, such as the tasks of a job
    array, write the other parts. The first one starts the bank, and the last to finish reports it."""
    resume: Resume = False
    """Resume an unfinished token bank. `--resume auto` starts a bank if there is none."""
    overwrite: bool = False
    """Delete the contents of --out first."""
    verify_data: bool = False
    """Read all files of --data at the start, record their content, and compare it when the bank is resumed."""
    accept_data_change: bool = False
    """Continue even if files of --data were changed in place since the bank was started. Tokens already written stay as
    they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "views", "min_crop", "num_nodes")
        positive(self, "image_size", most=MAX_IMAGE_SIZE)
        positive(self, "batch_size", most=MAX_BATCH)
        between(self, 0.0, 1.0, "min_crop")
        check_devices(self)
        between(self, 0, LARGEST, "seed")
        between(self, 0, MAX_IMAGE_SIZE, "tokenizer_size")
        between(self, -1, MAX_WORKERS, "workers")
        check_shard(self)
        if self.shard and (self.devices != "auto" or self.num_nodes != 1):
            raise ConfigError("--shard is for single processes: leave --devices and --num-nodes out.")
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other: give one of them.")

    @property
    def part(self) -> tuple[int, int]:
        """The part that this process writes, counted from 0, and the number of parts."""
        return part_of(self.shard)

    @property
    def strategy(self) -> str:
        """Strategy that `engine.launch` reads; nothing is trained here, so every process holds the whole tokenizer."""
        return "auto"


def check_shard(config: Any) -> None:
    """Refuse a `shard` that is not I/N, or that is combined with `overwrite`."""
    if not config.shard:
        return
    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", config.shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        refuse("shard", f"is I/N with I from 1 to N, as 3/8, not '{config.shard}'.")
    if config.overwrite:
        raise ConfigError("--shard and --overwrite exclude each other: processes would delete each other's files.")


def part_of(shard: str) -> tuple[int, int]:
    """Return the part that `shard` (I/N, or empty for all) names, counted from 0, and the number of parts."""
    index, _, count = (shard or "1/1").partition("/")
    return int(index) - 1, int(count)
