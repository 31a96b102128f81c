"""What a run leaves for others: an export folder, and networks that save, load and upload themselves as one.

An export folder is `model.safetensors`, `config.json` and `README.md`. Nothing here unpickles code.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from pecobook.errors import PecobookError, WeightsError, first_line


def export_folder(path: str | Path) -> Path:
    """The export folder of a run, or the folder itself. Raises WeightsError when there is none."""
    folder = Path(path)
    for candidate in (folder / "export", folder):
        if (candidate / "model.safetensors").is_file() and (candidate / "config.json").is_file():
            return candidate
    if not folder.exists():
        raise WeightsError(f"There is no run '{path}'. Give a run folder of pecobook or timm:NAME.")
    raise WeightsError(
        f"'{path}' holds no export/model.safetensors: it is not a finished run. Finish it with --resume."
    )


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings of an export folder, without its weights. Raises WeightsError when it is missing or damaged."""
    folder = export_folder(path)
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("config.json holds no JSON object")
    except (OSError, ValueError) as error:
        raise WeightsError(f"The export in '{folder}' cannot be read: {error}") from None
    return config


def read_export(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of an export folder. Raises WeightsError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, folder = read_settings(path), export_folder(path)
    try:
        return config, load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"The export in '{folder}' cannot be read: {error}") from None


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save

    from pecobook.utils.files import write_atomically

    file.parent.mkdir(parents=True, exist_ok=True)
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(file, save(own, metadata={"format": "pt"}))


def write_export(folder: Path, config: dict[str, Any], state: dict[str, Tensor], card: str) -> None:
    """Write an export folder."""
    from pecobook.utils.files import write_atomically

    write_tensors(folder / "model.safetensors", state)
    write_atomically(folder / "README.md", card.encode())
    # Last, since its presence makes the folder an export.
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """A model card, but for the Python that loads the model."""

    title: str
    text: str
    """Paragraphs before the Python."""
    usage: str = ""
    """Python that comes after what loads it."""
    more: str = ""
    """Paragraphs at the end."""
    tags: tuple[str, ...]
    pipeline: str = ""
    """The Hugging Face hub's name of the task, if it has one."""
    library: str = "pecobook"
    """What loads it."""

    def render(self, lines: str) -> str:
        """The whole card, with `lines` of Python."""
        task = f"pipeline_tag: {self.pipeline}\n" if self.pipeline else ""
        head = f"---\nlibrary_name: {self.library}\n{task}tags: [{', '.join(self.tags)}]\n---\n"
        after = f"\n{self.more}\n" if self.more else ""
        usage = f"\n{self.usage}" if self.usage else ""
        return f"{head}# {self.title}\n\n{self.text}\n\n```python\n{lines}{usage}\n```\n{after}"


class Exported(nn.Module):
    """A network that saves itself as an export folder, loads from one, and goes to the Hugging Face hub and back."""

    kind: ClassVar[str]
    """What `config.json` calls it."""
    comes_from: ClassVar[str]
    """The commands whose runs hold one."""

    def settings(self) -> dict[str, Any]:
        """All that `rebuild` makes the same network of, as plain values."""
        raise NotImplementedError

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """The network that `settings` describes, with random weights."""
        raise NotImplementedError

    def lines(self, source: str) -> str:
        """Python that loads it from the folder `source`."""
        raise NotImplementedError

    def hub_lines(self, repo_id: str) -> str:
        """Python that loads it from the hub's repository `repo_id`."""
        return self.lines(repo_id)

    def card(self, origin: str) -> Card:
        """The model card; `origin` tells what trained it, as far as that is known."""
        raise NotImplementedError

    @property
    def body(self) -> nn.Module:
        """The module whose weights are exported."""
        return self

    @classmethod
    def is_exported(cls, name: str) -> bool:  # noqa: ARG003
        """Whether the weight of this name goes with an export."""
        return True

    def load_exported(self, state: dict[str, Tensor]) -> None:
        """Take the weights of an export, all of them. Raises WeightsError or RuntimeError when they do not fit."""
        missing, unknown = self.body.load_state_dict(state, strict=False)
        wrong = sorted(name for name in missing if self.is_exported(name)) or unknown
        if wrong:
            raise WeightsError(f"missing or unknown weights {', '.join(wrong[:5])}")

    def save_pretrained(
        self, folder: str | Path, *, state: dict[str, Tensor] | None = None, origin: str = "", repo_id: str = ""
    ) -> None:
        """Write `model.safetensors`, `config.json` and a model card.

        Args:
            folder: where to.
            state: weights of `body` to write instead of its own, which may be this process's shard alone.
            origin: what trained it, for the card.
            repo_id: of the hub's repository that the card loads from; empty for the folder.
        """
        state = self.body.state_dict() if state is None else state
        own = {name: value for name, value in state.items() if self.is_exported(name)}
        lines = self.hub_lines(repo_id) if repo_id else self.lines("path/to/this/folder")
        write_export(Path(folder), {"kind": self.kind, **self.settings()}, own, self.card(origin).render(lines))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Load from a run folder, an export folder, or `owner/name` on the Hugging Face hub; in evaluation mode.

        Raises:
            WeightsError: there is none, it is damaged, or it is of another kind.
        """
        config, state = read_export(_place(source))
        kind = config.pop("kind", None)
        if kind != cls.kind:
            raise WeightsError(
                f"'{source}' is {f'a {kind}' if kind else 'no export of pecobook'}, not a {cls.kind}: give a run of "
                f"pecobook {cls.comes_from}."
            )
        try:
            network = cls.rebuild(config)
            network.load_exported(state)
        except (PecobookError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise WeightsError(f"The {cls.kind} in '{source}' is damaged: {error}") from None
        return network.eval()

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload to the Hugging Face hub as `owner/name`; returns the address."""
        from huggingface_hub import HfApi

        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id=repo_id)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(url)


def _place(source: str | Path) -> Path:
    """The folder, fetched from the hub where there is none of this name and it could be one of the hub's."""
    if Path(source).exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=["model.safetensors", "config.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(f"There is no run '{source}' here, and the hub gives none ({first_line(error)}).") from None
