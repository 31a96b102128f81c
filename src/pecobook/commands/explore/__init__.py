"""`pecobook explore`: a local web page to explore codewords.

model.py  computes the contents of the page
page.py   the page (Gradio)
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlsplit

from pecobook.analysis.wording import unique_names
from pecobook.commands.explore.model import IndexedTokenizer, index
from pecobook.commands.masked_run import MaskedRun, is_masked_run, load_masked_run
from pecobook.data.source import Splits
from pecobook.engine.preamble import show_source
from pecobook.engine.value_range import open_readable
from pecobook.errors import ConfigError, Preflight
from pecobook.models.tokenizers import load_tokenizer
from pecobook.settings.explore import ExploreConfig
from pecobook.settings.values import replace
from pecobook.utils.devices import device
from pecobook.utils.extras import require
from pecobook.utils.printer import show

__all__ = ["ExploreConfig", "explore"]


def explore(config: ExploreConfig | None = None, *, block: bool = True, **settings: Any) -> Any:
    """Serve the page until Ctrl-C; with `block=False` return Gradio's blocks, whose `close()` stops the server.

    Raises:
        PreflightError: lists all problems that were found before the page was served.
        ConfigError: the port is in use, or Gradio is not installed.
    """
    config = replace(config or ExploreConfig(), settings)
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")  # Gradio reads them at import
    require("explore", "pecobook explore")
    import gradio

    from pecobook.commands.explore.page import Page

    _check_port(config)
    indexed, runs, splits = _open(config)
    if block:
        # The default ends the process at once, and leaves the visitors' images behind.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    os.environ["GRADIO_TEMP_DIR"] = _uploads().name
    blocks = Page(indexed, runs, splits).blocks()
    try:
        blocks.queue(default_concurrency_limit=1).launch(
            server_name=config.host,
            server_port=config.port,
            share=config.share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            footer_links=[],
            max_file_size=f"{config.upload_mb}mb",
            ssr_mode=False,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            app_kwargs={"middleware": _check_requests(config)},
        )
    except OSError as error:
        raise ConfigError(f"The page cannot be served on port {config.port} ({error}): give another --port.") from None
    show(f"\nOpen http://{config.host}:{config.port} (Ctrl-C stops the server)")
    if block:
        blocks.block_thread()
    return blocks


def _check_requests(config: ExploreConfig) -> list[Any]:
    """Return the middleware that answers only requests to a name of this server, from a page of this server.

    Otherwise a web site could point its own name at this machine, and read the page through the visitor's browser (DNS
    rebinding), or send images and orders to it.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = ["localhost", "127.0.0.1", "::1", config.host, *config.allowed_hosts]
    if config.host in ("0.0.0.0", "::"):
        names += [socket.gethostname(), socket.getfqdn(), *_addresses()]
    if config.share:
        names.append("*.gradio.live")
    # Starlette cuts "[::1]:7860", an address of IPv6, at the first colon; no name begins with a bracket.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[*names, "["], www_redirect=False)
    return [hosts, Middleware(_OwnOrigin, names=names)]


class _OwnOrigin:
    """Refuses requests that a page of another server sends; a browser names that server in the header Origin."""

    def __init__(self, app: Any, names: list[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        origin = Headers(scope=scope).get("origin") if scope["type"] in ("http", "websocket") else None
        app = self._app
        if origin is not None and not self._is_own(origin):
            text = f"Requests from the page {origin!r} are refused; --allowed-hosts allows another name of this server."
            app = PlainTextResponse(text, 403)
        await app(scope, receive, send)

    def _is_own(self, origin: str) -> bool:
        try:
            name = urlsplit(origin).hostname or ""
        except ValueError:
            return False
        return any(name == own or (own.startswith("*.") and name.endswith(own[1:])) for own in self._names)


def _addresses() -> list[str]:
    """Return the addresses of this machine."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        return []


@lru_cache(maxsize=1)
def _uploads() -> tempfile.TemporaryDirectory[str]:
    """Return the folder for Gradio's uploaded and shown images, which is deleted when this process ends."""
    return tempfile.TemporaryDirectory(prefix="pecobook-uploads-")


def _check_port(config: ExploreConfig) -> None:
    """Raise ConfigError if the port is in use, before anything slow is done."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"Port {config.port} of {config.host} cannot be used ({error.strerror}). Another explorer may use it: "
                "give another --port."
            ) from None


def _open(config: ExploreConfig) -> tuple[list[IndexedTokenizer], dict[str, MaskedRun], Splits]:
    preflight = Preflight()
    if not config.runs:
        preflight.problems.append(ConfigError("No run is given: pecobook explore RUN [RUN ...] --data SOURCE."))
    tokenizers: dict[str, Any] = {}
    runs: dict[str, MaskedRun] = {}

    def load(name: str, source: str) -> None:
        if is_masked_run(source):
            runs[name] = load_masked_run(source).to(device())
            tokenizers[f"tokenizer of {name}"] = runs[name].tokenizer
        else:
            tokenizers[name] = load_tokenizer(source).to(device()).eval()

    splits = preflight.check(lambda: open_readable(config.data, config.value_range, config.runs))
    for name, source in zip(unique_names(config.runs), config.runs, strict=True):
        preflight.check(partial(load, name, source))
    preflight.finish()
    assert splits is not None
    show_source(splits)
    indexed = [index(name, tokenizer, splits, config.images) for name, tokenizer in tokenizers.items()]
    return indexed, runs, splits
