"""`pecobook push`: upload a run's export to the Hugging Face hub, with a model card that describes the run.

Only files of the export folder leave the machine. Settings that name files are sent without their folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pecobook.engine.dry_run import size_text
from pecobook.errors import ConfigError, WeightsError
from pecobook.models.dense.detector import Detector
from pecobook.models.dense.segmenter import Segmenter
from pecobook.models.export import Exported, export_folder, read_settings
from pecobook.models.hub import check_repo_id, publish
from pecobook.models.initial import TRAINING_FILE
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.models.video import ClipClassifier
from pecobook.models.weights import Backbone, Classifier
from pecobook.settings.changes import FREE_ON_RESUME
from pecobook.settings.push import PushConfig
from pecobook.settings.values import replace
from pecobook.utils.files import without_folders
from pecobook.utils.json_files import evaluation_of, is_number, last_evaluated, read_if_valid, read_metrics
from pecobook.utils.printer import show

_KINDS: dict[str, type[Exported]] = {
    kind.kind: kind for kind in (PerceptualTokenizer, Backbone, Classifier, ClipClassifier, Segmenter, Detector)
}
_SENT = ("config.json", "README.md", ".safetensors")


def push(config: PushConfig | None = None, **settings: Any) -> str:
    """Upload a run's export; return the URL of the repository or of its branch. A dry run returns its URL too.

    Raises:
        PecobookError: the run has no export, the repository name is invalid, there is no token, or the hub cannot be
            reached or refuses the upload.
    """
    config = replace(config or PushConfig(), settings)
    missing = [name for name in ("run", "repo") if not getattr(config, name)]
    if missing:
        raise ConfigError(f"--{missing[0]} is missing: pecobook push RUN OWNER/NAME.")
    check_repo_id(config.repo)
    folder = export_folder(config.run)
    kind = read_settings(folder).get("kind")
    if kind not in _KINDS:
        raise WeightsError(f"'{config.run}' is no export of pecobook that can be uploaded (kind {kind}).")
    network = _KINDS[kind].from_pretrained(folder)
    about = _About(folder.parent if folder.name == "export" else folder)
    card = network.hub_card(config.repo, license=config.license, more=about.text(config), dataset=about.dataset)
    files = _files(folder, card)
    _list(config, folder, files)
    if config.dry_run:
        show(card, stdout=True)
        show("Nothing was sent. Without --dry-run the same command sends these files.")
        return f"https://huggingface.co/{config.repo}"
    message = config.message or f"Trained by pecobook {about.settings.get('command', '')}".rstrip()
    url = publish(config.repo, files, private=config.private, revision=config.revision, message=message)
    show(f"Done: {url}")
    return url


def _files(folder: Path, card: str) -> dict[str, bytes | Path]:
    """Return what is uploaded: the card, the settings and the weights."""
    files: dict[str, bytes | Path] = {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name.endswith(_SENT) and file.name != TRAINING_FILE
    }
    files["README.md"] = card.encode()
    return files


def _list(config: PushConfig, folder: Path, files: dict[str, bytes | Path]) -> None:
    """Show what is sent, with sizes, and what is not."""
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files.items()}
    branch = f", branch {config.revision}" if config.revision else ""
    where = f"{config.repo}{branch}{', private' if config.private else ''}"
    show(f"To {where}, from '{folder}':")
    for name, size in sizes.items():
        show(f"  {name:<24} {size_text(size):>10}")
    here = {file.name for file in folder.iterdir() if not file.name.endswith(".sha256")} - files.keys()
    if TRAINING_FILE in here:
        show(f"Not sent: {TRAINING_FILE}, which only another training reads (--init).")
    left = sorted(here - {TRAINING_FILE})
    if left:
        show(f"Not sent: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}, which no run writes there.")
    if not config.license:
        show("The card names no licence, so nobody else may use the weights: --license mit, for example.")


class _About:
    """The facts in a run folder, without the folders of this machine."""

    def __init__(self, run: Path) -> None:
        self.settings = read_if_valid(run / "config.json") or {}
        self.environment = read_if_valid(run / "environment.json") or {}
        log = run / "metrics.jsonl"
        self.metrics = read_metrics(log) if log.is_file() else []
        if "command" not in self.settings:  # only an export folder, whose config.json is that of the network
            self.settings = {}

    @property
    def dataset(self) -> str:
        """The data set on the hub, `owner/name`; empty for other data."""
        data = str(self.settings.get("data", ""))
        name = data.removeprefix("hf:").partition(":")[0]
        return name if data.startswith("hf:") and name.count("/") == 1 else ""

    def text(self, config: PushConfig) -> str:
        """Return the model card's paragraphs on data, figures and settings."""
        if not self.settings:
            return ""
        parts = [self._data(), self._evaluation(), self._settings()]
        if config.revision:
            parts.insert(
                0, f"These files are on the branch `{config.revision}`: load them with its name as `revision`."
            )
        return "\n\n".join(filter(None, parts))

    def _data(self) -> str:
        images = self.environment.get("images") or {}
        words = (("training", "training images"), ("held_out", "held-out images"), ("classes", "classes"))
        counts = ", ".join(f"{images[name]:,} {word}" for name, word in words if images.get(name))
        name = without_folders(str(self.settings.get("data", "")))
        return f"## Data\n\n`{name}`{f': {counts}' if counts else ''}."

    def _evaluation(self) -> str:
        last = last_evaluated(self.metrics)
        if last is None:
            return ""
        rows = [f"| {name} | {value:.4g} |" for name, value in evaluation_of(last).items() if is_number(value)]
        images = (self.environment.get("images") or {}).get("held_out", 0)
        number = f" {min(images, self.settings['evaluation_images']):,}" if images else ""
        heading = f"## Evaluation\n\nAfter step {last['step']:,}, on{number} held-out images:\n\n"
        return heading + "\n".join(("| metric | value |", "| --- | ---: |", *rows))

    def _settings(self) -> str:
        versions = self.environment.get("versions") or {}
        named = ", ".join(f"{name} {versions[name]}" for name in ("pecobook", "torch", "timm") if name in versions)
        hidden = {name for name in FREE_ON_RESUME if name not in ("evaluation_images",)} | {"command", "recipe"}
        kept = _without_folders({name: value for name, value in self.settings.items() if name not in hidden})
        words = ("pecobook", self.settings["command"], self.settings.get("recipe", ""))
        command = f"`{' '.join(filter(None, words))}`{f' ({named})' if named else ''}"
        return (
            f"## Training\n\n{command} with these settings:\n\n"
            f"<details><summary>settings</summary>\n\n```json\n{json.dumps(kept, indent=2)}\n```\n\n</details>"
        )


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value
