"""`pecobook tokenize`: the tokens of V views of every image, written to a token bank that `pretrain --tokens` replays.

Each process takes whole shards, so any number of them writes at once, and one that was killed loses at most a shard.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecobook.errors import ConfigError, DataError, Preflight, RunFolderError
from pecobook.settings.tokenize import TokenizeConfig

if TYPE_CHECKING:
    from pecobook.data.source import ImageSource, Splits
    from pecobook.data.tokens import BankLayout
    from pecobook.utils.output_folder import OutputFolder


def tokenize(config: TokenizeConfig) -> Path:
    """Write a token bank; returns its folder.

    Raises:
        PreflightError: problems found before anything was written, all of them.
        PecobookError: what went wrong later.
    """
    from pecobook.data.tokens import layouts, missing_shards
    from pecobook.engine import launch
    from pecobook.models.tokenizers import load_tokenizer

    splits, described = _preflight(config)
    out, held = Path(config.out), None
    if launch.is_leader():
        held = _folder(config).begin(partial(_write_first, described))
    try:
        fabric = launch.start(config)  # type: ignore[arg-type]  # it reads devices, nodes and precision alone
        fabric.barrier()  # the folder is there
        layout = layouts(described)
        todo = fabric.broadcast(sorted(map(str, missing_shards(out, layout))))
        mine = [Path(file) for file in todo][fabric.global_rank :: fabric.world_size]
        tokenizer = load_tokenizer(config.tokenizer).to(fabric.device)
        _write(config, splits, tokenizer, fabric, layout, mine)
        fabric.barrier()
        if launch.is_leader():
            _finish(out, layout)
    finally:
        if held is not None:
            held.release()
    return out


def _preflight(config: TokenizeConfig) -> tuple[Splits, dict[str, Any]]:
    """Check everything before anything is written; returns the images and the bank's config."""
    from pecobook.data.images import open_readable
    from pecobook.engine import launch
    from pecobook.stages.pretrain import view_settings

    found = Preflight()
    if launch.is_leader():
        found.check(_folder(config).check)
    splits = found.check(lambda: open_readable(config.data))
    tokenizer = found.check(lambda: _describe_tokenizer(config))
    precision = found.check(lambda: launch.resolve_precision(config))  # type: ignore[arg-type]
    found.finish()
    assert splits is not None
    assert tokenizer is not None
    described = {
        "kind": "token bank",
        **tokenizer,
        "data": splits.train.fingerprint,
        "evaluation_data": splits.evaluation.fingerprint,
        **view_settings(config),
        "views": config.views,
        "num_images": len(splits.train),
        "num_evaluation_images": len(splits.evaluation),
        "source": config.data,
        "precision": precision,
    }
    if config.resume:
        _check_resume(Path(config.out), described)
    return splits, described


def _describe_tokenizer(config: TokenizeConfig) -> dict[str, Any]:
    from pecobook.data.tokens import MOST_CODEWORDS
    from pecobook.models.tokenizers import fingerprint, load_tokenizer

    if not config.tokenizer:
        raise ConfigError("--tokenizer is missing: give the folder of a codebook run.")
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.num_codewords > MOST_CODEWORDS:
        raise ConfigError(f"A bank holds tokens of at most {MOST_CODEWORDS} codewords, not {tokenizer.num_codewords}.")
    side, stride = config.tokenizer_size or config.image_size, tokenizer.stride
    if side % stride:
        near = max(round(side / stride), 1) * stride
        raise ConfigError(f"The tokenizer reads multiples of {stride} pixels, not {side}: give --image-size {near}.")
    return {"tokenizer": fingerprint(tokenizer), "grid": [side // stride, side // stride]}


def _check_resume(out: Path, described: dict[str, Any]) -> None:
    from pecobook.data.tokens import bank_differences, read_bank_config

    changed = bank_differences(read_bank_config(out), described)
    if changed:
        raise RunFolderError(
            f"--resume: the token bank '{out}' was begun otherwise: {'; '.join(changed)}.\n"
            "Give the same data, tokenizer and settings, or name another --out."
        )


def _folder(config: TokenizeConfig) -> OutputFolder:
    from pecobook.utils.output_folder import OutputFolder

    return OutputFolder(
        config.out,
        example="banks/first",
        kind="a token bank",
        marker="config.json",
        is_own=_is_bank,
        resume=config.resume,
        overwrite=config.overwrite,
    )


def _is_bank(out: Path) -> bool:
    from pecobook.data.tokens import read_bank_config

    try:  # many a folder holds a config.json, a training run among them
        return bool(read_bank_config(out))
    except DataError:
        return False


def _write_first(described: dict[str, Any], out: Path) -> None:
    from pecobook.utils.files import write_atomically

    write_atomically(out / "config.json", (json.dumps(described, indent=2) + "\n").encode())


# ----------------------------------------------------------------------------------------------- reading and writing


class _Views:
    """All views of an image, for a DataLoader: (split, number) to uint8 (V, 3, S, S) and colour draws (V, 9)."""

    def __init__(self, config: TokenizeConfig, splits: Splits) -> None:
        self.config, self.splits = config, splits

    def __getitem__(self, item: tuple[str, int]) -> dict[str, Any]:
        import torch

        from pecobook.data.decode import BadImage
        from pecobook.data.sampler import key
        from pecobook.data.views import center_crop, colour_draws, random_crop

        split, index = item
        source: ImageSource = self.splits.train if split == "train" else self.splits.evaluation
        size = self.config.image_size
        try:
            image = source.read(index)
        except BadImage as error:  # pre-training skips it too
            return {"skipped": error}
        if split == "evaluation":
            return {"image": center_crop(image, size)[None], "colour": None}
        keys = [key(self.config.seed, index, view) for view in range(self.config.views)]
        crops = [random_crop(image, size, k, min_area=self.config.min_crop) for k in keys]
        return {"image": torch.stack(crops), "colour": torch.stack([colour_draws(k) for k in keys])}


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One tensor of images uint8 (n V, 3, S, S), one of draws (n V, 9), and by its place each image that has none.

    Stacked by the worker: every tensor on its way to the trainer holds a file open.
    """
    import torch

    good = [sample for sample in samples if "skipped" not in sample]
    drawn = [sample["colour"] for sample in good if sample["colour"] is not None]
    return {
        "count": len(samples),
        "image": torch.cat([sample["image"] for sample in good]) if good else None,
        "colour": torch.cat(drawn) if drawn else None,
        "skipped": {place: sample["skipped"] for place, sample in enumerate(samples) if "skipped" in sample},
    }


def _write(
    config: TokenizeConfig,
    splits: Splits,
    tokenizer: Any,
    fabric: Any,
    layout: dict[str, BankLayout],
    files: list[Path],
) -> None:
    """Write these shards."""
    import numpy as np

    from pecobook.data.tokens import write_shard
    from pecobook.engine.log import Progress

    shards = [(layout[file.parent.name], int(file.stem.rpartition("-")[2]), file) for file in files]
    total = sum(len(own.images_of(shard)) for own, shard, _ in shards)
    progress = Progress(total=total, start=0, name="tokenize", quiet=fabric.global_rank > 0)
    items = [(own.split, i) for own, shard, _ in shards for i in own.images_of(shard)]
    read = _read(config, splits, items, pin=fabric.device.type == "cuda")
    done, began = 0, time.monotonic()
    pending: list[Any] = []  # codes (V, h, w) of the images read and not yet written, and why one has none
    try:
        for own, shard, file in shards:
            count = len(own.images_of(shard))
            while len(pending) < count:
                batch = next(read)
                pending += _encode(config, tokenizer, fabric, batch, own)
                done += batch["count"]
                speed = done / max(time.monotonic() - began, 1e-9)
                progress.show(min(done, total), {"images_per_second": speed})
            part = zip(own.images_of(shard), pending[:count], strict=True)
            skipped = {number: error for number, (_, error) in part if error is not None}
            write_shard(file, np.stack([codes for codes, _ in pending[:count]]), skipped)
            pending = pending[count:]
    finally:
        progress.close()


def _read(config: TokenizeConfig, splits: Splits, items: list[tuple[str, int]], *, pin: bool) -> Iterator[Any]:
    """Batches, in order; none crosses from one split to the other."""
    from torch.utils.data import DataLoader

    from pecobook.data.stream import default_workers, new_process_group
    from pecobook.engine.launch import device_count

    size = max(config.batch_size // config.views, 1)
    batches: list[list[tuple[str, int]]] = []
    for item in items:
        if not batches or len(batches[-1]) == size or batches[-1][0][0] != item[0]:
            batches.append([])
        batches[-1].append(item)
    workers = default_workers(device_count(config)) if config.workers < 0 else config.workers  # type: ignore[arg-type]
    if not batches:
        return iter(())
    views: Any = _Views(config, splits)
    loader = DataLoader(
        views,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_collate,
        worker_init_fn=new_process_group,
    )
    return iter(loader)


def _encode(
    config: TokenizeConfig, tokenizer: Any, fabric: Any, batch: dict[str, Any], layout: BankLayout
) -> list[tuple[Any, Any]]:
    """Codes uint16 (V, h, w) of each image and None; of one that could not be read, zeros and the BadImage."""
    import numpy as np
    import torch

    from pecobook.stages.pretrain import coloured, encode_views

    skipped = batch["skipped"]
    codes = iter(())
    if batch["image"] is not None:
        images = batch["image"].to(fabric.device, non_blocking=True)
        draws = None if batch["colour"] is None else batch["colour"].to(fabric.device, non_blocking=True)
        with torch.inference_mode(), fabric.autocast():
            found = encode_views(tokenizer, coloured(images, draws, config.colour), config.tokenizer_size)
        codes = iter(found.cpu().numpy().astype(np.uint16).reshape(-1, layout.num_views, *layout.grid))
    zeros = np.zeros((layout.num_views, *layout.grid), dtype=np.uint16)
    return [(zeros, skipped[i]) if i in skipped else (next(codes), None) for i in range(batch["count"])]


def _finish(out: Path, layout: dict[str, BankLayout]) -> None:
    """List what could not be read, by all processes and before a resume too, and say what to do next."""
    import sys

    from pecobook.data.tokens import read_skipped
    from pecobook.utils.files import write_atomically

    skipped = [str(error) for own in layout.values() for _, error in sorted(read_skipped(out, own).items())]
    (out / "skipped.txt").unlink(missing_ok=True)  # of before a resume, which may have read them
    if skipped:
        write_atomically(out / "skipped.txt", ("\n".join(skipped) + "\n").encode())
        print(f"{len(skipped)} images could not be read; {out / 'skipped.txt'} lists them.", file=sys.stderr)
    print(f"\nDone: {out}\n\npecobook pretrain ... --tokens {out}", file=sys.stderr)
