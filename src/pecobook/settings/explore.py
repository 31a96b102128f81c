"""Settings of `pecobook explore`, which serves a page for exploring codewords."""

from __future__ import annotations

from pecobook.settings.images import ImagesConfig
from pecobook.settings.values import between, positive, settings_class


@settings_class
class ExploreConfig(ImagesConfig):
    """Serve a page on this machine for viewing token maps, clicking codewords and painting masks."""

    runs: tuple[str, ...] = ()
    """Tokenizers (a codebook run, owner/name on the Hugging Face hub, dalle:FOLDER, diffusers:FOLDER) and pretrain
    runs, each shown with its own tokenizer. On the command line they may come first, without the flag."""
    images: int = 1000
    """Largest number of held-out images that are searched for patches."""
    host: str = "127.0.0.1"
    """Address that the page is served on. The default is reachable only from this machine."""
    allowed_hosts: tuple[str, ...] = ()
    """Other host names under which browsers reach the page, such as a proxy's. A request to any other name, or from a
    page of any other name, is refused, because it may come from a web site that points its name at this machine."""
    port: int = 7860
    """Port that the page is served on."""
    upload_mb: int = 20
    """Largest image upload that the page accepts, in MB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "images", "upload_mb")
        between(self, 1, 65535, "port")
