"""Files of weights: read without running code from them, translated to timm's names, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError, first_line
from pecobook.models.huggingface import beit_from_huggingface, is_huggingface_beit

# What others put before the names of a backbone. MoCo v3's files hold two encoders and the heads; its authors transfer
# the first.
_PREFIXES = ("module.base_encoder.", "base_encoder.", "module.backbone.", "backbone.", "module.", "model.")


# lm_head and mask_token: BEiT's pre-training; attn_pool: SigLIP's, which pools where we take the mean.
_HEADS = ("head", "fc", "classifier", "lm_head", "mask_token", "attn_pool")


def read_weights(path: str) -> dict[str, Tensor]:
    """A state dict from a safetensors file or a PyTorch file that holds only tensors. Raises WeightsError."""
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"There is no file of weights '{path}'.")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"'{path}' cannot be read as safetensors: {error}") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader stumble in any way
        raise WeightsError(
            f"'{path}' is no plain file of weights ({first_line(error)}); pecobook runs no code from a file.\n"
            "Convert it once, in a place you trust, to safetensors."
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"'{path}' holds no state dict.")
    return state


def is_moco(state: dict[str, Tensor]) -> bool:
    """Whether this is a checkpoint of MoCo v3's own code, which normalises images by ImageNet's mean and deviation."""
    return any(name.startswith(_PREFIXES[:2]) for name in state)


def _expand_beit(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of BEiT's authors for timm: one table of relative positions goes into every block that wants one.

    Where blocks have tables of their own beside it, both are added up, as attention does.
    """
    shared = "rel_pos_bias.relative_position_bias_table"
    tables = [name for name in own if name.endswith(".attn.relative_position_bias_table")]
    if shared in state and shared not in own and tables:
        table = state[shared]
        state = {**state, **{name: table + state[name] if name in state else table for name in tables}}
        del state[shared]
    return {name: value for name, value in state.items() if not name.endswith("relative_position_index")}


def load_state(network: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Load weights, all of them, heads aside. Raises WeightsError naming the keys that differ."""
    own = network.state_dict()
    state = _translate(state, own)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or unknown or wrong:
        parts = [("missing", missing), ("unknown", unknown), ("of another shape", wrong)]
        told = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in parts
            if names
        )
        raise WeightsError(f"The weights of '{source}' do not fit this network: {told}.")
    network.load_state_dict(state)


def _translate(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of `own`, as far as they have one there; heads of other classes left out."""
    if is_huggingface_beit(state):
        state = beit_from_huggingface(state)
    prefix = max(("", *_PREFIXES), key=lambda p: sum(p + name in state for name in own))  # the first of the best
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if "pre_logits.fc1.weight" in own and "classifier.0.weight" in state:  # torchvision's VGG: timm convolves instead
        names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2"}
        for old, part in [(name, part) for name in names for part in ("weight", "bias")]:
            value, target = state.pop(f"{old}.{part}", None), own[f"{names[old]}.{part}"]
            if value is not None:
                fits = value.numel() == target.numel()
                state[f"{names[old]}.{part}"] = value.reshape(target.shape) if fits else value
    state = _expand_beit(state, own)
    for name in [name for name in state if name not in own and name.split(".")[0] in _HEADS]:
        del state[name]  # a head of other classes is not part of a backbone
    # Files from before PyTorch 0.4.1 do not count batches, and nothing here reads the count.
    state |= {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in state}
    for old, new in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):  # the same norm, before or after the mean
        if f"{new}weight" in own and f"{new}weight" not in state and f"{old}weight" not in own:
            state |= {new + name.removeprefix(old): state.pop(name) for name in list(state) if name.startswith(old)}
    return state
