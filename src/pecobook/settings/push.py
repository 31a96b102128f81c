"""Settings of `pecobook push`, which uploads the export of a run to the Hugging Face hub."""

from __future__ import annotations

import re

from pecobook.settings.values import refuse, settings_class


@settings_class
class PushConfig:
    """Upload the export of a run, and nothing else of it, to the Hugging Face hub."""

    run: str = ""
    """A finished run of any training command. On the command line the run and the repository may stand first, without
    the flags."""
    repo: str = ""
    """Repository on the hub, OWNER/NAME. It is created if it is missing."""
    private: bool = False
    """Create a private repository. A public one that exists is refused."""
    revision: str = ""
    """Branch that receives the files, created if it is missing; empty is main."""
    message: str = ""
    """Message of the commit; empty names the command that trained the run."""
    license: str = ""
    """Licence of the weights on the model card, as the hub names it, such as mit or apache-2.0. Without a licence
    nobody else may use the weights."""
    dry_run: bool = False
    """List what would be sent, print the model card, and send nothing."""

    def __post_init__(self) -> None:
        if self.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            refuse("license", f"takes an identifier such as mit, apache-2.0 or other, not '{self.license}'.")
        if not re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._/-]*)?", self.revision):
            refuse("revision", f"takes the name of a branch, not '{self.revision}'.")
