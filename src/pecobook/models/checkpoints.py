"""Files of weights: loading without running code, translation to timm's names, and checks that the weights fit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError, first_line
from pecobook.models.huggingface import beit_from_huggingface, is_huggingface_beit
from pecobook.utils.checksums import damage

# Prefixes of a backbone's weights in files of other projects. MoCo v3's files contain two encoders and the heads; its
# authors transfer the base encoder.
_PREFIXES = ("module.base_encoder.", "base_encoder.", "module.backbone.", "backbone.", "module.", "model.")

# Weights that are left out: lm_head and mask_token belong to BEiT's pre-training; attn_pool is SigLIP's pooling, which
# pecobook replaces by the mean.
_HEADS = ("head", "fc", "classifier", "lm_head", "mask_token", "attn_pool")


def read_weights(path: str) -> dict[str, Tensor]:
    """Load a state dict from a safetensors file or a PyTorch file that contains only tensors.

    Raises:
        WeightsError: the file is missing, is no such file, or differs from the checksum beside it.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"There is no file of weights '{path}'.")
    sentence = damage([file])
    if sentence:
        raise WeightsError(sentence)
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"'{path}' cannot be read as safetensors: {error}") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any exception
        raise WeightsError(
            f"'{path}' is not a plain file of weights ({first_line(error)}); pecobook runs no code from a file.\n"
            "Convert it once to safetensors, in an environment that you trust."
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"'{path}' contains no state dict.")
    return state


def is_moco(state: dict[str, Tensor]) -> bool:
    """Return whether `state` is a checkpoint of MoCo v3's code, which normalises with ImageNet's mean and deviation."""
    return any(name.startswith(_PREFIXES[:2]) for name in state)


def _expand_shared_positions(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the shared table of relative positions of a BEiT checkpoint into every block that expects a table.

    BEiT's authors pre-train with one shared table. A block that also has its own table gets the sum of both, since
    attention adds them up.
    """
    shared = "rel_pos_bias.relative_position_bias_table"
    tables = [name for name in expected if name.endswith(".attn.relative_position_bias_table")]
    if shared in state and shared not in expected and tables:
        table = state[shared]
        state = {**state, **{name: table + state[name] if name in state else table for name in tables}}
        del state[shared]
    return {name: value for name, value in state.items() if not name.endswith("relative_position_index")}


def load_state(network: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Load all weights of `network`; heads in `state` are ignored. Raises WeightsError with the keys that differ."""
    expected = network.state_dict()
    state = to_timm_names(state, expected)
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    if missing or unknown or reshaped:
        groups = [("missing", missing), ("unknown", unknown), ("of another shape", reshaped)]
        differences = "; ".join(
            f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for problem, names in groups
            if names
        )
        raise WeightsError(f"The weights of '{source}' do not fit this network: {differences}.")
    network.load_state_dict(state)


def to_timm_names(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of `state` to the names in `expected`, and leave out heads for other classes."""
    if is_huggingface_beit(state):
        state = beit_from_huggingface(state)
    prefix = max(("", *_PREFIXES), key=lambda p: sum(p + name in state for name in expected))  # ties: the first prefix
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    # torchvision's VGG has linear layers where timm's VGG has convolutions.
    if "pre_logits.fc1.weight" in expected and "classifier.0.weight" in state:
        names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2"}
        for old, kind in [(name, kind) for name in names for kind in ("weight", "bias")]:
            value, target = state.pop(f"{old}.{kind}", None), expected[f"{names[old]}.{kind}"]
            if value is not None:
                fits = value.numel() == target.numel()
                state[f"{names[old]}.{kind}"] = value.reshape(target.shape) if fits else value
    state = _expand_shared_positions(state, expected)
    for name in [name for name in state if name not in expected and name.split(".")[0] in _HEADS]:
        del state[name]  # a head for other classes is not part of a backbone
    # Files from before PyTorch 0.4.1 lack num_batches_tracked, and pecobook never reads the count.
    state |= {name: expected[name] for name in expected if name.endswith("num_batches_tracked") and name not in state}
    for old, new in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):  # the same norm, before or after the mean
        if f"{new}weight" in expected and f"{new}weight" not in state and f"{old}weight" not in expected:
            state |= {new + name.removeprefix(old): state.pop(name) for name in list(state) if name.startswith(old)}
    return state
