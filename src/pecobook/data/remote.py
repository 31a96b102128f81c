"""Files on other machines: s3://, gs://, https://, hf:// and anything else that fsspec knows; file:// is this machine.

A `RemotePath` is a path with the few methods that this package calls on the paths of tar and parquet files. Bytes are
fetched with range requests of 4 MiB. A failed request is repeated, with growing pauses. Blocks are kept in a cache
folder which the processes of a machine share: the first one that needs a block requests it, while others wait, and the
least recently used blocks are removed if the folder grows beyond its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from operator import methodcaller
from pathlib import Path, PosixPath
from typing import Any, TypeVar

from pecobook.data.remote_cache import cache_folder, into_cache, locked, read_cached, say_not_kept
from pecobook.data.remote_refusals import RefusedError, asked_pause, reason_of, refuse
from pecobook.errors import ConfigError, DataError, first_line, shown

T = TypeVar("T")

BLOCK = 2**22
"""Number of bytes per range request."""
_ASKED_AGAIN = 60.0
"""Seconds after which a server is asked again whether a file is unchanged."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 20.0
_TIMEOUT = 60.0
"""Seconds after which an unanswered request to a web server is given up."""
PATIENCE = 300.0
"""Seconds for which a request is repeated: a longer network outage ends the run, which can be resumed."""
_SUFFIXES = (".tar", ".parquet")
_URL = re.compile(r"(s3|s3a|gs|gcs|az|abfs|https?|hf|memory|file)://")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def is_remote(source: str | Path) -> bool:
    """Return whether a source is the URL of files on another machine."""
    return _URL.match(str(source)) is not None


class RemotePath(PosixPath):
    """The path of a file on another machine; `str` returns its URL.

    The part after `?` in a web server's URL, such as a signature that expires, is sent with requests (`url`), but is
    not part of the file's name or of its version.
    """

    @property
    def url(self) -> str:
        """The URL with everything that is sent to the server."""
        address = super().__str__()
        return address.replace(":/", ":///" if address.startswith("file:") else "://", 1)

    @property
    def name(self) -> str:
        """The name of the file, without its folder."""
        return str(self).rpartition("/")[2]

    def __str__(self) -> str:
        return shown(self.url)

    def __fspath__(self) -> str:
        return str(self)

    def open(self, mode: str = "rb", *_: Any, **__: Any) -> Any:
        """Open the file for reading. Raises OSError."""
        assert mode == "rb"
        return RemoteReader(self)

    def is_file(self) -> bool:
        """Return whether the file exists."""
        with contextlib.suppress(RefusedError):
            return bool(_info(self.url)["type"] == "file")
        return False

    def version(self) -> str:
        """Return text that changes if the file is replaced."""
        return f"{self} {_version(_info(self.url))}"

    def cached(self, name: str) -> Path:
        """Return the cache path of a part of the file."""
        return cache_folder() / hashlib.sha256(self.version().encode()).hexdigest()[:24] / name

    def request(self, start: int, stop: int) -> bytes:
        """Request a range of bytes of the file as it was opened.

        Raises:
            DataError: the server refuses, or does not answer, or the file has been replaced in the meantime.
        """
        data, before = _fetch(self.url, start, stop), _info(self.url)
        if time.monotonic() - _asked[self.url] > _ASKED_AGAIN:
            _system(self.url).invalidate_cache()  # of listings, from which some systems would answer
            del _infos[self.url]
            if _version(_info(self.url)) != _version(before):
                raise DataError(
                    f"'{self}' has been replaced since it was opened: start the command again, or restore the file "
                    "and continue with --resume."
                )
        return data

    @property
    def size(self) -> int:
        """Number of bytes of the file. Raises DataError if its server does not say."""
        size = _info(self.url).get("size")
        if size is None:
            raise DataError(
                f"The server of '{self}' does not state the size of the file: copy the file to this machine."
            )
        return int(size)

    def read_range(self, offset: int, length: int, *, keep: bool = True) -> bytes:
        """Return up to `length` bytes from `offset`, fewer at the end of the file; `keep` keeps them in the cache.

        Raises:
            DataError: the server refuses, or did not answer for `PATIENCE` seconds.
        """
        end = min(offset + length, self.size)
        if not keep:
            starts = range(offset, end, BLOCK)
            return b"".join(self.request(start, min(start + BLOCK, end)) for start in starts)
        numbers = range(offset // BLOCK, -(-end // BLOCK)) if end > offset else range(0)
        return b"".join(
            _read_block(self, number, max(offset - number * BLOCK, 0), min(end - number * BLOCK, BLOCK))
            for number in numbers
        )


class RemoteReader(io.RawIOBase):
    """A remote file, open for reading; `keep` keeps what is read in the cache."""

    def __init__(self, path: RemotePath, *, keep: bool = True) -> None:
        self.path, self._position, self._size, self._keep = path, 0, path.size, keep

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position, as in every file."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Read `size` bytes, or all."""
        length = self._size - self._position if size is None or size < 0 else size
        data = self.path.read_range(self._position, length, keep=self._keep)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


# ------------------------------------------------------------------------------------------------------------- requests


_systems: dict[tuple[int, str], Any] = {}
_infos: dict[str, dict[str, Any]] = {}
_asked: dict[str, float] = {}
"""When the server was last asked about a file."""


def _system(url: str) -> Any:
    """Return fsspec's file system for a URL in this process: a forked one needs its own connections."""
    import fsspec

    protocol = url.partition("://")[0]
    key = os.getpid(), protocol
    if key not in _systems:
        options: dict[str, Any] = {}
        try:
            if protocol.startswith("http"):  # aiohttp would wait five minutes for a server that does not answer
                from aiohttp import ClientTimeout

                options["client_kwargs"] = {"timeout": ClientTimeout(total=_TIMEOUT)}
            _systems[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
        except (ImportError, ValueError) as error:
            package = _PACKAGES.get(protocol, "")
            remedy = f"pip install {package}" if package else first_line(error)
            raise ConfigError(
                f"--data '{url}': addresses with {protocol}:// need one more package: {remedy}."
            ) from None
    return _systems[key]


def _try(url: str, request: Callable[[Any], T], patience: float | None = None) -> T:
    """Return the answer to a request, which is repeated after failures."""
    end, pause = time.monotonic() + (PATIENCE if patience is None else patience), _FIRST_PAUSE
    system = _system(url)
    while True:
        try:
            return request(system)
        except DataError:
            raise
        except Exception as error:  # each library has its own exceptions for lost connections
            refuse(url, error)
            pause = max(pause, asked_pause(error))
            if time.monotonic() + pause > end:
                raise DataError(f"'{shown(url)}' cannot be read: {reason_of(error)}.") from error
            time.sleep(max(pause * random.uniform(0.5, 1), asked_pause(error)))  # so that not all retry together
            pause = min(2 * pause, _LONGEST_PAUSE)


def _info(url: str) -> dict[str, Any]:
    if url not in _infos:
        _infos[url] = dict(_try(url, lambda system: system.info(url), min(PATIENCE, 60)))
        _asked[url] = time.monotonic()
    return _infos[url]


def _version(info: dict[str, Any]) -> str:
    names = ("ETag", "etag", "LastModified", "last_modified", "mtime", "md5Hash", "generation", "blob_id")
    found = [str(info[name]) for name in names if info.get(name)]
    return f"{info['size']} {found or [info[name] for name in ('Last-Modified', 'Content-MD5') if info.get(name)]}"


def _fetch(url: str, start: int, stop: int) -> bytes:
    """Request a range of bytes; an answer that is too short counts as a lost connection."""

    def request(system: Any) -> bytes:
        data: bytes = system.cat_file(url, start=start, end=stop)
        if len(data) > stop - start:
            raise DataError(
                f"The server of '{shown(url)}' does not answer requests for ranges of bytes: copy the files."
            )
        if len(data) < stop - start:
            raise ConnectionError(f"the answer ended {stop - start - len(data):,} bytes too early")
        return data

    return _try(url, request)


def list_remote(source: str, names: Callable[[str], Iterable[str]]) -> tuple[list[RemotePath], Counter[str]]:
    """Return the tar or parquet files at a URL: one file, a pattern, or all files below a folder.

    Returns:
        the files, and the number of others by the reason for leaving them out.

    Args:
        source: the URL, perhaps with `*`, `?`, `[...]`.
        names: expands the braces of a pattern.
    """
    found: list[str] = []
    for url in names(source):
        protocol, _, place = url.partition("://")
        if not place.strip("/") or (place.startswith("/") and protocol != "file"):
            raise DataError(f"--data '{source}' names no server, bucket or folder behind '{protocol}://'.")
        if shown(url) != url:
            address, _, query = url.partition("?")
            found.append(f"{address}?{query.replace('/', '%2F')}")  # a path keeps no repeated slashes
            continue
        is_pattern = re.search(r"[*?\[]", url)
        if not is_pattern and url.lower().endswith(_SUFFIXES):
            found.append(url)
            continue
        paths = sorted(_try(url, methodcaller("glob" if is_pattern else "find", url), _TIMEOUT))
        paths = [path.removeprefix(f"{protocol}://").strip("/") for path in paths]
        paths = [path for path in paths if path != url.partition("://")[2].strip("/")]  # an object that marks a folder
        start = "file:///" if protocol == "file" else f"{protocol}://"
        found += [f"{start}{path}" for path in paths]
    files = [RemotePath(url) for url in found]
    used = [file for file in files if file.suffix.lower() in _SUFFIXES]
    others = (file.suffix for file in files if file.suffix.lower() not in _SUFFIXES)
    left_out = Counter(f"extension {suffix}" if suffix else "no extension" for suffix in others)
    if len({file.suffix.lower() for file in used}) != 1:
        what = (
            "holds both .tar and .parquet files: name one kind with a pattern"
            if used
            else "has no .tar and no .parquet files"
        )
        raise DataError(f"--data '{source}' {what}. Single images are not read from other machines: pack them.")
    return used, left_out


# --------------------------------------------------------------------------------------------------------------- cache


def _read_block(path: RemotePath, number: int, start: int, stop: int) -> bytes:
    """Return bytes of a block from the cache, requesting the block if it is not there."""
    file = path.cached(f"{number:08d}")
    data = read_cached(file, start, stop)
    if data is not None:
        return data
    first, block = number * BLOCK, None
    try:
        with locked(file, number):  # another process may be requesting it
            data = read_cached(file, start, stop)
            if data is None:
                block = path.request(first, min(first + BLOCK, path.size))
                with into_cache(file) as unfinished:
                    unfinished.write_bytes(block)
    except OSError as error:  # no space, or no writable cache: the bytes are used directly
        say_not_kept(error)
    if data is not None:
        return data
    return path.request(first + start, first + stop) if block is None else block[start:stop]
