"""The files and folders that the mistakes of `tests.mistakes` name: runs, damaged copies of exports and of a bank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def make_folder(folder: Path, images: Path, codebook: Path, vit: Path, classifier: Path, bank: Path) -> None:
    """Fill a folder with what the mistakes name: runs, damaged copies of their exports and of a bank, other files.

    Args:
        folder: an empty folder.
        images: a folder of labelled images, to which a link is made.
        codebook: a finished run of `codebook` with 24 codewords and a stride of 4 pixels; the other runs likewise.
        vit: a finished run of `pretrain`.
        classifier: a finished run of `finetune`.
        bank: a token bank of the codebook's.
    """
    for name in ("empty", "broken", "photos-2024", "full"):
        (folder / name).mkdir()
    for number in range(3):
        (folder / "broken" / f"{number}.jpg").write_bytes(b"no image at all")
    (folder / "notes.txt").write_text("hello")
    (folder / "full" / "thesis.doc").touch()
    (folder / "images").symlink_to(images)
    for name, text in {
        "broken.json": '{"seed": ',
        "deep.json": "[" * 100_000,
        "list.json": "[1]",
        "unknown.json": '{"bach_size": 8}',
        "typed.json": '{"optim": {"lr": "fast"}}',
        "flat.json": '{"optim": 3}',
        "contrast.json": '{"command": "contrast", "seed": 3, "momentum": 0.5}',
        "null.json": '{"perceptual": {"layers": null}}',
        "nan.json": '{"optim": {"lr": NaN}}',
        "huge.json": '{"image_size": "huge"}',
    }.items():
        (folder / name).write_text(text)
    (folder / "latin.json").write_bytes(b'{"data": "b\xfccher"}')
    for name, run in {"codebook": codebook, "vit": vit, "classifier": classifier}.items():
        shutil.copytree(run / "export", folder / name / "export")
    for name, source, change in _DAMAGED_EXPORTS:
        shutil.copytree(folder / source, folder / name)
        _edit(folder / name / "export" / "config.json", change)
    shutil.copytree(folder / "codebook", folder / "damaged")
    weights = folder / "damaged" / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    for name, change in _DAMAGED_BANKS:
        shutil.copytree(bank, folder / name)
        _edit(folder / name / "config.json", change)
    _spoil_codes(folder / "bank-code")
    _spoil_weights(folder / "nan-classifier" / "export" / "model.safetensors")
    for name, file, text in (
        ("demo-list", "demo.json", "[1]"),
        ("demo-broken", "demo.json", '{"seed": '),
        ("tables-list", "reproduce.json", "3"),
        ("tables-types", "reproduce.json", '{"budget": {"tiny": 1}}'),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)


def _without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda config: {name: value for name, value in config.items() if name not in names}


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: {**config, **changes}


_DAMAGED_EXPORTS: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("no-model", "codebook", _without("model")),
    ("text-size", "codebook", _with(image_size="huge")),
    ("zero-codewords", "codebook", _with(num_codewords=0)),
    ("list-config", "codebook", lambda _: [1]),
    ("no-args", "vit", _without("args")),
    ("args-run-code", "vit", _with(args={"checkpoint_path": "a.pt"})),
    ("vit-size", "vit", _with(image_size="huge")),
    ("nan-classifier", "classifier", _with()),
    ("classifier-classes", "classifier", _with(classes=3)),
    ("classifier-no-classes", "classifier", _with(classes=[])),
    ("classifier-size", "classifier", _with(image_size=10**15)),
    ("classifier-crop", "classifier", _with(crop=0)),
]
_DAMAGED_BANKS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("bank-keys", _without("grid")),
    ("bank-types", _with(views="many")),
    ("bank-list", lambda _: [1]),
    ("bank-code", _with()),
]


def _edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file as a user would: its checksum is deleted."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    file.with_name(f"{file.name}.sha256").unlink(missing_ok=True)


def _spoil_codes(bank: Path) -> None:
    """Set a code of a bank beyond every vocabulary."""
    import numpy as np

    file = next((bank / "train").glob("codes-*.npy"))
    codes = np.load(file)
    codes.flat[-1] = 65535
    np.save(file, codes)
    file.with_name(f"{file.name}.sha256").unlink()


def _spoil_weights(file: Path) -> None:
    """Set all weights to NaN."""
    from safetensors.torch import load_file, save_file

    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)
    file.with_name(f"{file.name}.sha256").unlink()
