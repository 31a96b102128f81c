"""What the campaign works on: images, masks and objects, and small runs of every stage."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests.campaign.process import run
from tests.coco import make_coco
from tests.runs import small_flags
from tests.shapes import write_shapes

LENGTH = {"max_steps": "5", "save_every": 2, "sample_every": 2, "loggers": ("tensorboard",)}
"""Steps, checkpoints, evaluations and logs of a run, so that kills fall between all of them."""


class Materials:
    """Images and finished runs in a folder, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["PECOBOOK_CACHE"] = str(folder / "cache")

    @functools.cached_property
    def images(self) -> Path:
        """24 images of three classes, 40 x 48 pixels."""
        folder = self.folder / "images"
        rng = np.random.default_rng(0)
        for number, name in enumerate(("blue", "green", "red")):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for index in range(8):
                pixels = rng.integers(0, 60, (40, 48, 3)) + 10 * index
                pixels[..., 2 - number] += 80
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
        return folder

    @functools.cached_property
    def shapes(self) -> Path:
        """Images with masks."""
        return write_shapes(self.folder / "shapes")

    @functools.cached_property
    def objects(self) -> Path:
        """Images with boxes and masks in COCO's format."""
        return make_coco(self.folder / "objects")

    @functools.cached_property
    def codebook(self) -> Path:
        """A finished run of `codebook`."""
        return self._made("codebook")

    @functools.cached_property
    def vit(self) -> Path:
        """A finished run of `pretrain`."""
        return self._made("pretrain")

    @functools.cached_property
    def classifier(self) -> Path:
        """A finished run of `finetune`."""
        return self._made("finetune")

    @functools.cached_property
    def bank(self) -> Path:
        """A whole token bank of the images."""
        return self._made("tokenize")

    def _made(self, command: str) -> Path:
        out = self.folder / command
        process = run([*self.words(command), "--out", str(out)], self.folder / f"{command}.log")
        if process.code != 0:
            raise RuntimeError(process.text)
        return out

    def words(self, command: str) -> list[str]:
        """Return the command line of a small run without --out."""
        if command == "tokenize":
            words = [command, "tiny", "--image-size", "16", "--views", "3", "--batch-size", "7", "--workers", "0"]
            return [*words, "--precision", "fp32", "--data", str(self.images), "--tokenizer", str(self.codebook)]
        data = {"segment": "shapes", "detect": "objects"}.get(command, "images")
        words = [command, "tiny", "--data", str(getattr(self, data)), *small_flags(command, **LENGTH)]
        if command == "pretrain":
            words += ["--tokenizer", str(self.codebook)]
        elif command in ("finetune", "segment", "detect"):
            words += ["--backbone", str(self.vit)]
        return words

    def copy(self, source: Path, to: Path) -> Path:
        """Copy a folder; return the copy."""
        return Path(shutil.copytree(source, to))
