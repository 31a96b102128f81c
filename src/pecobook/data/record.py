"""The record of a source's files, by which a resumed run, or a reader of a token bank, notices changed data.

A record contains the name, size and modification time of every file that the images, masks and labels come from. Taking
it costs one file system request per file, and opens few of them: it also contains a content hash of some files spread
over the source, so that a copy, whose times all differ, can be distinguished from other images. With `verify` it
contains the content hash of every file. A data set on the Hugging Face hub counts as one file per split.

On disk the record is a parquet file: a million images take about 10 MB. In memory the names are one Arrow column, and a
file takes 24 bytes plus the letters of its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pecobook.data.decode import BadImage
from pecobook.data.source import ImageSource, Integers, Splits, arrow_binary, arrow_integers, release_memory
from pecobook.errors import RunFolderError, first_line, printable, some_of
from pecobook.utils.files import write_atomically

FILE = "data.parquet"
_SAMPLE = 256
_WHOLE = 2**20
"""Maximum size in bytes of a sampled file that is read whole; larger ones are read at both ends."""
_END = 2**16
_ABSENT = -1
"""Size and time of a file that cannot be found."""
_BLOCK, _PART = 4096, 2**16
"""Number of names looked up and gathered at a time."""
_THREADS = 16
"""Number of concurrent requests: a shared file system takes as long for one as for many."""

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Record:
    """The files of a source, ordered by name.

    Attributes:
        names: paths relative to the folder of the source, absolute outside of it; an Arrow array of large binary (n,).
        sizes: bytes, int64 (n,).
        times: modification times in nanoseconds, int64 (n,).
        contents: content hashes of the files that were read, by file number; "~" precedes a hash of both ends.
        root: the folder of the source, empty in a record read from disk.
    """

    names: Any
    sizes: Integers
    times: Integers
    contents: dict[int, str]
    root: bytes = b""

    def write(self, folder: Path) -> None:
        """Write the record to a run folder or a token bank, completely or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        contents = pa.lib.StringBuilder()
        contents.append_values(self.contents.get(number) for number in range(len(self.names)))
        columns = [self.names, arrow_integers(self.sizes), arrow_integers(self.times), contents.finish()]
        sink = pa.BufferOutputStream()
        table = pa.Table.from_arrays(columns, names=["name", "size", "time", "content"])
        pq.write_table(table, sink, compression="zstd", use_dictionary=False)
        write_atomically(folder / FILE, sink.getvalue().to_pybytes())

    def content(self, number: int, *, whole: bool) -> str:
        """Return a file's content hash, or that of a large file's ends unless `whole`; "" if unreadable."""
        try:
            with open(os.path.join(self.root, self.names[number].as_py()), "rb") as file:  # noqa: PTH118, PTH123 (bytes)
                size = os.fstat(file.fileno()).st_size
                if whole or size <= _WHOLE:
                    return hashlib.file_digest(file, "sha256").hexdigest()[:32]
                ends = file.read(_END) + os.pread(file.fileno(), _END, size - _END)
                return "~" + hashlib.sha256(ends).hexdigest()[:32]
        except (OSError, ValueError):
            return ""

    def with_contents(self, numbers: Iterable[int], *, whole: bool) -> Record:
        """Return the record with the content hashes of the files `numbers`; known ones are not read again."""
        unknown = [n for n in numbers if n not in self.contents or (whole and self.contents[n].startswith("~"))]
        read = _in_threads(partial(self.content, whole=whole), unknown)
        return dataclasses.replace(self, contents={**self.contents, **dict(zip(unknown, read, strict=True))})


def read(folder: Path) -> Record | None:
    """Read the record in a run folder or a token bank; None if there is none, as in earlier versions.

    Raises:
        RunFolderError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / FILE
    if not file.is_file():
        return None
    try:
        table = pq.read_table(file, columns=["name", "size", "time", "content"])
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(
            f"'{file}', the record of the data, cannot be read: {first_line(error)}.\n"
            "Delete it to go on without a comparison; it is then written anew."
        ) from None
    sizes, times = (table.column(name).to_numpy() for name in ("size", "time"))
    content = table.column("content")
    known = np.flatnonzero(content.is_valid().to_numpy()).tolist()
    names = table.column("name").cast(pa.large_binary()).combine_chunks()
    return Record(names, sizes, times, dict(zip(known, content.drop_null().to_pylist(), strict=True)))


def take(splits: Splits, *, verify: bool = False) -> Record:
    """Take the record of a source; `verify` reads the content of every file."""
    sources = (splits.train, splits.evaluation)
    root = os.fsencode(Path(splits.train.name).expanduser().absolute())
    listings = [source.files() for source in sources]
    root, names = _gather([*(files for files in listings if files is not None), map(os.fsencode, splits.files)], root)
    sizes, times = _stat_all(root, names)
    record = Record(names, sizes, times, {}, root)
    of_all: Iterable[int] = range(len(names))
    if not verify:
        extra = {_relative(os.fsencode(file), root) for file in splits.files}
        of_all = [bisect_left(range(len(names)), name, key=lambda n: names[n].as_py()) for name in extra]
    record = record.with_contents(of_all, whole=True)
    record = record.with_contents(_spread(len(names)), whole=False)
    for source, files in zip(sources, listings, strict=True):
        if files is None:
            record = _with_split(record, source, verify=verify)
    release_memory()
    return record


def _relative(path: bytes, root: bytes) -> bytes:
    """Return a path relative to `root`, or absolute outside of it."""
    here = path if path.startswith(b"/") else os.fsencode(Path.cwd()) + b"/" + path.removeprefix(b"./")
    return here.removeprefix(root + b"/")


def _gather(listings: Sequence[Iterable[bytes]], root: bytes) -> tuple[bytes, Any]:
    """Return the sorted file names, each once, with the folder that they are relative to."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def parts(root: bytes) -> Iterator[Any]:
        for files in map(iter, listings):
            while part := [_relative(path, root) for path in islice(files, _PART)]:
                yield arrow_binary(part)

    gathered = list(parts(root))
    if gathered and all(name.startswith(b"/") for part in gathered for name in part.to_pylist()):
        # one file, a pattern, built-in photographs
        root = os.path.commonpath({os.path.dirname(path) for part in gathered for path in part.to_pylist()})  # noqa: PTH120 (bytes)
        gathered = [arrow_binary([_relative(path, root) for path in part.to_pylist()]) for part in gathered]
    names = pa.chunked_array(gathered, pa.large_binary()).combine_chunks()
    del gathered
    names = names.take(pc.array_sort_indices(names))
    again = pc.equal(names[1:], names[:-1])
    if pc.any(again).as_py():
        names = names.filter(pc.invert(pa.concat_arrays([pa.array([False]), again])))
    return root, names


def _spread(count: int) -> list[int]:
    """Return the numbers of the sample of `count` files, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, _SAMPLE), dtype=np.int64)).tolist() if count else []


def _with_split(record: Record, source: ImageSource, *, verify: bool) -> Record:
    """Return the record with an entry for a split that has no files; its "size" is a hash of cheap properties."""
    import pyarrow as pa

    digest = hashlib.sha256(f"{source.digest()} {source.num_bytes} {source.classes}".encode())
    if source.labels is not None:
        digest.update(source.labels.tobytes())
    size, contents = int(digest.hexdigest()[:12], 16), dict(record.contents)
    if verify:
        for number in range(len(source)):
            try:
                digest.update(source.content(number))
            except BadImage:
                digest.update(b"unreadable")
        contents[len(record.names)] = digest.hexdigest()[:32]
    return Record(
        pa.concat_arrays([record.names, arrow_binary([f"the split {source.split}".encode()])]),
        np.append(record.sizes, size),
        np.append(record.times, 0),
        contents,
        record.root,
    )


def _stat_all(root: bytes, names: Any) -> tuple[Integers, Integers]:
    """Return the sizes and the times of files."""
    found = np.full((2, len(names)), _ABSENT, np.int64)

    def stat_block(start: int) -> None:
        for number, name in enumerate(names[start : start + _BLOCK].to_pylist(), start):
            with contextlib.suppress(OSError, ValueError):  # a text in a table that is not a path
                status = os.stat(os.path.join(root, name))  # noqa: PTH116, PTH118 (bytes, a million times)
                found[:, number] = status.st_size, status.st_mtime_ns

    _in_threads(stat_block, range(0, len(names), _BLOCK))
    return found[0], found[1]


def _in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(_THREADS) as threads:  # which would keep a kilobyte for each item
        starts = range(0, len(items), _BLOCK)
        return [result for start in starts for result in threads.map(work, items[start : start + _BLOCK])]


# ---------------------------------------------------------------------------------------------------------- comparison


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The differences between two records.

    Attributes:
        differences: one phrase for each kind of difference, with the number of files and up to three names; empty if
            the data are the same.
        same_names: whether both contain the same names.
        note: a sentence if everything but the times is the same, as in a copy.
        record: the current record, with the content hashes that the earlier one had for unchanged files.
        is_new: whether `record` contains more than, or something other than, the earlier one.
    """

    differences: tuple[str, ...]
    same_names: bool
    note: str
    record: Record
    is_new: bool

    def __str__(self) -> str:
        return ", ".join(self.differences)


def compare(before: Record, now: Record, *, unread: Sequence[str] = ()) -> Comparison:
    """Compare an earlier record with the current one; contents are read if only times differ.

    If fewer than half of the times differ, files were written in place: each one with a known content hash is read, and
    one without counts as changed. If most differ, the folder was copied or mounted in another way: the sample decides.

    Args:
        before: the earlier record.
        now: the current record.
        unread: names of images that were left out because they could not be read; these may have changed.
    """
    old, new = _in_both(before.names, now.names)
    is_resized = before.sizes[old] != now.sizes[new]
    is_later = ~is_resized & ~_same_times(before.times[old], now.times[new])
    is_copy = 2 * int(is_later.sum()) > len(new)
    known = _mask(len(before.names), before.contents)[old]
    checked = np.flatnonzero(is_later & known)
    if is_copy and len(checked) > _SAMPLE:
        checked = checked[_spread(len(checked))]
    contents = _contents_like(before, now, old[checked], new[checked])
    compared = {int(k): contents[int(old[k])] for k in checked}
    for number, content in now.contents.items():  # the sample, or everything with --verify-data
        k = int(np.searchsorted(new, number))
        if k < len(new) and new[k] == number and _comparable(before.contents.get(int(old[k])), content):
            compared[k] = content
    is_other = is_resized.copy()
    is_certain = ~is_later
    for k, content in compared.items():
        is_other[k] |= content != before.contents[int(old[k])]
        is_certain[k] |= not content.startswith("~")
    for number in np.flatnonzero(is_other).tolist() if unread else ():
        is_other[number] = not _ends_one(now.names[int(new[number])].as_py(), unread)
    is_rewritten = ~is_other & ~is_certain & (not is_copy)
    groups = {
        "added": (now, np.flatnonzero(~_mask(len(now.names), new))),
        "removed": (before, np.flatnonzero(~_mask(len(before.names), old))),
        "changed": (now, new[is_other]),
        "with another time and the same size": (now, new[is_rewritten]),
    }
    text = partial(bytes.decode, errors="replace")
    differences = tuple(
        f"{len(numbers):,} {kind} ({some_of((text(of.names[n].as_py()) for n in numbers[:4].tolist()), 3)})"
        for kind, (of, numbers) in groups.items()
        if len(numbers)
    )
    same = np.flatnonzero(known & ~is_other & ~is_rewritten)
    kept = {n: before.contents[o] for o, n in zip(old[same].tolist(), new[same].tolist(), strict=True)}
    better = {n: text for n, text in now.contents.items() if n not in kept or kept[n].startswith("~")}
    record = dataclasses.replace(now, contents=kept | better)
    is_new = bool(differences) or bool(is_later.any()) or record.contents != kept
    note = _note(int(is_later.sum()), len(new), len(compared)) if is_copy and not differences else ""
    same_names = len(old) == len(before.names) == len(now.names)
    return Comparison(differences, same_names, note, record, is_new)


def _in_both(before: Any, now: Any) -> tuple[Integers, Integers]:
    """Return the numbers of the names that both records contain, in each of them, in the current one's order."""
    if before.equals(now):  # nearly always
        return np.arange(len(now)), np.arange(len(now))
    import pyarrow.compute as pc

    place = pc.index_in(now, value_set=before)
    return place.drop_null().to_numpy().astype(np.int64), np.flatnonzero(place.is_valid().to_numpy(False))


def _mask(count: int, numbers: Iterable[int] | Integers) -> npt.NDArray[np.bool_]:
    """Return which of `count` numbers are among `numbers`."""
    mask = np.zeros(count, bool)
    mask[numbers if isinstance(numbers, np.ndarray) else list(numbers)] = True
    return mask


def _contents_like(before: Record, now: Record, old: Integers, new: Integers) -> dict[int, str]:
    """Return the current content hashes of files, hashed as in the earlier record, by their numbers there."""
    pairs = list(zip(old.tolist(), new.tolist(), strict=True))

    def content(pair: tuple[int, int]) -> str:
        earlier, present = before.contents[pair[0]], now.contents.get(pair[1])
        if present is not None and _comparable(earlier, present):
            return present
        return now.content(pair[1], whole=not earlier.startswith("~"))

    return dict(zip((o for o, _ in pairs), _in_threads(content, pairs), strict=True))


def _comparable(a: str | None, b: str) -> bool:
    return a is not None and a.startswith("~") == b.startswith("~")


def _same_times(a: Integers, b: Integers) -> Any:
    """Return whether times are equal, or one is the other in whole seconds or microseconds, as in some copies."""
    same = a == b
    for unit in (10**3, 10**9):
        same |= (a // unit == b // unit) & ((a % unit == 0) | (b % unit == 0))
    return same


def _ends_one(name: bytes, paths: Sequence[str]) -> bool:
    """Return whether a relative name is the end of one of the paths, wherever the folder was at that time."""
    text = printable(os.fsencode(name).decode(errors="replace"))
    return any(path == text or path.endswith(f"/{text}") for path in paths)


def _note(num_later: int, count: int, num_compared: int) -> str:
    whose = f"all {count:,} files" if num_later == count else f"{num_later:,} of {count:,} files"
    return (
        f"The times of {whose} of --data differ from those that were recorded, as after a copy. Names and sizes are "
        f"the same, and so is the content of {num_compared:,}."
    )
