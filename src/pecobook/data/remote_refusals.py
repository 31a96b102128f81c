"""Why a server did not return a file: what another request may fix, and what fails immediately."""

from __future__ import annotations

import errno

from pecobook.errors import DataError, first_line, shown

_FINAL = (
    *("NoCredentials", "PartialCredentials", "EntryNotFound", "RepositoryNotFound", "GatedRepo", "NoSuchBucket"),
    "TooManyRedirects",
)
"""Parts of the names of errors for which another request is useless."""
_MAY_PASS = (408, 425, 429)
"""Status codes from 400 to 499 of a web server for which another request may help."""


class RefusedError(DataError):
    """A server says that a file does not exist or may not be read."""


def refuse(url: str, error: Exception) -> None:
    """Raise RefusedError after a failure for which another request is useless."""
    answer = _answer(error)
    is_absent = isinstance(error, FileNotFoundError | IsADirectoryError) and not error.__cause__
    if answer in (404, 410) or is_absent or (isinstance(error, FileNotFoundError) and not url.startswith("http")):
        raise RefusedError(f"'{shown(url)}' does not exist.") from None
    if answer == 416:
        raise RefusedError(f"'{shown(url)}' has become shorter since it was opened: start the command again.") from None
    names = f"{type(error).__name__} {type(error.__cause__).__name__}"
    is_forbidden = isinstance(error, PermissionError) or any(name in names for name in _FINAL)
    is_wrong = type(error) is ValueError or getattr(error, "errno", 0) in (errno.EINVAL, errno.EPERM)  # S3's 400, 405
    if is_forbidden or is_wrong or (400 <= answer < 500 and answer not in _MAY_PASS):
        remedy = " 'Files on other machines' in docs/data.md says how to give credentials."
        remedy = "" if "Redirects" in names else remedy
        if answer and "?" in url:
            remedy = " The signature in the address may have expired: give a new address, and continue with --resume."
        raise RefusedError(f"'{shown(url)}' cannot be read: {reason_of(error)}.{remedy}") from error


def _cause(error: BaseException) -> BaseException:
    """Return a server's answer: fsspec raises FileNotFoundError for all failures of the first request."""
    cause = error.__cause__
    return cause if cause and (isinstance(error, FileNotFoundError) or hasattr(cause, "status")) else error


def reason_of(error: BaseException) -> str:
    """Return why a request failed, without a full stop."""
    cause = _cause(error)
    message, _, _ = str(getattr(cause, "message", "")).partition("\n")
    text = f"the server answers {answer} {message}" if (answer := _answer(error)) else first_line(cause)
    if "TooManyRedirects" in type(cause).__name__:
        text = "the server sends from address to address"
    wait = asked_pause(error)
    return (text.strip().rstrip(".:") or type(cause).__name__) + (f", and asks to wait {wait:.0f} s" if wait else "")


def _answer(error: BaseException) -> int:
    """Return a web server's status code, 0 for other failures."""
    return int(getattr(_cause(error), "status", 0) or 0)


def asked_pause(error: BaseException) -> float:
    """Return the seconds that a busy server asks to wait (Retry-After), 0 if it does not say."""
    stated = str((getattr(_cause(error), "headers", None) or {}).get("Retry-After", ""))
    return float(stated) if stated.isdecimal() else 0.0
