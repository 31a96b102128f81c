"""Settings of `pecobook check`, which looks at every image of a source."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pecobook.settings.config_files import errors_with_lines, read_config
from pecobook.settings.images import MAX_WORKERS, ClipConfig, ImagesConfig
from pecobook.settings.values import between, refuse, replace, settings_class


@settings_class
class CheckConfig(ImagesConfig):
    """Read every image as a command would, and report what it would learn and what is wrong.

    Nothing is trained. The exit code is 1 if something is wrong. The command's other flags are
    accepted and have no effect here.
    """

    task: Literal[
        "auto", "contrast", "codebook", "pretrain", "finetune", "segment", "detect", "tokenize", "probe", "embed"
    ] = "auto"
    """Command that will read the images. auto chooses detect or segment for files in their layouts, otherwise images
    with or without labels."""
    recipe: str = ""
    """Recipe of that command, whose data settings apply."""
    data: str = "photos"
    """Images: any source that the command takes, or photos (built in)."""
    classes: str = ""
    """File with one class per line, as in segment."""
    mask_values: tuple[str, ...] = ()
    """Pixel values of the classes, as in segment."""
    ignore: tuple[str, ...] = ("255",)
    """Pixel values or names of classes that are ignored, as in segment."""
    skip_bad: bool = False
    """Leave out unusable items instead of reporting errors, as in segment and detect."""
    clip: ClipConfig = ClipConfig()
    masks: bool = True
    """Also read the masks of objects, as in detect."""
    out: str = ""
    """PNG file for a contact sheet: samples with their labels, masks and boxes drawn. Leave empty to write none."""
    samples: int = 24
    """Number of images on the contact sheet."""
    json: bool = False
    """Print one JSON object instead of text."""
    workers: int = -1
    """Number of processes that read images. -1 uses one per core."""

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
    """Return `config` with a run's command and data settings, taken from its config.json.

    Raises ConfigError.
    """
    values = read_config(path)
    names = {field.name for field in dataclasses.fields(config)} - {"out", "workers", "recipe"}
    with errors_with_lines(path):
        return replace(config, {"task": values.get("command", "auto"), **{n: values[n] for n in names & values.keys()}})
