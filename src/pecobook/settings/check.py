"""Settings of `pecobook check`, which looks at every image of a source."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pecobook.settings.config_files import errors_with_lines, read_config
from pecobook.settings.images import MAX_WORKERS, ClipConfig, ImagesConfig
from pecobook.settings.values import between, refuse, replace, settings_class


@settings_class
class CheckConfig(ImagesConfig):
    """Look at every image as a command would read it: what it would learn from, and what is wrong.

    Nothing is trained. The exit code is 1 where something is wrong. The command's other flags are
    accepted and change nothing here.
    """

    task: Literal[
        "auto", "contrast", "codebook", "pretrain", "finetune", "segment", "detect", "tokenize", "probe", "embed"
    ] = "auto"
    """Command that will read the images. auto takes detect or segment for files in their layouts, and otherwise images
    with or without labels."""
    recipe: str = ""
    """Recipe of that command, whose settings of the data apply."""
    data: str = "photos"
    """Images: any source that the command takes, or photos (built in)."""
    classes: str = ""
    """File with a class on each line, as of segment."""
    mask_values: tuple[str, ...] = ()
    """Pixel values of the classes, as of segment."""
    ignore: tuple[str, ...] = ("255",)
    """Pixel values or names of classes that do not count, as of segment."""
    skip_bad: bool = False
    """Leave out what does not fit instead of reporting an error, as segment and detect do."""
    clip: ClipConfig = ClipConfig()
    masks: bool = True
    """Read the masks of objects too, as detect does."""
    out: str = ""
    """PNG file to write a contact sheet to: samples with their labels, masks and boxes drawn. Empty writes nothing."""
    samples: int = 24
    """Number of images on the contact sheet."""
    json: bool = False
    """Print one JSON object instead of text."""
    workers: int = -1
    """Number of processes that read images. -1 takes one for each core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, 1000, "samples")
        between(self, -1, MAX_WORKERS, "workers")
        if self.out and not self.out.lower().endswith(".png"):
            refuse("out", f"names the contact sheet, a .png file, not '{self.out}'.")
        if self.clip.frames and self.task not in ("auto", "finetune"):
            refuse("clip.frames", f"is a setting of finetune, not of {self.task}.")
        if self.recipe and self.task in ("auto", "probe", "embed"):
            other = "" if self.task == "auto" else f"; '{self.task}' has no recipes"
            refuse("recipe", f"needs the command that it belongs to: pecobook check COMMAND {self.recipe} ...{other}")


def of_run(config: CheckConfig, path: str) -> CheckConfig:
    """Return `config` with the command of a run and its settings of the data, from its config.json.

    Raises ConfigError.
    """
    values = read_config(path)
    names = {field.name for field in dataclasses.fields(config)} - {"out", "workers", "recipe"}
    with errors_with_lines(path):
        return replace(config, {"task": values.get("command", "auto"), **{n: values[n] for n in names & values.keys()}})
