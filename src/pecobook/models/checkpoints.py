"""Weights files: loading without running code, translation to timm's names, and checks that the weights fit."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError, loading_reason
from pecobook.models.huggingface import from_huggingface, is_huggingface
from pecobook.models.pickles import load_tensors
from pecobook.utils.checksums import damage

# Dictionaries of weights in the files of training scripts; of several, the first one listed here is used. Moving
# averages and teachers come first, since their authors evaluate and publish those.
_WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema", "teacher", "target_encoder"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "student", "encoder"),
)

# If several networks in one dictionary fit equally well, the authors transfer the one with this part in its name.
# MoCo's files contain two encoders, DINOv2's two networks, and many scripts' files a network and its moving average.
_PREFERRED = re.compile(r"teacher|base_encoder|encoder_q|(^|[._])ema[._]")

# Weights that are left out: heads and parts of pre-training; attn_pool is SigLIP's pooling, which pecobook replaces by
# the mean.
_HEADS = re.compile(
    r"(head|head_dist|heads|fc|classifier|last_linear|lm_head|mask_token|masked_embed|attn_pool|projector|predictor"
    r"|projection_head|prototypes|pooler|decoder\w*)(\.|$)"
)

# The first bytes of a file that a failed download left, and what the file is.
_NO_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the weights: 'git lfs pull' fetches them",
    b"<": "a page of text, not a file of weights: download it again",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a weights file."""

    state: dict[str, Tensor]
    """The weights, under the names of the file."""
    wrapper: tuple[str, ...] = ()
    """Keys of the dictionaries that contain the weights, outermost first; empty if the file is the state itself."""
    left_aside: tuple[str, ...] = ()
    """Other keys next to the weights, such as `optimizer` and `epoch`."""


def read_weights(path: str) -> dict[str, Tensor]:
    """Load a state dict from a safetensors file or a PyTorch file that contains only tensors. Raises WeightsError."""
    return read_checkpoint(path).state


def read_checkpoint(path: str) -> Checkpoint:
    """Load the weights from a safetensors, .npz or PyTorch file, out of the dictionaries that a training script saved.

    Settings (argparse, numpy, omegaconf, ...) next to the weights are skipped, and only the weights of a pickled
    network are read; no code in the file runs.

    Raises:
        WeightsError: the file is missing, damaged, does not match its checksum, or contains no state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"There is no file of weights '{path}'.")
    with file.open("rb") as opened:
        start = opened.read(32)
    for beginning, what in _NO_WEIGHTS.items():
        if start.startswith(beginning):
            raise WeightsError(f"'{path}' is {what}.")
    sentence = damage([file])
    if sentence:
        raise WeightsError(sentence)
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return Checkpoint(load_file(file))
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"'{path}' cannot be read as safetensors: {error}") from None
    try:
        content = _numpy_arrays(file) if file.suffix == ".npz" else load_tensors(file)
    except Exception as error:  # a damaged file can raise any exception
        raise WeightsError(
            f"'{path}' is not a plain file of weights ({loading_reason(error)}); pecobook runs no code from a file.\n"
            "Convert it once to safetensors, in an environment that you trust, or download it again if it is damaged."
        ) from None
    wrapper: list[str] = []
    left: list[str] = []
    while isinstance(content, dict):
        inner = _inner(content)
        if inner is None:
            break
        wrapper.append(inner)
        left += [str(name) for name in content if name != inner]
        content = content[inner]
    plain = (Tensor, str, int, float, bool, type(None))  # such as the number of an epoch
    if not _has_tensors(content) or not (wrapper or all(isinstance(value, plain) for value in content.values())):
        keys = f": its keys are {', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else ""
        raise WeightsError(f"'{path}' contains no state dict{keys}.")
    left += [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    state = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    return Checkpoint(state, tuple(wrapper), tuple(left))


def _numpy_arrays(file: Path) -> dict[str, Tensor]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _inner(content: dict[Any, Any]) -> str | None:
    """Return the key of the dictionary of weights in `content`: one of `_WRAPPERS`, or the only one with tensors."""
    known = next((name for name in _WRAPPERS if _has_tensors(content.get(name))), None)
    if known is not None or any(isinstance(value, Tensor) for value in content.values()):
        return known
    others = [name for name, value in content.items() if isinstance(name, str) and _has_tensors(value)]
    return others[0] if len(others) == 1 else None


def _has_tensors(value: Any) -> bool:
    """Return whether `value` is a dictionary with tensors, possibly nested in further dictionaries of weights."""
    if not isinstance(value, dict):
        return False
    return any(isinstance(v, Tensor) for v in value.values()) or any(_has_tensors(value.get(w)) for w in _WRAPPERS)


_SHARED = "rel_pos_bias.relative_position_bias_table"


def _expand_shared_positions(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a BEiT checkpoint's shared table of relative positions into every block that expects a table.

    BEiT's authors pre-train with one shared table. A block that also has its own table gets the sum of both, since
    attention adds them.
    """
    tables = [name for name in expected if name.endswith(".attn.relative_position_bias_table")]
    if _SHARED in state and _SHARED not in expected and tables:
        table = state[_SHARED]
        state = {**state, **{name: table + state[name] if name in state else table for name in tables}}
        del state[_SHARED]
    return {name: value for name, value in state.items() if not name.endswith("relative_position_index")}


def _share_equal_positions(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo the copies of `_expand_shared_positions` if the network expects one table and all blocks have the same one.

    pecobook exports a BEiT with a shared table in this form.
    """
    tables = [name for name in state if name.endswith(".attn.relative_position_bias_table")]
    if _SHARED not in expected or _SHARED in state or not tables or any(name in expected for name in tables):
        return state
    first = state[tables[0]]
    if any(not torch.equal(first, state[name]) for name in tables):
        return state
    return {_SHARED: first, **{name: value for name, value in state.items() if name not in tables}}


def load_state(
    network: nn.Module, state: dict[str, Tensor], *, source: str, needs_head: bool = True
) -> tuple[str, ...]:
    """Load all weights of `network`; heads in `state` are ignored, and position tables are resized.

    Args:
        network: the network.
        state: weights under the names of their file.
        source: name of the file, for error messages.
        needs_head: whether the network's head must be in `state` too; otherwise it is left unchanged.

    Returns:
        the unused names in `state`, without the common prefix of the used ones.

    Raises:
        WeightsError: lists the keys that differ, or a weight that contains infinity or NaN.
    """
    expected = network.state_dict()
    if is_huggingface(state):
        state = from_huggingface(state)
    prefix = _prefix(state, expected)
    fitted = to_timm_names(state, expected)
    if _differences(fitted, expected):
        # timm reads further authors' layouts and resizes position tables.
        converted = _convert_by_timm(network, _expand_shared_positions(_without_prefix(state, prefix), expected))
        if converted is not None:
            converted = to_timm_names(converted, expected)
            if len(_differences(converted, expected)) < len(_differences(fitted, expected)):
                fitted = converted
    fitted = {name: _resized(name, value, expected.get(name)) for name, value in fitted.items()}
    if not needs_head:
        shapes = {name: value.shape for name, value in fitted.items()}
        fitted |= {n: value for n, value in expected.items() if _HEADS.match(n) and shapes.get(n) != value.shape}
    problem = misfits(fitted, expected) or _lost_biases(_without_prefix(state, prefix), fitted)
    if problem:
        raise WeightsError(f"The weights of '{source}' do not fit this network: {problem}.")
    broken = [name for name, value in fitted.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise WeightsError(f"The weights of '{source}' contain values that are no finite numbers ({broken[0]}).")
    network.load_state_dict(fitted)
    others = [name for name in state if not name.startswith(prefix)]
    return (*others, *(name for name in _without_prefix(state, prefix) if _is_head(name, expected)))


def _lost_biases(state: dict[str, Tensor], fitted: dict[str, Tensor]) -> str:
    """Return in words which biases timm left out of layers whose weights it took: it takes them for zeros."""
    lost = [
        name
        for name, value in state.items()
        if name.endswith(".bias")
        and name not in fitted
        and f"{name.removesuffix('bias')}weight" in fitted
        # DINOv3's query, key and value have one bias, with a mask for the key's; timm has one of the query and value.
        and f"{name.removesuffix('qkv.bias')}q_bias" not in fitted
        and (value * state.get(f"{name}_mask", 1)).nan_to_num().any()
    ]
    return f"it has no place for {len(lost)} biases that are not zero ({lost[0]})" if lost else ""


_PROBLEMS = ("missing", "unknown", "of another shape")


def _differences(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Return (problem, name) for every weight that is missing, unknown or has another shape."""
    reshaped = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    columns = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys()), reshaped
    return [(problem, name) for problem, names in zip(_PROBLEMS, columns, strict=True) for name in names]


def misfits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Return in words which weights are missing, unknown or have another shape; empty if all fit."""
    differences = _differences(state, expected)
    groups = [(problem, [name for kind, name in differences if kind == problem]) for problem in _PROBLEMS]
    return "; ".join(
        f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in groups
        if names
    )


def _convert_by_timm(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the weights as converted by timm's own loading of this kind of network; None if it cannot."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    kernels = (weights.get("patch_embed.proj.weight") for weights in (state, network.state_dict()))
    if convert is None or len({kernel.shape[2:] for kernel in kernels if kernel is not None and kernel.ndim > 2}) > 1:
        return None  # timm would resample the kernels of a network with patches of another size
    if any(name.startswith("decoder") for name in state):  # MAE's mask token, which timm would take for DINOv2's
        state = {name: value for name, value in state.items() if name != "mask_token"}
    try:
        return dict(cast("Callable[..., dict[str, Tensor]]", convert)(dict(state), network))
    except Exception:  # a layout that timm does not know
        return None


def _resized(name: str, table: Tensor, expected: Tensor | None) -> Tensor:
    """Interpolate a table of absolute positions (1, prefix + N, D) on a square grid, if only N differs."""
    from timm.layers import resample_abs_pos_embed

    if expected is None or table.shape == expected.shape or not name.endswith("pos_embed"):
        return table
    if table.ndim != 3 or expected.ndim != 3 or table.shape[2] != expected.shape[2]:
        return table
    for prefix in range(3):  # class tokens, which come first
        old, new = (math.isqrt(max(value.shape[1] - prefix, 0)) for value in (table, expected))
        if old and new and (old * old + prefix, new * new + prefix) == (table.shape[1], expected.shape[1]):
            return resample_abs_pos_embed(table, [new, new], [old, old], num_prefix_tokens=prefix)  # type: ignore[no-any-return]
    return table


def _prefix(state: Iterable[str], expected: dict[str, Tensor]) -> str:
    """Return the prefix of most weights' names relative to `expected`, such as `module.backbone.`."""
    votes: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                votes[".".join(parts[:start]) + "." if start else ""] += 1
    if not votes:
        return ""
    most = max(votes.values())
    candidates = [prefix for prefix, count in votes.items() if count == most]
    return min(candidates, key=lambda prefix: (not _PREFERRED.search(prefix), len(prefix)))


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _is_head(name: str, expected: dict[str, Tensor]) -> bool:
    return name not in expected and is_head(name)


def to_timm_names(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of `state` to the names in `expected`, and drop heads for other classes."""
    state = _without_prefix(state, _prefix(state, expected))
    # torchvision's VGG has linear layers where timm's VGG has convolutions.
    if "pre_logits.fc1.weight" in expected and "classifier.0.weight" in state:
        names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2"}
        for old, kind in [(name, kind) for name in names for kind in ("weight", "bias")]:
            value, target = state.pop(f"{old}.{kind}", None), expected[f"{names[old]}.{kind}"]
            if value is not None:
                fits = value.numel() == target.numel()
                state[f"{names[old]}.{kind}"] = value.reshape(target.shape) if fits else value
    state = _share_equal_positions(_expand_shared_positions(state, expected), expected)
    for name in [name for name in state if _is_head(name, expected)]:
        del state[name]  # a head for other classes is not part of a backbone
    # Files from before PyTorch 0.4.1 lack num_batches_tracked, and pecobook never reads the count.
    state |= {name: expected[name] for name in expected if name.endswith("num_batches_tracked") and name not in state}
    for old, new in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):  # the same norm, before or after the mean
        if f"{new}weight" in expected and f"{new}weight" not in state and f"{old}weight" not in expected:
            state |= {new + name.removeprefix(old): state.pop(name) for name in list(state) if name.startswith(old)}
    return state


def is_head(name: str) -> bool:
    """Return whether a weight or a layer with this name belongs to a network's head."""
    return _HEADS.match(name) is not None


def summarised(names: Iterable[str]) -> str:
    """Abbreviate weight names: the first informative part of each, with the number of weights below it."""
    telling = (re.sub(r"^((module|_orig_mod)\.)+", "", name) for name in names)
    counts = Counter(re.sub(r"\.?\d+$", "", name.split(".")[0]) or name for name in telling)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def left_aside(path: str, checkpoint: Checkpoint, left: tuple[str, ...]) -> str:
    """Return a line on which part of a file was used and which parts were not; empty if all was used."""
    parts = [summarised(names) for names in (checkpoint.left_aside, left) if names]
    if not parts:
        return ""
    taken = f"'{'.'.join(checkpoint.wrapper)}'" if checkpoint.wrapper else "the network"
    return f"Of '{path}' {taken} is read; left aside: {', '.join(parts)}."
