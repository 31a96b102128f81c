"""Settings of `pecobook explore`, which serves a page to explore codewords."""

from __future__ import annotations

from pecobook.settings.images import ImagesConfig
from pecobook.settings.values import between, positive, settings_class


@settings_class
class ExploreConfig(ImagesConfig):
    """Serve a page on this machine to look at token maps, click codewords and paint masks."""

    runs: tuple[str, ...] = ()
    """Tokenizers (a codebook run, owner/name on the hub, dalle:FOLDER, diffusers:FOLDER) and pretrain runs, each with
    the tokenizer of the run. On the command line the runs may stand first, without the flag."""
    images: int = 1000
    """Largest number of held-out images that are searched for patches."""
    host: str = "127.0.0.1"
    """Address on which the page is served. The default is reachable from this machine alone."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names under which browsers reach the page, such as that of a proxy; requests to other names and from
    pages of other names are refused, because they may come from a web site that points its name at this machine."""
    port: int = 7860
    """Port on which the page is served."""
    upload_mb: int = 20
    """Largest size of an image that the page accepts, MB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "images", "upload_mb")
        between(self, 1, 65535, "port")
