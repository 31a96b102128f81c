"""`pecobook embed`: write a feature vector for every image of a source, labelled or not.

The images of all declared splits are read in order, in parts of a few thousand images. Each part is written as soon as
it is complete, so repeating the command continues a killed one, and processes with --shard I/N write parts in parallel.
At the end the parts are joined into one file, and images that could not be read are listed next to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pecobook.commands.embed.features import Features, load_features
from pecobook.commands.embed.files import join_parts, part_file, write_part
from pecobook.data.images import check_readable, open_all_splits
from pecobook.data.source import ImageSource
from pecobook.data.stream import Numbers, read_crops
from pecobook.engine.log import Progress
from pecobook.engine.value_range import set_value_range
from pecobook.errors import ConfigError, RunFolderError
from pecobook.settings.embed import EmbedConfig
from pecobook.settings.values import replace
from pecobook.utils.files import write_atomically, write_json
from pecobook.utils.folder_lock import FolderLock
from pecobook.utils.images import to_float
from pecobook.utils.json_files import OBJECT, TEXT, list_of, read_json
from pecobook.utils.output_folder import SHARED_WAIT, check_new_file
from pecobook.utils.printer import say, show

PART_IMAGES = 2048
"""Number of images in a part, rounded up to whole batches."""
_SETTINGS = "settings.json"
_MARKER = {"embed": OBJECT}


class _Part(NamedTuple):
    number: int
    source: ImageSource
    images: range


def embed(config: EmbedConfig | None = None, **settings: Any) -> Path:
    """Write the features and return the path of the file.

    Raises:
        PecobookError: the images or the network do not exist, no image can be read, or the file cannot be written.
    """
    config = replace(config or EmbedConfig(), settings)
    if not config.out:
        raise ConfigError("--out is missing: give FILE.parquet, FILE.npy or FILE.npz.")
    out = Path(config.out)
    _check_out(out, config)
    sources = open_all_splits(config.data)
    set_value_range(sources, config.value_range, [config.backbone])
    check_readable(sources[0])
    features = load_features(config)  # may download weights, so the images are checked first
    about = _about(config, sources, features)
    count = sum(map(len, sources))
    splits = ", ".join(f"{len(source):,} {source.split}" for source in sources)
    show(f"{count:,} images ({splits}) of '{config.data}' at {features.image_size} pixels: {features.words}")
    folder = _begin(out, about, config)
    parts = _parts(sources, config.batch_size)
    index, shards = config.part
    with FolderLock(folder, part=f"{index + 1}-of-{shards}" if config.shard else ""):
        _write_parts(config, features, folder, parts[index::shards])
    with FolderLock(folder, shared=True, wait=SHARED_WAIT):
        if out.exists() and not config.overwrite:  # another process joined the parts
            return out
        missing = [part for part in parts if not part_file(folder, part.number).exists()]
        if missing:
            show(f"Part {config.shard} is written; {len(missing)} of {len(parts)} parts of '{out}' are missing so far.")
            return out
        return _join(out, folder, parts, about)


def _check_out(out: Path, config: EmbedConfig) -> None:
    """Raise RunFolderError if a file would be replaced, or if the vectors would lie among the images."""
    if not config.overwrite:
        check_new_file(config.out)
        if out.suffix.lower() == ".npy":
            check_new_file(str(out.with_suffix(".csv")))
    data = Path(config.data).expanduser()
    if config.data and data.exists() and data.resolve() in (out.resolve(), *out.resolve().parents):
        raise RunFolderError(f"--out '{out}' is or lies in the images '{config.data}': name a file outside of them.")


def _about(config: EmbedConfig, sources: list[ImageSource], features: Features) -> dict[str, Any]:
    """Return what determines the vectors, which must be the same when a command continues."""
    names = ("backbone", "weights", "data", "layer", "pool", "codes", "batch_size")
    return {
        **{name: getattr(config, name) for name in names},
        "image_size": features.image_size,
        "features": features.words,
        "hash_of_weights": features.weights,
        "hash_of_images": [source.fingerprint for source in sources],
        "normalisation": [list(config.mean), list(config.std)],
    }


def _begin(out: Path, about: dict[str, Any], config: EmbedConfig) -> Path:
    """Create the folder of parts, or continue one with the same settings."""
    folder = out.with_name(f"{out.name}.parts")
    file = folder / _SETTINGS
    if file.exists():
        before = read_json(file, _MARKER, remedy=f"Delete '{folder}'.")["embed"]
        changed = [name for name in about if before.get(name) != about[name]]
        if changed and config.overwrite:
            _remove(folder)
        elif changed:
            raise RunFolderError(
                f"'{folder}' holds parts with other settings ({', '.join(changed)}): give the same ones to continue, "
                "or --overwrite to begin again."
            )
        else:
            say(f"Continuing with the parts in '{folder}'.")
    elif folder.exists() and any(folder.iterdir()):
        raise RunFolderError(f"'{folder}' is needed for parts and holds other files: name another --out.")
    folder.mkdir(exist_ok=True)
    if not file.exists():
        write_json(file, {"embed": about})
    return folder


def _parts(sources: list[ImageSource], batch_size: int) -> list[_Part]:
    size = -(-PART_IMAGES // batch_size) * batch_size
    starts = [(source, start) for source in sources for start in range(0, len(source), size)]
    ranges = [(source, range(start, min(start + size, len(source)))) for source, start in starts]
    return [_Part(number, source, images) for number, (source, images) in enumerate(ranges)]


def _write_parts(config: EmbedConfig, features: Features, folder: Path, parts: list[_Part]) -> None:
    """Write the missing parts. All but a source's last hold whole batches: no batch spans two parts."""
    missing = [part for part in parts if not part_file(folder, part.number).exists()]
    total = sum(len(part.images) for part in missing)
    done, size, batch_size = 0, features.image_size, config.batch_size
    with Progress(total=total, start=0, name="embed", quiet=False) as progress:
        for source in {id(part.source): part.source for part in missing}.values():
            of_source = [part for part in missing if part.source is source]
            order = Numbers([part.images for part in of_source])
            batches = iter(read_crops(source, size, order, batch_size=batch_size, workers=config.workers))
            for part in of_source:
                read = []
                for _ in range(0, len(part.images), batch_size):
                    batch: dict[str, Any] = {**next(batches)}
                    if "image" in batch:
                        batch["features"] = features.compute(to_float(batch.pop("image")))
                    read.append(batch)
                    done += batch_size
                    progress.show(min(done, total), {})
                _write(folder, part, read)


def _write(folder: Path, part: _Part, read: list[dict[str, Any]]) -> None:
    whole = [batch for batch in read if "features" in batch]
    indices = [index for batch in whole for index in batch["index"].tolist()]
    labels: list[str | None] = [None] * len(indices)
    if part.source.labels is not None and part.source.classes is not None:
        codes = [int(part.source.labels[index]) for index in indices]
        labels = [part.source.classes[code] if code >= 0 else None for code in codes]
    columns = whole[0]["features"] if whole else ()
    arrays = {name: torch.cat([batch["features"][name] for batch in whole]).numpy() for name in columns}
    skipped = [name for batch in read for name in batch["skipped"]]
    if skipped:
        write_json(folder / f"skipped-{part.number:05d}.json", {"skipped": skipped})
    names = [part.source.identify(index) for index in indices]
    write_part(part_file(folder, part.number), names, part.source.split, labels, arrays)


def _join(out: Path, folder: Path, parts: list[_Part], about: dict[str, Any]) -> Path:
    skipped = [
        name
        for file in sorted(folder.glob("skipped-*.json"))
        for name in read_json(file, {"skipped": list_of(TEXT)}, remedy=f"Delete '{folder}'.")["skipped"]
    ]
    count = join_parts([part_file(folder, part.number) for part in parts], out, about)
    if skipped:
        listed = out.with_name(f"{out.name}.skipped.txt")
        write_atomically(listed, ("\n".join(skipped) + "\n").encode())
        show(f"{len(skipped)} images could not be read; {listed} lists them.")
    _remove(folder)
    show(f"\nDone: {out}, {count:,} images\n\n{_reading(out)}")
    return out


def _remove(folder: Path) -> None:
    """Remove the folder of parts, unless a user put other files there."""
    for pattern in ("part-*.parquet", "skipped-*.json", _SETTINGS, ".*lock*", ".*.tmp"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _reading(out: Path) -> str:
    """Return Python code that reads the file."""
    if out.suffix.lower() == ".parquet":
        return (
            "import numpy as np, pyarrow.parquet as pq\n"
            f"table = pq.read_table({str(out)!r})\n"
            'vectors = np.stack(table["embedding"].to_numpy())'
        )
    if out.suffix.lower() == ".npy":
        return f"import numpy as np\nvectors = np.load({str(out)!r})  # rows as in {str(out.with_suffix('.csv'))!r}"
    return f"import numpy as np\nfile = np.load({str(out)!r})\nvectors, names = file['embedding'], file['image']"
