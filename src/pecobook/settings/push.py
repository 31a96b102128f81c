"""Settings of `pecobook push`, which uploads a run's export to the Hugging Face hub."""

from __future__ import annotations

import re

from pecobook.settings.values import refuse, settings_class


@settings_class
class PushConfig:
    """Upload a run's export, and nothing else of it, to the Hugging Face hub."""

    run: str = ""
    """A finished run of any training command. On the command line the run and the repository may come first, without
    the flags."""
    repo: str = ""
    """Repository on the hub, OWNER/NAME, created if it does not exist."""
    private: bool = False
    """Create a private repository. An existing public one is refused."""
    revision: str = ""
    """Branch that receives the files, created if it does not exist; empty is main."""
    message: str = ""
    """Commit message; empty names the command that trained the run."""
    license: str = ""
    """Licence of the weights for the model card, as the hub names it, such as mit or apache-2.0. Without a licence
    nobody else may use the weights."""
    dry_run: bool = False
    """List what would be sent and print the model card, but send nothing."""

    def __post_init__(self) -> None:
        if self.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            refuse("license", f"takes an identifier such as mit, apache-2.0 or other, not '{self.license}'.")
        if not re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._/-]*)?", self.revision):
            refuse("revision", f"takes the name of a branch, not '{self.revision}'.")
