"""Hugging Face hub repositories: names, uploading the files of an export, downloading them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pecobook.errors import PecobookError, WeightsError, first_line

T = TypeVar("T")
_PART = r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?!.*(--|\.\.))(?=.{{3,96}}$){_PART}/{_PART}")


class HubError(PecobookError):
    """The hub cannot be reached, or refuses a request."""


def check_repo_id(repo_id: str) -> None:
    """Raise WeightsError unless `repo_id` has the form owner/name that the hub accepts."""
    if not _NAME.fullmatch(repo_id):
        raise WeightsError(f"'{repo_id}' is no name of the Hugging Face hub: give owner/name, such as me/codebook.")


def publish(
    repo_id: str, files: Mapping[str, bytes | Path], *, private: bool = False, revision: str = "", message: str = ""
) -> str:
    """Upload files in one commit, into a repository that is created if it does not exist; return its URL.

    Args:
        repo_id: `owner/name`.
        files: name in the repository -> content, or a local file.
        private: create a private repository; an existing public one is refused.
        revision: branch that receives the commit, created if it does not exist; empty for `main`.
        message: commit message.

    Raises:
        WeightsError: the hub does not accept this repository name.
        HubError: there is no token, or the hub cannot be reached or refuses a request.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_repo_id(repo_id)
    if get_token() is None:
        raise HubError("There is no token of the Hugging Face hub: run 'hf auth login', or set HF_TOKEN.")
    api = HfApi()
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]

    def upload() -> str:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(f"'{repo_id}' exists and is public: name another repository, or leave out --private.")
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        words = message or "Upload by pecobook"
        api.create_commit(repo_id, operations, commit_message=words, revision=revision or None)
        return f"{url}/tree/{revision}" if revision else str(url)

    return _asked(upload, repo_id)


def _asked(request: Callable[[], T], repo_id: str) -> T:
    """Return the result of a hub request. Raises HubError instead of a hub or network error."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The HTTP library differs between versions of the hub's package; its connection errors need not be OSErrors.
    network_errors: tuple[type[BaseException], ...] = (OSError, HfHubHTTPError.__bases__[0])
    try:
        return request()
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so the Hugging Face hub is not asked: unset it.") from None
    except network_errors as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is None:
            raise HubError(f"The hub {constants.ENDPOINT} cannot be reached: {first_line(error)}.") from None
        remedies = {
            401: "Its token is not valid: run 'hf auth login', or set HF_TOKEN.",
            403: f"Its token may not write to '{repo_id}': take a token with write access, and an owner of yours.",
        }
        reason = getattr(error, "server_message", None) or first_line(error)
        raise HubError(
            f"The hub refused '{repo_id}' ({status}). {remedies.get(status, first_line(Exception(reason)))}"
        ) from None


def resolve_source(source: str | Path, revision: str = "") -> Path:
    """Return the local folder of `source`; download it if `source` is not a path and has the form `owner/name`.

    Args:
        source: a run, an export folder, or `owner/name`.
        revision: branch, tag or commit on the hub; empty for `main`.

    Raises:
        WeightsError: the hub returned nothing, or a revision was requested for a folder.
    """
    if Path(source).exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        if revision:
            raise WeightsError(f"'{source}' is a folder, which has no revision '{revision}': leave out revision=.")
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["model.safetensors", "config.json"]
    try:
        return Path(snapshot_download(str(source), revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at '{revision}'" if revision else ""
        raise WeightsError(
            f"There is no run '{source}' here, and the Hugging Face hub returned none{at} ({first_line(error)})."
        ) from None
