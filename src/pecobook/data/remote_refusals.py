"""Why a server did not give a file: what another request may mend, and what is refused at once."""

from __future__ import annotations

import errno
import re

from pecobook.errors import DataError, first_line

_QUERY = re.compile(r"^(https?://|(?!\w+://)).*?\.(tar|parquet)\?")
_FINAL = ("NoCredentials", "PartialCredentials", "EntryNotFound", "RepositoryNotFound", "GatedRepo", "NoSuchBucket")
"""Parts of the names of errors for which another request is of no use."""
_MAY_PASS = (408, 425, 429)
"""Answers from 400 to 499 of a web server for which another request may be of use."""


class RefusedError(DataError):
    """A server says that a file does not exist or may not be read."""


def refuse(url: str, error: Exception) -> None:
    """Raise RefusedError after a failure for which another request is of no use."""
    answer = _answer(error)
    is_absent = isinstance(error, FileNotFoundError | IsADirectoryError) and not error.__cause__
    if answer in (404, 410) or is_absent or (isinstance(error, FileNotFoundError) and not url.startswith("http")):
        raise RefusedError(f"'{shown(url)}' does not exist.") from None
    if answer == 416:
        raise RefusedError(f"'{shown(url)}' has become shorter since it was opened: start the command again.") from None
    is_forbidden = isinstance(error, PermissionError) or any(name in type(error).__name__ for name in _FINAL)
    is_wrong = type(error) is ValueError or getattr(error, "errno", 0) in (errno.EINVAL, errno.EPERM)  # S3's 400, 405
    if is_forbidden or is_wrong or (400 <= answer < 500 and answer not in _MAY_PASS):
        remedy = " 'Files on other machines' in docs/data.md says how to give credentials."
        if answer and "?" in url:
            remedy = " The signature in the address may have expired: give a new address, and continue with --resume."
        raise RefusedError(f"'{shown(url)}' cannot be read: {reason_of(error)}.{remedy}") from error


def _answer(error: BaseException) -> int:
    """Return the number with which a web server answered, 0 for other failures.

    fsspec raises FileNotFoundError for every failure of the first question about a file; the cause says what it was.
    """
    return int(getattr(error, "status", 0) or getattr(error.__cause__, "status", 0) or 0)


def reason_of(error: BaseException) -> str:
    """Return why a request failed, without a full stop."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    answer = _answer(error)
    text = f"the server answers {answer} {getattr(cause, 'message', '')}" if answer else first_line(cause)
    return text.strip().rstrip(".") or type(cause).__name__


def shown(address: str) -> str:
    """Return the address of a file on a web server without what stands behind `?`."""
    return address.partition("?")[0] if _QUERY.match(address) else address
