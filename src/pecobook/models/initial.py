"""Initial weights of a training, `--init RUN|timm:NAME|FILE`: which parts are used and which are not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import left_aside, load_state, misfits, read_checkpoint, read_weights
from pecobook.models.export import export_folder, read_export, read_settings, write_tensors
from pecobook.models.hub import resolve_source
from pecobook.models.network_traits import differing_layer
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.models.tokenizers import fingerprint, load_tokenizer
from pecobook.models.weights import load_backbone, load_file
from pecobook.settings.changes import changed_settings, complete
from pecobook.settings.images import IMAGENET_MEAN, IMAGENET_STD
from pecobook.settings.values import to_dict
from pecobook.utils.files import without_folders
from pecobook.utils.json_files import OBJECT, TEXT, Schema, read_if_valid

TRAINING_FILE = "training.safetensors"
"""File of an export with weights that only training reads: heads, momentum encoders, a codebook's averages."""
_GROUP_REMEDY = "leave --model settings out, so that the network is that of --init"


@dataclasses.dataclass
class Start:
    """The parts that a training has taken from the weights of `--init`."""

    source: str
    """The value of --init."""
    taken: list[str] = dataclasses.field(default_factory=list)
    """Names of the parts that were taken."""
    left: list[str] = dataclasses.field(default_factory=list)
    """Names of the parts that were not taken, each with the reason."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean that the network expects of its input."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation that the network expects of its input."""
    lines: tuple[str, ...] = ()
    """More lines for the user."""

    @property
    def summary(self) -> str:
        """A line on what was loaded and what was not; empty without --init."""
        if not self.source:
            return ""
        left = f"; left: {', '.join(self.left)}" if self.left else ""
        return f"taken from '{without_folders(self.source)}' (--init): {', '.join(self.taken)}{left}"

    @property
    def notes(self) -> tuple[str, ...]:
        """All lines for the user; none without --init."""
        return (self.summary, *self.lines) if self.source else ()


@contextmanager
def _with_remedy(remedy: str) -> Iterator[None]:
    """Name the flag and the remedy if weights do not fit the network."""
    try:
        yield
    except WeightsError as error:
        if "do not fit" not in str(error):
            raise
        raise WeightsError(f"--init: {error}\nTo start from them, {remedy}.") from None


def start_backbone(network: nn.Module, source: str, *, name: str, args: dict[str, Any], image_size: int) -> Start:
    """Load weights into the timm network `name`, built with `args` and without a head; resample its positions.

    Args:
        network: the network.
        source: a run with a backbone, `timm:NAME`, or a weights file; empty leaves the network unchanged.
        name: timm's name of `network`.
        args: arguments that timm built `network` with.
        image_size: side of the images that `network` reads, in pixels.

    Raises:
        WeightsError: the weights are missing, damaged, or belong to another network.
    """
    if not source:
        return Start("")
    if Path(source).is_file():
        checkpoint = None if source.endswith(".npz") else read_checkpoint(source)
        with _with_remedy("name their network with --model.name timm's NAME and --model.args"):
            left, normalisation = load_file(network, name, args, source, checkpoint)
        aside = left_aside(source, checkpoint, left) if checkpoint else ""
        lines = (normalisation.line(source), *([aside] if aside else []))
        return _start(source, normalisation.mean, normalisation.std, *lines)
    loaded = load_backbone(source, image_size=image_size)
    with _with_remedy("leave --model.name and --model.args out, so that the network is that of --init"):
        load_state(network, loaded.network.state_dict(), source=source)
        if difference := differing_layer(network, loaded.network):
            raise WeightsError(f"The weights of '{source}' do not fit this network: its {difference}.")
    start = _start(source, loaded.mean, loaded.std, *loaded.notes)
    if not source.startswith("timm:"):
        settings = read_settings(source)
        size, tables = settings.get("image_size"), ("pos_embed", "relative_position_bias_table")
        if size and size != image_size and any(name.endswith(tables) for name in network.state_dict()):
            start.taken = [f"backbone, its positions resampled from {size} to {image_size} pixels"]
        start.left = ["head"] if settings.get("classes") else []
    return start


def _start(source: str, mean: tuple[float, ...], std: tuple[float, ...], *lines: str) -> Start:
    return Start(source, ["backbone"], mean=mean, std=std, lines=lines)


# ------------------------------------------------------------------------------------------- weights beside the network


def write_training_weights(folder: Path, state: dict[str, Tensor], *, leave_out: Iterable[str]) -> None:
    """Write a stage's weights that its export does not contain, so that another training can start from them.

    Args:
        folder: the export folder.
        state: the full state of the stage.
        leave_out: prefixes of names that the export already contains, or that are frozen.
    """
    others = {name: value for name, value in state.items() if not name.startswith(tuple(leave_out))}
    write_tensors(folder / TRAINING_FILE, others)


def training_weights(source: str, file: str = TRAINING_FILE) -> dict[str, Tensor]:
    """Return the training weights in a run's export; an empty dictionary if there are none."""
    if source.startswith("timm:") or Path(source).is_file():
        return {}
    path = export_folder(resolve_source(source)) / file
    return read_weights(str(path)) if path.is_file() else {}


def take_parts(
    module: nn.Module, state: dict[str, Tensor], start: Start, *, skip: Collection[str] = (), rename: str = ""
) -> None:
    """Load the parts of `module` that `state` has in the same shapes; record in `start` what was loaded and what not.

    Args:
        module: a network; its direct submodules and parameters are the parts.
        state: weights under the names of the module's state dict.
        start: records the parts.
        skip: parts that stay unchanged and are not recorded.
        rename: prefix of a part's name in the records.
    """
    own = module.state_dict()
    parts = dict.fromkeys(name.partition(".")[0] for name in [*own, *state])
    for part in [part for part in parts if part not in skip]:
        ours, theirs = ({n: v for n, v in every.items() if n.partition(".")[0] == part} for every in (own, state))
        if ours and theirs and not misfits(theirs, ours):
            own |= theirs
            start.taken.append(rename + part)
        elif ours and theirs:
            start.left.append(f"{rename}{part} ({_first_misfit(theirs, ours)})")
        elif ours:
            start.left.append(f"{rename}{part} (not in it)")
        else:
            start.left.append(f"{rename}{part} (not part of this training)")
    module.load_state_dict(own)


def _first_misfit(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> str:
    """Return the shapes of the first tensor that differs, or what is missing."""
    for name, value in ours.items():
        if name in theirs and theirs[name].shape != value.shape:
            there, here = (" x ".join(map(str, tensor.shape)) for tensor in (theirs[name], value))
            return f"{there} there, {here} here"
    return "other layers"


# ----------------------------------------------------------------------------------------------------------- tokenizers


def start_tokenizer(tokenizer: PerceptualTokenizer, source: str, *, vectors: float) -> Start:
    """Load encoder, decoder and codebook, with the codebook's averages if the export has them.

    If the number of codewords differs, the codebook is not loaded, and k-means initialises it.

    Args:
        tokenizer: the tokenizer being trained.
        source: a codebook run, an export folder, `owner/name` on the Hugging Face hub, or a file with a tokenizer's
            weights.
        vectors: number of latent vectors per step, over which missing averages are spread evenly.

    Raises:
        WeightsError: the weights are missing, damaged, or belong to a tokenizer of another shape.
    """
    if ":" in source and not Path(source).exists():
        raise WeightsError(
            f"--init '{source}': a codebook starts from another codebook run, or from a file of its weights; a network "
            "of timm can be its perceptual network (--perceptual.network)."
        )
    start = Start(source, ["encoder", "decoder"])
    state, averages = _read_tokenizer(tokenizer, source, start)
    expected, K = tokenizer.state_dict(), tokenizer.num_codewords
    codebook = state.pop("quantizer.codebook", None)
    body = {name: value for name, value in expected.items() if not name.startswith("quantizer.")}
    problem = misfits(state, body)
    if problem:
        raise WeightsError(f"--init: The weights of '{source}' do not fit: {problem}.\nTo start, {_GROUP_REMEDY}.")
    if codebook is not None and codebook.shape == expected["quantizer.codebook"].shape:
        start.taken.append(f"{K} codewords")
        state |= {"quantizer.codebook": codebook, **_averages(codebook, averages, start, vectors)}
    elif codebook is not None:
        there, here = (" x ".join(map(str, value.shape)) for value in (codebook, expected["quantizer.codebook"]))
        start.left.append(f"codewords ({there} there, {here} here: k-means starts them anew)")
    tokenizer.load_state_dict({**expected, **state})
    return start


def _read_tokenizer(
    tokenizer: PerceptualTokenizer, source: str, start: Start
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a tokenizer's weights, and its codebook's averages under the tokenizer's names."""
    if Path(source).is_file():
        state = read_checkpoint(source).state
        inner = {name.removeprefix("tokenizer."): value for name, value in state.items() if "tokenizer." in name}
        state = inner or state
        averages = {name: state.pop(name) for name in list(state) if name.startswith("quantizer.ema_")}
        beside = read_if_valid(Path(source).parent / "config.json", {"model": OBJECT})
        _compare_settings(tokenizer, beside or {}, start)
        names = ("encoder.", "decoder.", "quantizer.codebook")
        return {name: value for name, value in state.items() if name.startswith(names)}, averages
    folder = resolve_source(source)
    settings, state = read_export(folder, kinds=("tokenizer",))
    if settings.get("kind") != "tokenizer":
        raise WeightsError(f"--init '{source}' is a {settings.get('kind')}, not a tokenizer: give a codebook run.")
    _compare_settings(tokenizer, settings, start)
    extra = training_weights(source)
    return state, {n.removeprefix("tokenizer."): v for n, v in extra.items() if n.startswith("tokenizer.")}


def _compare_settings(tokenizer: PerceptualTokenizer, settings: dict[str, Any], start: Start) -> None:
    """Record in `start` which settings of an export's network differ from those of `tokenizer`: weights show few."""
    defaults = to_dict(tokenizer.config)
    there = complete({"model": settings.get("model", {})}, defaults)["model"]
    if changed := changed_settings(there, defaults["model"], "model."):
        start.lines = (f"--init: settings of the network differ from those there: {'; '.join(changed)}",)


def _averages(codebook: Tensor, averages: dict[str, Tensor], start: Start, vectors: float) -> dict[str, Tensor]:
    """Return a codebook's moving averages; steps and revivals are those of the new training, which starts at 0."""
    names = [f"quantizer.{name}" for name in ("ema_count", "ema_sum", "usage", "idle", "unused")]
    found = {name: averages[name] for name in names if name in averages}
    if {"quantizer.ema_count", "quantizer.ema_sum"} <= found.keys():
        start.taken.append("their averages")
        return found
    start.left.append("averages of the codewords (not in it: all begin as if used equally)")
    counts = torch.full((len(codebook),), max(vectors / len(codebook), 1e-3))
    return {
        "quantizer.ema_count": counts,
        "quantizer.ema_sum": codebook * counts[:, None],
        "quantizer.usage": counts.clone(),
    }


# ------------------------------------------------------------------------------------------------- training with labels


def start_head(network: nn.Module, source: str, classes: tuple[str, ...]) -> Start:
    """Load the head of a finetune run into a network that already has its backbone.

    Args:
        network: a timm network with a head for `classes`.
        source: the run; empty leaves the network unchanged.
        classes: names of the classes. The head is taken if the run has the same ones, in the same order.
    """
    if not source:
        return Start("")
    start = Start(source, ["backbone"])
    settings, state = read_export(source, kinds=("classifier",))
    if tuple(settings["classes"]) == classes:
        load_state(network, state, source=source)
        start.taken.append(f"head of {len(classes)} classes")
    else:
        start.left.append(f"head ({len(settings['classes'])} classes there, {len(classes)} others here)")
    return start


def start_dense(model: nn.Module, source: str, kind: str, classes: Sequence[str]) -> Start:
    """Load those weights of a segment or detect run that fit; resample tables of relative positions.

    Args:
        model: a segmenter or detector, whose backbone is the run's network.
        source: the run; empty leaves the model unchanged.
        kind: kind of the model, as its export names it.
        classes: names of the classes of `model`.
    """
    from timm.layers import resize_rel_pos_bias_table

    if not source:
        return Start("")
    settings, state = read_export(source, kinds=(kind,))
    own = model.state_dict()
    for name, value in state.items():
        if name.endswith("relative_position_bias_table") and name in own and own[name].shape != value.shape:
            side = (math.isqrt(len(own[name])) + 1) // 2  # of a square grid, with three entries of the class token
            state[name] = resize_rel_pos_bias_table(
                value.contiguous(), new_window_size=(side, side), new_bias_shape=own[name].shape
            )
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict({**own, **fitting})
    start = Start(source, [f"{len(fitting)} of {len(own)} tensors"])
    parts = dict.fromkeys(name.rpartition(".")[0] for name in own if name not in fitting)
    there = {name.rpartition(".")[0] for name in state}
    start.left = [f"{part} ({'another shape' if part in there else 'not in it'})" for part in parts]
    if tuple(settings["classes"]) != tuple(classes):
        start.lines = (f"--init: its classes were {', '.join(settings['classes'])[:200]}",)
    return start


# --------------------------------------------------------------------------------------------------- masked image model


def take_masked_model(model: nn.Module, start: Start, target: str, tokenizer: nn.Module | None) -> None:
    """Take the mask token, decoder and head of a pre-training run; the head only if it predicts the same targets.

    Args:
        model: the masked image model, whose backbone already has its weights.
        start: the record of its backbone's start, to which the parts are added.
        target: the setting `target` of the training.
        tokenizer: the tokenizer of the training; None for pixels.
    """
    state = training_weights(start.source, "mim.safetensors") if start.source else {}
    if not state:
        start.left += ["mask token and head (not in it)"] if start.source else []
        return
    reason = _other_targets(start.source, target, tokenizer)
    start.left += [f"head ({reason})"] if reason else []
    take_parts(model, state, start, skip=("backbone", "head") if reason else ("backbone",))


_TARGET: Schema = {"target": TEXT, "tokenizer": TEXT, "out": TEXT}


def _other_targets(run: str, target: str, tokenizer: nn.Module | None) -> str:
    """Return why a run's head does not predict the targets of a training; empty if it does."""
    settings = read_if_valid(export_folder(run).parent / "config.json", _TARGET)
    if settings is None:
        return "the settings of its run are not beside it"
    if settings["target"] != target:
        return f"it predicts {settings['target']}"
    if tokenizer is None:
        return ""
    try:
        source = tokenizer_of_run(settings["tokenizer"], settings["out"], Path(run))
        same = fingerprint(load_tokenizer(source)) == fingerprint(tokenizer)
    except WeightsError:
        return f"its tokenizer '{settings['tokenizer']}' is not there to compare"
    return "" if same else "it predicts the codes of another tokenizer"


def tokenizer_of_run(tokenizer: str, out: str, run: Path) -> str:
    """Return the current location of a pre-training run's tokenizer.

    A relative path is relative to the folder that the run was trained in. If the run is still where its `--out` says,
    as seen from that folder, then so is the tokenizer, wherever this process runs.

    Args:
        tokenizer: the run's setting `tokenizer`.
        out: the run's setting `out`.
        run: the folder of the run.

    Raises:
        WeightsError: the tokenizer is in neither place.
    """
    relative, written, folder = Path(tokenizer), Path(out), export_folder(run).parent.resolve()
    is_path = not relative.is_absolute() and ":" not in tokenizer
    if is_path and not written.is_absolute() and folder.parts[-len(written.parts) :] == written.parts:
        beside = folder.parents[len(written.parts) - 1] / relative
        if beside.exists():
            return str(beside)
    if is_path and not relative.exists() and tokenizer.count("/") != 1:  # owner/name may be on the hub
        raise WeightsError(
            f"The run '{run}' was trained with the tokenizer '{tokenizer}', a path that does not exist here.\n"
            "Start the command in the folder in which the run was trained, or move the tokenizer to that path."
        )
    return tokenizer
