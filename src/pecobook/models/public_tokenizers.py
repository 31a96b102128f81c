"""Public VQGAN checkpoints, recognised by weight names: taming-transformers' VQModel and LlamaGen's VQ.

Both are the autoencoder of diffusers' `VQModel` under other names, so their weights are renamed and loaded into it. The
shape of the network is inferred from the weights. LlamaGen's codewords and latent vectors have unit length: the nearest
codeword of unit length does not depend on the length of the vector, so only the codewords are scaled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import load_state, read_checkpoint

LAYOUTS = ("taming", "llamagen")
_SIDE = 256  # of the images that these tokenizers were trained on, pixels; the files do not say it
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up|conv_blocks)\.(\d+)\.(block|res|attn|downsample|upsample)\.(.+)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2|0|1|2)\.(.+)")


def load_public_model(layout: str, source: str) -> Any:
    """Load a public checkpoint into a diffusers VQModel.

    Args:
        layout: one of `LAYOUTS`.
        source: the file, or a folder that contains one weights file.

    Raises:
        WeightsError: diffusers is not installed, or the file is missing, damaged or of another layout.
    """
    try:
        from diffusers import VQModel
    except ImportError:
        text = f"Tokenizers {layout}:FILE need the package diffusers: pip install 'pecobook[diffusers]'."
        raise WeightsError(text) from None
    file = weights_file(layout, source)
    weights = read_checkpoint(str(file)).state
    # LlamaGen counts there which codewords were used; anything else of a quantizer changes the codes.
    names = [name for name in weights if name.startswith(_PARTS) and name != "quantize.codebook_used"]
    # Latent diffusion keeps moving averages under names without dots, and evaluates those.
    state = {name: weights.get(f"model_ema.{name.replace('.', '')}", weights[name]) for name in names}
    _check_layout(layout, state, file)
    renamed = {_in_diffusers(name, state): value for name, value in state.items()}
    # The kernel of a 1 x 1 convolution of an attention is the matrix of a linear layer.
    renamed |= {new: kernel[:, :, 0, 0] for new, kernel in renamed.items() if ".to_" in new and kernel.ndim == 4}
    try:
        model = VQModel(**_settings(state))
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(f"The weights of '{file}' are no autoencoder of {layout}'s layout: {error}.") from None
    if layout == "llamagen":
        renamed["quantize.embedding.weight"] = F.normalize(renamed["quantize.embedding.weight"].float(), dim=1)
    load_state(model, renamed, source=str(file))
    return model


def weights_file(layout: str, source: str) -> Path:
    """Return the weights file, or the only one in a folder. Raises WeightsError."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return path
    files = [file for file in sorted(path.rglob("*")) if file.suffix in (".ckpt", ".pt", ".pth", ".safetensors")]
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} files" if files else "no file"
    raise WeightsError(f"'{source}' holds {found} of weights: give {layout}:FILE, a .ckpt, .pt or .safetensors.")


def _check_layout(layout: str, state: dict[str, Tensor], file: Path) -> None:
    """Raise WeightsError for weights of another layout, naming the layout if it is known."""
    first = {"taming": "encoder.down.0.block.0.norm1.weight", "llamagen": "encoder.conv_blocks.0.res.0.norm1.weight"}
    if "quantize.embedding.weight" in state and first[layout] in state:
        return
    found = next((other for other, name in first.items() if name in state), "")
    if found and found != layout:
        raise WeightsError(f"'{file}' has the layout of {found}: give {found}:{file}.")
    reason = "its quantizer has no 'quantize.embedding.weight'" if found else f"'{first[layout]}' is missing"
    raise WeightsError(f"'{file}' is no VQGAN in the layout of {layout}: {reason}.")


def _in_diffusers(name: str, state: dict[str, Tensor]) -> str:
    """Return the diffusers name of a weight in either layout; unknown names stay, and are refused later."""
    name = name.replace("nin_shortcut", "conv_shortcut").replace(".norm_out.", ".conv_norm_out.")
    if match := _MIDDLE.fullmatch(name):
        side, part, rest = match.groups()
        kind, number = ("attentions", 0) if part in ("attn_1", "1") else ("resnets", int(part in ("block_2", "2")))
        return f"{side}.mid_block.{kind}.{number}.{_rest(kind, rest)}"
    if not (match := _BLOCK.fullmatch(name)):
        return name
    side, level, part, rest = match[1], int(match[2]), match[3], match[4]
    if ".up." in name:  # taming counts from the image, LlamaGen and diffusers from the codes
        level = _count(state, "decoder.up") - 1 - level
    blocks = "down_blocks" if side == "encoder" else "up_blocks"
    if part.endswith("sample"):
        return f"{side}.{blocks}.{level}.{part}rs.0.{rest}"
    kind = "attentions" if part == "attn" else "resnets"
    place, _, leaf = rest.partition(".")
    return f"{side}.{blocks}.{level}.{kind}.{place}.{_rest(kind, leaf)}"


def _rest(kind: str, rest: str) -> str:
    head, _, tail = rest.rpartition(".")
    return f"{_ATTENTION.get(head, head)}.{tail}" if kind == "attentions" else rest


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """Return the number of parts `prefix`.0, `prefix`.1, ..."""
    parts = len(prefix.split("."))
    return 1 + max((int(name.split(".")[parts]) for name in state if name.startswith(f"{prefix}.")), default=-1)


def _settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of diffusers' VQModel, inferred from the weights' shapes."""
    public = "encoder.down" if "encoder.down.0.block.0.norm1.weight" in state else "encoder.conv_blocks"
    block = "block" if public == "encoder.down" else "res"
    levels = range(_count(state, public))
    attention = [f"{public}.{level}.attn.0.norm.weight" in state for level in levels]
    codewords, dim = state["quantize.embedding.weight"].shape
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "down_block_types": [f"{'Attn' if here else ''}DownEncoderBlock2D" for here in attention],
        "up_block_types": [f"{'Attn' if here else ''}UpDecoderBlock2D" for here in reversed(attention)],
        "block_out_channels": [state[f"{public}.{level}.{block}.0.conv1.weight"].shape[0] for level in levels],
        "layers_per_block": _count(state, f"{public}.0.{block}"),
        "latent_channels": state["encoder.conv_out.weight"].shape[0],
        "num_vq_embeddings": codewords,
        "vq_embed_dim": dim,
        "sample_size": _SIDE,
    }
