"""Every field of every command's settings is read in a real run: a field that no code reads would have no effect.

A command runs several times with other settings, since some fields matter only for certain values of others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pecobook import api
from pecobook.recipes import recipe
from pecobook.recipes import tokenize as tokenize_recipe
from pecobook.settings import values
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.values import flag, replace
from tests.runs import SMALL

Reads = set[tuple[type, str]]

_POLY: dict[str, Any] = {"optim.schedule": "poly"}
_PROBE: dict[str, Any] = {"probe_data": "photos", "probe_images": 8}
_STEPS: dict[str, Any] = {"optim.schedule": "steps", "optim.milestones": ("1",)}
_VIT = {
    "model.name": "vit_tiny_patch16_224",
    "model.args": '{"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}',
}
_NETWORK = {"network": "timm:resnet10t", "weights": "random", "layers": (1,)}
_TRANSFORMER = {"kind": "vit", "channels": (32, 4), "num_heads": 2, "num_blocks": 1}
_ADVERSARIAL = {"weight": 0.1, "num_layers": 1, "width": 8}
_DECODER = {"depth": 1, "width": 16, "num_heads": 2}

# Settings of each run of a command, added to the command's small settings.
RUNS: dict[str, tuple[dict[str, Any], ...]] = {
    "contrast": ({**_POLY, **_PROBE}, {**_STEPS, **_VIT, "solarise": (0.5, 0.5)}),
    "codebook": (
        {**_POLY, "perceptual": _NETWORK, "adversarial": _ADVERSARIAL, "explicit.kind": "contrastive"},
        {**_STEPS, "model": _TRANSFORMER, "quantizer.start_after": 0},
        {"quantizer.kind": "lfq", "quantizer.num_codewords": 16, "model.latent_dim": 4, "quantizer.start_after": 0},
        {"target_features": "timm:resnet10t", "target.weights": "random", "target.layer": "2"},
    ),
    "pretrain": ({**_POLY, **_PROBE}, {**_STEPS, "visible_only": True, "decoder": _DECODER, "target": "pixels"}),
    "finetune": (_POLY, _STEPS),
    "segment": (_POLY, {**_STEPS, "test.mode": "slide"}),
    "detect": (_POLY, {**_STEPS, "jitter": (0.5, 1.0)}),
}

# Fields that need not be read, each with the reason.
EXCEPTIONS: dict[str, dict[str, str]] = {
    command: dict.fromkeys(
        [f"tracking.{name}" for name in ("project", "entity", "group", "tags", "offline")],
        "read with --loggers wandb and mlflow, which tests/engine/test_log.py tests",
    )
    for command in ("contrast", "codebook", "pretrain", "finetune", "segment", "detect")
}
for _command in ("contrast", "codebook", "pretrain", "finetune", "segment"):
    EXCEPTIONS[_command]["compile-mode"] = "read with --compile, which these short trainings leave out"

EXCEPTIONS["finetune"] |= dict.fromkeys(
    [f"clip.{name}" for name in ("sampling", "stride", "flip", "crops")],
    "read with --clip.frames, which tests/stages/test_clips.py and tests/data/test_clips.py test",
)


@contextlib.contextmanager
def recording(config_type: type) -> Iterator[Reads]:
    """Collect (class, field) of every setting that code reads, except in checks and copies of the settings."""
    reads: Reads = set()
    library = {dataclasses.__file__, values.__file__, "<string>"}  # '<string>' is the code that dataclasses generates

    def read(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in type(self).__dataclass_fields__ and _in_use(sys._getframe(1), library):
            reads.update((kind, name) for kind in type(self).__mro__)
        return value

    patched = [kind for kind in groups(config_type) if "__getattribute__" not in vars(kind)]
    for kind in patched:
        kind.__getattribute__ = read
    try:
        yield reads
    finally:
        for kind in patched:
            del kind.__getattribute__


def _in_use(frame: Any, library: set[str]) -> bool:
    if frame.f_code.co_filename in library:
        return False
    while frame is not None:
        if frame.f_code.co_name == "__post_init__":
            return False
        frame = frame.f_back
    return True


def groups(config_type: Any) -> list[Any]:
    """Return the settings class, its groups' classes, and their subclasses (as PhotometricConfig of JitterConfig)."""
    classes = [config_type]
    for kind in typing.get_type_hints(config_type).values():
        if dataclasses.is_dataclass(kind):
            classes += [*groups(kind), *kind.__subclasses__()]  # type: ignore[union-attr]
    return classes


def unread(config_type: Any, reads: Reads, prefix: str = "") -> list[str]:
    """Return the flags whose field no code read."""
    missing = []
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        name = prefix + flag(field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            missing += unread(hints[field.name], reads, name + ".")
        elif (config_type, field.name) not in reads:
            missing.append(name)
    return missing


def run(command: str, config: Any) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        api.run(command, config)


def settings(command: str, out: Path, images: Path, needs: dict[str, str], **more: Any) -> Any:
    values = {"max_steps": "2", "out": str(out), "data": str(images), **needs}
    return replace(recipe(command, "tiny"), {**SMALL[command], **values, **more})


@pytest.mark.parametrize("command", list(RUNS))
def test_every_setting_is_read(command: str, images: Path, needs: dict[str, str], tmp_path: Path) -> None:
    config_type = type(recipe(command, "tiny"))
    with recording(config_type) as reads:
        for number, more in enumerate(RUNS[command]):
            run(command, settings(command, tmp_path / str(number), images, needs, **more))
    assert unread(config_type, reads) == list(EXCEPTIONS.get(command, {}))


def test_every_setting_of_tokenize_is_read(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    config = replace(
        tokenize_recipe("tiny"),
        {"data": str(images), "tokenizer": str(codebook_run), "out": str(tmp_path / "bank"), "image_size": 16},
    )
    from pecobook.commands.tokenize import tokenize

    with recording(type(config)) as reads, contextlib.redirect_stderr(io.StringIO()):
        tokenize(replace(config, {"workers": 0}))
    assert unread(type(config), reads) == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted(FinetuneConfig):
    """Settings with a field that no code reads, though it is checked, compared and written to config.json."""

    dead: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        values.between(self, 0, 1, "dead")


def test_a_planted_dead_setting_is_found(images: Path, vit_run: Path, tmp_path: Path) -> None:
    config = settings("finetune", tmp_path / "run", images, {"backbone": str(vit_run)})
    planted = Planted(**vars(config))
    with recording(Planted) as reads:
        run("finetune", planted)
    assert "dead" in unread(Planted, reads)
    assert (FinetuneConfig, "mixup") in reads
    assert not {"batch-size", "mixup", "optim.lr"} & set(unread(Planted, reads))
