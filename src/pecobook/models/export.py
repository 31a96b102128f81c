"""Export folders of trained networks: writing, reading, and uploading to the Hugging Face hub.

An export folder contains `model.safetensors`, `config.json` with their checksums, and `README.md`. Nothing in this
module unpickles code.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from pecobook.errors import PecobookError, WeightsError
from pecobook.models.hub import publish, resolve_source
from pecobook.models.snippets import range_text
from pecobook.settings.images import AUTO, MAX_IMAGE_SIZE, RangeSetting
from pecobook.utils.checksums import checksum_file, damage, write_with_checksum
from pecobook.utils.files import write_atomically
from pecobook.utils.given import given
from pecobook.utils.json_files import COUNT, NUMBER, OBJECT, SWITCH, TEXT, WHOLE, Kind, Schema, list_of, read_json

_SIZE = Kind(f"a whole number from 1 to {MAX_IMAGE_SIZE}", lambda value: WHOLE.holds(value) and value <= MAX_IMAGE_SIZE)
_SHARE = Kind("a number above 0 and up to 1", lambda value: NUMBER.holds(value) and 0 < value <= 1)
_NAMES = Kind("a list of at least one text", lambda value: list_of(TEXT).holds(value) and bool(value))
_OF_0_1 = Kind("a whole number, which exports have since version 0.1.0", COUNT.holds)
_NETWORK = {"name": TEXT, "args": OBJECT, "mean": list_of(NUMBER, 3), "std": list_of(NUMBER, 3)}
_PYRAMID = {**_NETWORK, "image_size": _SIZE, "window": COUNT}
_CLASSIFIER = {**_NETWORK, "image_size": _SIZE, "classes": _NAMES, "crop": _SHARE.or_none}
_COMMON = {
    "kind": TEXT.or_none,
    "origin": TEXT.or_none,
    "init": TEXT.or_none,
    "value_range": list_of(NUMBER, 2).or_none,
}
_SCHEMAS: dict[str, Schema] = {
    "tokenizer": {"model": {"group_size": _OF_0_1}, "num_codewords": WHOLE, "image_size": _SIZE},
    "backbone": {**_NETWORK, "image_size": _SIZE.or_none},
    "classifier": _CLASSIFIER,
    "clip classifier": {**_CLASSIFIER, "clip": OBJECT},
    "segmenter": {"pyramid": _PYRAMID, "classes": _NAMES, "width": COUNT, "image_size": _SIZE},
    "detector": {
        "pyramid": _PYRAMID,
        "classes": _NAMES,
        "category_ids": list_of(COUNT),
        "masks": SWITCH,
        "sides": list_of(_SIZE, 2),
        "heads": OBJECT,
    },
}
"""The fields of config.json, by kind of network."""


def export_folder(path: str | Path) -> Path:
    """Return the export folder of a run, or the folder itself. Raises WeightsError if it contains no export."""
    folder = Path(path)
    for candidate in (folder / "export", folder):
        if (candidate / "model.safetensors").is_file() and (candidate / "config.json").is_file():
            return candidate
    if not folder.exists():
        raise WeightsError(f"There is no run '{path}'. Give a run folder of pecobook or timm:NAME.")
    raise WeightsError(
        f"'{path}' contains no export/model.safetensors: it is not a finished run. Finish it with --resume."
    )


def read_settings(path: str | Path, *, kinds: Collection[str] = tuple(_SCHEMAS)) -> dict[str, Any]:
    """Return the settings of an export folder, without the weights. Raises WeightsError if it is missing or damaged.

    Args:
        path: the export folder, or the folder of its run.
        kinds: the kinds that the caller accepts. Fields of other kinds are not checked, so that the caller reports the
            kind and not a field.
    """
    if (network := given("backbone", str(path))) is not None:
        return {"kind": network.kind, **network.settings(), **range_entry(network)}
    file = export_folder(path) / "config.json"
    _check_undamaged(file)

    def schema(content: dict[str, Any]) -> Schema:
        kind = str(content.get("kind"))
        return {**_COMMON, **(_SCHEMAS.get(kind, {}) if kind in kinds else {})}

    return read_json(file, schema, error=WeightsError, remedy="Export the run again, with --resume.")


def check_kind(source: str, kind: str, command: str) -> None:
    """Raise WeightsError unless `--init` of `command` is a finished run that exports a network of this kind."""
    if source.startswith("timm:") or Path(source).is_file():
        found = "not a run"
    else:
        found = f"a {read_settings(source, kinds=(kind,)).get('kind')}"
    if found != f"a {kind}":
        raise WeightsError(
            f"--init '{source}' is {found}: '{command}' starts from another {command} run, with its head. Any other "
            "backbone is given with --backbone, and a file of its weights with --weights."
        )


def read_export(
    path: str | Path, *, kinds: Collection[str] = tuple(_SCHEMAS)
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and weights of an export folder, as `read_settings` reads them. Raises WeightsError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_settings(path, kinds=kinds)
    if (network := given("backbone", str(path))) is not None:
        return config, {name: value.detach().cpu().clone() for name, value in network.body.state_dict().items()}
    folder = export_folder(path)
    _check_undamaged(folder / "model.safetensors")
    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"The export in '{folder}' cannot be read: {error}") from None
    broken = next((name for name, value in state.items() if value.is_floating_point() and value.isnan().any()), None)
    if broken:
        raise WeightsError(f"The export in '{path}' has NaN in '{broken}': train again with a lower --optim.lr.")
    return config, state


def _check_undamaged(file: Path) -> None:
    sentence = damage([file])
    if sentence:
        remedy = f"If you changed it yourself, delete '{checksum_file(file).name}'; else export the run again."
        raise WeightsError(f"{sentence}\n{remedy}")


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically, with its checksum: the file is either complete or absent."""
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_with_checksum(file, save(contiguous, metadata={"format": "pt"}))


def write_export(folder: Path, config: dict[str, Any], state: dict[str, Tensor], card: str) -> None:
    """Write an export folder.

    Args:
        folder: the folder; created if it does not exist.
        config: content of `config.json`.
        state: weights.
        card: text of the model card.
    """
    write_tensors(folder / "model.safetensors", state)
    write_atomically(folder / "README.md", card.encode())
    # config.json is written last, since a folder counts as an export only if it contains this file.
    write_with_checksum(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def range_entry(network: Any) -> dict[str, Any]:
    """Return config.json's entry for the values that are black and white in images with more than 8 bits."""
    value_range = getattr(network, "value_range", AUTO)
    return {} if value_range == AUTO else {"value_range": list(value_range)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Content of a model card, except the Python code that loads the model and applies it to an image."""

    title: str
    text: str
    """Paragraphs before the Python code."""
    more: str = ""
    """Paragraphs after the Python code."""
    tags: tuple[str, ...]
    pipeline: str = ""
    """Name of the task on the Hugging Face hub, if the hub has one."""
    library: str = "pecobook"
    """Name of the library that loads the model."""
    license: str = ""
    """Identifier of the licence, such as mit; empty for none."""
    dataset: str = ""
    """Data set of the hub that the model was trained on, `owner/name`; empty for none."""

    def render(self, loading_code: str) -> str:
        """Return the whole card as Markdown; `loading_code` is the Python code that uses the model."""
        task = f"pipeline_tag: {self.pipeline}\n" if self.pipeline else ""
        task += f"license: {self.license}\n" if self.license else ""
        task += f"datasets: [{self.dataset}]\n" if self.dataset else ""
        header = f"---\nlibrary_name: {self.library}\n{task}tags: [{', '.join(self.tags)}]\n---\n"
        more = f"\n{self.more}\n" if self.more else ""
        return f"{header}# {self.title}\n\n{self.text}\n\n```python\n{loading_code}\n```\n{more}"


class Exported(nn.Module):
    """A network that can be saved to an export folder, loaded from one, and uploaded to the Hugging Face hub."""

    kind: ClassVar[str]
    """Value of `kind` in `config.json`."""
    trained_by: ClassVar[str]
    """The commands whose runs export a network of this kind, for error messages."""
    origin: str = ""
    """How the network was trained, read from the export by `from_pretrained`; empty if that is unknown."""
    init: str = ""
    """The weights that the training started from, and what was loaded from them; empty for random weights."""
    value_range: RangeSetting = AUTO
    """The values mapped to black and white in training images with more than 8 bits, read from the export."""

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `rebuild` builds an equal network, as JSON values."""
        raise NotImplementedError

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """Build the network that `settings` describes, with random weights."""
        raise NotImplementedError

    def loading_code(self, source: str) -> str:
        """Return Python code that loads the network from the folder `source` and applies it to an image file."""
        raise NotImplementedError

    def hub_loading_code(self, repo_id: str) -> str:
        """Return the same code for the repository `repo_id` on the Hugging Face hub."""
        return self.loading_code(repo_id)

    def card(self, origin: str) -> Card:
        """Return the model card; `origin` describes how the network was trained, empty if that is unknown."""
        raise NotImplementedError

    @property
    def body(self) -> nn.Module:
        """The module whose weights are exported."""
        return self

    @classmethod
    def is_exported(cls, name: str) -> bool:  # noqa: ARG003
        """Return whether an export includes the weight of this name."""
        return True

    def load_exported(self, state: dict[str, Tensor]) -> None:
        """Load the weights of an export into `body`. Raises WeightsError or RuntimeError if any weight does not fit."""
        missing, unknown = self.body.load_state_dict(state, strict=False)
        mismatched = sorted(name for name in missing if self.is_exported(name)) or unknown
        if mismatched:
            raise WeightsError(f"missing or unknown weights {', '.join(mismatched[:5])}")

    def save_pretrained(
        self, folder: str | Path, *, state: dict[str, Tensor] | None = None, origin: str = "", repo_id: str = ""
    ) -> None:
        """Write `model.safetensors`, `config.json` and a model card.

        Args:
            folder: the folder to write; created if it does not exist.
            state: weights of `body` to write; None uses `body.state_dict()`, which under sharding holds only this
                process's shard.
            origin: how the network was trained, for the card and `config.json`; empty uses the attribute `origin`.
            repo_id: hub repository that the card's code loads the network from; if empty, the code loads it from a
                folder.
        """
        state = self.body.state_dict() if state is None else state
        exported = {name: value for name, value in state.items() if self.is_exported(name)}
        loading_code = self.hub_loading_code(repo_id) if repo_id else self.loading_code("path/to/this/folder")
        origin = origin or self.origin
        texts = {name: text for name, text in (("origin", origin), ("init", self.init)) if text}
        config = {"kind": self.kind, **self.settings(), **texts, **range_entry(self)}
        write_export(Path(folder), config, exported, self._full_card(origin).render(loading_code))

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str = "") -> Self:
        """Load from a run folder, an export folder, or `owner/name` on the Hugging Face hub.

        Args:
            source: the folder, or `owner/name`.
            revision: branch, tag or commit on the hub; empty for `main`.

        Returns:
            the network in evaluation mode.

        Raises:
            WeightsError: the export is missing, damaged, or of another kind.
        """
        config, state = read_export(resolve_source(source, revision), kinds=(cls.kind,))
        kind, origin, init = config.pop("kind", None), config.pop("origin", ""), config.pop("init", "")
        value_range = tuple(config.pop("value_range", AUTO))
        if kind != cls.kind:
            raise WeightsError(
                f"'{source}' is {f'a {kind}' if kind else 'no export of pecobook'}, not a {cls.kind}: give a run of "
                f"pecobook {cls.trained_by}."
            )
        try:
            network = cls.rebuild(config)
            network.load_exported(state)
        except (PecobookError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch lists every tensor
            raise WeightsError(f"The {cls.kind} in '{source}' is damaged: {reason}") from None
        network.origin, network.init, network.value_range = origin, init, value_range
        return network.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str = "",
        message: str = "",
        license: str = "",  # noqa: A002
    ) -> str:
        """Upload to the Hugging Face hub as `owner/name`; `pecobook.push` also describes the run's data and figures.

        Args:
            repo_id: `owner/name`; the repository is created if it does not exist.
            private: create a private repository.
            revision: branch that receives the files, created if it does not exist; empty for `main`.
            message: commit message.
            license: identifier of the licence on the card, such as mit.

        Returns:
            the URL of the repository.

        Raises:
            WeightsError: the hub does not accept this repository name.
            HubError: there is no token, or the hub cannot be reached or refuses the upload.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            # Without checksums: the hub verifies files itself, and lets people edit them.
            files: dict[str, bytes | Path] = {
                file.name: file for file in Path(folder).iterdir() if not file.name.endswith(".sha256")
            }
            files["README.md"] = self.hub_card(repo_id, license=license).encode()
            return publish(repo_id, files, private=private, revision=revision, message=message)

    def hub_card(self, repo_id: str, *, license: str = "", more: str = "", dataset: str = "") -> str:  # noqa: A002
        """Return the model card for the repository `repo_id`, ending with the paragraphs in `more`."""
        card = self._full_card(self.origin)
        more = "\n\n".join(filter(None, (card.more, more)))
        card = dataclasses.replace(card, license=license, more=more, dataset=dataset)
        return card.render(self.hub_loading_code(repo_id))

    def _full_card(self, origin: str) -> Card:
        card = self.card(origin)
        texts = [card.text]
        if self.init:
            texts.append(f"Start of the training: {self.init}.")
        if self.value_range != AUTO:
            texts.append(range_text(self.value_range))
        return dataclasses.replace(card, text="\n\n".join(texts))
