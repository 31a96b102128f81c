"""`pecobook tokenize` writes the tokens of V views of every image to a token bank, which `pretrain --tokens` replays.

Each process writes whole shards, so any number of processes can write at once, and a killed process loses at most one
shard.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from pecobook import recipes
from pecobook.data import record
from pecobook.data.batch import Batch
from pecobook.data.loading import WorkerError
from pecobook.data.source import Splits
from pecobook.data.stream import read_all_views, to_device
from pecobook.data.tokens import (
    BANK,
    OF_IMAGES,
    BankLayout,
    bank_differences,
    bank_layouts,
    code_type,
    missing_shards,
    read_bank_config,
    read_skipped,
    shard_files,
    write_shard,
)
from pecobook.data.views import NamedViews
from pecobook.engine import launch
from pecobook.engine.data_check import compare_data
from pecobook.engine.launch import num_workers
from pecobook.engine.log import Progress
from pecobook.engine.preamble import device_name, show_source
from pecobook.engine.signals import Signals
from pecobook.engine.value_range import open_readable
from pecobook.engine.world import is_leader
from pecobook.errors import ConfigError, Preflight, RunFolderError, shown
from pecobook.models.tokenizers import fingerprint, load_tokenizer
from pecobook.recipes import RECIPES
from pecobook.settings.tokenize import VIEW_SETTINGS, TokenizeConfig
from pecobook.settings.values import flag_words, replace
from pecobook.stages.pretrain import encode_views
from pecobook.utils.checksums import add_checksum, checksum_file
from pecobook.utils.distributed import gather_objects, on_all_ranks
from pecobook.utils.files import write_atomically, write_json
from pecobook.utils.folder_lock import FolderLock
from pecobook.utils.output_folder import SHARED_WAIT, OutputFolder
from pecobook.utils.printer import of_run, say, show


def tokenize(config: TokenizeConfig) -> Path:
    """Write a token bank and return its folder.

    Raises:
        PreflightError: lists all problems that were found before anything was written.
        PecobookError: a problem that occurred later.
    """
    if config.shard:
        return _tokenize_part(config)
    with of_run(quiet=not is_leader()), launch.signals(config):  # type: ignore[arg-type]  # launch reads devices, nodes and precision alone
        begun = launch.begin(
            config,  # type: ignore[arg-type]
            lambda: _preflight(config),
            lambda ready: _begin(config, ready),
        )
        out, layout = Path(config.out), bank_layouts(begun.ready.bank_config)
        if is_leader():
            _show(config, begun.ready)
        try:
            missing = begun.fabric.broadcast(sorted(map(str, missing_shards(out, layout))))
            files = [Path(file) for file in missing][begun.fabric.global_rank :: begun.fabric.world_size]
            finished = gather_objects(on_all_ranks(lambda: _write(config, begun.ready, begun.fabric, layout, files)))
            if all(finished) and is_leader():
                _finish(out, layout, next_command(config, begun.ready.bank_config["grid"][0]))
        finally:
            if begun.lock is not None:
                begun.lock.release()
    if not all(finished):
        _exit_unfinished()
    return out


def _tokenize_part(config: TokenizeConfig) -> Path:
    """Write one part's files, while other processes write other parts; the last to finish lists what was skipped."""
    ready = _preflight(config)
    out, layout, (part, parts) = Path(config.out), bank_layouts(ready.bank_config), config.part
    with _begin(config, ready):
        lock = FolderLock(out, part=f"{part + 1}-of-{parts}")
    with lock, Signals():
        _show(config, ready)
        mine = set(list(shard_files(out, layout))[part::parts])
        files = [file for file in missing_shards(out, layout) if file in mine]
        fabric = launch.start(ready.config, alone=True)  # type: ignore[arg-type]
        if not _write(config, ready, fabric, layout, files):
            _exit_unfinished()
    with FolderLock(out, shared=True, wait=SHARED_WAIT):  # the last process sees all files, and one process at a time
        missing = list(missing_shards(out, layout))
        if not missing:
            _finish(out, layout, next_command(config, ready.bank_config["grid"][0]))
    if missing:
        text = f"Part {config.shard} of '{out}' is written. {len(missing)} files of other parts are missing so far."
        show(text)
    return out


def _show(config: TokenizeConfig, ready: _Ready) -> None:
    """Print lines on the images, the views and the device."""
    bank_config = ready.bank_config
    views = f"{config.views:,} of each training image, one of each held-out image, {bank_config['grid'][0]} x "
    views += f"{bank_config['grid'][1]} tokens of {ready.tokenizer.num_codewords:,} codewords"
    show_source(ready.splits, ("views", views), ("device", f"{device_name()}, {bank_config['precision']}"))


def _exit_unfinished() -> NoReturn:
    show("Stopped; the files that are written are whole. Continue with --resume.")
    raise SystemExit(130)


class _Ready(NamedTuple):
    """The inputs, checked and opened before anything is written."""

    config: TokenizeConfig
    """The settings, with the resolved precision."""
    splits: Splits
    tokenizer: Any
    bank_config: dict[str, Any]


def _preflight(config: TokenizeConfig) -> _Ready:
    """Check everything before anything is written; return the images, the tokenizer and the config of the bank."""
    preflight = Preflight()
    if config.shard or is_leader():
        preflight.check(_folder(config).check)
    splits = preflight.check(lambda: open_readable(config.data, config.value_range, [config.tokenizer]))
    tokenizer = preflight.check(lambda: _open_tokenizer(config))
    precision = preflight.check(lambda: launch.resolve_precision(config))  # type: ignore[arg-type]
    preflight.finish()
    assert splits is not None
    assert tokenizer is not None
    views = NamedViews.of(config)
    bank_config = {
        "kind": "token bank",
        "tokenizer": fingerprint(tokenizer),
        **code_type(tokenizer.num_codewords),
        "grid": [views.tokenizer_size // tokenizer.stride] * 2,
        "value_range": splits.train.value_range and list(splits.train.value_range),
        "data": splits.train.fingerprint,
        "evaluation_data": splits.evaluation.fingerprint,
        **views.settings(),
        "views": config.views,
        "num_images": len(splits.train),
        "num_evaluation_images": len(splits.evaluation),
        "source": shown(config.data),
        "precision": precision,
    }
    if config.resume is True or ((config.resume or config.shard) and (Path(config.out) / "config.json").is_file()):
        _check_resume(config, bank_config)
    config = dataclasses.replace(config, precision=precision)  # type: ignore[arg-type]
    return _Ready(config, splits, tokenizer, bank_config)


def _open_tokenizer(config: TokenizeConfig) -> Any:
    if not config.tokenizer:
        raise ConfigError("--tokenizer is missing: give the folder of a codebook run.")
    tokenizer = load_tokenizer(config.tokenizer)
    size, stride = config.tokenizer_size or config.image_size, tokenizer.stride
    if size % stride:
        nearest = max(round(size / stride), 1) * stride
        raise ConfigError(f"The tokenizer reads multiples of {stride} pixels, not {size}: give --image-size {nearest}.")
    return tokenizer


def _check_resume(config: TokenizeConfig, bank_config: dict[str, Any], _content: object = None) -> None:
    out, flag = Path(config.out), "--resume" if config.resume else "--shard"
    if (out / record.FILE).is_file():  # the record says more about the images than their fingerprint
        bank_config = {name: value for name, value in bank_config.items() if name not in OF_IMAGES}
    changed = bank_differences(read_bank_config(out), bank_config)
    if changed:
        raise RunFolderError(
            f"{flag}: the token bank '{out}' was begun with other settings: {'; '.join(changed)}.\n"
            "Give the same data, tokenizer and settings, or name another --out."
        )


def _folder(config: TokenizeConfig, bank_config: dict[str, Any] | None = None) -> OutputFolder:
    return OutputFolder(
        config.out,
        example="banks/first",
        kind="a token bank",
        marker="config.json",
        schema=BANK,
        files=(
            *("config.json", "config.json.sha256", "data.parquet", "skipped.txt", "*/codes-*.npy*", "*/skipped-*.json"),
            *(".*.tmp", "*/.*.tmp"),
        ),
        data=config.data,
        resume=config.resume is True,
        overwrite=None if config.shard else config.overwrite,
        always_resumes=config.resume == "auto" or bool(config.shard),
        shared=bool(config.shard),
        check_resume=None if bank_config is None else partial(_check_resume, config, bank_config),
    )


def _begin(config: TokenizeConfig, ready: _Ready) -> FolderLock:
    """Create or continue the bank, with the record of its images. Raises RunFolderError if these have changed."""
    now = record.take(ready.splits, verify=config.verify_data)  # before the folder is locked, since it may take long

    def write(out: Path) -> None:
        news: record.Record | None = now
        accept = config.accept_data_change
        if (out / "config.json").is_file():  # a resumed bank has the record already
            notes, news = compare_data(out, now, data=config.data, of="the token bank", accept=accept, may_accept=False)
            for note in notes:
                say(note)
        else:
            write_json(out / "config.json", ready.bank_config)
        if news is not None:
            news.write(out)

    return _folder(config, ready.bank_config).begin(write)


# ----------------------------------------------------------------------------------------------- reading and writing


def _write(
    config: TokenizeConfig, ready: _Ready, fabric: Any, layout: dict[str, BankLayout], files: list[Path]
) -> bool:
    """Encode and write the shards `files`; return whether all are written, or False after a signal to stop."""
    tokenizer = ready.tokenizer.to(fabric.device)
    shards = [(layout[file.parent.name], int(file.stem.rpartition("-")[2]), file) for file in files]
    total = sum(len(split.images_of(shard)) for split, shard, _ in shards)
    progress = Progress(total=total, start=0, name="tokenize", quiet=fabric.global_rank > 0)
    batches = read_all_views(
        NamedViews.of(config),
        ready.splits,
        [(split.split, split.images_of(shard)) for split, shard, _ in shards],
        num_views=config.views,
        images_per_batch=max(config.batch_size // config.views, 1),
        workers=num_workers(config),  # type: ignore[arg-type]
        pin=fabric.device.type == "cuda",
    )
    done, start = 0, time.monotonic()
    pending: list[Any] = []  # (codes (V, h, w), error or None) of the images that were read and not yet written
    try:
        with Signals() as signals:
            for split, shard, file in shards:
                count = len(split.images_of(shard))
                while len(pending) < count:
                    if signals.received:
                        return False
                    batch = next(batches)
                    pending += _encode(config, tokenizer, fabric, batch, split)
                    done += len(batch["unread"])
                    speed = done / max(time.monotonic() - start, 1e-9)
                    progress.show(min(done, total), {"images_per_second": speed})
                images = zip(split.images_of(shard), pending[:count], strict=True)
                skipped = {number: error for number, (_, error) in images if error is not None}
                write_shard(file, np.stack([codes for codes, _ in pending[:count]]), skipped)
                pending = pending[count:]
        return True
    except WorkerError as error:
        raise WorkerError(f"{error}\nThe files that are written are whole: continue with --resume.") from None
    finally:
        progress.close()


def _encode(
    config: TokenizeConfig, tokenizer: Any, fabric: Any, batch: dict[str, Any], layout: BankLayout
) -> list[tuple[Any, Any]]:
    """Returns (codes (V, h, w) of the bank's type, None) of each image; (zeros, BadImage) of an unreadable image."""
    unread = batch["unread"]
    codes = iter(())
    if "image" in batch:
        views = to_device(Batch(image=batch["image"], colour=batch["colour"]), fabric.device)
        with torch.inference_mode(), fabric.autocast():
            pixels = NamedViews.of(config).pixels(views, training=layout.split == "train")
            indices = encode_views(tokenizer, pixels, config.tokenizer_size)
        codes = iter(indices.cpu().numpy().astype(layout.code_type).reshape(-1, layout.num_views, *layout.grid))
    zeros = np.zeros((layout.num_views, *layout.grid), dtype=layout.code_type)
    return [(next(codes), None) if error is None else (zeros, error) for error in unread]


def _finish(out: Path, layout: dict[str, BankLayout], command: str) -> None:
    """List the images that no process could read, including those from before a resume, and print the next command."""
    if not checksum_file(out / "config.json").exists():
        add_checksum(out / "config.json")
    skipped = [str(error) for split in layout.values() for _, error in sorted(read_skipped(out, split).items())]
    (out / "skipped.txt").unlink(missing_ok=True)  # a list from before a resume, which may have read these images
    if skipped:
        write_atomically(out / "skipped.txt", ("\n".join(skipped) + "\n").encode())
        show(f"{len(skipped)} images could not be read; {out / 'skipped.txt'} lists them.")
    show(f"\nDone: {out}\n\n{command}")


def next_command(config: TokenizeConfig, grid: int) -> str:
    """Return the command that pre-trains on a token bank with `grid` tokens per side, ready for a shell.

    It names the `pretrain` recipe whose views differ least from the bank's, and everything that must differ from the
    recipe: the views and, for another token grid, the ViT's patches and the masks.
    """

    def distance(recipe: str) -> int:
        return sum(getattr(recipes.tokenize(recipe), name) != getattr(config, name) for name in VIEW_SETTINGS)

    recipe = min(RECIPES["pretrain"], key=distance)
    base: Any = RECIPES["pretrain"][recipe]()
    same = {name: getattr(config, name) for name in (*VIEW_SETTINGS, "data", "tokenizer")}
    run = dataclasses.replace(base, **same, tokens=config.out, out=f"{Path(config.out)}-vit")
    arguments = base.model.kwargs()
    named = re.search(r"patch(\d+)", base.model.name)
    patch = arguments.get("patch_size") or int(named[1] if named else 16)
    if config.image_size != patch * grid:
        share = (grid * patch / base.image_size) ** 2  # patches of the bank for each patch of the recipe
        changes = {
            "model.args": json.dumps({**arguments, "patch_size": config.image_size // grid}),
            "mask.num_masked": max(round(base.mask.num_masked * share), 1),
            "mask.min_block": min(base.mask.min_block, max(round(base.mask.min_block * share), 1)),
        }
        run = replace(run, changes)
    always = ("data", "tokenizer", "tokens", "out")
    return f"pecobook pretrain {recipe} {shlex.join(flag_words(run, base, always=always))}"
