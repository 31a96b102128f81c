"""`pecobook explore`: a local web page for exploring codewords.

model.py    computes what the page shows, as values
answers.py  the answer to each address
server.py   the HTTP server
static/     the page
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from functools import partial
from typing import Any

from pecobook.analysis.wording import unique_names
from pecobook.commands.explore.answers import Answers
from pecobook.commands.explore.model import index
from pecobook.commands.explore.server import Server
from pecobook.commands.masked_run import MaskedRun, is_masked_run, load_masked_run
from pecobook.engine.preamble import show_source
from pecobook.engine.value_range import open_readable
from pecobook.errors import ConfigError, Preflight
from pecobook.models.tokenizer import require_pixels
from pecobook.models.tokenizers import fingerprint, load_tokenizer
from pecobook.settings.explore import ExploreConfig
from pecobook.settings.values import replace
from pecobook.utils.devices import device
from pecobook.utils.extras import require
from pecobook.utils.printer import say, show


def explore(config: ExploreConfig | None = None, *, block: bool = True, **settings: Any) -> Server:
    """Serve the page until Ctrl-C; with `block=False` return the server, whose `close()` stops it.

    Raises:
        PreflightError: lists all problems that were found before the page was served.
        ConfigError: the port is in use.
    """
    config = replace(config or ExploreConfig(), settings)
    require("analysis", "pecobook explore")
    server = Server(config)  # before anything slow is done
    try:
        server.serve(_open(config))
    except BaseException:
        server.server_close()
        raise
    name = f"[{config.host}]" if ":" in config.host else config.host
    show(f"\nOpen http://{name}:{config.port} (Ctrl-C stops the server)")
    if block:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(server):
            threading.Event().wait()
    return server


def _open(config: ExploreConfig) -> Answers:
    preflight = Preflight()
    if not config.runs:
        preflight.problems.append(ConfigError("No run is given: pecobook explore RUN [RUN ...] --data SOURCE."))
    loaded: dict[str, Any] = {}

    def load(name: str, source: str) -> None:
        loaded[name] = load_masked_run(source) if is_masked_run(source) else load_tokenizer(source).eval()
        tokenizer = getattr(loaded[name], "tokenizer", loaded[name])
        require_pixels(tokenizer, f"'{source}'", "be explored, which draws images; 'pecobook analyze' shows its codes")

    splits = preflight.check(lambda: open_readable(config.data, config.value_range, config.runs))
    for name, source in zip(unique_names(config.runs), config.runs, strict=True):
        preflight.check(partial(load, name, source))
    preflight.finish()
    assert splits is not None
    show_source(splits)
    tokenizers, owner = _distinct_tokenizers(loaded)
    indexed = [index(name, one.to(device()), splits.evaluation, config.images) for name, one in tokenizers.items()]
    runs = {name: (run.to(device()), owner[name]) for name, run in loaded.items() if isinstance(run, MaskedRun)}
    return Answers(indexed, runs, splits.evaluation, config.upload_mb)


def _distinct_tokenizers(loaded: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each tokenizer once, by name, and for each run the name of its tokenizer.

    A codebook run and a ViT trained on its codes share a tokenizer.
    """
    names: dict[str, str] = {}  # of tokenizers, by fingerprint
    tokenizers, owner = {}, {}
    for name, one in sorted(loaded.items(), key=lambda item: isinstance(item[1], MaskedRun)):
        tokenizer = one.tokenizer if isinstance(one, MaskedRun) else one
        full_name = f"tokenizer of {name}" if isinstance(one, MaskedRun) else name
        first = names.setdefault(fingerprint(tokenizer), full_name)
        owner[name] = first
        if first == full_name:
            tokenizers[first] = tokenizer
        else:
            say(f"The tokenizer of {name} is that of {first}, and listed once.")
    return tokenizers, owner
