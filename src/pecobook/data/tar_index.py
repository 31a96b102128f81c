"""Finds the images and labels in a tar shard (WebDataset), even in one that is damaged or concatenated from several.

Members with the same name up to a dot form a sample: "1.jpg", "1.cls", "1.json", "1.seg.png". Which dot ends the name
depends on the shard, because names may hold dots themselves ("my.photo.jpg"):

- An image whose name continues that of another image is an annotation ("1.seg.png" beside "1.jpg") and is left out; so
  is one whose name ends like that of an annotation ("1.mask.png"), unless it has a label under its whole name. Every
  other image is an image of its own, even if a sample holds several ("1.left.png", "1.right.png"), but a mask beside
  its image ("1_mask.png") is left out. Arrays (.npy) are images only if there are no others.
- The label is the content of the `.cls` member, or the value of "label" in the `.json` member, with the image's name up
  to its last dot, or else up to its first dot.

A shard may be several archives one after the other (`cat a.tar b.tar`); each has its own samples. Links to members are
read as what they lead to. After a damaged header, reading continues at the next one that is valid.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from pecobook.data.names import BESIDE_ITS_IMAGE, IMAGE_EXTENSIONS, MASK_ENDINGS, is_hidden, masks_among
from pecobook.data.remote import RemoteReader

_BLOCK = tarfile.BLOCKSIZE
_MAGIC = 257
"""Offset of the text "ustar" in a header."""
_MAX_SEARCH = 2**28
"""Number of bytes of a file that are searched for a header if the first one is damaged."""
_MAX_LABEL = 2**24
"""Maximum size of a member that may hold a label, in bytes."""


class IndexedImage(NamedTuple):
    """An image member: its name, where its bytes are, and its label or None."""

    member: str
    offset: int
    size: int
    label: str | None


@dataclass
class ShardIndex:
    """What a shard holds.

    Attributes:
        images: the images in the order of the members.
        left_out: why other members are not used, and how many there are.
        notes: sentences on damage, for the user.
    """

    images: list[IndexedImage] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def index_shard(shard: Path) -> ShardIndex:
    """Read the headers of all members of a shard, and its labels.

    Raises:
        tarfile.TarError: the file is not an uncompressed tar file.
        OSError: the file cannot be read.
    """
    index = ShardIndex()
    with shard.open("rb") as file:
        for members in _archives(file, shard, index):
            _add_samples(file, members, index)
    return index


def _archives(file: IO[bytes], shard: Path, index: ShardIndex) -> Iterator[list[_Member]]:
    """Yield the members of each archive in a file. A name that occurs again begins a new archive as well."""
    end = file.path.size if isinstance(file, RemoteReader) else os.fstat(file.fileno()).st_size
    archive: dict[str, _Member] = {}
    links: list[tuple[str, str]] = []
    targets: dict[str, _Member] = {}
    for member in _members(file, shard, end, index):
        if member is None or member.name in archive:
            yield [*archive.values(), *_resolve(links, targets, index)]
            archive, links = {}, []
        if member is None:
            continue
        name = member.name.encode(errors="surrogateescape").decode(errors="replace")
        if member.isdir():
            continue
        if any(map(is_hidden, name.split("/"))):
            index.left_out["hidden"] += 1
        elif member.islnk():
            links.append((name, member.linkname))
        elif member.issym():
            links.append((name, posixpath.join(posixpath.dirname(name), member.linkname)))
        elif not member.isreg() or member.sparse:
            index.left_out["not a regular file"] += 1
        elif member.offset_data + member.size > end:
            index.left_out["cut short"] += 1
            missing = member.offset_data + member.size - end
            index.notes.append(f"{shard} ends {missing:,} bytes too early, inside '{name}', which is left out.")
        else:
            archive[member.name] = targets[posixpath.normpath(name)] = _Member(name, member.offset_data, member.size)
    yield [*archive.values(), *_resolve(links, targets, index)]


def _pread(file: IO[bytes], size: int, offset: int) -> bytes:
    if isinstance(file, RemoteReader):
        return file.path.read_range(offset, size)
    return os.pread(file.fileno(), size, offset)


def _members(file: IO[bytes], shard: Path, end: int, index: ShardIndex) -> Iterator[tarfile.TarInfo | None]:
    """Yield all members, and None between two archives; note damage."""
    position = last_byte = 0
    last: tarfile.TarInfo | None = None  # a member is yielded when it is known that no other archive begins inside it
    try:
        tar = tarfile.open(fileobj=file, mode="r:", errors="surrogateescape")  # noqa: SIM115 (the caller closes the file)
    except tarfile.ReadError:
        start, _ = _next_header(file, _BLOCK, min(end, _MAX_SEARCH))
        if start is None:
            raise  # not a tar file
        index.notes.append(f"{shard} is damaged at byte 0: {start:,} bytes are skipped.")
        index.left_out["damaged header"] += 1
        file.seek(position := start)
        tar = tarfile.open(fileobj=file, mode="r:", errors="surrogateescape")  # noqa: SIM115
    while True:
        first_unread = position
        try:
            member = tar.next()
        except (tarfile.TarError, ValueError):  # the end of the file, or damage after a header of extended data
            member, first_unread = None, position + _BLOCK
        if member is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise a kilobyte stays in memory for each member
            position, last_byte = tar.offset, member.offset_data + member.size
            if last is not None:
                yield last
            last = member
            continue
        start, skipped = None, 0
        if position < end:
            inside = position if last is None else last.offset_data
            is_damaged = any(_pread(file, _BLOCK, position))  # zeros mark the end of an archive
            start = _search(file, inside, position) if is_damaged else None
            if start is None:
                start, skipped = _next_header(file, first_unread, end)
                skipped += first_unread - position
        elif last_byte <= end:  # otherwise the last member is noted as cut short
            index.notes.append(f"{shard} has no end mark, so it may be cut short.")
        is_joined = start is not None and start < position
        if is_joined and last is not None and start < last_byte:  # type: ignore[operator]
            index.notes.append(f"{shard}: another archive begins inside '{last.name}', which is left out.")
            index.left_out["cut short"] += 1
        else:
            if is_joined:
                index.notes.append(
                    f"{shard}: the archive before byte {start:,} has no end mark, so it may be cut short."
                )
            if last is not None:
                yield last
        last = None
        if skipped:
            lost = "no further member is found" if start is None else f"{skipped:,} bytes are skipped"
            index.notes.append(f"{shard} is damaged at byte {position:,}: {lost}.")
            index.left_out["damaged header"] += 1
        if start is None:
            return
        if not skipped or (start - position) % _BLOCK:
            yield None
        tar.offset = position = start
        file.seek(start)


def _next_header(file: IO[bytes], position: int, end: int) -> tuple[int | None, int]:
    """Return where the next valid header begins (None if there is none), and how many bytes before it are not zero.

    Headers follow in steps of 512 bytes, but after a truncated archive another one may begin anywhere.
    """
    skipped = 0
    for start in range(position, end, _BLOCK):
        block = _pread(file, _BLOCK, start)
        if block.count(0) == len(block):
            continue
        if _is_header(block):
            return start, skipped
        skipped += len(block)
    found = _search(file, position, end) if skipped else None
    return found, skipped if found is None else found - position


def _search(file: IO[bytes], start: int, end: int) -> int | None:
    """Return where a header begins, at any byte; None if there is none."""
    step = 2**20
    for first in range(start, end, step):
        data = _pread(file, step + _BLOCK, first)
        for match in re.finditer(b"ustar", data):
            at = match.start() - _MAGIC
            if 0 <= at < min(step, end - first) and _is_header(data[at : at + _BLOCK]):
                return first + at
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _resolve(links: list[tuple[str, str]], targets: dict[str, _Member], index: ShardIndex) -> list[_Member]:
    """Return the members that links lead to, under the names of the links."""
    leads_to = {posixpath.normpath(name): posixpath.normpath(target) for name, target in links}
    found = []
    for name, _ in links:
        target = posixpath.normpath(name)
        for _ in range(len(links)):  # a link may lead to a link, and a circle of links to nothing
            if target not in leads_to:
                break
            target = leads_to[target]
        if target in targets:
            found.append(_Member(name, *targets[target][1:]))
        else:
            index.left_out["link to nothing in the shard"] += 1
    return found


def _add_samples(file: IO[bytes], members: list[_Member], index: ShardIndex) -> None:
    """Add the images of one archive with their labels to the index."""
    images: list[tuple[str, _Member]] = []
    labels: dict[str, str] = {}
    loose: dict[str, str] = {}
    for member in members:
        stem, dot, extension = member.name.rpartition(".")
        extension = extension.lower() if dot and "/" not in extension else ""
        if extension in IMAGE_EXTENSIONS:
            images.append((stem, member))
        elif extension in ("cls", "json") and member.size <= _MAX_LABEL:
            label = _read_label(file, member, is_json=extension == "json")
            if label is not None and (extension == "cls" or stem not in labels):
                labels[stem] = loose[_sample_name(stem)] = label
        else:
            index.left_out[f"extension .{extension}" if extension else "no extension"] += 1
    pictures = [(stem, member) for stem, member in images if not member.name.lower().endswith(".npy")]
    if 0 < len(pictures) < len(images):
        index.left_out["extension .npy beside other images"] += len(images) - len(pictures)
        images = pictures
    stems = {stem for stem, _ in images}
    known = stems | {_sample_name(stem) for stem in stems}
    if without_image := sum(stem not in known and _sample_name(stem) not in known for stem in labels):
        index.left_out["label without an image"] += without_image
    masks = masks_among([os.fsencode(member.name) for _, member in images])
    for stem, member in images:
        name = _sample_name(stem)
        if os.fsencode(member.name) in masks:
            index.left_out[BESIDE_ITS_IMAGE] += 1
            continue
        is_annotation = stem.rpartition(".")[2].lower() in MASK_ENDINGS and stem != name
        if stem not in labels and (is_annotation or _continues(stem, stems)):
            index.left_out["annotation of an image, such as x.seg.png"] += 1
            continue
        label = labels.get(stem, labels.get(name, loose.get(name) if stem == name else None))
        index.images.append(IndexedImage(*member, label))


def _sample_name(stem: str) -> str:
    """Return a name up to the first dot of the file's name, with its folder."""
    folder, slash, file = stem.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _continues(stem: str, stems: set[str]) -> bool:
    """Return whether a name continues another one after a dot."""
    shortest = len(_sample_name(stem))
    while len(stem := stem.rpartition(".")[0]) >= shortest:
        if stem in stems:
            return True
    return False


def _read_label(file: IO[bytes], member: _Member, *, is_json: bool) -> str | None:
    # Bytes that are not valid UTF-8 stay distinct: two names must not become one.
    text = _pread(file, member.size, member.offset).decode("utf-8-sig", "backslashreplace").strip("\0 \r\n\t")
    if not is_json:
        return text or None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    label = value.get("label") if isinstance(value, dict) else None
    return str(label) if isinstance(label, (int, float, str)) else None
