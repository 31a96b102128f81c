"""Small runs of every stage, a second or two each, through the same functions as the command line."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from pecobook import api
from pecobook.data.decode import BadImage
from pecobook.data.source import ImageSource, Store
from tests.coco import make_coco
from tests.shapes import write_shapes

_COMMON: dict[str, Any] = {
    "batch_size": 8,
    "max_steps": "8",
    "log_every": 1,
    "save_every": 100,
    "sample_every": 100,
    "workers": 0,
    "loggers": (),
    "precision": "fp32",
    "micro_batch_size": 0,
}

# Changes to the `tiny` recipe of each command, which give networks of a few thousand weights.
SMALL: dict[str, dict[str, Any]] = {
    "contrast": {
        **_COMMON,
        "model.args": '{"channels": [8, 16, 32, 64], "stem_width": 8}',
        "hidden_dim": 32,
        "output_dim": 16,
        "blur": (1.0, 0.1),
    },
    "codebook": {
        **_COMMON,
        "image_size": 16,
        "model.channels": (8, 16, 16),
        "model.latent_dim": 8,
        "quantizer.num_codewords": 24,
        "quantizer.revive_after": 3,
        "quantizer.start_after": 2,  # so that eight steps include unquantised and quantised steps
    },
    "pretrain": {
        **_COMMON,
        "image_size": 16,
        "model.args": '{"patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2, "init_values": 0.1}',
        "drop_path": 0.1,
    },
    "finetune": {**_COMMON, "image_size": 16, "drop_path": 0.1, "cutmix": 1.0, "random_erasing": 0.25},
    "segment": {**_COMMON, "image_size": 24, "drop_path": 0.1, "head_width": 8, "auxiliary_width": 8},
    "detect": {
        **_COMMON,
        "batch_size": 4,
        "image_size": 48,
        "scales": (40,),
        "max_size": 48,
        "drop_path": 0.1,
        "detector": {"width": 16, "head_width": 32, "proposals": 60, "samples": 32, "detections": 10},
    },
}


def small_flags(command: str, **more: Any) -> list[str]:
    """Return the flags of `SMALL`, with changes."""
    words: list[str] = []
    settings = {**SMALL[command], **more}
    groups = {name: value for name, value in settings.items() if isinstance(value, dict)}
    settings |= {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    for name, value in settings.items():
        if name in groups:
            continue
        words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def train(command: str, data: Path | str, out: Path, /, **more: Any) -> Path:
    """Train a small stage in this process; return the run folder. A setting with a dot is `**{"optim.lr": 1}`."""
    settings = {**SMALL[command], "data": str(data), "out": str(out), **more}
    with contextlib.redirect_stderr(io.StringIO()):
        run: Path = getattr(api, command)("tiny", **settings)
    return run


def export_bytes(run: Path) -> dict[str, bytes]:
    """Return the content of every file of the export by name."""
    return {path.name: path.read_bytes() for path in sorted((run / "export").iterdir())}


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Return the training loss of every logged step."""
    return [line["loss"] for line in logged(run) if "loss" in line]


def without_norm(widths: list[int], *, final_norm: bool) -> nn.Sequential:
    """Replace `models.contrastive.mlp`, whose BatchNorm depends on the images that a device holds at once."""
    return nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in itertools.pairwise(widths)))


@pytest.fixture(scope="session")
def codebook_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `codebook`, 16-pixel images in 4 x 4 tokens."""
    return train("codebook", images, tmp_path_factory.mktemp("codebook"))


@pytest.fixture(scope="session")
def vit_run(images: Path, codebook_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `pretrain`."""
    return train("pretrain", images, tmp_path_factory.mktemp("vit"), tokenizer=str(codebook_run))


def inputs(command: str, codebook: Path, vit: Path) -> dict[str, str]:
    """Return the settings that a command needs in addition to images, or instead of them."""
    needs = {
        "pretrain": lambda: {"tokenizer": str(codebook)},
        "finetune": lambda: {"backbone": str(vit)},
        "segment": lambda: {"backbone": str(vit), "data": str(shapes())},
        "detect": lambda: {"backbone": str(vit), "data": str(objects())},
    }
    return needs[command]() if command in needs else {}


@pytest.fixture
def needs(command: str, codebook_run: Path, vit_run: Path) -> dict[str, str]:
    """What the `command` of a parametrized test needs in addition to images, or instead of them."""
    return inputs(command, codebook_run, vit_run)


@functools.cache
def shapes() -> Path:
    """Return a folder of images with masks, written once for all tests."""
    return write_shapes(Path(os.environ["PECOBOOK_CACHE"]).parent / "shapes")


@functools.cache
def objects() -> Path:
    """Return a folder in COCO's format, written once for all tests."""
    return make_coco(Path(os.environ["PECOBOOK_CACHE"]).parent / "objects")


class Squares(Store):
    """A store of 8 x 8 images of one colour each; some images cannot be read."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def read(self, row: int, shortest: int = 0) -> Tensor:  # noqa: ARG002
        if row in self.bad:
            raise BadImage(self.identify(row), "truncated")
        generator = torch.Generator().manual_seed(row)
        return torch.randint(256, (3, 1, 1), dtype=torch.uint8, generator=generator).expand(3, 8, 8).contiguous()

    def identify(self, row: int) -> str:
        return f"square {row}"

    def digest(self, rows: npt.NDArray[np.int64]) -> str:
        return rows.tobytes().hex()


def squares(count: int, bad: tuple[int, ...] = ()) -> ImageSource:
    """Return a source of `Squares` with two classes."""
    labels = np.arange(count, dtype=np.int64) % 2
    return ImageSource(Squares(count, bad), name="squares", split="train", classes=("even", "odd"), labels=labels)
